"""One answer: what a call computes depends on its inputs alone, and is what reference.py computes.

Pairs of calls with the same inputs, which differ in all that must not matter: the algorithm, the
rows beside a row, the grid and the cluster shape, the threads, how many rows pushes are ahead, the
size of the inbox (so that a call takes one launch or several), programmatic dependent launch, and
whether they are eager or replayed. Both outputs of every rank of both calls have the same bits.

Everything is enqueued on one stream a rank, whichever workspace it is for: so a rank has one kernel
at a time on the GPU that all share, as with one workspace. Where kernels start early it is two, so
those workspaces have tiny grids, and calls of no other are in flight with theirs.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import checks
import pytest
import torch
from checks import Case
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import plan, workspace
from gpu.test_streams import ALGORITHMS, Call

DEVICE = "cuda"
PAIRS = {2: 30_000, 3: 20_000, 4: 16_000, 5: 10_000, 6: 8_000, 7: 8_000, 8: 8_000}
BATCH = 250
GRAPH = 25  # pairs whose calls are in one graph
ROWS = (1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 40)
HIDDENS = (64, 72, 264, 512, 640, 1024, 1152, 2048)
LONG_HIDDEN, LONG_ROWS = 16384, (17, 33, 40)  # of one pair in LONG: more than a small inbox takes
LONG = 40
SMALL_INBOX = 2 << 20  # the least there is
WEIGHTS = 20_000  # numbers from which the weights of a call are taken
TIMEOUT_S = 20.0

fused = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm.out


# ------------------------------------------------------------------------------------- workspaces


def some_rules(rng: random.Random, share: int, clusters: bool, early: bool) -> list[plan.Rule]:
    """A plan of random limits and shapes, that has rules of both algorithms for every call.

    share: multiprocessors that a rank may fill. early: kernels let the next one start early.
    """

    def rule(size: plan.Size, algorithm: int) -> plan.Rule:
        multiprocessors = rng.choice((1, 2, 4) if early else (1, 3, share))
        triggers = (plan.Trigger.AT_START, plan.Trigger.AFTER_PUSH)
        return plan.Rule(
            *size,
            algorithm=algorithm,
            blocks_a_team=min(rng.choice((1, 2, 4, 8)), multiprocessors) if clusters else 1,
            max_threads=rng.choice((32, 64, 128, 256, 512)),
            threads_a_multiprocessor=512 if early else rng.choice((512, 1024)),
            trigger=rng.choice(triggers) if early else plan.Trigger.NEVER,
            lead_rows=rng.choice((1, 1, 2, 3, 5)),
            multiprocessors=multiprocessors,
            evidence="random",
        )

    def size() -> plan.Size:
        no = plan.NO_LIMIT
        return plan.Size(
            rng.choice((1, 4, 16, no)), rng.choice((32, 128, no)), rng.choice((256, no))
        )

    rules = [rule(size(), rng.randrange(2)) for _ in range(6)]
    return rules + [rule(plan.Size(), algorithm) for algorithm in rng.sample(range(2), 2)]


def some_group(n: int, rng: random.Random, *, early: bool, small: bool) -> workspace.LocalGroup:
    """A local group with a plan of its own. small: its inbox takes a part of the longest calls."""
    device = torch.cuda.current_device()
    info = gemma_ar_norm._C.device_info(device)
    share = max(4, info["multiprocessors"] // n // 2)
    rules = some_rules(rng, share, clusters=info["max_cluster"] >= 4, early=early)
    arguments = {"hidden_size": LONG_HIDDEN, "max_rows": 64, "dtype": torch.float32}
    arguments["timeout_s"] = TIMEOUT_S
    with contextlib.ExitStack() as stack:
        if small:
            patch = mock.patch.object(gemma_ar_norm._C, "inbox_bytes", return_value=SMALL_INBOX)
            stack.enter_context(patch)
        group = workspace._local_group(n, device, rules, arguments)
    assert (group[0].workspace.inbox_bytes == SMALL_INBOX) == small
    return group


# ------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pair:
    """The inputs of a pair of calls, as places in the memory of its batch."""

    first: int  # of its elements
    rows: int
    hidden: int
    form: str
    weight_dtype: torch.dtype
    weights: tuple[int, int]  # where weight and post_weight begin

    @staticmethod
    def of(rng: random.Random, first: int, dtype: torch.dtype) -> Pair:
        is_long = rng.randrange(LONG) == 0
        hidden = LONG_HIDDEN if is_long else rng.choice(HIDDENS)
        begins = [8 * rng.randrange((WEIGHTS - hidden) // 8) for _ in range(2)]
        return Pair(
            first=first,
            rows=rng.choice(LONG_ROWS if is_long else ROWS),
            hidden=hidden,
            form=rng.choice(checks.FORMS),
            weight_dtype=rng.choice((dtype, torch.float32)),
            weights=(begins[0], begins[1]),
        )

    @property
    def end(self) -> int:
        return self.first + self.rows * self.hidden


class Batch:
    """Pairs of one dtype, with all their memory."""

    def __init__(self, n: int, rng: random.Random) -> None:
        self.n, self.rng = n, rng
        self.dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
        self.pairs: list[Pair] = []
        for _ in range(BATCH):
            first = self.pairs[-1].end if self.pairs else 0
            self.pairs.append(Pair.of(rng, first, self.dtype))
        self.elements = self.pairs[-1].end

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=DEVICE)

        self.x, self.residual = empty(n, self.elements), empty(self.elements)
        self.weights = {of: empty(WEIGHTS, dtype=of) for of in (self.dtype, torch.float32)}
        # Of each side: norm_out and residual_out of every rank.
        self.out = [[empty(n, self.elements) for _ in range(2)] for _ in range(2)]
        self.generator = torch.Generator(DEVICE).manual_seed(rng.randrange(1 << 32))

    def refill(self) -> None:
        """New inputs, and outputs poisoned: differently on the two sides."""
        self.x.normal_(0, self.n**-0.5, generator=self.generator)
        self.residual.normal_(generator=self.generator)
        for weights in self.weights.values():
            weights.normal_(0, 0.1, generator=self.generator)
        for poison, outputs in zip((77.0, -55.0), self.out, strict=True):
            for output in outputs:
                output.fill_(poison)

    def weights_of(self, pair: Pair) -> list[Tensor]:
        return [self.weights[pair.weight_dtype][at : at + pair.hidden] for at in pair.weights]

    def view(self, memory: Tensor, pair: Pair, first: int, rows: int, rank: int = 0) -> Tensor:
        """These rows of a pair, of what a rank has in this memory."""
        at = rank * self.elements + pair.first + first * pair.hidden
        return memory.as_strided((rows, pair.hidden), (pair.hidden, 1), at)

    def parts(self, rows: int) -> list[tuple[int, int]]:
        """(first row, rows) of the calls that together are one call of all rows."""
        cuts = []
        if rows > 1 and self.rng.random() < 0.4:
            cuts = sorted(self.rng.sample(range(1, rows), self.rng.randint(1, min(3, rows - 1))))
        return list(
            itertools.starmap(lambda a, b: (a, b - a), itertools.pairwise([0, *cuts, rows]))
        )

    def calls(self, side: int, groups: Sequence[workspace.LocalGroup]) -> list[list[tuple]]:
        """For each pair (rank, arguments, outputs) of all calls of this side, in order."""
        found = []
        for pair in self.pairs:
            calls: list[tuple] = []
            group, algorithm = self.rng.choice(groups), self.rng.choice(ALGORITHMS)
            weight, post_weight = self.weights_of(pair)
            for part in self.parts(pair.rows):
                plain, sandwich = pair.form == "plain", pair.form == "sandwich"
                shared = (
                    weight,
                    None if plain else self.view(self.residual, pair, *part),
                    post_weight if sandwich else None,
                    1e-6,
                    1.0,
                )
                for r, rank in enumerate(group):
                    x, norm_out, residual_out = (
                        self.view(memory, pair, *part, r) for memory in (self.x, *self.out[side])
                    )
                    out = {"norm_out": norm_out, "residual_out": residual_out}
                    calls.append((r, (x, *shared, rank.group_name, algorithm), out))
            found.append(calls)
        return found

    def wrong(self) -> Tensor:
        """How many elements differ from those of rank 0 on the first side, or are those of
        reference.py in one of the pairs and differ there; on the device."""
        count = torch.zeros((), dtype=torch.int64, device=DEVICE)
        bits = checks.BITS[self.dtype]
        for i in range(2):
            first = self.out[0][i][0].view(bits)
            for side in range(2):
                count += (self.out[side][i].view(bits) != first).sum()
        pair = self.rng.choice(self.pairs)
        for got, want in zip(self.got(pair, 0, 0), self.case(pair).expected(), strict=True):
            count += (got.view(bits) != want.view(bits)).sum()
        return count

    def case(self, pair: Pair) -> Case:
        weight, post_weight = self.weights_of(pair)
        return Case(
            [self.view(self.x, pair, 0, pair.rows, r) for r in range(self.n)],
            weight,
            None if pair.form == "plain" else self.view(self.residual, pair, 0, pair.rows),
            post_weight if pair.form == "sandwich" else None,
            1e-6,
            1.0,
            str(pair),
        )

    def got(self, pair: Pair, side: int, rank: int) -> list[Tensor]:
        return [self.view(out, pair, 0, pair.rows, rank) for out in self.out[side]]

    def explain(self, kinds: Sequence[str]) -> None:
        """Raises for the first output that is wrong."""
        for i, pair in enumerate(self.pairs):
            wants = self.case(pair).expected()
            for side, rank in itertools.product(range(2), range(self.n)):
                for name, got, want in zip(
                    ("norm_out", "residual_out"), self.got(pair, side, rank), wants, strict=True
                ):
                    what = f"pair {i}, {kinds[side]} (of {kinds}): {name} of rank {rank}: {pair}"
                    checks.assert_bit_equal(got, want, what)


def enqueue(pairs: Sequence[Sequence[tuple]], streams: Sequence[torch.cuda.Stream]) -> None:
    """Each call on its rank's stream. (set_stream: less host time than a context manager.)"""
    before = torch.cuda.current_stream()
    try:
        for r, arguments, out in itertools.chain.from_iterable(pairs):
            torch.cuda.set_stream(streams[r])
            fused(*arguments, **out)
    finally:
        torch.cuda.set_stream(before)


