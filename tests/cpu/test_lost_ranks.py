"""Ranks that are lost in calls on the CPU path, where four are needed, or a rank that is half lost.

One run of four processes has all cases, and each is a test. (More of them: test_faults.py.)
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import checks
import pytest
import torch
import torch.distributed as dist

import gemma_ar_norm
from gemma_ar_norm import PeerTimeoutError, groups, launcher

RANKS = 4
LAST = RANKS - 1
TIME_LIMIT_S = 120
CALL_TIMEOUT_S, GROUP_TIMEOUT_S = 2.0, 60.0
AT_ONCE_S = 20.0  # less than any timeout that a case is not to wait for; on a busy machine

CASES: dict[str, Callable[[int, Any], None]] = {}


def case(function: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
    CASES[function.__name__] = function
    return function


def call(rank: int, group: Any) -> None:
    made = checks.make_case(RANKS, 4, 640, torch.bfloat16, seed=1)
    outputs = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
        made.xs[rank], made.weight, **made.options, group=group
    )
    for one, expected in zip(outputs, made.expected(), strict=True):
        checks.assert_bit_equal(one, expected, "")


@case
def a_rank_that_does_not_come(rank: int, group: Any) -> None:
    """timeout_s counts, as on a GPU, and not the group's own."""
    gemma_ar_norm.init(group, timeout_s=CALL_TIMEOUT_S)
    call(rank, group)
    dist.barrier()
    if rank != LAST:
        start = time.monotonic()
        words = f"^rank {LAST}: to take part in a call .* within {CALL_TIMEOUT_S:g} s; got nothing"
        with pytest.raises(PeerTimeoutError, match=words) as raised:
            call(rank, group)
        assert 0.9 * CALL_TIMEOUT_S <= time.monotonic() - start < AT_ONCE_S
        assert (raised.value.peer, raised.value.call, raised.value.row) == (LAST, -1, -1)
    dist.barrier()
    with pytest.raises(PeerTimeoutError, match=r"^rank"):  # the others have hung up
        call(rank, group)


@case
def a_rank_that_ends_when_one_other_has_heard_from_it(rank: int, group: Any) -> None:
    """That one learns of it from the others, which hang up: also the one that does so late, when
    another has hung up before it."""
    gemma_ar_norm.init(group, timeout_s=GROUP_TIMEOUT_S)
    left = dist.new_group(list(range(LAST)))
    dist.barrier()
    if rank == LAST:

        def ends_early(of: groups.Group, sent: torch.Tensor, tag: int, _: Any) -> None:
            options = {"group": of.process_group, "tag": tag}
            heard = dist.irecv(torch.empty_like(sent), group_src=2, **options)
            dist.send(sent, group_dst=2, **options)
            heard.wait()
            time.sleep(1)
            os._exit(0)

        with mock.patch.object(groups, "_gather", ends_early):
            call(rank, group)
    hang_up = groups.hang_up

    def late(*arguments: Any) -> None:
        time.sleep(2)
        hang_up(*arguments)

    start = time.monotonic()
    with (
        mock.patch.object(groups, "hang_up", late if rank == 0 else hang_up),
        pytest.raises(PeerTimeoutError, match=f"{LAST}: to take part in a call"),
    ):
        call(rank, group)
    took = time.monotonic() - start
    dist.barrier(left)  # nobody learns of it by the end of another's process
    assert took < AT_ONCE_S


def main() -> None:
    rank, _, _ = launcher.init_from_env()
    for name, function in CASES.items():
        group = dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT_S))
        failure = ""
        try:
            function(rank, group)
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps({"case": name, "failure": failure}), flush=True)
    os._exit(0)  # the last case leaves groups that are of no use


@pytest.fixture(scope="module")
def run() -> launcher.Result:
    return launcher.run(
        [sys.executable, "-W", "ignore", __file__],
        RANKS,
        timeout_s=TIME_LIMIT_S,
        gpus=0,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        show="nothing",
    )


@pytest.mark.parametrize("name", CASES)
def test_case(run: launcher.Result, name: str) -> None:
    for rank, output in enumerate(run.outputs):
        found = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
        failures = [one["failure"] for one in found if one["case"] == name]
        ends = name == list(CASES)[-1] and rank == LAST
        assert failures == ([] if ends else [""]), f"rank {rank}: {failures}\n{run.transcript()}"


if __name__ == "__main__":
    main()
