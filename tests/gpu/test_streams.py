"""Ranks as streams of one process: long random sequences of calls, every bit compared.

Each of 2 to 8 ranks gets thousands of calls whose rows, hidden size, dtypes, form, algorithm,
weights and residuals change from call to call, eager and as replays of CUDA graphs. Inputs are new
and outputs poisoned before every call, and both outputs of every rank must have the bits of
reference.py; so they are equal on all ranks with the same residual. The seed of a sequence is
printed.

Kernels of one GPU wait for each other here, so nothing may come between the calls of the ranks that
waits for the device: all memory is there before, and a call of all ranks is enqueued before the
next one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import checks
import pytest
import torch
from checks import Case
from torch import Tensor

import gemma_ar_norm

DEVICE = "cuda"
CALLS = 1500  # of all ranks, for each number of ranks: 10,500 together
MAX_ELEMENTS = 400_000  # of one rank's x
ALGORITHMS = ("auto", "one_shot", "two_shot")
WORKSPACE = {"hidden_size": 4096, "max_rows": 48, "dtype": torch.bfloat16, "timeout_s": 20.0}
ROWS = (0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 64, 65, 96, 128, 256, 333, 998)


@dataclass
class Call:
    """One call of all ranks, with all its memory."""

    made: Case
    residuals: list[Tensor | None]  # of each rank
    out: list[tuple[Tensor, Tensor]]
    algorithm: str

    @staticmethod
    def of(
        made: Case, residuals: Sequence[Tensor | None] | None = None, algorithm: str = "auto"
    ) -> Call:
        n = len(made.xs)
        out = [(torch.empty_like(x), torch.empty_like(x)) for x in made.xs]
        return Call(made, list(residuals or [made.residual] * n), out, algorithm)

    def poison(self) -> None:
        for norm_out, residual_out in self.out:
            norm_out.fill_(77.0)
            residual_out.fill_(float("nan"))

    def refill(self, made: Case, residuals: Sequence[Tensor | None]) -> None:
        """New values in the same memory, which a graph has captured."""
        pairs = [*zip(self.made.xs, made.xs, strict=True), (self.made.weight, made.weight)]
        pairs += [(self.made.post_weight, made.post_weight)]
        pairs += zip(self.residuals, residuals, strict=True)
        for into, values in pairs:
            if into is not None:
                into.copy_(values)

    def enqueue(self, group, streams: Sequence[torch.cuda.Stream] = ()) -> None:
        """On the ranks' streams, unless others are given."""
        for r, rank in enumerate(group):
            with torch.cuda.stream(streams[r] if streams else rank.stream):
                self.enqueue_one(r, rank)

    def enqueue_one(self, r: int, rank) -> None:
        """Rank r's call, on the current stream."""
        gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
            self.made.xs[r],
            self.made.weight,
            self.residuals[r],
            post_weight=self.made.post_weight,
            eps=self.made.eps,
            weight_bias=self.made.weight_bias,
            group=rank,
            algorithm=self.algorithm,
            out=self.out[r],
        )

    def expected(self) -> list[tuple[Tensor, Tensor]]:
        """Of each rank; computed once where all have one residual."""
        if all(residual is self.residuals[0] for residual in self.residuals):
            same = replace(self.made, residual=self.residuals[0]).expected()
            return [same] * len(self.residuals)
        return [replace(self.made, residual=residual).expected() for residual in self.residuals]

    def wrong(self) -> Tensor:
        """How many elements of all ranks differ, as a tensor on the device."""
        expected = self.expected()
        count = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for i in range(2):
            got = torch.stack([out[i] for out in self.out])
            if all(e is expected[0] for e in expected):
                want = expected[0][i]
            else:
                want = torch.stack([e[i] for e in expected])
            count += (~checks.bit_equal(got, want)).sum()
        return count

    def explain(self, where: str) -> None:
        """Raises for the first rank and output that is wrong."""
        for r, (out, want) in enumerate(zip(self.out, self.expected(), strict=True)):
            for i, name in enumerate(("norm_out", "residual_out")):
                what = f"{where}, {self.algorithm}: {name} of rank {r} of {self.made}"
                checks.assert_bit_equal(out[i], want[i], what)