def capture(
    pairs: Sequence[Sequence[tuple]], streams: Sequence[torch.cuda.Stream]
) -> list[torch.cuda.CUDAGraph]:
    """Graphs with a branch for each rank."""
    graphs = []
    for first in range(0, len(pairs), GRAPH):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            base = torch.cuda.current_stream()
            for stream in streams:
                stream.wait_stream(base)
            enqueue(pairs[first : first + GRAPH], streams)
            for stream in streams:
                base.wait_stream(stream)
    return graphs


KINDS = ("eager", "eager", "early eager", "graph", "early graph")


@pytest.mark.parametrize("n", PAIRS)
def test_pairs_of_calls(n):
    seed = checks.fresh_seed()
    print(f"{n} ranks: seed {seed}")  # shown when it fails
    rng = random.Random(seed)
    start, done, used = time.monotonic(), 0, Counter()
    info = gemma_ar_norm._C.device_info(torch.cuda.current_device())
    has_early = info["compute_capability"] >= (9, 0)
    possible = [kind for kind in KINDS if has_early or "early" not in kind]
    deck: list[str] = []
    with contextlib.ExitStack() as stack:

        def some_groups(count: int, early: bool) -> list[workspace.LocalGroup]:
            made = [some_group(n, rng, early=early, small=i % 2 == 1) for i in range(count)]
            return [stack.enter_context(group) for group in made]

        groups = some_groups(6, early=False)
        early_groups = some_groups(4, early=True) if has_early else []
        streams = [torch.cuda.Stream() for _ in range(n)]
        while done < PAIRS[n]:
            batch = Batch(n, rng)
            batch.refill()
            kinds, sides = [], []
            for side in range(2):
                deck = deck or rng.sample(possible, len(possible))
                kind = deck.pop()
                early = "early" in kind
                calls = batch.calls(side, [rng.choice(early_groups)] if early else groups)
                kinds.append(kind)
                sides.append((calls, capture(calls, streams) if "graph" in kind else []))
            for repeat in range(3 if "graph" in "".join(kinds) else 1):
                if repeat > 0:
                    batch.refill()
                torch.cuda.synchronize()
                for calls, graphs in sides:
                    if not graphs:
                        enqueue(calls, streams)
                    for graph in graphs:
                        graph.replay()
                    torch.cuda.synchronize()
                if batch.wrong().item():
                    for group in (*groups, *early_groups):
                        group.synchronize()  # a timeout says more than its NaN
                    batch.explain(kinds)
                    raise AssertionError("wrong at first, right when looked at again")
                used.update(kinds)
            done += BATCH
        for group in (*groups, *early_groups):
            group.synchronize()
    took = time.monotonic() - start
    print(f"{n} ranks: {done} pairs, {took:.1f} s; batches of their calls: {dict(used)}")
    assert set(used) == set(possible)


