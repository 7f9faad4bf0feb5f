"""What the CPU and the GPU tests share: inputs, equality of bits, and distance from float64.

Inputs are fresh in every run: a case names its seed, and every failure prints the case.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma_ar_norm import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMS = ("plain", "residual", "sandwich")
SPECIALS = ("zeros", "negative_zero", "nan", "inf", "subnormal", "empty_words", "overflow")

# Hidden sizes of the models, with the edges: one pack of bf16, a part of a segment, 64 segments.
HIDDENS = (8, 264, 640, 1024, 1152, 2048, 2304, 2880, 3584, 4096, 5120, 5376, 7168, 8192, 16384)

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
LOWEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}


# ---------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Case:
    """The arguments of one fused call on all its ranks. `str(case)` is the call that remakes it."""

    xs: list[Tensor]  # one [rows, hidden] a rank
    weight: Tensor
    residual: Tensor | None
    post_weight: Tensor | None
    eps: float
    weight_bias: float
    label: str

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the fused call, of add_rmsnorm and of the reference."""
        return {
            "residual": self.residual,
            "post_weight": self.post_weight,
            "eps": self.eps,
            "weight_bias": self.weight_bias,
        }

    def expected(self) -> tuple[Tensor, Tensor]:
        """(norm_out, residual_out) of the contract."""
        return reference.fused_allreduce_gemma_rmsnorm(self.xs, self.weight, **self.options)

    def __str__(self) -> str:
        return self.label


def fresh_seed() -> int:
    return secrets.randbits(32)


