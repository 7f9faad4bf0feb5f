"""One rank of the tests by processes: runs a list of cases and writes what it found.

    python tests/gpu/worker.py DIRECTORY [CASE ...]     (started by processes.py)

Every rank writes DIRECTORY/rank<r>.jsonl, a line a case: {"case", "failures", "seconds"}. A wrong
value does not end a case, so that all ranks go on making the same calls; an exception on any rank
ends the run after that case. It runs on the CPU too, where a graph is a function called again: that
is how the cases themselves are tried without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import checks
import torch
import torch.distributed as dist
from checks import Case
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import WorkspaceError, groups, launcher, plan
from gemma_ar_norm.library import _C
from gpu import compile_cases

BF16, FP16, FP32 = checks.DTYPES
ROWS = (1, 4, 8, 15, 64, 127, 128, 256, 333, 998, 1024, 2048)
HIDDENS = (640, 1024, 1152, 2048, 2304, 2880, 3584, 4096, 5120, 5376, 7168, 8192, 16384)
# Of all ranks' inputs together. Every rank makes them all, on its CPU.
MAX_ELEMENTS = 17_000_000
SMALL_ELEMENTS = 300_000  # on the CPU

FUSED = plan.FUSED_ALGORITHMS
ALGORITHMS = ("auto", *FUSED)
TIMEOUT_S = 20.0
REPLAYS = 20

CASES: dict[str, Callable[[Ranks], None]] = {}
MIN_WORLD: dict[str, int] = {}
# Each is a run of its own: it ends its group, or needs another placement.
APART = ("deadline", "a_rank_that_raises", "shares_that_differ")
APART += tuple(function.__name__ for function in compile_cases.CASES)  # those take long


def case(function=None, *, world: int = 2):
    """Registers a case for runs with so many ranks or more."""
    if function is None:
        return lambda f: case(f, world=world)
    CASES[function.__name__] = function
    MIN_WORLD[function.__name__] = world
    return function


for function in compile_cases.CASES:
    case(function)


def cases_of(world: int) -> list[str]:
    """The names of the cases that one run of so many ranks has."""
    return [name for name in CASES if MIN_WORLD[name] <= world and name not in APART]


# ------------------------------------------------------------------------------------ what they use


@dataclass
class Ranks:
    """This rank among the others, its calls, and what it found wrong."""

    rank: int
    world: int
    device: torch.device
    failures: list[str]

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    # ---- inputs

    def case(
        self, rows: int, hidden: int, dtype=BF16, form="residual", *, seed, ranks=0, **options
    ):
        """The same case on every rank: made on the CPU, because a GPU's random numbers depend on
        how many multiprocessors a process may use."""
        made = checks.make_case(
            ranks or self.world, rows, hidden, dtype, form, seed=seed, **options
        )
        return self.to_device(made)

    def to_device(self, made: Case) -> Case:
        moved = {
            name: None if getattr(made, name) is None else getattr(made, name).to(self.device)
            for name in ("weight", "residual", "post_weight")
        }
        return replace(made, xs=[x.to(self.device) for x in made.xs], **moved)

    # ---- calls

    def call(self, made: Case, *, rank: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        x = made.xs[self.rank if rank is None else rank]
        return gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
            x, made.weight, **{**made.options, **options}
        )

    def call_each(self, made: Case, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The call by each fused algorithm. Nothing waits between them."""
        return {one: self.call(made, algorithm=one, **options) for one in FUSED}

    def synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    # ---- checks: they note what is wrong and go on

    def expect(self, condition: bool, what: object) -> None:
        if not condition:
            self.failures.append(str(what)[:2000])

    def expect_result(self, made: Case, outputs: Sequence[Tensor], what: str = "") -> None:
        """Both outputs have the contract's bits, and lie within the promised ulps of float64."""
        self.expect_bits(made, outputs, what)
        if outputs[0].shape == made.xs[0].shape:
            self._noted(checks.assert_near_float64, made, *outputs)

    def expect_each(self, made: Case, what: str = "", **options: Any) -> list[Tensor]:
        """`expect_result` of `call_each`; returns all outputs."""
        found = self.call_each(made, **options)
        for algorithm, outputs in found.items():
            self.expect_result(made, outputs, f"{what} {algorithm}")
        return [output for outputs in found.values() for output in outputs]

    def expect_bits(self, made: Case, outputs: Sequence[Tensor], what: str = "") -> None:
        for name, got, want in zip(
            ("norm_out", "residual_out"), outputs, made.expected(), strict=True
        ):
            self._noted(checks.assert_bit_equal, got, want, f"{what} {name} of {made}")

    def expect_close(
        self, made: Case, outputs: Sequence[Tensor], relative: float, what: str
    ) -> None:
        for name, got, want in zip(
            ("norm_out", "residual_out"), outputs, made.expected(), strict=True
        ):
            error = ((got.double() - want.double()).norm() / want.double().norm()).item()
            self.expect(error <= relative, f"{what}: {name} is {error:.2e} off; {made}")

    def expect_equal_everywhere(self, digest: Digest, what: str = "", group=None) -> None:
        """Collective. Every rank of the group put the same bits into its digest."""
        found = groups.all_gather_json(groups.resolve(group), digest.text())
        self.expect(len(set(found)) == 1, f"{what}: ranks have different bits: {found}")

    def expect_same_bits_everywhere(self, *tensors: Tensor) -> None:
        """Collective, of the default group."""
        digest = Digest()
        digest.add(*tensors)
        self.expect_equal_everywhere(digest)

    @contextmanager
    def expect_raises(self, kind: type[Exception], *words: str) -> Iterator[list[Exception]]:
        """The block raises this, and the message has these words."""
        caught: list[Exception] = []
        try:
            yield caught
        except kind as error:
            caught.append(error)
            for word in words:
                self.expect(word in str(error), f"{word!r} is not in {str(error)!r}")
        else:
            self.expect(False, f"no {kind.__name__} was raised")

    def _noted(self, check: Callable[..., Any], *arguments: Any) -> None:
        try:
            check(*arguments)
        except AssertionError as error:
            self.expect(False, error)


