"""Builds bench/streams and runs it beside the plan of this machine's GPU.

    python bench/streams/run.py [options of streams, see the top of streams.cu]

Needs nvcc and CMake, neither torch nor the installed package. The GPU's multiprocessors and compute
capability are asked of nvidia-smi and of streams itself.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
RANKS = range(2, 9)


def load_plan():
    """plan.py alone: the package needs torch."""
    spec = importlib.util.spec_from_file_location("plan", ROOT / "gemma_ar_norm" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    plan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan)
    return plan


def build() -> Path:
    options = ["-DGAN_BUILD_PYTHON=OFF", "-DGAN_BUILD_BENCH=ON"]
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *options]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD)], check=True, stdout=subprocess.DEVNULL)
    return BUILD / "streams"


def compute_capability() -> tuple[int, int]:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    first = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    major, minor = first.split(".")
    return int(major), int(minor)


def write_rules(path: Path, streams: Path) -> None:
    """The plan as it would be for one rank a GPU with as many SMs as a share has: with early start
    of kernels. The calls of a run all have one shape, so that two of them fit into a share."""
    plan = load_plan()
    capability = compute_capability()
    sms = subprocess.run([streams, "--sms", "-"], check=True, capture_output=True).stdout
    multiprocessors = int(sms)
    with path.open("w") as file:
        for ranks in RANKS:
            print("ranks", ranks, file=file)
            for rule in plan.make_rules(
                ranks=ranks,
                multiprocessors=multiprocessors // ranks,
                compute_capability=capability,
                max_cluster=8 if capability >= (9, 0) else 1,
                shared_device=False,
                one_gpu=True,
            ):
                print(*rule.numbers, file=file)


def main() -> int:
    streams = build()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # a queue for every rank's stream
    with tempfile.TemporaryDirectory() as directory:
        rules = Path(directory) / "rules.txt"
        write_rules(rules, streams)
        return subprocess.run([streams, "--rules", str(rules), *sys.argv[1:]]).returncode


if __name__ == "__main__":
    sys.exit(main())
