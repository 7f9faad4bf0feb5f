"""Builds the benchmarks that need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"


class CannotBuildError(RuntimeError):
    """The text says what is missing."""


def build(target: str) -> Path:
    """The program bench/<target>, built. What the tools say goes to stderr."""
    options = ["-DGAN_BUILD_PYTHON=OFF", "-DGAN_BUILD_BENCH=ON"]
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *options],
        ["cmake", "--build", str(BUILD), "--target", target],
    ):
        try:
            subprocess.run(command, check=True, stdout=sys.stderr)
        except FileNotFoundError:
            raise CannotBuildError(
                "cmake: CMake and Ninja are required; got none; pip install cmake ninja"
            ) from None
        except subprocess.CalledProcessError as error:
            raise CannotBuildError(
                f"{target}: a build that works is required; got exit code {error.returncode} of "
                f"{' '.join(command)}; see what it said above (it needs nvcc)"
            ) from None
    return BUILD / target