class Digest:
    """The bits of many tensors, every NaN the same."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            plain = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
            plain = plain.detach().cpu().contiguous()
            size = plain.numel() * plain.element_size()
            self._hash.update(ctypes.string_at(plain.data_ptr(), size) if size else b"")

    def text(self) -> str:
        return self._hash.hexdigest()


class Graph:
    """A captured function, and its outputs, which every replay writes."""

    def __init__(self, ranks: Ranks, calls: Callable[[], list[Tensor]]) -> None:
        self._calls = calls
        self._graph = torch.cuda.CUDAGraph() if ranks.gpu else None
        # gloo's and NCCL's threads may call CUDA meanwhile.
        mode = {"capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._graph, **mode) if self._graph else nullcontext():
            self.outputs = calls()

    def replay(self) -> None:
        """With the outputs poisoned before."""
        for output in self.outputs:
            output.fill_(77.0)
        if self._graph is not None:
            self._graph.replay()
        else:
            for output, new in zip(self.outputs, self._calls(), strict=True):
                output.copy_(new)


def refill(old: Case, new: Case) -> None:
    """The new case's values in the old one's memory, which a graph has captured."""
    pairs = [*zip(old.xs, new.xs, strict=True), (old.weight, new.weight)]
    pairs += [(old.residual, new.residual), (old.post_weight, new.post_weight)]
    for into, values in pairs:
        if into is not None:
            into.copy_(values)


# --------------------------------------------------------------------------------------- the cases


def matrix(world: int, max_elements: int = MAX_ELEMENTS) -> list[dict[str, Any]]:
    """Arguments of make_case: every number of rows and every hidden size at least once, and the
    other choices spread over them, differently for each number of ranks."""
    rng = random.Random(world)
    chosen = []
    for i in range(2 * len(HIDDENS)):
        rows, hidden = ROWS[i % len(ROWS)], HIDDENS[(i + world) % len(HIDDENS)]
        limit = max_elements // world
        if i < len(HIDDENS):  # this round keeps the hidden size, the second the number of rows
            rows = max([r for r in ROWS if r <= rows and r * hidden <= limit], default=1)
        else:
            hidden = max([h for h in HIDDENS if h <= hidden and rows * h <= limit], default=640)
        dtype = rng.choice(checks.DTYPES)
        chosen.append(
            {
                "rows": rows,
                "hidden": hidden,
                "dtype": dtype,
                "form": checks.FORMS[i % 3],
                "weight_dtype": rng.choice((dtype, FP32)),
                "weight_std": rng.choice((0.1, 1.0)),
                "weight_bias": rng.choice((0.0, 1.0)),
                "eps": rng.choice((1e-6, 1e-5)),
                "seed": rng.randrange(1 << 32),
            }
        )
    return chosen


@case
def shapes_dtypes_and_forms(ranks: Ranks) -> None:
    digest = Digest()
    for options in matrix(ranks.world, MAX_ELEMENTS if ranks.gpu else SMALL_ELEMENTS):
        digest.add(*ranks.expect_each(ranks.case(**options)))
    ranks.expect_equal_everywhere(digest)


@case
def rows_that_change_every_call(ranks: Ranks) -> None:
    """And the algorithm."""
    digest, results = Digest(), []
    for i, rows in enumerate((1, 16, 1, 96, 1, 0, 2, 0, 96, 1, 1, 96, 16, 16)):
        made = ranks.case(rows, 2880, seed=i, form=checks.FORMS[i % 3])
        for algorithm in (FUSED[i // 2 % 2], "auto"):
            results.append((made, ranks.call(made, algorithm=algorithm)))  # nothing waits
    for made, outputs in results:
        ranks.expect_result(made, outputs)
        digest.add(*outputs)
    ranks.expect_equal_everywhere(digest)


@case
def fewer_rows_than_ranks(ranks: Ranks) -> None:
    for rows in range(ranks.world + 2):
        for form in checks.FORMS:
            made = ranks.case(rows, 1152, FP16, form, seed=rows)
            for output in ranks.expect_each(made):
                ranks.expect(output.shape == (rows, 1152), f"shape {tuple(output.shape)}")


@case
def leading_dimensions(ranks: Ranks) -> None:
    made = ranks.case(24, 640, seed=5)
    x, residual = (v.view(2, 3, 4, 640) for v in (made.xs[ranks.rank], made.residual))
    outputs = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, made.weight, residual)
    ranks.expect(outputs[0].shape == outputs[1].shape == x.shape, outputs[0].shape)
    ranks.expect_result(made, [output.reshape(24, 640) for output in outputs])
    one_row = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
        made.xs[ranks.rank][3], made.weight, made.residual[3]
    )
    ranks.expect(one_row[0].shape == (640,), one_row[0].shape)
    for one, many in zip(
        one_row, outputs, strict=True
    ):  # the number of rows does not change a row's bits
        ranks._noted(checks.assert_bit_equal, one, many.reshape(24, 640)[3], "one row of 24")


@case
def residuals_that_differ(ranks: Ranks) -> None:
    for i, form in enumerate(("residual", "sandwich")):
        made = ranks.case(33, 2304, form=form, seed=i)
        residual = checks.make_case(1, 33, 2304, BF16, seed=100 + ranks.rank).residual
        ranks.expect_each(replace(made, residual=residual.to(ranks.device)))


@case
def weights_in_fp32(ranks: Ranks) -> None:
    for i, dtype in enumerate((BF16, FP16)):
        for std in (0.001, 1.0):  # 1 + 0.001 is 1 in bf16
            made = ranks.case(9, 5376, dtype, "sandwich", seed=i, weight_dtype=FP32, weight_std=std)
            ranks.expect_each(made)


@case
def two_hidden_sizes_and_dtypes_on_one_workspace(ranks: Ranks) -> None:
    generation = gemma_ar_norm.init(timeout_s=TIMEOUT_S).generation
    results = []
    for i in range(12):
        hidden, dtype = (5376, 1152, 16384)[i % 3], checks.DTYPES[i // 2 % 3]
        made = ranks.case((7, 64)[i % 2], hidden, dtype, checks.FORMS[i // 3 % 3], seed=i)
        results += [(made, outputs) for outputs in ranks.call_each(made).values()]
    for made, outputs in results:
        ranks.expect_result(made, outputs)
    again = gemma_ar_norm.init(timeout_s=TIMEOUT_S)
    ranks.expect(again.generation == generation + 1, f"generation {again.generation}")
    ranks.expect(again.fused == ranks.gpu, again.reason)


@case
def special_values(ranks: Ranks) -> None:
    """NaN words 0xFFFFFFFF, -0.0, infinities, subnormals, sums and squares out of range."""
    digest = Digest()
    for i, special in enumerate((*checks.SPECIALS, "mixed")):
        for dtype in checks.DTYPES:
            for form in checks.FORMS:
                made = ranks.case(11, 1024, dtype, form, seed=i, special=special, eps=1e-5)
                digest.add(*ranks.expect_each(made, special))
    ranks.expect_equal_everywhere(digest)


@case
def out_may_alias(ranks: Ranks) -> None:
    names = ("separate", "residual", "residual swapped", "x", "x and residual")
    for i, alias in enumerate(names):
        for form, algorithm in itertools.product(("residual", "sandwich"), FUSED):
            made = ranks.case(40, 3584, form=form, seed=i)
            expected = made.expected()
            x, residual = made.xs[ranks.rank].clone(), made.residual.clone()
            new = checks.poisoned_like(x)
            out = {
                "separate": (new, checks.poisoned_like(x)),
                "residual": (new, residual),
                "residual swapped": (residual, new),
                "x": (x, new),
                "x and residual": (x, residual),
            }[alias]
            got = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                x,
                made.weight,
                **{**made.options, "residual": residual},
                algorithm=algorithm,
                out=out,
            )
            for result, written, want in zip(got, out, expected, strict=True):
                ranks.expect(
                    result.data_ptr() == written.data_ptr(), "out= is not what is returned"
                )
                what = f"{algorithm}, out aliases {alias}, {made}"
                ranks._noted(checks.assert_bit_equal, written, want, what)
            if alias == "separate":
                ranks._noted(checks.assert_bit_equal, x, made.xs[ranks.rank], "x was changed")
                ranks._noted(checks.assert_bit_equal, residual, made.residual, "residual changed")


@case
def strided_and_misaligned_inputs(ranks: Ranks) -> None:
    def every_second(v: Tensor) -> Tensor:
        return torch.stack([v, torch.full_like(v, 9.0)], dim=-1)[..., 0]

    def wide_rows(v: Tensor) -> Tensor:
        return torch.cat([v, torch.full_like(v, 9.0)], dim=-1)[..., : v.shape[-1]]

    def misaligned(v: Tensor) -> Tensor:
        flat = torch.cat([v.new_full((1,), 9.0), v.reshape(-1)])
        return flat[1:].view(v.shape)

    layouts = (every_second, wide_rows, misaligned)
    for i, layout in enumerate(layouts):
        made = ranks.case(19, 2048, form="sandwich", seed=i)
        moved = replace(
            made,
            xs=[layout(x) for x in made.xs],
            residual=layouts[(i + 1) % 3](made.residual),
            weight=layouts[(i + 2) % 3](made.weight),
            post_weight=layout(made.post_weight),
        )
        for algorithm, outputs in ranks.call_each(moved).items():
            ranks.expect_result(made, outputs, f"{layout.__name__} {algorithm}")


@case
def larger_than_the_workspace(ranks: Ranks) -> None:
    group = dist.new_group(list(range(ranks.world)))
    with gemma_ar_norm.init(
        group, hidden_size=1024, max_rows=1, dtype=BF16, timeout_s=TIMEOUT_S
    ) as workspace:
        if ranks.gpu:
            ranks.expect(workspace.inbox_bytes == 2 << 20, f"{workspace.inbox_bytes} bytes")
        for i, (rows, hidden, dtype) in enumerate(
            ((700, 5376, BF16), (3, 16384, FP32), (333, 16384, FP16), (1, 1024, BF16))
        ):
            made = ranks.case(
                rows if ranks.gpu else min(rows, 12), hidden, dtype, checks.FORMS[i % 3], seed=i
            )
            ranks.expect_each(made, group=group)
            ranks.expect_result(made, ranks.call(made, group=group), "auto")
    dist.destroy_process_group(group)


@case(world=3)
def subgroups(ranks: Ranks) -> None:
    """Neighbours and every second rank, and between their calls those of the whole group."""
    half = ranks.world // 2
    blocks = [list(range(half)), list(range(half, ranks.world))]
    stripes = [list(range(0, ranks.world, 2)), list(range(1, ranks.world, 2))]
    mine = []
    for members in (*blocks, *stripes):
        group = dist.new_group(members)  # collective on all ranks, also on those outside
        if ranks.rank in members:
            mine.append((group, members))
    for group, _ in mine:
        gemma_ar_norm.init(group, hidden_size=4096, max_rows=32, timeout_s=TIMEOUT_S)
    for i in range(6):
        for group, members in mine:
            made = ranks.case(5 + i, 4096, seed=100 * members[0] + i, ranks=len(members))
            own = {"group": group, "rank": members.index(ranks.rank)}
            digest = Digest()
            if len(members) > 1 or not ranks.gpu:
                digest.add(*ranks.expect_each(made, f"ranks {members}", **own))
            outputs = ranks.call(made, **own)
            ranks.expect_result(made, outputs, f"ranks {members}")
            digest.add(*outputs)
            ranks.expect_equal_everywhere(digest, f"ranks {members}", group)
        ranks.expect_each(ranks.case(6 - i, 4096, seed=i), "all ranks")
    for group, _ in mine:
        dist.destroy_process_group(group)


@case
def several_streams(ranks: Ranks) -> None:
    """Eager calls from two streams in turn; nothing of the test's own puts them in order."""
    streams = [torch.cuda.Stream() for _ in range(2)] if ranks.gpu else [None, None]
    results = [ranks.case(1 + 13 * (i % 3), 2048, seed=i) for i in range(10)]
    ranks.synchronize()
    outputs = []
    for i, made in enumerate(results):
        with torch.cuda.stream(streams[i % 2]) if ranks.gpu else nullcontext():
            outputs.append(ranks.call(made, algorithm=ALGORITHMS[i % 3]))
    ranks.synchronize()
    for made, output in zip(results, outputs, strict=True):
        ranks.expect_result(made, output)


