"""Loads the compiled parts: the ops (libgemma_ar_norm.so, into torch) and the host objects (_C).

There is no fallback: a package without its library is a broken install, and says so.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

LIBRARY = Path(__file__).with_name("libgemma_ar_norm.so")
BUILD = "build it with `pip install --no-build-isolation -e .` in the source tree, torch first"


def load(library: Path = LIBRARY, module: str = f"{__package__}._C") -> ModuleType:
    """Registers the ops and returns _C. Raises ImportError that says what to do."""
    if not library.is_file():
        raise ImportError(
            f"{library.name}: the compiled library is required; got none in {library.parent}; "
            f"{BUILD}"
        )
    try:
        torch.ops.load_library(str(library))
        return importlib.import_module(module)
    except (OSError, ImportError) as error:
        raise ImportError(
            f"{library.name}: a library that loads in torch {torch.__version__} is required (it is "
            f"built for torch 2.10 and newer); got: {error}; {BUILD}"
        ) from error


if TYPE_CHECKING:
    from . import _C as _C
else:
    _C = load()
