#!/usr/bin/env python3
"""The fused call and what it is compared with, on whatever this machine has. See README.md here.

python bench/bench_fused.py --ranks 4 [options]               # starts the ranks itself
torchrun --nproc-per-node 4 bench/bench_fused.py [options]    # is one of them
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import plots, progress, worker
from harness import report as reports
from harness.baselines import all_baselines
from harness.cases import DTYPES, FORMS

from gemma_ar_norm import demo, launcher


def parser() -> argparse.ArgumentParser:
    names = ", ".join(baseline.name for baseline in all_baselines())
    p = argparse.ArgumentParser(
        description="Times the fused all-reduce + residual + RMSNorm beside other ways to do it.",
        epilog=f"algorithms: {names}",
    )
    p.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes; default: a GPU each (at most 8), 4 on one GPU, 2 on the CPU",
    )
    p.add_argument(
        "--rows", type=int, nargs="+", default=[1, 8, 16, 64, 128, 256, 1024], metavar="ROWS"
    )
    p.add_argument("--hidden", type=int, nargs="+", default=[4096], metavar="SIZE")
    p.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    p.add_argument("--form", nargs="+", default=["residual"], choices=FORMS)
    p.add_argument(
        "--algorithms",
        nargs="+",
        default=[],
        metavar="NAME",
        help="those whose names start so, as 'floor ours flashinfer'; default: all",
    )
    p.add_argument("--calls", type=int, default=20, help="dependent calls in a graph (20)")
    p.add_argument("--replays", type=int, default=50, help="timed replays of a graph (50)")
    p.add_argument(
        "--warm-l2", action="store_true", help="inputs that the L2 may hold from the call before"
    )
    p.add_argument("--json", metavar="FILE", help="where to write all numbers")
    p.add_argument("--plot", metavar="PREFIX", help="PREFIX_latency.png, PREFIX_roofline.png")
    p.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS", help="for all (1800)"
    )
    p.add_argument("--no-mps", action="store_true", help="start no CUDA MPS")
    p.add_argument("--worker", metavar="REPORT", help=argparse.SUPPRESS)
    return p


def options_of(given: argparse.Namespace, p: argparse.ArgumentParser) -> worker.Options:
    for name in ("rows", "hidden"):
        if min(getattr(given, name)) < 1:
            p.error(f"--{name}: 1 or more is required; got {min(getattr(given, name))}")
    for name in ("ranks", "calls", "replays"):
        value = getattr(given, name)
        if value is not None and value < 1:
            p.error(f"--{name}: 1 or more is required; got {value}")
    if not given.timeout > 0:
        p.error(f"--timeout: more than 0 seconds are required; got {given.timeout:g}")
    for option, path in (("--json", given.json), ("--plot", given.plot)):
        if problem := reports.no_place(option, path):
            p.error(problem)
    names = [baseline.name for baseline in all_baselines()]
    for start in given.algorithms:
        if not any(name.startswith(start) for name in names):
            p.error(
                f"--algorithms: the start of one of {', '.join(names)} is required; got {start}"
            )
    if given.plot and plots.problem():
        p.error(str(plots.problem()))
    try:
        cases = worker.grid(given.rows, given.hidden, given.dtype, given.form)
    except ValueError as error:
        p.error(str(error))
    return worker.Options(cases, given.algorithms, given.calls, given.replays, given.warm_l2)


def finish(report: reports.Report, plot: str | None) -> None:
    print(reports.table(report), flush=True)
    if plot and any(cell["us"] is not None for cell in report["cells"]):
        for path in plots.draw(report, plot):
            print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    given = p.parse_args(arguments)
    options = options_of(given, p)
    if given.worker is not None:
        return 1 if worker.is_wrong(worker.work(options, Path(given.worker))) else 0
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        started = int(os.environ["WORLD_SIZE"])
        if given.ranks not in (None, started):
            p.error(
                f"--ranks: {started}, as torchrun has started (RANK and WORLD_SIZE are set), are "
                f"required; got {given.ranks}"
            )
        report = worker.work(options, Path(given.json) if given.json else None)
        if os.environ["RANK"] == "0":
            finish(report, given.plot)
        return 1 if worker.is_wrong(report) else 0

    worker.without_multicast()
    with tempfile.TemporaryDirectory(prefix="gan_bench_") as directory:
        file = Path(given.json or Path(directory) / "report.json")
        old = reports.stamp(file)
        steps = Path(directory) / "progress"
        script = [sys.executable, str(Path(__file__).resolve()), "--worker", str(file.absolute())]
        with progress.followed(steps):
            result = launcher.run(
                [*script, *(sys.argv[1:] if arguments is None else arguments)],
                given.ranks or demo.default_ranks(launcher.gpu_count()),
                timeout_s=given.timeout,
                mps=not given.no_mps,
                env={progress.FILE: str(steps)},
                show="nothing",
            )
        known = False
        if reports.stamp(file) != old:
            found = reports.load(file)
            finish(found, given.plot)
            known = found["complete"] and worker.is_wrong(found)
        if result.exit_code and not known:
            print(result.transcript(), file=sys.stderr)
            print(f"{result.placement}: {result.reason}", file=sys.stderr)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
