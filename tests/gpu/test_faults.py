"""Ranks that are killed, stopped or cannot take part. The cases are in fault_worker.py."""

from __future__ import annotations

import pytest

from gpu import faults

CASES = [(which, name) for which in faults.RUNS for name in which.cases]


@pytest.mark.parametrize(("which", "name"), CASES, ids=[name for _, name in CASES])
def test_case(which, name):
    _, found = faults.run(which)
    one = next(one for one in found if one.case.name == name)
    assert not one.failures, "\n".join(one.failures[:10])


@pytest.mark.parametrize("which", faults.RUNS, ids=lambda which: which.name)
def test_the_run_ended_well(which):
    result, _ = faults.run(which)
    assert result.exit_code == 0, f"{result.reason}\n{result.transcript()[-4000:]}"


def test_every_case_is_run():
    assert {name for _, name in CASES} == set(faults.fault_worker.CASES)