class Sequences:
    """Random calls on one local group."""

    def __init__(self, group, rng: random.Random) -> None:
        self.group, self.rng = group, rng
        self.done = 0
        self.replays = 0

    def options(self) -> dict:
        rng = self.rng
        hidden, rows = rng.choice(checks.HIDDENS), rng.choice(ROWS)
        dtype = rng.choice(checks.DTYPES)
        return {
            "rows": min(rows, MAX_ELEMENTS // hidden),
            "hidden": hidden,
            "dtype": dtype,
            "form": rng.choice(checks.FORMS),
            "weight_dtype": rng.choice((dtype, torch.float32)),
            "weight_std": rng.choice((0.1, 1.0)),
            "weight_bias": rng.choice((0.0, 1.0, 1.0)),
            "eps": rng.choice((1e-6, 1e-5)),
        }

    def algorithm(self) -> str:
        return self.rng.choice(ALGORITHMS)

    def fresh(self, options: dict) -> tuple[Case, list[Tensor | None]]:
        """A case, and the residual of each rank: one in six times they differ."""
        rng, n = self.rng, len(self.group)
        special = rng.choice((*checks.SPECIALS, "mixed")) if rng.random() < 0.15 else None
        seed = rng.randrange(1 << 32)
        made = checks.make_case(n, **options, special=special, seed=seed, device=DEVICE)
        residuals = [made.residual] * n
        if made.residual is not None and rng.random() < 1 / 6:
            residuals = [checks.with_other_residual(made, seed + r).residual for r in range(n)]
        return made, residuals

    def eager(self, count: int) -> None:
        """Calls in flight together, each of its own kind."""
        kinds = [(*self.fresh(self.options()), self.algorithm()) for _ in range(count)]
        self._run([Call.of(*kind) for kind in kinds], "eager")

    def chain(self, count: int) -> None:
        """Calls on the outputs of the call before, as in a model; nothing waits in between."""
        options = self.options() | {"form": self.rng.choice(("residual", "sandwich"))}
        calls = [Call.of(self.fresh(options)[0], algorithm=self.algorithm())]
        for _ in range(count - 1):
            made = self.fresh(options)[0]
            xs = [norm_out for norm_out, _ in calls[-1].out]
            residuals = [residual_out for _, residual_out in calls[-1].out]
            calls.append(Call.of(replace(made, xs=xs), residuals, self.algorithm()))
        self._run(calls, "chain")

    def graph(self, count: int, replays: int) -> None:
        """Calls of several kinds in one graph, replayed with new inputs, weights and residuals."""
        kinds = [self.options() for _ in range(count)]
        calls = []
        for kind in kinds:
            made, residuals = self.fresh(kind)
            # Each rank has memory for a residual of its own.
            own = [None if residual is None else residual.clone() for residual in residuals]
            calls.append(Call.of(made, own, self.algorithm()))
        torch.cuda.synchronize()
        graph = capture(self.group, calls)
        for replay in range(replays):
            for call, kind in zip(calls, kinds, strict=True):
                call.refill(*self.fresh(kind))
            self._run(calls, f"replay {replay}", graph)
            self.replays += 1

    def _run(self, calls: Sequence[Call], where: str, graph=None) -> None:
        for call in calls:
            call.poison()
        torch.cuda.synchronize()
        if graph is None:
            for call in calls:
                call.enqueue(self.group)
        else:
            graph.replay()
        torch.cuda.synchronize()
        self.done += len(calls)
        if sum(call.wrong() for call in calls).item():
            self.group.synchronize()  # a timeout says more than its NaN
            for i, call in enumerate(calls):
                call.explain(f"call {self.done - len(calls) + i}, {where}, {i} in the batch")
            raise AssertionError(f"{where}: wrong at first, right when looked at again")
        if self.done % 8 == 0 and all(r is calls[0].residuals[0] for r in calls[0].residuals):
            made = replace(calls[0].made, residual=calls[0].residuals[0])
            checks.assert_near_float64(made, *calls[0].out[0])


def capture(group, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph with a branch for each rank."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        base = torch.cuda.current_stream()
        for rank in group:
            rank.stream.wait_stream(base)
        for call in calls:
            call.enqueue(group)
        for rank in group:
            base.wait_stream(rank.stream)
    return graph


def warm_up(group) -> None:
    """Loads every kernel that the sequences use: loading one waits for those that run."""
    n = len(group)
    for dtype in checks.DTYPES:
        for rows, hidden in ((1, 640), (1, 5376), (1, 16384), (40, 640), (20, 4096), (9, 16384)):
            made = checks.make_case(n, rows, hidden, dtype, "sandwich", device=DEVICE)
            calls = [Call.of(made, algorithm=algorithm) for algorithm in ALGORITHMS[1:]]
            torch.cuda.synchronize()
            for call in calls:
                call.enqueue(group)
            group.synchronize()


@pytest.mark.parametrize("n", range(2, 9))
def test_random_sequences(n):
    seed = checks.fresh_seed()
    print(f"{n} ranks: seed {seed}")  # shown when it fails
    rng = random.Random(seed)
    start = time.monotonic()
    with gemma_ar_norm.local_group(n, **WORKSPACE) as group:
        warm_up(group)
        sequences = Sequences(group, rng)
        while sequences.done < CALLS:
            kind = rng.random()
            if kind < 0.6:
                sequences.eager(rng.randint(1, 8))
            elif kind < 0.85:
                sequences.chain(rng.randint(2, 8))
            else:
                sequences.graph(rng.randint(1, 5), rng.randint(2, 12))
        group.synchronize()
    took = time.monotonic() - start
    print(f"{n} ranks: {sequences.done} calls, {sequences.replays} replays, {took:.1f} s")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n", [4, 8])
def test_a_row_has_the_same_bits_in_every_call(n, algorithm):
    """Whatever the number of rows beside it: eager, in parts, and in one call."""
    hidden = 5376
    made = checks.make_case(n, 96, hidden, torch.bfloat16, "sandwich", device=DEVICE)
    with gemma_ar_norm.local_group(n, **WORKSPACE) as group:
        warm_up(group)
        whole = Call.of(made, algorithm=algorithm)
        whole.poison()
        torch.cuda.synchronize()
        whole.enqueue(group)
        group.synchronize()
        assert whole.wrong().item() == 0, made
        for size in (1, 2, 3, 8, 33, 48):
            parts = []
            for first in range(0, 96, size):
                rows = slice(first, min(96, first + size))
                part = replace(made, xs=[x[rows] for x in made.xs], residual=made.residual[rows])
                parts.append(Call.of(part, algorithm=algorithm))
                parts[-1].poison()
            torch.cuda.synchronize()
            for part in parts:
                part.enqueue(group)
            group.synchronize()
            for r in range(n):
                for i in range(2):
                    got = torch.cat([part.out[r][i] for part in parts])
                    checks.assert_bit_equal(got, whole.out[r][i], f"rank {r}, {size} rows a call")
