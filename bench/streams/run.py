"""Builds bench/streams and runs it beside the plan of this machine's GPU, or of several.

    python bench/streams/run.py [--gpus N] [--json FILE] [--plot PREFIX] [options of streams.cu]

Prints the table, and writes the JSON and the plots, of bench_fused.py (bench/README.md). Needs nvcc
and CMake, neither torch nor the installed package. The plan is for the GPU that streams finds.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from harness import cmake, plots, progress  # noqa: E402
from harness import report as reports  # noqa: E402

RANKS = range(2, 9)


@functools.cache
def load_plan():
    """plan.py alone: the package needs torch."""
    spec = importlib.util.spec_from_file_location("plan", ROOT / "gemma_ar_norm" / "plan.py")
    assert spec is not None
    assert spec.loader is not None
    plan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan)
    return plan


def rules_of(ranks: int, gpus: int, multiprocessors: int, capability: tuple[int, int]):
    """The plan for shares of SMs that are the ranks' alone, as GPUs of that size would be: with
    early start of kernels, which ranks that share a GPU do not have. The calls of a run all have
    one shape, so that two of them fit into a share. One-shot or two-shot: as for ranks on as many
    GPUs as there are.

    multiprocessors: of a GPU, which those of its ranks share.
    """
    gpus = min(gpus, ranks)
    ranks_a_gpu = -(-ranks // gpus)
    return load_plan().make_rules(
        ranks=ranks,
        multiprocessors=multiprocessors // ranks_a_gpu,
        compute_capability=capability,
        max_cluster=8 if capability >= (9, 0) else 1,
        shared_device=False,
        one_gpu=gpus == 1,
    )


def write_rules(path: Path, streams: Path, gpus: int) -> None:
    asked = subprocess.run([streams, "--device", "-"], check=True, stdout=subprocess.PIPE)
    multiprocessors, major, minor = map(int, asked.stdout.split())
    with path.open("w") as file:
        for ranks in RANKS:
            print("ranks", ranks, file=file)
            for rule in rules_of(ranks, gpus, multiprocessors, (major, minor)):
                print(*rule.numbers, file=file)


def measure(streams: Path, rules: Path, file: Path, options: Sequence[str]) -> int:
    """Runs streams, which prints a line a cell; returns its exit code."""
    command = [str(streams), "--rules", str(rules), "--json", str(file), *options]
    bar = progress.Bar(0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            bar.show(" ".join(line.split()))
    bar.close()
    return process.returncode


def report(file: Path, plot: str | None) -> None:
    """Adds to the file what streams cannot know, and shows it."""
    found = reports.load(file)
    found["driver"] = reports.driver_version()
    reports.note_commit(found["versions"])
    reports.save(found, file)
    print(reports.table(found))
    if plot and found["cells"]:
        for path in plots.draw(found, plot):
            print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Ranks as streams of one process, on one GPU or several.",
        epilog="All other options go to streams; they are at the top of streams.cu.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="rank r is on GPU r %% N (1)"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write all numbers")
    parser.add_argument("--plot", metavar="PREFIX", help="PREFIX_latency.png, PREFIX_roofline.png")
    given, options = parser.parse_known_args(arguments)
    if given.plot and plots.problem():
        parser.error(str(plots.problem()))
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if problem := reports.no_place(option, path):
            parser.error(problem)
    if given.gpus < 1:
        parser.error(f"--gpus: 1 or more are required; got {given.gpus}")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # a queue for every rank's stream
    with tempfile.TemporaryDirectory() as directory:
        rules = Path(directory) / "rules.txt"
        try:
            streams = cmake.build("streams")
            write_rules(rules, streams, given.gpus)
        except cmake.CannotBuildError as error:
            print(error, file=sys.stderr)
            return 2
        except subprocess.CalledProcessError:  # streams has said why
            return 2
        file = Path(given.json or Path(directory) / "report.json")
        old = reports.stamp(file)
        exit_code = measure(streams, rules, file, ["--gpus", str(given.gpus), *options])
        if reports.stamp(file) != old:
            report(file, given.plot)
        return exit_code


if __name__ == "__main__":
    sys.exit(main())