# ---- graphs


@case
def graph_of_dependent_calls(ranks: Ranks) -> None:
    """Four calls, the residual of each from the one before; all inputs new in every replay. The
    algorithms take turns."""
    for form, dtype, rows in (("residual", BF16, 16), ("sandwich", FP16, 3)):
        layers = [ranks.case(rows, 4096, dtype, form, seed=i) for i in range(4)]
        ranks.call(layers[0])

        def calls(layers=layers) -> list[Tensor]:
            outputs, residual = [], layers[0].residual
            for i, layer in enumerate(layers):
                algorithm = FUSED[i % 2]
                norm_out, residual = ranks.call(layer, residual=residual, algorithm=algorithm)
                outputs += [norm_out, residual]
            return outputs

        graph = Graph(ranks, calls)
        digest = Digest()
        for replay in range(REPLAYS):
            for i, layer in enumerate(layers):
                refill(layer, ranks.case(rows, 4096, dtype, form, seed=1000 * replay + i))
            graph.replay()
            residual = layers[0].residual
            for i, layer in enumerate(layers):
                got = graph.outputs[2 * i : 2 * i + 2]
                ranks.expect_result(replace(layer, residual=residual), got, f"replay {replay}")
                residual = got[1]
            digest.add(*graph.outputs)
        ranks.expect_equal_everywhere(digest, form)


