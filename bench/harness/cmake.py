"""Builds the benchmarks that need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"


def build(target: str) -> Path:
    """The program bench/<target>, built. What the tools say goes to stderr."""
    options = ["-DGAN_BUILD_PYTHON=OFF", "-DGAN_BUILD_BENCH=ON"]
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *options],
        ["cmake", "--build", str(BUILD), "--target", target],
    ):
        subprocess.run(command, check=True, stdout=sys.stderr)
    return BUILD / target
