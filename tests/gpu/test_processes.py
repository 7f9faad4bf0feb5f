"""Ranks as processes over CUDA IPC, on however many GPUs there are.

The cases are in worker.py. One run for each number of ranks has all of them, and each is a test.
"""

from __future__ import annotations

import pytest

from gpu import processes, worker

WORLDS = (2, 3, 4, 8)
CASES = [(world, name) for world in WORLDS for name in worker.cases_of(world)]


@pytest.mark.parametrize(("world", "name"), CASES, ids=[f"{w}-{name}" for w, name in CASES])
def test_case(world, name):
    processes.run(world).expect_passed(name)


@pytest.mark.parametrize("world", WORLDS)
def test_the_ranks_were_fused_and_ended_well(world):
    run = processes.run(world)
    for rank, line in enumerate(run.first_lines):
        assert line.get("fused"), f"rank {rank} was not fused: {line}"
    result = run.result
    assert result.exit_code == 0, (
        f"{result.reason}; {result.placement}\n{result.transcript()[-4000:]}"
    )


@pytest.mark.parametrize("percentages", [(50, 30), (25, 15, 20, 10)], ids=str)
def test_ranks_with_different_shares_of_a_gpu(percentages):
    run = processes.run(
        len(percentages), "shares_that_differ", percentages=percentages, time_limit_s=90
    )
    run.expect_passed("shares_that_differ")
    assert run.result.exit_code == 0, run.result.transcript()[-4000:]


def test_a_rank_that_raises_ends_the_run():
    result = processes.run(2, "a_rank_that_raises", time_limit_s=60).result
    assert result.exit_code not in (0, 124), f"{result.reason}\n{result.transcript()[-4000:]}"
    assert "ZeroDivisionError: as the test wants it" in result.outputs[1]