@case
def graph_with_inputs_overwritten(ranks: Ranks) -> None:
    """Calls of several sizes and dtypes in one graph; each input is overwritten right after its
    call, so that a kernel which reads it late, or too early, is seen. Eager calls in between."""
    sizes = ((1, 2048, BF16), (16, 1152, FP32), (1, 5376, BF16), (96, 2880, FP16), (1, 2048, BF16))
    layers = [
        ranks.case(rows, hidden, dtype, checks.FORMS[i % 3], seed=i)
        for i, (rows, hidden, dtype) in enumerate(sizes)
    ]
    for layer in layers:
        ranks.call(layer)
    scratch = [layer.xs[ranks.rank].clone() for layer in layers]

    def calls() -> list[Tensor]:
        outputs: list[Tensor] = []
        for i, (layer, x) in enumerate(zip(layers, scratch, strict=True)):
            x.copy_(layer.xs[ranks.rank])
            outputs += gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                x, layer.weight, **layer.options, algorithm=FUSED[(i + 1) // 2 % 2]
            )
            x.fill_(float("nan"))
        return outputs

    graph = Graph(ranks, calls)
    for replay in range(REPLAYS):
        for i, layer in enumerate(layers):
            fresh = ranks.case(*sizes[i], checks.FORMS[i % 3], seed=1000 * replay + i, special=None)
            refill(layer, fresh)
        graph.replay()
        for i, layer in enumerate(layers):
            got = graph.outputs[2 * i : 2 * i + 2]
            ranks.expect_bits(layer, got, f"replay {replay}")
        if replay % 5 == 0:
            for algorithm, outputs in ranks.call_each(layers[3]).items():
                ranks.expect_bits(layers[3], outputs, f"eager between replays, {algorithm}")


