"""The torch.compile pass through all of Inductor, on two gloo processes.

The cases are those of the GPU tests (tests/gpu/compile_cases.py), so these are tried here too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from gpu import compile_cases

from gemma_ar_norm import launcher

TESTS = Path(__file__).parents[1]
CASES = [case.__name__ for case in compile_cases.CASES]
TIME_LIMIT_S = 300


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    result = launcher.run(
        [sys.executable, "-W", "ignore", str(TESTS / "gpu" / "worker.py"), str(directory), *CASES],
        2,
        timeout_s=TIME_LIMIT_S,
        gpus=0,
        # No pool of compiling processes: it takes longer to start than it saves.
        env={"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        show="nothing",
    )
    found = []
    for rank in range(2):
        file = directory / f"rank{rank}.jsonl"
        lines = file.read_text().splitlines()[1:] if file.exists() else []
        found.append({line["case"]: line for line in map(json.loads, lines)})
    return result, found


@pytest.mark.parametrize("name", CASES)
def test_compiled(run, name):
    result, found = run
    for rank, cases in enumerate(found):
        assert name in cases, f"{name} did not end on rank {rank}: {result.transcript()[-4000:]}"
        assert cases[name]["failures"] == [], f"rank {rank}"
    assert result.exit_code == 0, result.transcript()[-4000:]
