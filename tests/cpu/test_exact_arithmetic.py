"""The kernels' short ways to 1 / sqrt(v) and sum / hidden (csrc/device/rstd.cuh) give the bits of
the correctly rounded operations, for every mantissa, whatever a GPU approximates them by."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import checks

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("exact_arithmetic")


def has_fma() -> bool:
    """Without it g++ calls a function for each: right as well, but minutes instead of seconds."""
    cpu = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpu.is_file() and " fma " in cpu.read_text()


def test_each_operation_is_correctly_rounded(tmp_path):
    program = tmp_path / "exact_arithmetic"
    command = [
        os.environ.get("CXX", "g++"),
        *("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-DGAN_EMULATOR"),
        "-ffp-contract=off",
        *(["-mfma"] if has_fma() else []),
        f"-I{PROGRAM}",
        f"-I{ROOT / 'csrc/device'}",
        *(str(PROGRAM / "main.cpp"), "-o", str(program)),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    seed = checks.fresh_seed()
    ran = subprocess.run([str(program), str(seed)], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, f"seed {seed}\n{ran.stdout}{ran.stderr}"
    # Every mantissa, two exponents, 17 approximations; all hidden sizes.
    counts = [int(n) for n in re.findall(r"(\d+) (?:roots|quotients)", ran.stdout)]
    assert counts[0] > 2**24 * 17
    assert counts[1] > 4096 * 5 * 4096
