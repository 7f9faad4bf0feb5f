"""What the soak calls: random calls that a seed determines, their values, and what is right.

A run is a sequence of batches. Batch k of a seed, the workspace it is called on and the values of
its inputs follow from (seed, k, Setting) alone, by the pure functions below. Values are made on the
device by a hash of their place in integers, so every process has the inputs of all ranks without an
exchange, and a random generator that depends on the GPU is not needed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import reference
from gemma_ar_norm.plan import FUSED_ALGORITHMS, PACK_BYTES
from gemma_ar_norm.workspace import DTYPES, MAX_HIDDEN

FORMS = ("plain", "residual", "sandwich")
ALGORITHMS = ("auto", *FUSED_ALGORITHMS)
# What norm_out and residual_out are: new tensors, or an input ("-" is a new one).
OUTS = ("none", "separate", "x -", "- x", "residual -", "- residual", "x residual", "residual x")
LAYOUTS = ("dense", "wide rows", "every second", "misaligned")
SHAPES = ("rows", "leading dimensions", "no dimension of rows")
VALUES = (
    *("ordinary", "bits", "zeros", "negative zero", "nan", "inf", "subnormal", "huge"),
    "empty words",
)
HIDDENS = (640, 1024, 1152, 2048, 2304, 2880, 3584, 4096, 5120, 5376, 7168, 8192)

# Packs of a row up to which our kernels keep it in registers: one rank's alone, and the fused ones.
MOST_KEPT_ALONE, MOST_KEPT = 512, 1024

BATCHES_A_WORKSPACE = 25
MAX_ELEMENTS = 600_000  # of one rank's x
MAX_ELEMENTS_CPU = 20_000
MAX_CALLS = 8  # of a batch
TIMEOUT_S = 30.0

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
POISON = 77.0  # finite, so that a NaN which was not written is found too


@dataclass(frozen=True)
class Setting:
    """What the calls depend on beside the seed."""

    ranks: int
    gpu: bool
    streams: bool  # ranks are streams of one process

    @property
    def hows(self) -> tuple[str, ...]:
        """The ways in which a batch can be called. Streams of one rank wait for each other, and
        ranks that share hardware queues could wait for them: so not where ranks are streams."""
        if self.gpu and not self.streams:
            return ("eager", "eager", "two streams", "two streams", "graph")
        return ("eager", "eager", "eager", "graph")

    @property
    def renewals(self) -> tuple[str, ...]:
        """How the workspace is changed."""
        if self.streams:
            return ("local_group",)
        return ("init", "close, init", "close, first call", "new group")


# ------------------------------------------------------------------------------- what is called


@dataclass(frozen=True)
class Kind:
    """All of one call but the values of its tensors."""

    rows: int
    hidden: int
    dtype: torch.dtype
    form: str
    algorithm: str
    weight_dtype: torch.dtype
    eps: float
    weight_bias: float
    out: str
    shape_of: str  # one of SHAPES
    x_layout: str
    residual_layout: str
    weight_layout: str
    differ: bool  # each rank has a residual of its own
    between: bool  # torch's ops between this call and the next
    alone: bool  # each rank calls on a group of its own: there is nothing to reduce

    @property
    def shape(self) -> tuple[int, ...]:
        if self.shape_of == "no dimension of rows":
            return (self.hidden,)
        if self.shape_of == "leading dimensions":
            first = next(n for n in (3, 2, 1) if self.rows % n == 0)
            return (first, 1, self.rows // first, self.hidden)
        return (self.rows, self.hidden)


@dataclass(frozen=True)
class Batch:
    """Calls that are queued together, and then compared."""

    number: int
    how: str  # "eager", "graph", "two streams"
    chained: bool  # x and residual of each call are the outputs of the one before
    replays: int  # times that the calls are made, each time with new values; 1 unless in a graph
    calls: tuple[Kind, ...]

    @property
    def mode(self) -> str:
        return f"{self.how}, chain" if self.chained else self.how


@dataclass(frozen=True)
class Data:
    """What the values of a call are made from."""

    key: int  # 62 bits
    values: str  # one of VALUES
    exponent: int  # ordinary ones are in [-2^exponent, 2^exponent)
    weight_values: str  # "ordinary" or "bits"
    weight_exponent: int


def _random(*words: object) -> random.Random:
    return random.Random("/".join(map(str, words)))


def workspace_of(seed: int, number: int, setting: Setting) -> dict[str, Any]:
    """The workspace of batch `number`: "how" it is made, and init's arguments."""
    rng = _random(seed, "workspace", number // BATCHES_A_WORKSPACE, setting)
    return {
        "how": rng.choice(setting.renewals),
        "hidden_size": rng.choice((64, 1024, 1024, 4096, 8192, MAX_HIDDEN)),
        "max_rows": rng.choice((1, 1, 4, 48, 256)),  # of the smallest, calls take several launches
        "dtype": rng.choice(DTYPES),
        "timeout_s": TIMEOUT_S,
    }


def batch_of(seed: int, number: int, setting: Setting) -> Batch:
    """Batch `number`, counted from 0, of this seed."""
    rng = _random(seed, "batch", number, setting)
    how = rng.choice(setting.hows)
    chained = how != "two streams" and rng.random() < 0.25
    count = rng.randint(2 if chained else 1, MAX_CALLS)
    calls = [call_of(seed, (number, index), setting) for index in range(count)]
    if chained:
        first = replace(calls[0], alone=False)  # so that all ranks have the same outputs
        if first.form == "plain":
            first = replace(first, form=rng.choice(FORMS[1:]))
        # The others have its shape, and new tensors as outputs, which are inputs of the next.
        calls = [
            replace(
                call,
                rows=first.rows,
                hidden=first.hidden,
                shape_of=first.shape_of,
                dtype=first.dtype,
                weight_dtype=rng.choice((first.dtype, torch.float32)),
                form=first.form if call.form == "plain" else call.form,
                out=rng.choice(OUTS[:2]),
                x_layout="dense",
                residual_layout="dense",
                differ=False,
            )
            for call in (first, *calls[1:])
        ]
    if setting.streams:
        calls = [beside_waiting_ranks(call) for call in calls]
    if how == "graph" and all(call.rows == 0 for call in calls):  # torch warns of empty graphs
        calls = [replace(call, rows=1) for call in calls]
    return Batch(number, how, chained, rng.randint(2, 8) if how == "graph" else 1, tuple(calls))


def beside_waiting_ranks(call: Kind) -> Kind:
    """The call, such that a rank can always begin it while its peers wait on all SMs of one GPU.

    A kernel cannot start on an SM that has less shared memory set aside than it needs, as long as
    any block is there; and torch's copies of views set aside little. So calls that keep rows in
    shared memory come without such copies, and one rank's alone, which can come behind another
    call's copies, keep none.
    """
    packs = call.hidden * call.dtype.itemsize // PACK_BYTES
    if packs > MOST_KEPT_ALONE:
        call = replace(call, alone=False)
    if packs > MOST_KEPT:
        call = replace(call, x_layout="dense", residual_layout="dense", weight_layout="dense")
    return call


def call_of(seed: int, index: tuple[int, int], setting: Setting) -> Kind:
    """Call index[1] of batch index[0], before the batch chains its calls."""
    rng = _random(seed, "call", *index, setting)
    dtype, form = rng.choice(DTYPES), rng.choice(FORMS)
    hidden = _hidden(rng, PACK_BYTES // dtype.itemsize)
    rows = _rows(rng, (MAX_ELEMENTS if setting.gpu else MAX_ELEMENTS_CPU) // hidden)
    out = rng.choice(OUTS[:4] if form == "plain" else OUTS)
    shape_of = rng.choice((*SHAPES[:1] * 3, SHAPES[2] if rows == 1 else SHAPES[1]))

    def layout(*names: str) -> str:
        if set(names) & set(out.split()) or rng.random() < 0.5:
            return "dense"  # an output must be
        return rng.choice(LAYOUTS[1:])

    kind = Kind(
        rows=rows,
        hidden=hidden,
        dtype=dtype,
        form=form,
        algorithm=rng.choice(ALGORITHMS),
        weight_dtype=rng.choice((dtype, torch.float32)),
        eps=rng.choice((1e-6, 1e-6, 1e-5, 1e-2, 0.0)),
        weight_bias=rng.choice((1.0, 1.0, 0.0, 0.5)),
        out=out,
        shape_of=shape_of,
        x_layout=layout("x"),
        residual_layout="dense" if form == "plain" else layout("residual"),
        weight_layout=layout(),
        differ=form != "plain" and rng.random() < 0.25,
        between=rng.random() < 0.3 and not setting.streams,
        alone=False,
    )
    if rng.random() < 0.06:
        return replace(kind, alone=True, algorithm="auto")  # one rank has no fused kernels
    return kind


def _hidden(rng: random.Random, pack: int) -> int:
    """A model's, or the least or the greatest, or an odd number of packs."""
    draw = rng.random()
    if draw < 0.45:
        return rng.choice(HIDDENS)
    if draw < 0.55:
        return rng.choice((pack, 8, MAX_HIDDEN))
    packs = int(2 ** rng.uniform(0, math.log2(MAX_HIDDEN // pack - 1)))
    return pack * (packs | 1)


def _rows(rng: random.Random, most: int) -> int:
    draw, most = rng.random(), max(1, most)
    if draw < 0.04:
        rows = 0
    elif draw < 0.25:
        rows = 1
    elif draw < 0.5:
        rows = rng.randint(2, 9)
    elif draw < 0.75:
        rows = rng.choice((16, 32, 48, 64, 128, 256)) * rng.randint(1, 3) + rng.randint(-1, 1)
    else:
        rows = int(2 ** rng.uniform(1, 11))
    return min(rows, most)


def data_of(seed: int, batch: int, index: int, replay: int) -> Data:
    """What the values of this call of a batch are made from, each time that it is made."""
    rng = _random(seed, "data", batch, index, replay)
    values = rng.choice(VALUES) if rng.random() < 0.4 else "ordinary"
    return Data(
        key=rng.getrandbits(62),
        values=values,
        exponent=rng.choice((-8, -2, 0, 0, 0, 2, 6)) if values == "ordinary" else 0,
        weight_values="bits" if rng.random() < 0.02 else "ordinary",
        weight_exponent=rng.choice((-7, -3, 0)),
    )


# ------------------------------------------------------------------------------------------ values

MASK = 0xFFFFFFFF


def hashed(key: int, count: int, device: torch.device) -> Tensor:
    """count numbers of 32 bits, as int64. In integers that never overflow: so they are the same on
    every device."""
    low, high = key & MASK, key >> 32
    h = torch.arange(count, dtype=torch.int64, device=device).bitwise_xor_(low)
    for multiplier, word in ((0x7FEB352D, high), (0x045D9F3B, low), (0x7FEB352D, 0)):
        h.bitwise_xor_(h >> 16).mul_(multiplier).add_(word).bitwise_and_(MASK)
    return h.bitwise_xor_(h >> 16)


def numbers(h: Tensor, dtype: torch.dtype, exponent: int) -> Tensor:
    """Uniform in [-2^exponent, 2^exponent), of 24 bits before they are rounded to dtype."""
    return (((h & 0xFFFFFF) - 0x800000).float() * 2.0 ** (exponent - 23)).to(dtype)


def plant(values: str, data: Tensor, h: Tensor, ranks: int) -> None:
    """Special values into data, [ranks and residuals, rows, hidden], by the hash h of its shape.

    They are in every second row, so that the rows between show that a row does not disturb its
    neighbours; "bits" are everywhere.
    """
    draw, rows, limits = h[:, ::2] >> 24, data[:, ::2], torch.finfo(data.dtype)
    bits = data.view(BITS[data.dtype])
    if values == "bits":
        bits.copy_(h)  # the low ones
    elif values == "zeros":
        rows.zero_()
    elif values == "negative zero":  # in one place on all ranks, so that sums are -0.0 too
        rows.masked_fill_(draw[0] < 128, -0.0)
    elif values == "nan":
        rows.masked_fill_(draw == 7, math.nan)
    elif values == "inf":
        rows.masked_fill_(draw == 7, math.inf).masked_fill_(draw == 8, -math.inf)
    elif values == "subnormal":
        rows.copy_(rows.float() * limits.tiny)
    elif values == "huge":  # their sum leaves T, or their squares leave fp32
        rows.copy_(rows.float() * (limits.max / 4))
    elif values == "empty words":  # the protocol's mark of an empty word, as data
        elements = 4 // data.element_size()  # of a word
        chosen = (draw[..., ::elements] < 40).repeat_interleave(elements, dim=-1)
        bits[:, ::2].masked_fill_(chosen, -1)
        bits[ranks - 1, ::4] = -1
    elif values != "ordinary":
        raise ValueError(f"values: one of {', '.join(VALUES)} is required; got {values!r}")


def empty_in_layout(
    shape: Sequence[int], dtype: torch.dtype, layout: str, device: torch.device
) -> Tensor:
    """A tensor of this shape, dense or a view of something larger."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    if layout == "wide rows":
        return empty(*shape[:-1], shape[-1] + 8)[..., : shape[-1]]
    if layout == "every second":
        return empty(*shape, 2)[..., 0]
    if layout == "misaligned":
        return empty(math.prod(shape) + 1)[1:].view(shape)
    return empty(*shape)


def unequal(got: Tensor, want: Tensor) -> Tensor:
    """Elementwise: other bits, and not both NaN. -0.0 is not 0.0."""
    bits = BITS[want.dtype]
    return (got.view(bits) != want.view(bits)) & ~(got.isnan() & want.isnan())


# -------------------------------------------------------------------------------------------- call


class Call:
    """One call of all ranks, with the memory of the ranks `mine`, which this process has.

    before: the call whose outputs are the inputs of this one.
    """

    def __init__(
        self,
        kind: Kind,
        ranks: int,
        mine: Iterable[int],
        device: torch.device,
        before: Call | None = None,
    ) -> None:
        self.kind, self.ranks, self.mine, self.device = kind, ranks, tuple(mine), device
        self.before = before
        # What norm_out and residual_out are written over; "-" is a new tensor.
        self._written = ["-", "-"] if kind.out in ("none", "separate") else kind.out.split()
        self.expected: dict[int, tuple[Tensor, Tensor]] = {}
        self.got: dict[int, tuple[Tensor, Tensor]] = {}
        # What x and residual are to hold after the call.
        self._sources: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.data: Data | None = None

        shape = kind.shape
        self._x: dict[int, Tensor] = {}
        self._residual: dict[int, Tensor] = {}
        self._out: dict[int, tuple[Tensor, Tensor] | None] = {}
        for r in self.mine:
            own: dict[str, Tensor] = {}
            if before is None:
                own["x"] = empty_in_layout(shape, kind.dtype, kind.x_layout, device)
                self._x[r] = own["x"]
                if kind.form != "plain":
                    own["residual"] = empty_in_layout(
                        shape, kind.dtype, kind.residual_layout, device
                    )
                    self._residual[r] = own["residual"]
            if kind.out == "none":
                self._out[r] = None
                continue
            first, second = (
                empty_in_layout(shape, kind.dtype, "dense", device) if name == "-" else own[name]
                for name in self._written
            )
            self._out[r] = (first, second)

        def weight() -> Tensor:
            return empty_in_layout((kind.hidden,), kind.weight_dtype, kind.weight_layout, device)

        self._weight = weight()
        self._post_weight = weight() if kind.form == "sandwich" else None

    def fill(self, data: Data) -> None:
        """New values in the same memory, what is right of them, and outputs poisoned."""
        kind, self.data = self.kind, data
        residuals = 0 if kind.form == "plain" else self.ranks if kind.differ else 1
        tensors = 0 if self.before is not None else self.ranks + residuals
        elements = tensors * kind.rows * kind.hidden
        h = hashed(data.key, elements + 2 * kind.hidden, self.device)
        weight, post_weight = self._fill_weights(h[elements:].view(2, -1), data)
        options: dict[str, Any] = {"eps": kind.eps, "weight_bias": kind.weight_bias}
        if self._post_weight is not None:
            options["post_weight"] = post_weight

        if self.before is not None:  # all ranks have the same outputs there
            x, residual = self.before.expected[self.mine[0]]
            xs = [x] * (1 if kind.alone else self.ranks)
            same = reference.fused_allreduce_gemma_rmsnorm(xs, weight, residual, **options)
            self.expected = dict.fromkeys(self.mine, same)
        else:
            h = h[:elements].view(tensors, kind.rows, kind.hidden)
            values = numbers(h, kind.dtype, data.exponent)
            plant(data.values, values, h, self.ranks)
            sources = [one.view(kind.shape) for one in values]
            # By the places of the first x and of the residual.
            found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
            for r in self.mine:
                xs = sources[r : r + 1] if kind.alone else sources[: self.ranks]
                place = r if kind.alone else 0, self.ranks + (r if kind.differ else 0)
                own = sources[place[1]] if residuals else None
                self._x[r].copy_(sources[r])
                if own is not None:
                    self._residual[r].copy_(own)
                if place not in found:
                    found[place] = reference.fused_allreduce_gemma_rmsnorm(
                        xs, weight, own, **options
                    )
                self._sources[r], self.expected[r] = (sources[r], own), found[place]
        self._poison()
        if len(self.mine) > 1:
            self._load_copies()

    def _fill_weights(self, h: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        values = numbers(h, self.kind.weight_dtype, data.weight_exponent)
        if data.weight_values == "bits":
            values.view(BITS[values.dtype]).copy_(h)
        self._weight.copy_(values[0])
        if self._post_weight is not None:
            self._post_weight.copy_(values[1])
        return values[0], values[1]

    def _poison(self) -> None:
        for r in self.mine:
            # Without out= there are outputs where a graph has written some before.
            outputs = self._out[r] or self.got.get(r) or ()
            for name, output in zip(self._written, outputs, strict=False):
                if name == "-":
                    output.fill_(POISON)

    def _load_copies(self) -> None:
        """Has torch load the kernels that make dense, aligned copies of views. Where ranks are
        streams that must not be done while one of them waits."""
        views = [self._weight, self._post_weight, *self._x.values(), *self._residual.values()]
        for view in views:
            if view is not None and not view.is_contiguous():
                view.contiguous()
            elif view is not None and view.data_ptr() % PACK_BYTES:
                view.clone()

    def run(self, r: int, group: Any) -> None:
        """Rank r's call, on the current stream."""
        if self.before is not None:
            x, residual = self.before.got[r]
        else:
            x, residual = self._x[r], self._residual.get(r)  # type: ignore[assignment]
        out = self._out[r]
        got = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
            x,
            self._weight,
            residual,
            post_weight=self._post_weight,
            eps=self.kind.eps,
            weight_bias=self.kind.weight_bias,
            group=group,
            algorithm=self.kind.algorithm,
            out=out,
        )
        for name, output in zip(("norm_out", "residual_out"), got, strict=True):
            if (output.shape, output.dtype) != (x.shape, x.dtype) or not output.is_contiguous():
                raise AssertionError(
                    f"{name}: a dense tensor like x is required; got {tuple(output.shape)} "
                    f"{output.dtype}, strides {output.stride()}"
                )
        if out is not None and any(a is not b for a, b in zip(got, out, strict=True)):
            raise AssertionError("out: its tensors are to be returned; others were")
        self.got[r] = got

    def _compared(self, r: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, what is there, what must be there) of rank r, after a run."""
        yield "norm_out", self.got[r][0], self.expected[r][0]
        yield "residual_out", self.got[r][1], self.expected[r][1]
        if self.before is None:
            x, residual = self._sources[r]
            if "x" not in self._written:
                yield "x (an input)", self._x[r], x
            if residual is not None and "residual" not in self._written:
                yield "residual (an input)", self._residual[r], residual

    def wrong(self) -> Tensor:
        """How many elements of all of `mine` are wrong, on the device."""
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for of_ranks in zip(*map(self._compared, self.mine), strict=True):
            got = torch.stack([one[1] for one in of_ranks])
            count += unequal(got, torch.stack([one[2] for one in of_ranks])).sum()
        return count

    def explain(self) -> str:
        """The first element that is wrong, in words; "" where none is."""
        for r in self.mine:
            for name, got, want in self._compared(r):
                wrong = unequal(got, want)
                if bool(wrong.any()):
                    places = wrong.nonzero()
                    at = tuple(places[0].tolist())
                    return (
                        f"rank {r}: {name}{list(at)} is {got[at].item()!r}, must be "
                        f"{want[at].item()!r}; {len(places)} of {wrong.numel()} elements differ"
                    )
        return ""


# ---------------------------------------------------------------------------- what was not left out


def categories_of(batch: Batch, kind: Kind, data: Data) -> dict[str, str]:
    """What is counted of a call."""
    rows = str(kind.rows) if kind.rows < 2 else "2 to 9" if kind.rows < 10 else "10 and more"
    return {
        "dtype": str(kind.dtype).removeprefix("torch."),
        "form": kind.form,
        "algorithm": kind.algorithm,
        "mode": batch.mode,
        "weights": "fp32" if kind.weight_dtype == torch.float32 else "of T",
        "ranks": "one" if kind.alone else "all",
        "residuals": "of each rank" if kind.differ else "none" if kind.form == "plain" else "one",
        "rows": rows,
        "shape": kind.shape_of,
        "out": kind.out,
        "layout of x": kind.x_layout,
        "layout of residual": kind.residual_layout,
        "layout of weight": kind.weight_layout,
        "values": data.values,
    }


def all_categories(setting: Setting) -> dict[str, tuple[str, ...]]:
    """What each category can be."""
    modes = [(how, how + ", chain") for how in dict.fromkeys(setting.hows) if how != "two streams"]
    found = {
        "dtype": tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES),
        "form": FORMS,
        "algorithm": ALGORITHMS,
        "mode": (*sum(modes, ()), *({"two streams"} & set(setting.hows))),
        "weights": ("of T", "fp32"),
        "ranks": ("all", "one"),
        "residuals": ("none", "one", "of each rank"),
        "rows": ("0", "1", "2 to 9", "10 and more"),
        "shape": SHAPES,
        "out": OUTS,
        "layout of x": LAYOUTS,
        "layout of residual": LAYOUTS,
        "layout of weight": LAYOUTS,
        "values": VALUES,
        "workspace": tuple(dict.fromkeys(setting.renewals)),
    }
    if setting.gpu:
        found["path"] = (*FUSED_ALGORITHMS, "local")
        found["launches"] = ("0", "1", "several")
    return found