@case
def graph_whose_weight_changes(ranks: Ranks) -> None:
    """Between replays, and by a kernel of the graph right before the call."""
    made = ranks.case(4, 4096, form="sandwich", seed=1)
    next_weights = [made.weight.clone() for _ in range(2)]
    ranks.call(made)

    def calls() -> list[Tensor]:
        outputs: list[Tensor] = []
        for i, algorithm in enumerate((*FUSED, FUSED[0])):
            if i > 0:
                made.weight.copy_(next_weights[i - 1])
            outputs += ranks.call(made, algorithm=algorithm)
        return outputs

    graph = Graph(ranks, calls)
    for replay in range(REPLAYS):
        fresh = ranks.case(4, 4096, form="sandwich", seed=10 * replay)
        refill(made, fresh)
        for i, weight in enumerate(next_weights):
            weight.copy_(ranks.case(4, 4096, seed=10 * replay + 1 + i).weight)
        graph.replay()
        for i, weight in enumerate((fresh.weight, *next_weights)):
            updated, got = replace(fresh, weight=weight), graph.outputs[2 * i : 2 * i + 2]
            ranks.expect_bits(updated, got, f"replay {replay}, call {i}")


# ---- paths


@case
def the_unfused_path(ranks: Ranks) -> None:
    """The group's own all-reduce, in whatever order it adds: close, no more."""
    for i, (dtype, relative) in enumerate(((BF16, 3e-2), (FP16, 4e-3), (FP32, 1e-5))):
        for form in checks.FORMS:
            made = ranks.case(21, 2304, dtype, form, seed=i)
            kept = made.xs[ranks.rank].clone()
            outputs = ranks.call(made, algorithm="unfused")
            ranks.expect_close(made, outputs, relative, f"unfused {dtype} {form}")
            ranks._noted(checks.assert_bit_equal, made.xs[ranks.rank], kept, "x was changed")


