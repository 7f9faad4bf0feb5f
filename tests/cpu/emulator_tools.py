"""What the emulator's tests share: its builds, the seed, and what CI leaves to other commits."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import checks

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests/emulator"
BUILD = ROOT / "build/emulator"
sys.path.insert(0, str(EMULATOR))  # its Python files

PROCESSES = os.cpu_count() or 1
SEEDS_A_COMMIT = 1_000_000  # .ci/run: as many as there are commits, times this
SEED = int(os.environ.get("GAN_EMULATOR_SEED") or checks.fresh_seed())

# CI has 15 minutes for all there is: what takes long takes turns there, commit by commit.
IN_CI = bool(os.environ.get("GAN_CI"))
TURN = SEED // SEEDS_A_COMMIT


def make(target: str) -> None:
    command = ["make", "-s", f"-j{PROCESSES}", "-C", str(EMULATOR), target]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # of test files that run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, f"{built.stdout}{built.stderr}"
