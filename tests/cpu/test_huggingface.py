"""`fuse` on tiny models of transformers, one of each family, on two CPU ranks.

The cases are in models_worker.py. One run has all of them, and each is a test.
"""

from __future__ import annotations

import models_runs
import pytest

models_runs.need_transformers()

# Compiling on the CPU takes long, and test_fusion.py does it.
CASES = tuple(case for case in models_runs.CASES if not case.startswith("compiled-"))


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    models_runs.expect_passed(case, *models_runs.run(2, CASES, gpus=0))


def test_the_ranks_ended_well():
    result, _ = models_runs.run(2, CASES, gpus=0)
    assert result.exit_code == 0, f"{result.reason}\n{result.transcript()[-4000:]}"