@case
def torch_compile(ranks: Ranks) -> None:
    """One graph for all numbers of rows, without a break, whatever algorithm they take."""
    from torch._dynamo.testing import CompileCounterWithBackend

    weights = [ranks.case(1, 1024, seed=i).weight for i in range(2)]

    def block(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        norm_out, residual = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
            x + 1, weights[0], residual
        )
        return gemma_ar_norm.fused_allreduce_gemma_rmsnorm(norm_out * 2, weights[1], residual)

    # Inductor once: it takes a while to start.
    backend = "inductor" if ranks.gpu and ranks.world == 2 else "aot_eager"
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    sizes = [4, 16, 7, 96, 4]
    # Of 8 MiB, so that one launch takes what two GPUs do by two-shot too.
    workspace = gemma_ar_norm.init(hidden_size=8192, max_rows=512, timeout_s=TIMEOUT_S)
    if workspace.fused:
        most = plan.most_one_shot_rows(workspace.rules, MAX_ELEMENTS, 1024 * 2 // 16)
        sizes[2:2] = [most + 1, most, most + 8]
        paths = {gemma_ar_norm.explain(rows, 1024).path for rows in sizes}
        ranks.expect(paths == set(FUSED), f"the plan takes {paths} for {sizes} rows")
    counts = []
    for i, rows in enumerate(sizes):
        made = ranks.case(rows, 1024, seed=i)
        dist.barrier()  # compiling takes longer than a call may wait
        outputs = compiled(made.xs[ranks.rank], made.residual)
        first = replace(made, xs=[x + 1 for x in made.xs], weight=weights[0])
        norm_out, residual = first.expected()
        second = replace(
            made, xs=[norm_out * 2] * ranks.world, weight=weights[1], residual=residual
        )
        ranks.expect_bits(second, outputs, f"compiled, {rows} rows")
        counts.append(counter.frame_count)
    ranks.expect(counts == counts[:1] * len(sizes), f"compiled again: {counts} for {sizes} rows")
    targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    ours = [target for target in targets if "gemma_ar_norm" in target]
    ranks.expect(len(ours) == 2, f"ops in the graph: {targets}")


@case
def opcheck(ranks: Ranks) -> None:
    name = groups.name_of(None)
    op = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm
    for form in checks.FORMS:
        made = ranks.case(6, 640, form=form, seed=3)
        x = made.xs[ranks.rank]
        tensors = (x, made.weight, made.residual, made.post_weight)
        for algorithm in ("auto", FUSED[1]):
            arguments = (*tensors, 1e-6, 1.0, name, algorithm)
            torch.library.opcheck(op.default, arguments)
            out = {"norm_out": torch.empty_like(x), "residual_out": torch.empty_like(x)}
            torch.library.opcheck(op.out, arguments, out)


@case
def a_workspace_made_by_the_first_call(ranks: Ranks) -> None:
    group = dist.new_group(list(range(ranks.world)))
    made = ranks.case(2, 640, seed=1)
    if ranks.gpu:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ranks.expect_raises(RuntimeError, "capture", "init"),
        ):
            ranks.call(made, group=group)
        del graph
        ranks.synchronize()
    ranks.expect_result(made, ranks.call(made, group=group), "after the refusal")
    said = gemma_ar_norm.explain(2, 640, BF16, group=group, device=ranks.device)
    ranks.expect(said.path not in ("undecided", ""), f"explain() says {said}")
    dist.destroy_process_group(group)


@case
def closed_and_made_again(ranks: Ranks) -> None:
    group = dist.new_group(list(range(ranks.world)))
    made = ranks.case(5, 1024, seed=2)
    for size in (1, 64, 8):
        workspace = gemma_ar_norm.init(group, max_rows=size, timeout_s=TIMEOUT_S)
        ranks.expect_result(made, ranks.call(made, group=group), f"max_rows={size}")
        if size != 64:  # otherwise the next init replaces it
            workspace.close()
            workspace.close()
    ranks.expect_result(made, ranks.call(made, group=group), "made by the call after close()")
    dist.destroy_process_group(group)


@case
def inboxes_are_given_back(ranks: Ranks) -> None:
    """Of closed workspaces whose peers have all unmapped them, over real IPC nothing stays."""
    group = dist.new_group(list(range(ranks.world)))
    made = ranks.case(3, 1024, seed=3)
    free = []
    for _ in range(10):
        workspace = gemma_ar_norm.init(group, hidden_size=8192, max_rows=64, timeout_s=TIMEOUT_S)
        ranks.expect_result(made, ranks.call(made, group=group), "a new workspace")
        workspace.close()
        dist.barrier()  # all have closed
        if ranks.gpu:
            held = _C.reclaim()
            ranks.expect(held == 0, f"{held} retired inboxes are still held")
            dist.barrier()
            free.append(torch.cuda.mem_get_info()[0])
    # All ranks use this GPU's memory, so only the trend tells: an inbox has 16 MiB at least.
    ranks.expect(not free or free[1] - free[-1] < 16 << 20, f"free memory falls: {free}")
    dist.destroy_process_group(group)


@case
def calls_that_differ_in_debug_mode(ranks: Ranks) -> None:
    """Every rank's check() says which rank differs in what, and a new workspace works."""
    group = dist.new_group(list(range(ranks.world)))
    last = ranks.world - 1
    made, smaller = ranks.case(5, 1024, seed=4), ranks.case(4, 1024, seed=4)
    none = ranks.case(0, 1024, seed=4)
    calls = {
        "rows 5 on": (smaller, {}),
        "rows 5 ": (none, {}),
        "hidden 1024 on": (ranks.case(5, 2048, seed=4), {}),
        "x.dtype bfloat16 on": (ranks.case(5, 1024, FP16, seed=4), {}),
        "form residual on": (ranks.case(5, 1024, form="sandwich", seed=4), {}),
        "algorithm auto on": (made, {"algorithm": FUSED[1]}),
        "unfused on": (made, {"algorithm": "unfused"}),
        "eps": (replace(made, eps=1e-3), {}),
        "weight_bias 1.0 on": (replace(made, weight_bias=0.0), {}),
    }
    os.environ["GEMMA_AR_NORM_DEBUG"] = "1"
    try:
        for what, (other, options) in calls.items():
            gemma_ar_norm.init(group, hidden_size=2048, max_rows=8, timeout_s=TIMEOUT_S)
            ranks.expect_each(made, f"before {what!r}", group=group)
            ranks.synchronize()
            mine = other if ranks.rank == last else made
            with ranks.expect_raises(WorkspaceError, what, f"on rank {last}", "make the same"):
                outputs = ranks.call(mine, group=group, **(options if ranks.rank == last else {}))
                ranks.synchronize()
                ranks.expect(all(bool(o.isnan().all()) for o in outputs), f"{what}: not NaN")
                gemma_ar_norm.check(group)
            if ranks.gpu:  # the workspace stays broken
                with ranks.expect_raises(WorkspaceError, what):
                    ranks.call(made, group=group)
        gemma_ar_norm.init(group, hidden_size=1024, max_rows=8, timeout_s=TIMEOUT_S)
        ranks.expect_each(made, "in a new workspace", group=group)
        ranks.synchronize()
    finally:
        del os.environ["GEMMA_AR_NORM_DEBUG"]
    dist.destroy_process_group(group)


