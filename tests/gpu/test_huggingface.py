"""`fuse` on tiny models of transformers, one of each family: eager, in a CUDA graph and compiled.

models_worker.py runs the cases. One run for each number of ranks has all, and each is a test.
"""

from __future__ import annotations

import models_runs
import pytest

models_runs.need_transformers()

WORLDS = (2, 4)
CASES = tuple(models_runs.CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_case(world, case):
    models_runs.expect_passed(case, *models_runs.run(world, CASES))


@pytest.mark.parametrize("world", WORLDS)
def test_the_ranks_ended_well(world):
    result, _ = models_runs.run(world, CASES)
    assert result.exit_code == 0, (
        f"{result.reason}; {result.placement}\n{result.transcript()[-4000:]}"
    )
