"""CUDA graphs, streams and the caching allocator around the calls of ranks that are streams.

(One rank in a graph: test_workspace.py. A graph a process: worker.py. Random graphs of both
algorithms: test_streams.py, whose `Call` this uses.) As there, a call of all ranks is enqueued
before anything that could wait for it, and every bit of every output is compared.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace

import checks
import pytest
import torch
from torch import Tensor

import gemma_ar_norm
from gpu.test_streams import ALGORITHMS, Call

DEVICE = "cuda"
HIDDEN = 2048
FUSED = ALGORITHMS[1:]

pytestmark = pytest.mark.parametrize("n", [2, 4])


@pytest.fixture
def group(n):
    with gemma_ar_norm.local_group(n, hidden_size=HIDDEN, max_rows=64, timeout_s=20.0) as ranks:
        yield ranks
        ranks.synchronize()


def case(n, rows, form="residual", *, hidden=HIDDEN, dtype=torch.bfloat16) -> checks.Case:
    return checks.make_case(n, rows, hidden, dtype, form, device=DEVICE)


Graphs = list[torch.cuda.CUDAGraph]


def capture(group, calls: Sequence[Call], stream=None) -> Graphs:
    """A graph a rank, as processes have. (Branches of one graph need not run side by side.)"""
    graphs = []
    torch.cuda.synchronize()
    for r, rank in enumerate(group):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=rank.stream if stream == "a rank's" else stream):
            for call in calls:
                call.enqueue_one(r, rank)
        graphs.append(graph)
    return graphs


class Replays:
    """Replays among eager calls, on the ranks' streams; in between, inputs are changed and results
    looked at on a stream that waits for the ranks', and they for it."""

    def __init__(self, group) -> None:
        self.group, self.stream = group, torch.cuda.Stream()
        self.wrong: list[Tensor] = []

    def replay(self, graphs: Graphs, calls: Sequence[Call], news: Sequence) -> None:
        """With these new cases as inputs; what is wrong afterwards is counted on the device."""
        self._wait_for_ranks()
        with torch.cuda.stream(self.stream):
            for call, new in zip(calls, news, strict=True):
                call.refill(new, [new.residual] * len(self.group))
                call.poison()
        self._ranks_wait()
        for rank, graph in zip(self.group, graphs, strict=True):
            with torch.cuda.stream(rank.stream):
                graph.replay()
        self._wait_for_ranks()
        with torch.cuda.stream(self.stream):
            self.wrong += [call.wrong() for call in calls]
        self._ranks_wait()

    def _wait_for_ranks(self) -> None:
        for rank in self.group:
            self.stream.wait_stream(rank.stream)

    def _ranks_wait(self) -> None:
        for rank in self.group:
            rank.stream.wait_stream(self.stream)

    def assert_right(self) -> None:
        torch.cuda.synchronize()
        self.group.synchronize()
        wrong = torch.stack(self.wrong)
        assert not wrong.any(), f"wrong elements, replay by replay: {wrong.tolist()}"


def run_eager(group, calls: Sequence[Call], where: str) -> None:
    for call in calls:
        call.poison()
    torch.cuda.synchronize()
    for call in calls:
        call.enqueue(group)
    assert_right(group, calls, where)


def assert_right(group, calls: Sequence[Call], where: str) -> None:
    torch.cuda.synchronize()
    if sum(call.wrong() for call in calls).item():
        group.synchronize()
        for i, call in enumerate(calls):
            call.explain(f"{where}, call {i}")


# ---------------------------------------------------------------------------------- eager, streams


