"""The PEP 517 backend: setuptools, which first looks at what the machine has.

Before anything is downloaded it checks that there is a torch to build against, and it asks pip for
a CUDA compiler only where the machine has none.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from gan_toolchain import BuildError, build_requirements, find_nvcc, find_torch
from setuptools import build_meta as _setuptools
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _machine_requirements() -> list[str]:
    # A missing torch must be told here: before the next hook pip downloads torch (3 GB) as a
    # dependency.
    try:
        choice = find_nvcc(find_torch())
    except BuildError as error:
        sys.exit(f"\nerror: {error}\n")
    return build_requirements(choice)


def get_requires_for_build_wheel(config_settings=None):
    return [*_setuptools.get_requires_for_build_wheel(config_settings), *_machine_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*_setuptools.get_requires_for_build_editable(config_settings), *_machine_requirements()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    # setuptools packs whatever lies in build/lib*, also files that are no longer in the source.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)
