"""What is measured: shapes, their inputs, and what reference.py makes of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma_ar_norm import reference

EPS = 1e-6
WEIGHT_BIAS = 1.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORMS = ("plain", "residual", "sandwich")

# How far a row may be from reference.py's, |difference| / |row|, where sums are rounded otherwise.
BOUNDS = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 1e-5}
CHAIN_FACTOR = 5  # after many calls, each on the outputs of the one before

Outputs = tuple[Tensor, Tensor]  # norm_out, residual_out
# x, weight, residual, post_weight
Call = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Outputs]


@dataclass(frozen=True)
class Case:
    rows: int
    hidden: int
    dtype: str  # of DTYPES
    form: str  # of FORMS

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def x_bytes(self) -> int:
        return self.rows * self.hidden * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.rows} x {self.hidden} {self.dtype} {self.form}"


@dataclass
class Inputs:
    """What one rank's calls of a case take, and what all ranks contribute.

    x, weight and post_weight lie in memory several times over: call number i takes copy i. So
    no call finds in the L2 what another call of the same graph has read. One copy: `warm`, where
    x is the norm_out of the call before, as its residual always is the residual_out of that.
    """

    all_xs: list[Tensor]
    residual: Tensor | None
    xs: list[Tensor]
    weights: list[Tensor]
    post_weights: list[Tensor | None]
    rank: int
    _expected: dict[tuple[int, bool], Outputs] = field(default_factory=dict)

    @staticmethod
    def random(
        case: Case, ranks: int, rank: int, seed: int, device: torch.device, copies: int
    ) -> Inputs:
        """Made on the CPU, so that ranks of one seed have the same whatever their GPU's shape."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float) -> Tensor:
            values = torch.randn(shape, generator=generator) * std
            return values.to(device=device, dtype=case.torch_dtype)

        def several(value: Tensor) -> list[Tensor]:
            return [value, *(value.clone() for _ in range(copies - 1))]

        shape = (case.rows, case.hidden)
        all_xs = [normal(*shape, std=ranks**-0.5) for _ in range(ranks)]
        sandwich = case.form == "sandwich"
        return Inputs(
            all_xs,
            None if case.form == "plain" else normal(*shape, std=1.0),
            several(all_xs[rank]),
            several(normal(case.hidden, std=0.2)),
            [*several(normal(case.hidden, std=0.2))] if sandwich else [None] * copies,
            rank,
        )

    @property
    def warm(self) -> bool:
        return len(self.xs) == 1

    def chain(self, call: Call, count: int) -> Outputs:
        """So many dependent calls, as the layers of a model make them; the outputs of the last."""
        x, residual = self.xs[0], self.residual
        copies = zip(self.xs, self.weights, self.post_weights, strict=True)
        for own_x, weight, post_weight in itertools.islice(itertools.cycle(copies), count):
            if not self.warm:
                x = own_x
            outputs = call(x, weight, residual, post_weight)
            x = outputs[0]
            residual = None if residual is None else outputs[1]
        return outputs

    def expected(self, count: int, *, reduces: bool) -> Outputs:
        """What the last of `count` calls returns by reference.py, with or without the sum."""
        if (count, reduces) not in self._expected:
            xs = self.all_xs if reduces else [self.all_xs[self.rank]]

            def call(
                x: Tensor, weight: Tensor, residual: Tensor | None, post: Tensor | None
            ) -> Outputs:
                # Of later calls of a warm chain x is the norm_out that all ranks have.
                later = self.warm and x is not self.xs[0]
                return reference.fused_allreduce_gemma_rmsnorm(
                    [x] * len(xs) if later else xs,
                    weight,
                    residual,
                    post_weight=post,
                    eps=EPS,
                    weight_bias=WEIGHT_BIAS,
                )

            self._expected[count, reduces] = self.chain(call, count)
        return self._expected[count, reduces]


def copies_needed(case: Case, calls: int, l2_bytes: int) -> int:
    """So many that they are twice the L2 together, and no more than a graph has calls."""
    weights = 2 if case.form == "sandwich" else 1
    one = case.x_bytes + weights * case.hidden * case.torch_dtype.itemsize
    return max(2, min(calls, 1 + math.ceil(2 * l2_bytes / one)))


def row_error(got: Outputs, want: Outputs) -> float:
    """The largest |got - want| / |want| of a row, of both outputs; NaN where there is a NaN."""
    errors = []
    for g, w in zip(got, want, strict=True):
        distance = (g.double() - w.double()).norm(dim=-1)
        errors.append((distance / w.double().norm(dim=-1).clamp(min=1e-30)).max())
    return torch.stack(errors).amax().item()


def same_bits(got: Outputs, want: Outputs) -> bool:
    as_int = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(g.contiguous().view(as_int[g.itemsize]), w.view(as_int[w.itemsize]))
        for g, w in zip(got, want, strict=True)
    )


def what_is_wrong(got: Outputs, want: Outputs, case: Case, calls: int, *, exact: bool) -> str:
    """In words; "" where nothing is. exact: the bits of reference.py are required."""
    if got[0].shape != want[0].shape or got[0].dtype != want[0].dtype:
        return f"{tuple(got[0].shape)} of {got[0].dtype} instead of {tuple(want[0].shape)}"
    if exact and same_bits(got, want):
        return ""
    after = f"after {calls} call{'s' if calls > 1 else ''}"
    error = row_error(got, want)
    if exact:
        return f"other bits than reference.py {after}, a row is {error:.1e} off"
    bound = BOUNDS[case.dtype] * (CHAIN_FACTOR if calls > 1 else 1)
    return "" if error <= bound else f"a row is {error:.1e} off {after}, allowed is {bound:.0e}"
