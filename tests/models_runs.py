"""Runs models_worker.py as processes, once for each number of ranks, for the CPU and GPU tests."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import models
import models_tools
import models_worker
import pytest

from gemma_ar_norm import launcher

HERE = Path(__file__).parent
CASES = [
    f"{case}-{name}"
    for name in models.TINY
    for case in models_worker.CASES
    if name in models_tools.FAMILIES[case]
]


def need_transformers() -> None:
    """Skips a file of tests where transformers is missing; in CI that is an error."""
    if importlib.util.find_spec("transformers") is None:
        if os.environ.get("GAN_CI"):
            raise RuntimeError("transformers is required in CI; see requirements-dev.txt")
        pytest.skip("transformers is not installed", allow_module_level=True)


@functools.cache
def run(ranks: int, cases: tuple[str, ...], gpus: int | None = None, time_limit_s: float = 400.0):
    """(launcher.Result, [{case: failures} of each rank])"""
    with tempfile.TemporaryDirectory(prefix="gan_models_") as directory:
        result = launcher.run(
            [sys.executable, str(HERE / "models_worker.py"), directory, *cases],
            ranks,
            gpus=gpus,
            timeout_s=time_limit_s,
            env={
                "PYTHONPATH": f"{HERE}:{Path(launcher.__file__).parents[1]}",
                "PYTHONFAULTHANDLER": "1",  # where a rank ends by a signal, the test says where
            },
            show="nothing",
        )
        found, seconds = [], {}
        for rank in range(ranks):
            path = Path(directory) / f"rank{rank}.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            read = [json.loads(line) for line in lines if line.endswith("}")]
            found.append({line["case"]: line["failures"] for line in read})
            seconds |= {line["case"]: line["seconds"] for line in read}
    print(f"\n{result.placement}: {result.seconds:.1f} s, {sum(seconds.values()):.1f} in the cases")
    print("\n".join(line for line in result.outputs[0].splitlines() if "of the largest" in line))
    return result, found


def expect_passed(case: str, result, found) -> None:
    """The case passed on every rank."""
    failures = [
        f"rank {rank}: {failure}"
        for rank, cases in enumerate(found)
        for failure in cases.get(case, [])
    ]
    if failures:
        pytest.fail("\n".join([*failures, str(result.placement)]))
    missing = [rank for rank, cases in enumerate(found) if case not in cases]
    if missing:
        last = f"{result.reason or 'an earlier case raised'}; {result.placement}"
        pytest.fail(f"ranks {missing} did not end it: {last}\n{result.transcript()[-4000:]}")
