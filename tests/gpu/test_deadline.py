"""A rank that does not call: the others learn it in time, know who, and can go on."""

from __future__ import annotations

import time

import checks
import pytest
import torch

import gemma_ar_norm
from gemma_ar_norm import plan
from gpu import processes

TIMEOUT_S = 0.5


def call(case, ranks, algorithm="auto"):
    """The call of these ranks, enqueued one after the other."""
    outs = [tuple(checks.poisoned_like(case.xs[0]) for _ in range(2)) for _ in ranks]
    torch.cuda.synchronize()
    for rank, rank_out in zip(ranks, outs, strict=True):
        with torch.cuda.stream(rank.stream):
            gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                case.xs[rank.rank],
                case.weight,
                group=rank,
                algorithm=algorithm,
                out=rank_out,
                **case.options,
            )
    return outs


@pytest.mark.parametrize("algorithm", plan.FUSED_ALGORITHMS)
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_streams(absent, algorithm):
    case = checks.make_case(3, 5, 1024, torch.bfloat16, device="cuda")
    case.expected()
    with gemma_ar_norm.local_group(3) as warm:  # loads the kernel, with time to do so
        call(case, warm, algorithm)
        warm.synchronize()
    with gemma_ar_norm.local_group(3, hidden_size=1024, max_rows=8, timeout_s=TIMEOUT_S) as group:
        present = [rank for rank in group if rank.rank != absent]
        for outs in call(case, group, algorithm):
            torch.cuda.synchronize()
            for got, want in zip(outs, case.expected(), strict=True):
                checks.assert_bit_equal(got, want, case)

        start = time.monotonic()
        outs = call(case, present, algorithm)
        torch.cuda.synchronize()
        took = time.monotonic() - start
        assert TIMEOUT_S * 0.9 < took < TIMEOUT_S + 2
        for norm_out, residual_out in outs:
            assert norm_out.isnan().all()
            assert residual_out.isnan().all()

        for rank in present:
            for _ in range(2):  # it stays failed
                start = time.monotonic()
                with pytest.raises(
                    gemma_ar_norm.PeerTimeoutError, match=f"rank {absent}"
                ) as caught:
                    call(case, [rank], algorithm)
                assert time.monotonic() - start < 0.2
                assert caught.value.peer == absent
                assert caught.value.call == 1
                assert 0 <= caught.value.row < 5
            with pytest.raises(gemma_ar_norm.PeerTimeoutError):
                rank.workspace.synchronize()

    # The context works, and so does a new group.
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    with gemma_ar_norm.local_group(3, hidden_size=1024, max_rows=8) as group:
        for outs in call(case, group, algorithm):
            group.synchronize()
            for got, want in zip(outs, case.expected(), strict=True):
                checks.assert_bit_equal(got, want, case)


@pytest.mark.parametrize("algorithm", plan.FUSED_ALGORITHMS)
def test_graph_replays_after_a_failure_return_at_once(algorithm):
    """Nothing raises inside a replay: its outputs are NaN, and check() says why."""
    case = checks.make_case(2, 3, 2048, torch.bfloat16, device="cuda")
    case.expected()
    with gemma_ar_norm.local_group(2, hidden_size=2048, max_rows=8) as warm:
        call(case, warm, algorithm)
        warm.synchronize()
    with gemma_ar_norm.local_group(2, hidden_size=2048, max_rows=8, timeout_s=TIMEOUT_S) as group:
        present, graph = group[0], torch.cuda.CUDAGraph()
        out = tuple(checks.poisoned_like(case.xs[0]) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(3):
                gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                    case.xs[0],
                    case.weight,
                    group=present,
                    algorithm=algorithm,
                    out=out,
                    **case.options,
                )
        for limit_s in (TIMEOUT_S + 2, 0.2):  # one deadline for the first, none for later ones
            for output in out:
                output.fill_(77.0)
            torch.cuda.synchronize()
            start = time.monotonic()
            graph.replay()
            torch.cuda.synchronize()
            assert time.monotonic() - start < limit_s
            assert all(output.isnan().all() for output in out)
        with pytest.raises(gemma_ar_norm.PeerTimeoutError) as caught:
            present.workspace.check()
        assert caught.value.peer == 1
        assert caught.value.call == 0


@pytest.mark.parametrize("world", [3, 4])
def test_processes(world):
    run = processes.run(world, "deadline", time_limit_s=90)
    run.expect_passed("deadline")
    assert run.result.exit_code == 0, run.result.transcript()[-4000:]