# ------------------------------------------------------------------------ against reference.py

SHAPES = (
    (1, 16384),
    (1, 640),
    (3, 8),
    (5, 72),
    (7, 2880),
    (15, 5376),
    (64, 1152),
    (64, 4096),
    (333, 264),
    (333, 2304),
)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_both_algorithms_against_the_reference(n):
    """Also where there are fewer rows, or fewer packs of a row, than ranks."""
    seed = checks.fresh_seed()
    print(f"{n} ranks: seed {seed}")
    rng = random.Random(seed)
    with gemma_ar_norm.local_group(n, hidden_size=8192, max_rows=64, timeout_s=TIMEOUT_S) as group:
        kinds = itertools.product(checks.DTYPES, checks.FORMS, SHAPES)
        for i, (dtype, form, (rows, hidden)) in enumerate(kinds):
            made = checks.make_case(
                n,
                rows,
                hidden,
                dtype,
                form,
                weight_dtype=rng.choice((dtype, torch.float32)),
                weight_std=rng.choice((0.1, 1.0)),
                special=rng.choice((None, None, "mixed")),
                seed=rng.randrange(1 << 32),
                device=DEVICE,
            )
            calls = [Call.of(made, algorithm=algorithm) for algorithm in ALGORITHMS]
            for call in calls:
                call.poison()
            torch.cuda.synchronize()
            for call in calls:
                call.enqueue(group)
            torch.cuda.synchronize()
            if sum(call.wrong() for call in calls).item():
                group.synchronize()
                for call in calls:
                    call.explain(f"case {i}")
            checks.assert_near_float64(made, *calls[-1].out[n - 1])
