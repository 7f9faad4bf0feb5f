"""Runs worker.py as processes on this machine's GPUs, once for each number of ranks."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma_ar_norm import launcher

HERE = Path(__file__).parent
TIME_LIMIT_S = 150.0  # of a run; time-sliced ranks are slow, and a hang ends here


@dataclass
class Run:
    """A run, and for each rank what it wrote: {case: {"failures", "seconds"}}."""

    result: launcher.Result
    first_lines: list[dict[str, Any]]
    cases: list[dict[str, dict[str, Any]]]

    def expect_passed(self, name: str) -> None:
        """The case passed on every rank."""
        found = [cases.get(name) for cases in self.cases]
        failures = [
            f"rank {rank}: {failure}"
            for rank, one in enumerate(found)
            if one is not None
            for failure in one["failures"]
        ]
        if failures:
            pytest.fail("\n".join([*failures[:10], str(self.result.placement)]))
        if None in found:
            last = f"{self.result.reason or 'an earlier case raised'}; {self.result.placement}"
            started = f"case {name}" in self.result.transcript()
            if started:
                pytest.fail(f"did not end: {last}\n{self.result.transcript()[-4000:]}")
            pytest.fail(f"was not reached: {last}\n{self.result.transcript()[-2000:]}")


@functools.cache
def run(
    ranks: int,
    *cases: str,
    time_limit_s: float = TIME_LIMIT_S,
    percentages: tuple[int, ...] | None = None,
) -> Run:
    """Runs these cases, or all that so many ranks can run together.

    percentages: what each rank has of its GPU, under MPS; equal shares unless given.
    """
    with tempfile.TemporaryDirectory(prefix="gan_test_") as directory:
        result = launcher.run(
            [sys.executable, str(HERE / "worker.py"), directory, *cases],
            ranks,
            timeout_s=time_limit_s,
            percentages=percentages,
            env={"PYTHONPATH": f"{HERE.parent}:{Path(launcher.__file__).parents[1]}"},
            show="nothing",
        )
        first_lines, found = [], []
        for rank in range(ranks):
            path = Path(directory) / f"rank{rank}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            # A killed rank may have left half a line.
            read = [json.loads(line) for line in lines if line.endswith("}")]
            first_lines.append(read[0] if read else {})
            found.append({line["case"]: line for line in read[1:]})
    slowest = sorted(((one["seconds"], name) for name, one in found[0].items()), reverse=True)
    print(f"\n{result.placement}: {result.seconds:.1f} s; the longest cases of rank 0:")
    for seconds, name in slowest[:5]:
        print(f"  {seconds:6.2f} s  {name}")
    return Run(result, first_lines, found)