@case
def calls_that_differ(ranks: Ranks) -> None:
    """Without debug mode: a timeout at the worst, and a new workspace works. On the CPU path the
    call itself says at once what differs; a call that is left out ends the group."""
    group = dist.new_group(list(range(ranks.world)))
    made = ranks.case(5, 1024, seed=4)
    last, timeout_s = ranks.rank == ranks.world - 1, 1.0 if ranks.gpu else 3.0
    calls = {
        "rows": (ranks.case(4, 1024, seed=4), {}),
        "hidden": (ranks.case(5, 640, seed=4), {}),
        "algorithm": (made, {"algorithm": FUSED[1]}),
        "a call that is left out": (None, {}),
    }
    for what, (other, options) in calls.items():
        gemma_ar_norm.init(group, hidden_size=1024, max_rows=8, timeout_s=timeout_s)
        ranks.call(made, group=group)
        ranks.synchronize()
        dist.barrier()
        start = time.monotonic()
        mine, chosen = (other, options) if last else (made, {})
        if mine is not None:
            with nullcontext() if ranks.gpu else ranks.expect_raises(*_on_the_cpu(ranks, what)):
                ranks.call(mine, group=group, **{"algorithm": FUSED[0], **chosen})
        ranks.synchronize()
        dist.barrier()  # some have failed; who has not learns of it in its next call
        if ranks.gpu or other is None:
            with ranks.expect_raises(gemma_ar_norm.PeerTimeoutError):
                ranks.call(made, group=group)
                gemma_ar_norm.synchronize(group)
        else:
            ranks.expect_result(made, ranks.call(made, group=group), f"after {what}")
        took = time.monotonic() - start
        ranks.expect(took < timeout_s + 2, f"{what}: took {took:.1f} s")
        dist.barrier()
    if not ranks.gpu:
        dist.destroy_process_group(group)
        group = dist.new_group(list(range(ranks.world)))
    gemma_ar_norm.init(group, hidden_size=1024, max_rows=8, timeout_s=TIMEOUT_S)
    ranks.expect_each(made, "in a new workspace", group=group)
    ranks.synchronize()
    dist.destroy_process_group(group)


def _on_the_cpu(ranks: Ranks, what: str) -> tuple[type[Exception], str, str]:
    """What a call of `calls_that_differ` raises there, and words of it."""
    last = f"rank {ranks.world - 1}"
    if what == "a call that is left out":
        return gemma_ar_norm.PeerTimeoutError, last, "is required within 3 s"
    return WorkspaceError, f"{what} ", f"on {last}"


# ---- runs of their own


@case(world=3)
def deadline(ranks: Ranks) -> None:
    """The last rank does not call. The others learn who is missing, in time, and can go on."""
    group = dist.new_group(list(range(ranks.world)))
    made = ranks.case(5, 1024, seed=1)
    ranks.call_each(made)  # with the default time, for a kernel may be loaded by its first call
    ranks.synchronize()
    for algorithm in FUSED:
        gemma_ar_norm.init(group, hidden_size=1024, max_rows=8, timeout_s=0.5)
        outputs = ranks.call(made, group=group, algorithm=algorithm)
        ranks.expect_result(made, outputs, f"before {algorithm}")
        ranks.synchronize()
        dist.barrier()
        _one_rank_does_not_call(ranks, made, group, algorithm)
        dist.barrier()

    total = torch.ones(1000, device=ranks.device).sum().item()
    ranks.expect(total == 1000, f"the context does not work: {total}")
    gemma_ar_norm.init(group, hidden_size=1024, max_rows=8, timeout_s=TIMEOUT_S)
    ranks.expect_each(made, "after a new init", group=group)