def make_case(
    ranks: int,
    rows: int,
    hidden: int,
    dtype: torch.dtype,
    form: str = "residual",
    *,
    weight_dtype: torch.dtype | None = None,
    weight_std: float = 0.1,
    eps: float = 1e-6,
    weight_bias: float = 1.0,
    special: str | None = None,
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Case:
    """Random partial sums, N(0, 1) once added, with weights N(0, weight_std).

    form: one of FORMS. weight_dtype: dtype unless given. seed: fresh unless given; every process
    that gives the same seed on the same kind of device gets the same case.
    special: one of SPECIALS, planted in every second row from row 0 on, so that the rows between
    show that a row does not disturb its neighbours; or "mixed": all of them, in turn.
    """
    if form not in FORMS:
        raise ValueError(f"form: must be one of {FORMS}; got {form!r}")
    seed = fresh_seed() if seed is None else seed
    generator = torch.Generator(device).manual_seed(seed)
    weight_dtype = dtype if weight_dtype is None else weight_dtype

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * std

    xs = [normal(rows, hidden, std=ranks**-0.5).to(dtype) for _ in range(ranks)]
    residual = None if form == "plain" else normal(rows, hidden, std=1.0).to(dtype)
    weight = normal(hidden, std=weight_std).to(weight_dtype)
    post_weight = normal(hidden, std=weight_std).to(weight_dtype) if form == "sandwich" else None

    if special == "mixed":
        for first, name in enumerate(SPECIALS):
            _plant(name, slice(first, None, len(SPECIALS) + 1), xs, residual, generator)
    elif special is not None:
        _plant(special, slice(0, None, 2), xs, residual, generator)
    label = (
        f"make_case({ranks}, {rows}, {hidden}, {dtype}, {form!r}, weight_dtype={weight_dtype}, "
        f"weight_std={weight_std}, eps={eps}, weight_bias={weight_bias}, special={special!r}, "
        f"seed={seed}, device={str(device)!r})"
    )
    return Case(xs, weight, residual, post_weight, eps, weight_bias, label)


def with_other_residual(case: Case, seed: int) -> Case:
    """The case of a rank whose residual differs from the other ranks', which is legal."""
    if case.residual is None:
        raise ValueError("case: needs a residual; got the plain form; make another form")
    generator = torch.Generator(case.residual.device).manual_seed(seed)
    noise = torch.randn(case.residual.shape, generator=generator, device=case.residual.device)
    label = f"with_other_residual({case.label}, {seed})"
    return replace(case, residual=noise.to(case.residual.dtype), label=label)


def poisoned_like(x: Tensor) -> Tensor:
    """An output to be overwritten. Finite, so that a NaN which was not written is found too."""
    return torch.full_like(x, 77.0, memory_format=torch.contiguous_format)


def _plant(
    special: str,
    rows: slice,
    xs: Sequence[Tensor],
    residual: Tensor | None,
    generator: torch.Generator,
) -> None:
    """Writes special values into these rows of the inputs."""
    inputs = [x[rows] for x in xs] + ([] if residual is None else [residual[rows]])
    first, last = inputs[0], inputs[len(xs) - 1]
    count, hidden = first.shape
    if count == 0:
        return
    limits = torch.finfo(first.dtype)

    def chosen(fraction: float) -> Tensor:
        """A random set of elements, at least one in every row."""
        draw = torch.rand(first.shape, generator=generator, device=first.device)
        return (draw < fraction) | (draw == draw.amin(dim=-1, keepdim=True))

    if special == "zeros":
        for values in inputs:
            values.zero_()
    elif special == "negative_zero":  # on every rank, so that the sum and h are -0.0 too
        where = chosen(0.5)
        for values in inputs:
            values.masked_fill_(where, -0.0)
    elif special == "nan":
        last.masked_fill_(chosen(2 / hidden), float("nan"))
    elif special == "inf":  # the second of these rows gets inf - inf where there are two ranks
        where = chosen(2 / hidden)
        first.masked_fill_(where, float("inf"))
        last[1::2].masked_fill_(where[1::2], float("-inf"))
    elif special == "subnormal":
        for values in inputs:
            values.copy_(values.float() * limits.tiny)
    elif (
        special == "empty_words"
    ):  # the protocol's empty mark 0xFFFFFFFF as data: words, packs, rows
        bits = last.view(torch.int32)
        draw = torch.rand(bits.shape, generator=generator, device=bits.device)
        bits.masked_fill_(draw < 0.1, -1)
        bits[:, :4] = -1
        bits[2::3] = -1
        first.view(BITS[first.dtype])[:, -1] = -1  # half a word, where T has 16 bits
    elif special == "overflow":  # the sum over ranks in T; in the next of these rows the squares
        for values in inputs:
            values[::2].copy_(values[::2].float() * (limits.max / 4))
            values[1::2].copy_(values[1::2].float() * limits.max**0.5)
    else:
        raise ValueError(f"special: must be one of {SPECIALS} or 'mixed'; got {special!r}")


# ------------------------------------------------------------------------------ equality of bits


def bit_equal(got: Tensor, want: Tensor) -> Tensor:
    """Elementwise: the same bits, or both NaN. -0.0 is not 0.0."""
    bits = BITS[want.dtype]
    return (got.view(bits) == want.view(bits)) | (got.isnan() & want.isnan())


def assert_bit_equal(got: Tensor, want: Tensor, what: object = "") -> None:
    """Shape, dtype and every element equal, NaN equal to NaN. `what`: said when they are not."""
    assert got.dtype == want.dtype, f"{what}: {got.dtype} instead of {want.dtype}"
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    equal = bit_equal(got, want)
    if bool(equal.all()):
        return
    wrong = (~equal).nonzero()
    at = tuple(wrong[0].tolist())
    raise AssertionError(
        f"{what}: {len(wrong)} of {equal.numel()} elements differ; the first at {at}: "
        f"{got[at].item()!r} instead of {want[at].item()!r}"
    )


# ------------------------------------------------------------------------- distance from float64

# The promise, for bf16 and fp16 (contract, promise 3), and what is checked of the rest.
#   norm_out      within 1 ulp of T of the float64 value computed from the same h, in all forms.
#                 (One rounding to T and some 17 fp32 operations: at most 0.51 ulp in truth.)
#   residual_out  plain, residual: within 1 ulp of T of the float64 value of residual + sum of x_r,
#                 where the ulp is taken at the larger magnitude of a and h: half an ulp of a and
#                 half an ulp of h are two roundings, and that of a cannot be undone when the
#                 residual cancels a. sandwich: the same of p and h, computed from the same a, and
#                 besides what the 17 fp32 operations of p add to its half an ulp, as above.
#                 The fp32 additions may add 2^-24 of the sum of all magnitudes for each addition,
#                 which is less than 2^-12 ulp unless the ranks' values cancel each other.
# T = fp32 has no rounding that hides the fp32 operations: 20 ulps of norm_out, as a sanity check.
# Not included: rows whose sum of squares leaves fp32 (2^127), or whose mean of squares + eps is
# under 2^-100, where the squares are subnormal; sums whose magnitudes together leave T's range.
# There only the bits of the contract count.
MAX_NORM_ULPS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 20.0}
MAX_RESIDUAL_ULPS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 20.0}


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of dtype's neighbouring numbers at this magnitude (float64 in, float64 out)."""
    lowest = LOWEST_EXPONENT[dtype]
    exponent = torch.frexp(magnitude.abs()).exponent - 1  # 2^exponent <= magnitude
    exponent = torch.where(magnitude == 0, lowest, exponent).clamp(min=lowest)
    return torch.pow(2.0, (exponent - (SIGNIFICAND_BITS[dtype] - 1)).double())