@pytest.mark.parametrize("count", [2, 3])
def test_calls_from_several_streams_run_in_order(group, n, count):
    """Each depends on the one before, which was queued on another stream. Nothing but the package
    orders them, and the host does not wait."""
    streams = [[torch.cuda.Stream() for _ in group] for _ in range(count)]
    for rows, form in ((1, "residual"), (40, "sandwich")):
        calls = [Call.of(case(n, rows, form), algorithm=FUSED[0])]
        for i in range(1, 60):
            before = calls[-1].out
            made = replace(case(n, rows, form), xs=[norm_out for norm_out, _ in before])
            residuals = [residual_out for _, residual_out in before]
            calls.append(Call.of(made, residuals, ALGORITHMS[i % 3]))
        for call in calls:
            call.poison()
        torch.cuda.synchronize()
        for i, call in enumerate(calls):
            call.enqueue(group, streams[i % count])
        assert_right(group, calls, f"{rows} rows, {count} streams")


def test_memory_that_is_used_again_at_once(group, n):
    """Inputs that are freed right after the call, and taken by others that are filled then."""
    rows, nan, reused = 64, float("nan"), 0
    gc.collect()
    torch.cuda.empty_cache()
    for i in range(30):
        algorithm = FUSED[i % 2]
        made = case(n, rows, "sandwich")
        expected = made.expected()
        inputs: list = [(x, made.residual) for x in made.xs]
        torch.cuda.synchronize()
        for r, rank in enumerate(group):
            with torch.cuda.stream(rank.stream):
                inputs[r] = [one.clone() for one in inputs[r]]
                spare = [torch.empty_like(made.residual) for _ in range(4)]
                del spare  # cached now: no memory is asked for while a rank waits
        torch.cuda.synchronize()
        outputs = []
        for r, rank in enumerate(group):
            with torch.cuda.stream(rank.stream):
                x, residual = inputs[r]
                addresses = {x.data_ptr(), residual.data_ptr()}
                outputs.append(
                    gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                        x, made.weight, **made.options | {"residual": residual},
                        group=rank, algorithm=algorithm,
                    )
                )  # fmt: skip
                inputs[r] = None
                del x, residual
                others = [torch.full_like(made.residual, nan) for _ in range(2)]
                reused += len(addresses & {other.data_ptr() for other in others})
                del others
        torch.cuda.synchronize()
        for r, got in enumerate(outputs):
            for output, want in zip(got, expected, strict=True):
                checks.assert_bit_equal(output, want, f"{algorithm}, rank {r} of {made}")
        del outputs
    assert reused > 0, "no memory was used again: this shows nothing"


# ------------------------------------------------------------------------------------------ graphs


@pytest.mark.parametrize("on", ["torch's stream", "a stream of its own", "a rank's stream"])
def test_capture_on_any_stream(group, n, on):
    """With eager calls before, between replays and after."""
    stream = {"a stream of its own": torch.cuda.Stream(), "a rank's stream": "a rank's"}.get(on)
    calls = [
        Call.of(case(n, rows, form), algorithm=algorithm)
        for rows, form, algorithm in ((3, "residual", FUSED[0]), (17, "sandwich", FUSED[1]))
    ]
    eager = [Call.of(case(n, 5), algorithm=algorithm) for algorithm in FUSED]
    run_eager(group, eager, "before the capture")
    graphs = capture(group, calls, stream)
    replays = Replays(group)
    for _ in range(10):
        news = [case(n, 3, "residual"), case(n, 17, "sandwich")]
        torch.cuda.synchronize()
        replays.replay(graphs, calls, news)
        run_eager(group, eager, "between replays")
    replays.assert_right()


def test_a_graph_among_eager_calls_of_other_rows(group, n):
    """The captured call keeps its shape, whatever calls of other shapes do to the workspace.

    The host waits for none of them with two ranks. With more it does: where a stream that waits
    shares a hardware queue with a rank's, that one waits too, and the ranks of one GPU for it.
    """
    captured = [Call.of(case(n, 6), algorithm="auto")]
    graphs = capture(group, captured)
    replays = Replays(group)
    sizes = itertools.cycle(itertools.product((1, 64, 15, 333, 2), ALGORITHMS))
    for _ in range(5):
        news = [case(n, 6) for _ in range(10)]
        eager = [
            Call.of(case(n, rows, "sandwich"), algorithm=algorithm)
            for rows, algorithm in itertools.islice(sizes, 10)
        ]
        for call in eager:
            call.poison()
        torch.cuda.synchronize()
        for call, new in zip(eager, news, strict=True):
            call.enqueue(group)
            if n > 2:
                torch.cuda.synchronize()
            replays.replay(graphs, captured, [new])
            if n > 2:
                torch.cuda.synchronize()
        assert_right(group, eager, "eager")
    replays.assert_right()


