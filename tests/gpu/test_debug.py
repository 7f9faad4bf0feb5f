"""Debug mode: calls that run at the same time, and ranks that disagree, are found; others are not.

By processes: worker.py, calls_that_differ_in_debug_mode.
"""

from __future__ import annotations

import checks
import pytest
import torch

import gemma_ar_norm
from gemma_ar_norm import PeerTimeoutError, WorkspaceError

DEVICE = "cuda"


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setenv("GEMMA_AR_NORM_DEBUG", "1")
    with gemma_ar_norm.local_group(2, hidden_size=640, max_rows=8, timeout_s=2.0) as ranks:
        monkeypatch.delenv("GEMMA_AR_NORM_DEBUG")
        yield ranks


def arguments(made, rank):
    return made.xs[rank.rank], made.weight, made.residual


def captured_call(made, rank) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemma_ar_norm.fused_allreduce_gemma_rmsnorm(*arguments(made, rank), group=rank)
    return graph


def test_two_replays_at_once_are_found(group):
    made = checks.make_case(2, 4, 640, torch.bfloat16, "residual", device=DEVICE)
    graphs = [captured_call(made, group[0]) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    # The first waits for rank 1, which never comes: so the second runs beside it.
    for graph, stream in zip(graphs, streams, strict=True):
        with torch.cuda.stream(stream):
            graph.replay()
    torch.cuda.synchronize()
    match = "one after the other are required; got two that ran at the same time"
    with pytest.raises(WorkspaceError, match=match):
        group[0].workspace.check()
    with pytest.raises(WorkspaceError, match=match):
        gemma_ar_norm.fused_allreduce_gemma_rmsnorm(*arguments(made, group[0]), group=group[0])
    group[1].workspace.check()


def test_calls_in_order_are_not(group):
    """Eager from two streams, and replays among them: right, and nothing is found."""
    made = checks.make_case(2, 4, 640, torch.bfloat16, "residual", device=DEVICE)
    expected = made.expected()
    out = [tuple(torch.full_like(made.xs[0], 77.0) for _ in range(2)) for _ in group]
    others = [torch.cuda.Stream() for _ in group]
    graphs = [captured_call(made, rank) for rank in group]
    for turn in range(20):
        torch.cuda.synchronize()
        for rank, graph in zip(group, graphs, strict=True):
            with torch.cuda.stream(rank.stream):
                graph.replay()
        torch.cuda.synchronize()
        for rank, other in zip(group, others, strict=True):
            with torch.cuda.stream(other if turn % 2 else rank.stream):
                gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                    *arguments(made, rank), group=rank, out=out[rank.rank]
                )
    group.synchronize()
    for got in out:
        for one, want in zip(got, expected, strict=True):
            checks.assert_bit_equal(one, want, "after calls from two streams")


def test_replays_that_differ_are_found(group):
    """Graphs of other numbers of rows, replayed at the same time, after replays that were alike."""
    made = {rows: checks.make_case(2, rows, 640, torch.bfloat16, device=DEVICE) for rows in (4, 3)}
    graphs = {rows: [captured_call(case, rank) for rank in group] for rows, case in made.items()}

    def replay(*rows_of_rank):
        torch.cuda.synchronize()
        for rank, rows in zip(group, rows_of_rank, strict=True):
            with torch.cuda.stream(rank.stream):
                graphs[rows][rank.rank].replay()

    replay(4, 4)
    replay(3, 3)
    group.synchronize()
    replay(4, 3)
    replay(4, 4)  # does nothing
    torch.cuda.synchronize()
    for rank in group:
        with pytest.raises(WorkspaceError, match="got rows 4 on rank 0 and 3 on rank 1; make the"):
            rank.workspace.check()
        with pytest.raises(WorkspaceError, match="got rows 4 on rank 0 and 3 on rank 1; make the"):
            gemma_ar_norm.fused_allreduce_gemma_rmsnorm(*arguments(made[4], rank), group=rank)


def test_who_does_not_come_is_named(group):
    """Before any of the call's own kernels has started."""
    made = checks.make_case(2, 4, 640, torch.bfloat16, "residual", device=DEVICE)
    gemma_ar_norm.fused_allreduce_gemma_rmsnorm(*arguments(made, group[0]), group=group[0])
    torch.cuda.synchronize()
    with pytest.raises(PeerTimeoutError) as raised:
        group[0].workspace.check()
    assert raised.value.peer == 1
    gemma_ar_norm.fused_allreduce_gemma_rmsnorm(*arguments(made, group[1]), group=group[1])
    with pytest.raises(PeerTimeoutError):
        group[1].workspace.synchronize()
