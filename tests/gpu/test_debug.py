"""Debug mode: calls of a workspace that run at the same time are found, and others are not."""

from __future__ import annotations

import checks
import pytest
import torch

import gemma_ar_norm
from gemma_ar_norm import WorkspaceError

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