def test_two_graphs_in_turn(group, n):
    """One of one-shot and one of two-shot calls, of different rows and forms; 50 times, each time
    with other inputs."""
    kinds = {
        FUSED[0]: ((1, "residual"), (20, "sandwich"), (1, "plain")),
        FUSED[1]: ((33, "sandwich"), (2, "residual")),
    }
    kinds_of = []
    for algorithm, shapes in kinds.items():
        calls = [Call.of(case(n, *shape), algorithm=algorithm) for shape in shapes]
        kinds_of.append((capture(group, calls), calls, shapes))
    replays = Replays(group)
    for i in range(50):
        graphs, calls, shapes = kinds_of[i % 2]
        news = [case(n, *shape) for shape in shapes]
        replays.stream.wait_stream(torch.cuda.current_stream())  # which makes the new inputs
        replays.replay(graphs, calls, news)
        torch.cuda.current_stream().wait_stream(replays.stream)  # before news is freed
    replays.assert_right()


@pytest.mark.parametrize("algorithm", FUSED)
def test_a_call_of_several_launches_in_a_graph(n, algorithm):
    rows, hidden = 700, 5376
    made = case(n, rows, "sandwich", hidden=hidden)
    with gemma_ar_norm.local_group(n, hidden_size=1024, max_rows=1, timeout_s=20.0) as group:
        said = gemma_ar_norm.explain(rows, hidden, group=group[0], algorithm=algorithm)
        assert (said.path, said.launches > 3) == (algorithm, True), said
        calls = [Call.of(made, algorithm=algorithm), Call.of(case(n, 1), algorithm=algorithm)]
        graphs = capture(group, calls)
        replays = Replays(group)
        for _ in range(5):
            news = [case(n, rows, "sandwich", hidden=hidden), case(n, 1)]
            torch.cuda.synchronize()
            replays.replay(graphs, calls, news)
        replays.assert_right()


def test_outputs_that_a_graph_owns(group, n):
    """Without out= they lie in the graph's own memory, where nobody else's can be."""
    made = case(n, 12, "sandwich")
    outputs: list[tuple[Tensor, Tensor]] = []
    graphs: Graphs = []
    torch.cuda.synchronize()
    for r, rank in enumerate(group):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for algorithm in FUSED:
                outputs.append(
                    gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                        made.xs[r], made.weight, **made.options, group=rank, algorithm=algorithm
                    )
                )
        graphs.append(graph)
    own = {output.data_ptr() for pair in outputs for output in pair}
    assert len(own) == 2 * 2 * n, "two outputs share their memory"

    def fill_memory() -> None:
        """What the caching allocator has, and what it gets anew, on every stream."""
        for stream in (torch.cuda.current_stream(), *(rank.stream for rank in group)):
            with torch.cuda.stream(stream):
                junk = [torch.full_like(made.xs[0], float("nan")) for _ in range(64)]
                assert not own & {one.data_ptr() for one in junk}
                del junk
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    for _ in range(5):
        new = case(n, 12, "sandwich")
        Call(made, [made.residual], [], "").refill(new, [new.residual])
        expected = made.expected()
        for pair in outputs:
            for output in pair:
                output.fill_(77.0)
        fill_memory()
        for rank, graph in zip(group, graphs, strict=True):
            with torch.cuda.stream(rank.stream):
                graph.replay()
        torch.cuda.synchronize()
        fill_memory()
        for i, pair in enumerate(outputs):
            for got, want in zip(pair, expected, strict=True):
                checks.assert_bit_equal(got, want, f"{FUSED[i % 2]}, rank {i // 2} of {new}")