def ulps(got: Tensor, want: Tensor, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
    """|got - want| in ulps of dtype at the magnitude `at` (of want unless given).

    got: of dtype. want: the float64 value, not rounded. 0 where both are NaN, the same infinity, or
    want lies beyond dtype's range and got is that infinity.
    """
    got = got.double()
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64, device=want.device)
    beyond = want.abs() >= largest + ulp(largest, dtype) / 2
    want = torch.where(beyond, want.sign() * float("inf"), want)
    distance = (got - want).abs() / ulp(want if at is None else at, dtype)
    return torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, distance)


def float64_rmsnorm(
    v: Tensor, weight: Tensor, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    """float64 of (v * rstd(v)) * (bias + weight), and where the promise covers it ([..., 1]).

    eps and bias are rounded to fp32 as the contract does; nothing else is rounded.
    """
    eps, weight_bias = torch.tensor([eps, weight_bias], dtype=torch.float32).tolist()
    v = v.double()
    total = v.square().sum(-1, keepdim=True)
    mean = total / v.shape[-1] + eps
    covered = ~((total >= 2.0**127) | (mean < 2.0**-100))  # a NaN is covered: it must be NaN
    return v / mean.sqrt() * (weight_bias + weight.double()), covered


def float64_errors(case: Case, norm_out: Tensor, residual_out: Tensor) -> tuple[Tensor, Tensor]:
    """The errors of (norm_out, residual_out) in ulps, element by element: the promise above."""
    dtype, scaling = residual_out.dtype, (case.eps, case.weight_bias)

    norm64, covered = float64_rmsnorm(residual_out, case.weight, *scaling)
    norm_error = torch.where(covered, ulps(norm_out, norm64, dtype), 0.0)

    if case.post_weight is None:
        summands = torch.stack([x.double() for x in case.xs])
        covered = torch.ones_like(covered)
    else:
        p64, covered = float64_rmsnorm(reference.all_reduce(case.xs), case.post_weight, *scaling)
        summands = p64.unsqueeze(0)
    a_or_p = summands.sum(0)
    if case.residual is not None:
        summands = torch.cat([summands, case.residual.double().unsqueeze(0)])
    residual64, magnitudes = summands.sum(0), summands.abs().sum(0)

    at = torch.maximum(a_or_p.abs(), residual64.abs())
    error = ulps(residual_out, residual64, dtype, at)
    fp32_error = len(summands) * 2.0**-24 * magnitudes
    if case.post_weight is not None:
        fp32_error = fp32_error + 17 * 2.0**-24 * a_or_p.abs()
    fp32_error = fp32_error / ulp(at, dtype)
    skipped = ~covered | (magnitudes >= torch.finfo(dtype).max)
    return norm_error, torch.where(skipped | (error == 0), 0.0, error - fp32_error)


def assert_near_float64(case: Case, norm_out: Tensor, residual_out: Tensor) -> tuple[float, float]:
    """Checks the promise above; returns the largest errors (norm_out, residual_out) in ulps."""
    limits = (MAX_NORM_ULPS[norm_out.dtype], MAX_RESIDUAL_ULPS[norm_out.dtype])
    largest = []
    for name, error, limit in zip(
        ("norm_out", "residual_out"),
        float64_errors(case, norm_out, residual_out),
        limits,
        strict=True,
    ):
        worst = error.amax().item() if error.numel() else 0.0
        assert worst <= limit, f"{name} is {worst} ulps from float64; {limit} are allowed; {case}"
        largest.append(worst)
    return largest[0], largest[1]
