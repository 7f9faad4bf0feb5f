"""Runs the fault cases of fault_worker.py, and writes the table of docs/faults.md.

    python tests/gpu/faults.py                          # prints the table; on the CPU without a GPU
    python tests/gpu/faults.py --write docs/faults.md   # and writes it there
    python tests/gpu/faults.py --json FILE              # a line a case

One GPU is enough. Ranks that are killed or stopped share it in time slices, for MPS does not
support clients that are killed; the others run under MPS. It takes about three minutes. The exit
code is 1 where a case did not show what is expected.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402

import gemma_ar_norm  # noqa: E402
from gemma_ar_norm import launcher  # noqa: E402
from gpu import fault_worker  # noqa: E402

BEGIN, END = "<!-- table: tests/gpu/faults.py --write -->", "<!-- end of table -->"


@dataclass(frozen=True)
class FaultRun:
    """Cases that one set of processes goes through. A case that kills leaves one rank less."""

    name: str
    ranks: int
    cases: tuple[str, ...]
    mps: bool = False
    env: tuple[tuple[str, str], ...] = ()
    time_limit_s: float = 150.0


def _cases(*functions: str) -> tuple[str, ...]:
    return tuple(n for f in functions for n in fault_worker.CASES if n.split("[")[0] == f)


RUNS = (
    FaultRun(
        "killed",
        6,
        (
            "killed_between_calls[one_shot]",
            "killed_between_calls[two_shot]",
            "killed_in_a_call[one_shot]",
            "killed_in_a_call[two_shot]",
        ),
    ),
    FaultRun(
        "killed with graphs",
        7,
        (
            "killed_between_calls[graph]",
            "killed_between_calls[compiled]",
            "killed_in_a_call[graph]",
            "killed_in_a_call[compiled]",
            "killed_in_close",
        ),
    ),
    FaultRun("killed in init", 6, _cases("killed_in_init")),
    FaultRun(
        "stopped",
        3,
        _cases("a_short_stall", "a_long_stall", "a_short_stall_in_init", "a_long_stall_in_init"),
    ),
    FaultRun(
        "cannot",
        3,
        _cases(
            "no_memory_on_one_rank",
            "no_memory_on_any_rank",
            "no_peer_access",
            "no_ipc",
            "another_host",
            "another_build",
            "other_arguments",
            "a_wrong_argument",
            "many_cycles",
        ),
        mps=True,
    ),
    FaultRun(
        "expandable segments",
        2,
        ("expandable_segments",),
        mps=True,
        env=(("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),),
    ),
)


@dataclass
class Outcome:
    """What became of a case. seen: of all ranks together, in words."""

    case: fault_worker.FaultCase
    seen: str
    failures: list[str]
    seconds: float


@functools.cache
def run(which: FaultRun, gpus: int | None = None) -> tuple[launcher.Result, tuple[Outcome, ...]]:
    """gpus: 0 for the CPU; all that there are unless given."""
    with tempfile.TemporaryDirectory(prefix="gan_faults_") as directory:
        env = {"PYTHONPATH": f"{HERE.parent}:{Path(launcher.__file__).parents[1]}"}
        if not which.mps:
            env["CUDA_MPS_PIPE_DIRECTORY"] = f"{directory}/none"  # also where a daemon runs
        result = launcher.run(
            [sys.executable, str(HERE / "fault_worker.py"), directory, *which.cases],
            which.ranks,
            timeout_s=which.time_limit_s,
            gpus=gpus,
            mps=which.mps,
            env={**env, **dict(which.env)},
            show="nothing",
            may_be_killed=range(which.ranks),
        )
        found = [_lines(Path(directory) / f"rank{rank}.jsonl") for rank in range(which.ranks)]
    return result, tuple(outcomes(which, result, found))


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    return {one["case"]: one for one in read}


def outcomes(
    which: FaultRun, result: launcher.Result, found: Sequence[dict[str, dict[str, Any]]]
) -> list[Outcome]:
    """Of each case of the run. found: for each rank what it wrote of each case."""
    made, alive = [], list(range(which.ranks))
    for name in which.cases:
        case = fault_worker.CASES[name]
        said = {rank: found[rank].get(name) for rank in alive}
        killed = [rank for rank, one in said.items() if one is not None and one.get("killed")]
        failures = [
            f"rank {rank}: {failure}"
            for rank, one in said.items()
            if one is not None
            for failure in one.get("failures", ())
        ]
        if None in said.values():
            silent = [rank for rank, one in said.items() if one is None]
            failures.append(
                f"ranks {silent} did not end it: {result.reason or 'an earlier case raised'}; "
                f"{result.placement}\n{result.transcript()[-3000:]}"
            )
        elif len(killed) != case.kills:
            failures.append(f"ranks {killed} were killed")
        alive = [rank for rank in alive if rank not in killed]
        notes = [said[rank]["seen"] for rank in alive if said[rank] is not None]
        seconds = max((said[rank]["seconds"] for rank in alive if said[rank]), default=0.0)
        made.append(Outcome(case, merged(notes), failures, seconds))
    return made


def merged(notes: Sequence[Sequence[Sequence[Any]]]) -> str:
    """One text of what several ranks noted, with the range of their times."""
    times: dict[str, list[float | None]] = {}
    for of_rank in notes:
        for what, seconds in of_rank:
            times.setdefault(what, []).append(seconds)
    parts = []
    for what, seconds in times.items():
        known = [f"{one:.2f}" for one in seconds if one is not None]
        least, most = min(known, key=float, default=""), max(known, key=float, default="")
        span = "" if not known else f" {least} s" if least == most else f" {least} to {most} s"
        parts.append(what + span)
    return "; ".join(parts)


# -------------------------------------------------------------------------------------- the table


def where(gpus: int | None) -> str:
    if gpus == 0 or not torch.cuda.is_available():
        return "the CPU path (gloo; `init` with a stand-in for the native part)"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"


def table(found: Sequence[Outcome], gpus: int | None) -> str:
    versions = f"torch {torch.__version__}, gemma_ar_norm {gemma_ar_norm.__version__}"
    failed = sum(1 for one in found if one.failures)
    lines = [
        f"{datetime.date.today()}, {where(gpus)}, {versions}: {len(found)} cases, {failed} failed. "
        "Times are of the first and the last rank.",
        "",
        "| case | expected | seen |",
        "| --- | --- | --- |",
    ]
    for one in found:
        seen = one.seen or "-"
        if one.failures:
            seen = f"**FAILED**: {one.failures[0].splitlines()[0][:200]}; {seen}"
        cells = (cell.replace("|", "/") for cell in (one.case.title, one.case.expected, seen))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Puts the table in its place in this file."""
    old = path.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"{path}: lines {BEGIN!r} and {END!r} are required; got none; add them")
    head, rest = old.split(BEGIN, 1)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown, with the markers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line a case")
    parser.add_argument("--runs", help="names of runs, with commas between; all unless given")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, also where there is a GPU")
    options = parser.parse_args()
    gpus = 0 if options.cpu or not torch.cuda.is_available() else None
    wanted = options.runs.split(",") if options.runs else [one.name for one in RUNS]
    unknown = set(wanted) - {one.name for one in RUNS}
    if unknown:
        parser.error(f"--runs: {', '.join(one.name for one in RUNS)} are known; got {unknown}")

    found: list[Outcome] = []
    with open(options.json, "w") if options.json else contextlib.nullcontext() as lines:
        for which in RUNS:
            if which.name not in wanted:
                continue
            result, of_run = run(which, gpus)
            found += of_run
            print(f"{which.name}: {result.placement}, {result.seconds:.1f} s", flush=True)
            for one in of_run:
                for failure in one.failures:
                    print(f"  {one.case.name}: {failure}", flush=True)
                if lines:
                    said = {
                        "run": which.name,
                        "placement": str(result.placement),
                        "case": one.case.name,
                        "title": one.case.title,
                        "expected": one.case.expected,
                        "seen": one.seen,
                        "failures": one.failures,
                        "seconds": one.seconds,
                    }
                    lines.write(json.dumps(said) + os.linesep)
            if result.exit_code and not any(one.failures for one in of_run):
                print(f"  the run ended badly: {result.reason}\n{result.transcript()[-3000:]}")
                found[-1].failures.append(f"the run ended badly: {result.reason}")
    text = table(found, gpus)
    print(text)
    if options.write:
        write(options.write, text)
    return 1 if any(one.failures for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