def _one_rank_does_not_call(ranks: Ranks, made: Case, group: Any, algorithm: str) -> None:
    absent = ranks.world - 1
    if ranks.rank == absent:
        return
    out = tuple(checks.poisoned_like(made.residual) for _ in range(2))
    options = {"group": group, "algorithm": algorithm}
    start = time.monotonic()
    ranks.call(made, out=out, **options)
    ranks.synchronize()
    took = time.monotonic() - start
    ranks.expect(0.3 < took < 2.5, f"the {algorithm} call took {took:.2f} s")
    ranks.expect(all(bool(o.isnan().all()) for o in out), f"{algorithm}: outputs are not NaN")
    for _ in range(2):
        start = time.monotonic()
        with ranks.expect_raises(gemma_ar_norm.PeerTimeoutError) as caught:
            ranks.call(made, **options)
        ranks.expect(time.monotonic() - start < 0.2, "a later call waited")
        for error in caught:
            named = f"{algorithm}: peer {error.peer} is named; {absent} was it"
            ranks.expect(error.peer == absent, named)
            ranks.expect(str(absent) in str(error), f"the message names nobody: {error}")


@case
def shares_that_differ(ranks: Ranks) -> None:
    """Ranks of one GPU that have different parts of it, by MPS, choose alike for calls of any
    size. (Where there is no MPS they have no parts, and the same is asked of them.)"""
    workspace = gemma_ar_norm.init(hidden_size=8192, max_rows=256, timeout_s=TIMEOUT_S)
    share = percentage = 0.0
    if ranks.gpu:
        share = torch.cuda.get_device_properties(ranks.device).multi_processor_count
        percentage = float(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "0"))
    said = {"rules": repr(workspace.rules), "share": share, "percentage": percentage}
    all_said = groups.all_gather_json(groups.resolve(), said)
    ranks.expect(len({one["rules"] for one in all_said}) == 1, f"different rules: {all_said}")
    least = min(one["share"] for one in all_said)
    if percentage:
        print(f"shares: {[one['share'] for one in all_said]}", flush=True)
        ranks.expect(len({one["percentage"] for one in all_said}) > 1, f"no parts: {all_said}")
        multiprocessors = {rule.multiprocessors for rule in workspace.rules}
        ranks.expect(multiprocessors == {least}, f"{multiprocessors} of {all_said}")

    digest, paths = Digest(), set()
    sizes = [*itertools.product((1, 2, 7, 16, 33, 96), (640, 2880, 5376)), (333, 8192), (1000, 640)]
    for i, (rows, hidden) in enumerate(sizes):
        dtype, form = checks.DTYPES[i % 3], checks.FORMS[i // 3 % 3]
        made = ranks.case(rows if ranks.gpu else min(rows, 4), hidden, dtype, form, seed=i)
        outputs = ranks.call(made)
        ranks.expect_result(made, outputs, "auto")
        digest.add(*outputs)
        said = gemma_ar_norm.explain(rows, hidden, dtype, device=ranks.device)
        paths.add((said.path, said.launches, said.blocks, said.threads))
    ranks.expect_equal_everywhere(digest)
    all_paths = groups.all_gather_json(groups.resolve(), sorted(paths))
    ranks.expect(all(one == all_paths[0] for one in all_paths), f"different paths: {all_paths}")


@case
def a_rank_that_raises(ranks: Ranks) -> None:
    """Its process ends in a traceback and not in a hang, with a workspace open."""
    made = ranks.case(3, 1024, seed=1)
    ranks.expect_result(made, ranks.call(made))
    ranks.synchronize()
    dist.barrier()
    if ranks.rank == 1:
        raise ZeroDivisionError("as the test wants it")


# --------------------------------------------------------------------------------------------- main


def run_case(name: str, ranks: Ranks) -> dict[str, Any]:
    ranks.failures = []
    start, raised = time.monotonic(), False
    try:
        CASES[name](ranks)
        ranks.synchronize()
    except Exception:
        if name == "a_rank_that_raises":
            raise
        raised = True
        ranks.failures.append(traceback.format_exc()[-4000:])
    found = {"case": name, "failures": ranks.failures, "seconds": time.monotonic() - start}
    return {**found, "raised": raised}


def run_all(names: Sequence[str], run: Callable[[str], dict[str, Any]], results: TextIO) -> bool:
    """Runs cases and writes what was found, until one raises on any rank. Whether one failed."""
    failed = False
    for name in names:
        print(f"case {name}", flush=True)
        found = run(name)
        results.write(json.dumps(found) + "\n")
        failed = failed or bool(found["failures"])
        raised = torch.tensor([found["raised"]], dtype=torch.int32)
        dist.all_reduce(raised)
        if raised.item():
            break
    return failed


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()

    rank, world, device = launcher.init_from_env()
    ranks = Ranks(rank, world, device, [])
    workspace = gemma_ar_norm.init(hidden_size=8192, max_rows=256, timeout_s=TIMEOUT_S)
    with open(options.directory / f"rank{rank}.jsonl", "w", buffering=1) as results:
        first = {"fused": workspace.fused, "reason": workspace.reason}
        results.write(json.dumps(first) + "\n")
        names = options.cases or cases_of(world)
        failed = run_all(names, lambda name: run_case(name, ranks), results)
    dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
