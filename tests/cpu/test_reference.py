"""reference.py is the contract: shown against exact arithmetic, formulas by hand and float64.

`Exact...` below is a second implementation of docs/design.md's contract, one Python number at a
time: every operation is done on fractions and rounded once, so it owes nothing to torch or the CPU.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from functools import reduce

import checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_ar_norm import reference

BF16, FP16, FP32 = checks.DTYPES
NAN, INF = math.nan, math.inf


# ------------------------------------------------------------ the contract in exact arithmetic


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """value, not 0, rounded once to dtype: to nearest, ties to even, subnormals kept."""
    bits, lowest = checks.SIGNIFICAND_BITS[dtype], checks.LOWEST_EXPONENT[dtype]
    above, below = abs(value.numerator), value.denominator
    exponent = above.bit_length() - below.bit_length()
    exponent -= above << max(-exponent, 0) < below << max(exponent, 0)
    # Now 2^exponent <= |value| < 2^(exponent + 1). In units of the last kept bit:
    unit = max(exponent, lowest) - (bits - 1)
    above, below = above << max(-unit, 0), below << max(unit, 0)
    units, rest = divmod(above, below)
    units += 2 * rest > below or (2 * rest == below and units % 2 == 1)
    too_large = units.bit_length() + unit > 2 - lowest  # 1 + the greatest exponent of dtype
    return math.copysign(INF if too_large else math.ldexp(units, unit), value)


def fp32(operation: Callable[[Fraction, Fraction], Fraction], a: float, b: float, ieee: float):
    """a and b combined exactly, then rounded to fp32; `ieee` where no fraction can say it."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return ieee
    exact = operation(Fraction(a), Fraction(b))
    return rounded(exact, FP32) if exact else ieee


def add(a: float, b: float) -> float:
    return fp32(Fraction.__add__, a, b, a + b)


def mul(a: float, b: float) -> float:
    return fp32(Fraction.__mul__, a, b, a * b)


def div(a: float, b: float) -> float:
    if b == 0:
        return NAN if a == 0 or math.isnan(a) else math.copysign(INF, a) * math.copysign(1, b)
    return fp32(Fraction.__truediv__, a, b, a / b)


def sqrt(a: float) -> float:
    if not math.isfinite(a) or a == 0:
        return a
    scaled = Fraction(a) * 4**300  # so that its root has far more bits than are kept
    root = math.isqrt(scaled.numerator // scaled.denominator)
    sticky = Fraction(int(root * root != scaled), 2)  # what is cut off is never a tie
    return rounded((root + sticky) / 2**300, FP32)


def to(value: float, dtype: torch.dtype) -> float:
    return value if value == 0 or not math.isfinite(value) else rounded(Fraction(value), dtype)


def warp_sum(lanes: list[float]) -> float:
    """__shfl_xor_sync 16, 8, 4, 2, 1: all 32 lanes end with the same sum."""
    for mask in (16, 8, 4, 2, 1):
        lanes = [add(lanes[lane], lanes[lane ^ mask]) for lane in range(32)]
    assert all(lane == lanes[0] or math.isnan(lane) for lane in lanes)
    return lanes[0]


def exact_sum_of_squares(v: list[float], dtype: torch.dtype) -> float:
    elements = 4 if dtype == FP32 else 8
    packs = [
        reduce(add, (mul(e, e) for e in v[i : i + elements])) for i in range(0, len(v), elements)
    ]
    segments = []
    for i in range(0, len(packs), 32):
        segment = packs[i : i + 32]
        segments.append(warp_sum(segment + [0.0] * (32 - len(segment))))
    return exact_sum_of_segments(segments)


def exact_sum_of_segments(segments: list[float]) -> float:
    lanes = [0.0] * 32
    for i, segment_sum in enumerate(segments):
        lanes[i % 32] = add(lanes[i % 32], segment_sum)
    return warp_sum(lanes)


def exact_rmsnorm(
    v: list[float], weight: list[float], eps: float, bias: float, dtype: torch.dtype
) -> list[float]:
    eps, bias = to(eps, FP32), to(bias, FP32)
    mean = div(exact_sum_of_squares(v, dtype), len(v))
    rstd = div(1.0, sqrt(add(mean, eps)))
    return [to(mul(mul(e, rstd), add(bias, w)), dtype) for e, w in zip(v, weight, strict=True)]


def exact_row(case: checks.Case, row: int) -> tuple[list[float], list[float]]:
    """(norm_out, residual_out) of one row of a case."""
    dtype, scaling = case.xs[0].dtype, (case.eps, case.weight_bias, case.xs[0].dtype)
    columns = zip(*(x[row].tolist() for x in case.xs), strict=True)
    h = [to(reduce(add, values), dtype) for values in columns]
    if case.post_weight is not None:
        h = exact_rmsnorm(h, case.post_weight.tolist(), *scaling)
    if case.residual is not None:
        h = [to(add(r, v), dtype) for r, v in zip(case.residual[row].tolist(), h, strict=True)]
    return exact_rmsnorm(h, case.weight.tolist(), *scaling), h


def assert_contract(case: checks.Case) -> None:
    """The reference's bits are those of exact arithmetic."""
    got_norm, got_residual = case.expected()
    for row in range(len(got_norm)):
        norm_out, residual_out = exact_row(case, row)
        assert_values(got_norm[row], norm_out, f"norm_out[{row}] of {case}")
        assert_values(got_residual[row], residual_out, f"residual_out[{row}] of {case}")


def assert_values(got: Tensor, want: Iterable[float], what: str) -> None:
    checks.assert_bit_equal(got, torch.tensor(list(want), dtype=got.dtype), what)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize(
    ("ranks", "rows", "hidden"),
    [(1, 2, 8), (2, 1, 640), (3, 3, 72), (8, 1, 264)],
)
def test_equals_exact_arithmetic(dtype, form, ranks, rows, hidden):
    for weight_dtype in {dtype, FP32}:
        case = checks.make_case(
            ranks, rows, hidden, dtype, form, weight_dtype=weight_dtype, weight_bias=0.3
        )
        assert_contract(case)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("special", [*checks.SPECIALS, "mixed"])
def test_special_values_equal_exact_arithmetic(dtype, special):
    for form, eps in (("plain", 0.0), ("residual", 1e-6), ("sandwich", 0.0), ("sandwich", 1e-6)):
        assert_contract(checks.make_case(3, 4, 40, dtype, form, special=special, eps=eps))


@pytest.mark.parametrize(
    ("rows", "hidden", "dtype"),
    [
        *((9, 8, BF16), (9, 264, FP16), (2, 2304, BF16), (2, 2880, FP16), (1, 5376, BF16)),
        *((9, 8, FP32), (9, 132, FP32), (3, 1152, FP32), (2, 4224, FP32), (1, 8256, FP32)),
    ],
)
def test_sum_of_squares_equals_exact_arithmetic(rows, hidden, dtype):
    """Segments missing, parts of them, all there, and two or (fp32 8256) three for a lane."""
    case = checks.make_case(1, rows, hidden, dtype, "plain")
    want = [exact_sum_of_squares(row, dtype) for row in case.xs[0].tolist()]
    assert_values(reference.sum_of_squares(case.xs[0]), want, str(case))


@pytest.mark.parametrize(("dtype", "hidden"), [(BF16, 16384), (FP16, 12288), (FP32, 16384)])
def test_order_of_segments(dtype, hidden):
    """2, 1 or 2 and 4 segments a lane, in many rows; each segment has one element that is not 0."""
    segment = 32 * 16 // dtype.itemsize
    v = torch.zeros(40, hidden // segment, segment, dtype=dtype)
    seed = checks.fresh_seed()
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randn(v.shape[:2], generator=generator).to(dtype)
    places = torch.randint(segment, (*v.shape[:2], 1), generator=generator)
    got = reference.sum_of_squares(v.scatter(2, places, elements.unsqueeze(-1)).flatten(1))
    want = [exact_sum_of_segments([mul(e, e) for e in row]) for row in elements.tolist()]
    assert_values(got, want, f"seed {seed}")


def packs_of_fp16() -> st.SearchStrategy[Tensor]:
    """Any 8 numbers, of any bits: NaN, infinities, subnormals and -0.0 among them."""
    numbers = st.integers(-(2**15), 2**15 - 1) | st.sampled_from([0, -(2**15), 1, 0x7C00, -1])
    packs = st.lists(numbers, min_size=8, max_size=8)
    return packs.map(lambda bits: torch.tensor(bits, dtype=torch.int16).view(FP16))


@settings(max_examples=50, deadline=None, database=None)
@given(
    packs=st.tuples(packs_of_fp16(), packs_of_fp16(), packs_of_fp16()),
    weight=packs_of_fp16(),
    eps=st.floats(0, 1e3),
    bias=st.floats(-3, 3),
    form=st.sampled_from(checks.FORMS),
)
def test_any_pack_equals_exact_arithmetic(packs, weight, eps, bias, form):
    x0, x1, residual = (pack.unsqueeze(0) for pack in packs)
    given_residual = None if form == "plain" else residual
    post_weight = weight.flip(0) if form == "sandwich" else None
    label = f"{packs} {weight} {eps} {bias} {form}"
    assert_contract(checks.Case([x0, x1], weight, given_residual, post_weight, eps, bias, label))


# -------------------------------------------- torch's elementwise operations are IEEE operations


def awkward_fp32(count: int, seed: int) -> Tensor:
    """fp32 of every exponent, subnormals included, and specials: random bits."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    values = bits.view(FP32)
    near_one = torch.randn(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.5, values, near_one)


def test_torch_rounds_every_fp32_operation_once():
    """Add, multiply, divide and the roundings to T: no flushing, no approximation."""
    seed = checks.fresh_seed()
    a, b = awkward_fp32(3001, seed), awkward_fp32(3001, seed + 1)
    small = torch.randn(3001).mul(2.0**-140)  # subnormal
    for x, y in ((a, b), (a, small), (small, small.flip(0))):
        pairs = list(zip(x.tolist(), y.tolist(), strict=True))
        assert_values(x + y, (add(*pair) for pair in pairs), f"+ {seed}")
        assert_values(x * y, (mul(*pair) for pair in pairs), f"* {seed}")
        assert_values(x / y, (div(*pair) for pair in pairs), f"/ {seed}")
        for dtype in (BF16, FP16):
            assert_values(x.to(dtype), (to(v, dtype) for v, _ in pairs), f"{dtype} {seed}")


def test_root_is_correctly_rounded():
    """Of anything, and of the numbers whose roots lie nearest to the middle of two fp32 numbers."""
    seed = checks.fresh_seed()
    middles = torch.randint(2**23, 2**24, (3000,), generator=torch.Generator().manual_seed(seed))
    near_middle = (2 * middles + 1).double().square().float()
    for x in (
        awkward_fp32(3000, seed).abs(),
        near_middle,
        torch.tensor([0.0, INF, NAN, 2.0**-149]),
    ):
        assert_values(reference._sqrt(x), (sqrt(v) for v in x.tolist()), f"seed {seed}")


def test_exact_arithmetic_knows_fp32():
    """The judge of the other tests, judged by the C compiler's own rounding of a double."""
    for v in (*torch.randn(500, dtype=torch.float64).tolist(), 1 + 2.0**-24, 1 + 3 * 2.0**-24):
        for scale in (1.0, 2.0**-140, 2.0**127):
            try:
                (want,) = struct.unpack("f", struct.pack("f", v * scale))
            except OverflowError:
                want = math.copysign(INF, v)
            assert rounded(Fraction(v * scale), FP32) == want
    assert [to(v, FP16) for v in (65519.0, 65520.0)] == [65504.0, INF]
    assert [to(1 + v * 2.0**-8, BF16) for v in (1, 3)] == [1.0, 1 + 2.0**-6]
    assert sqrt(2.0) == struct.unpack("f", struct.pack("f", math.sqrt(2)))[0]


def test_no_step_is_contracted_to_fma():
    """The rows are such that an FMA would be seen, so that equality means that there is none."""

    def fused_square_add(total: float, e: float) -> float:
        return rounded(Fraction(e) * Fraction(e) + Fraction(total), FP32)

    rows = torch.randn(200, 4)
    got = reference.sum_of_squares(rows).tolist()
    separate = [reduce(add, (mul(e, e) for e in row)) for row in rows.tolist()]
    fused = [reduce(fused_square_add, row, 0.0) for row in rows.tolist()]
    assert sum(a != b for a, b in zip(separate, fused, strict=True)) > 20
    assert got == separate


# ------------------------------------------------------------------------------ values by hand


def test_plain_residual_and_sandwich_by_hand():
    a = torch.full((1, 8), 2.0, dtype=BF16)
    weight = torch.arange(8, dtype=BF16)
    norm_out, residual_out = reference.add_rmsnorm(a, weight, eps=0.0)
    assert norm_out.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]  # 2 / sqrt(4) * (1 + w)
    assert residual_out.tolist() == [[2] * 8]

    norm_out, residual_out = reference.add_rmsnorm(a, weight, a * 3, eps=0.0, weight_bias=0.0)
    assert norm_out.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]  # 8 / sqrt(64) * w
    assert residual_out.tolist() == [[8] * 8]

    post_weight = torch.full((8,), 4.0, dtype=BF16)
    norm_out, residual_out = reference.add_rmsnorm(
        a, weight, a * 3, post_weight=post_weight, eps=12.0
    )
    # p = 2 / sqrt(4 + 12) * (1 + 4) = 2.5; h = 6 + 2.5 = 8.5; 8.5 / sqrt(72.25 + 12) = 0.926
    assert residual_out.tolist() == [[8.5] * 8]
    want = [8.5 / math.sqrt(72.25 + 12) * (1 + w) for w in range(8)]
    assert norm_out[0].tolist() == pytest.approx(want, rel=2**-8)


def test_rank_order_and_one_rounding():
    """1 + 2^-8 is lost in bf16 and kept by the fp32 sum; 2^24 + 1 is lost in fp32, by order."""
    tiny = torch.full((8,), 2.0**-8, dtype=BF16)
    one = torch.ones(8, dtype=BF16)
    assert reference.all_reduce([one, tiny, tiny]).tolist() == [1 + 2**-7] * 8
    large = torch.full((8,), 2.0**24)
    one = torch.ones(8)
    assert reference.all_reduce([large, one, -large]).tolist() == [0.0] * 8
    assert reference.all_reduce([large, -large, one]).tolist() == [1.0] * 8
    assert reference.all_reduce(torch.stack([one, large, -large])).tolist() == [0.0] * 8


def test_a_is_rounded_before_the_residual_is_added():
    x = [torch.ones(8, dtype=BF16), torch.full((8,), 2.0**-9, dtype=BF16)]
    residual = torch.full((8,), -1.0, dtype=BF16)
    _, residual_out = reference.fused_allreduce_gemma_rmsnorm(x, residual, residual)
    assert residual_out.tolist() == [0.0] * 8  # not 2^-9


def test_p_and_h_are_rounded():
    """Sandwich: h from p rounded to bf16, and norm_out from h rounded to bf16."""
    a = torch.ones(1, 8, dtype=BF16)
    post_weight = torch.full((8,), 2.0**-9)  # p = 1 + 2^-9 in fp32, 1 in bf16
    residual = torch.tensor([[-1.0, 2.0**-9] * 4], dtype=BF16)
    norm_out, residual_out = reference.add_rmsnorm(
        a, torch.zeros(8), residual, post_weight=post_weight, eps=0.0
    )
    assert residual_out.tolist() == [[0.0, 1.0] * 4]
    assert norm_out.tolist() == [[0.0, 1.4140625] * 4]


def test_bias_is_added_to_the_weight_in_fp32():
    """1 + 0.0037 is 1.0 in bf16: a cached or low-precision 1 + w loses the small weights."""
    h = torch.tensor([[1.0, 1.5, 1.25, 1.75]], dtype=BF16)
    weight = torch.full((4,), 0.0037, dtype=BF16)
    planted = (torch.tensor(1.0, dtype=BF16) + weight).float()  # wrong
    assert planted.tolist() == [1.0] * 4
    wrong = (h.float() * reference.rstd(h, 0.0).unsqueeze(-1) * planted).to(BF16)
    right = h.double() / math.sqrt(1.96875) * (1 + weight.double())

    got = reference.add_rmsnorm(h, weight, eps=0.0)[0]
    assert checks.ulps(got, right, BF16).max() <= 0.51
    assert checks.ulps(wrong, right, BF16).max() > 0.6


def test_fp32_weights_keep_their_bits():
    """A weight that bf16 cannot hold: rounding it (or reading it as bf16) first is seen."""
    case = checks.make_case(2, 5, 640, BF16, "sandwich", weight_dtype=FP32)
    norm_out, residual_out = case.expected()
    checks.assert_near_float64(case, norm_out, residual_out)
    assert case.post_weight is not None
    low = replace(case, weight=case.weight.to(BF16), post_weight=case.post_weight.to(BF16))
    assert not checks.bit_equal(low.expected()[0], norm_out).all()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_negative_zero_nan_and_infinity(dtype):
    minus = torch.full((1, 8), -0.0, dtype=dtype)
    zero = torch.zeros(8, dtype=dtype)
    norm_out, residual_out = reference.fused_allreduce_gemma_rmsnorm([minus] * 3, zero, minus)
    for out in (norm_out, residual_out):
        checks.assert_bit_equal(out, minus)
    norm_out, residual_out = reference.fused_allreduce_gemma_rmsnorm([minus, -minus], zero)
    checks.assert_bit_equal(residual_out, -minus)

    x = torch.ones(2, 8, dtype=dtype)
    x[0, 3], x[1, 5] = NAN, -INF
    norm_out, residual_out = reference.fused_allreduce_gemma_rmsnorm([x, torch.ones_like(x)], zero)
    assert norm_out[0].isnan().all()
    assert residual_out[0].isnan().tolist() == [column == 3 for column in range(8)]
    assert norm_out[1, :5].tolist() == [0.0] * 5  # rstd is 0
    assert norm_out[1, 5].isnan()
    assert residual_out[1].tolist() == [2.0] * 5 + [-INF] + [2.0] * 2


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_squares_that_overflow_or_vanish(dtype):
    huge = torch.full((1, 8), 2.0**64, dtype=dtype)
    zero = torch.zeros(8, dtype=dtype)
    assert reference.sum_of_squares(huge).item() == INF
    assert reference.rstd(huge, 1e-6).item() == 0.0
    assert reference.add_rmsnorm(huge, zero)[0].tolist() == [[0.0] * 8]
    tiny = torch.full((1, 8), 2.0**-80, dtype=dtype)
    assert reference.rstd(tiny, 0.0).item() == INF
    assert reference.rstd(tiny, 2.0**-20).item() == 1024
    subnormal = torch.full((1, 8), 2.0**-130, dtype=dtype)
    norm_out, residual_out = reference.add_rmsnorm(subnormal, zero, subnormal, eps=2.0**-20)
    assert residual_out.tolist() == [[2.0**-129] * 8]
    assert norm_out.tolist() == [[2.0**-119] * 8]
    # A sum of squares that is subnormal in fp32 is kept: 8 * 2^-148 / 8.
    assert reference.rstd(torch.full((1, 8), 2.0**-74, dtype=dtype), 0.0).item() == 2.0**74


def test_post_weight_needs_a_residual():
    a, weight = torch.ones(1, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="post_weight: needs a residual"):
        reference.add_rmsnorm(a, weight, post_weight=weight)


# ------------------------------------------------------------- other formulas, other shapes


def huggingface_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' Gemma3RMSNorm and Qwen3NextRMSNorm."""
    x32 = x.float()
    out = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (out * (1.0 + weight.float())).type_as(x)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("weight_std", [0.1, 1.0])
def test_equals_huggingface_within_rounding(dtype, weight_std):
    """Each stage from the same input: the sums to the bit, the norms within 1 ulp (fp32: 20)."""
    limit = 20 if dtype == FP32 else 1

    def assert_near(got: Tensor, want: Tensor) -> None:
        assert checks.ulps(got, want.double(), dtype).max() <= limit, case

    for hidden in (640, 1152, 5376):
        case = checks.make_case(4, 7, hidden, dtype, "sandwich", weight_std=weight_std)
        assert case.residual is not None
        assert case.post_weight is not None
        a = reference.all_reduce(case.xs)
        assert_near(
            reference.add_rmsnorm(a, case.weight)[0],
            huggingface_rmsnorm(a, case.weight, 1e-6),
        )
        norm_out, h = reference.add_rmsnorm(a, case.weight, case.residual)
        checks.assert_bit_equal(h, case.residual + a)
        assert_near(norm_out, huggingface_rmsnorm(h, case.weight, 1e-6))

        p, _ = reference.add_rmsnorm(a, case.post_weight)
        assert_near(p, huggingface_rmsnorm(a, case.post_weight, 1e-6))
        norm_out, h = case.expected()
        checks.assert_bit_equal(h, case.residual + p)
        assert_near(norm_out, huggingface_rmsnorm(h, case.weight, 1e-6))


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("hidden", [8, 640, 2304, 2880, 5376])
def test_within_one_ulp_of_float64(dtype, form, hidden):
    for ranks, weight_std, bias in ((2, 0.1, 1.0), (8, 1.0, 0.0), (3, 1.0, 0.37)):
        case = checks.make_case(
            ranks, 9, hidden, dtype, form, weight_std=weight_std, weight_bias=bias
        )
        norm_error, _ = checks.assert_near_float64(case, *case.expected())
        assert norm_error <= (20 if dtype == FP32 else 0.51), case  # nearly correctly rounded
    for special in [*checks.SPECIALS, "mixed"]:
        case = checks.make_case(2, 9, hidden, dtype, form, special=special)
        checks.assert_near_float64(case, *case.expected())


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_float64_check_can_fail(dtype):
    """Errors of two ulps, a lost rank, a weight added in T and an unwritten output are found."""
    case = checks.make_case(2, 16, 640, dtype, "residual", weight_std=1.0)
    norm_out, residual_out = case.expected()
    assert case.residual is not None

    def two_up(x: Tensor) -> Tensor:
        return (x.view(torch.int16) + 2).view(dtype)

    low = (case.weight + torch.tensor(1.0, dtype=dtype)).float() - 1  # 1 + w rounded to T
    planted = {
        "norm_out two ulps away": (two_up(norm_out), residual_out),
        "lost rank": reference.add_rmsnorm(case.xs[0], case.weight, case.residual),
        "weight added in T": reference.add_rmsnorm(
            reference.all_reduce(case.xs), low, case.residual
        ),
        "residual without a": (norm_out, case.residual),
        "unwritten": (checks.poisoned_like(norm_out), residual_out),
        "NaN": (torch.full_like(norm_out, NAN), residual_out),
    }
    for outputs in planted.values():
        with pytest.raises(AssertionError, match="ulps from float64"):
            checks.assert_near_float64(case, *outputs)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_no_dependence_on_rows_leading_shape_threads_or_strides(dtype):
    case = checks.make_case(4, 333, 2880, dtype, "sandwich", special="mixed")
    assert case.residual is not None
    assert case.post_weight is not None
    want = case.expected()

    def assert_same(what: str, xs: list[Tensor], residual: Tensor, rows: slice | int) -> None:
        got = reference.fused_allreduce_gemma_rmsnorm(
            xs, case.weight, residual, post_weight=case.post_weight
        )
        for out, expected in zip(got, want, strict=True):
            expected = expected[rows]
            checks.assert_bit_equal(
                out.reshape(expected.shape), expected, f"{what}, rows {rows} of {case}"
            )

    for rows in (slice(0, 1), slice(7, 8), slice(2, 5), slice(100, 228), 0, 332):
        assert_same("fewer rows", [x[rows] for x in case.xs], case.residual[rows], rows)
    everything = slice(None)
    shape = (3, 111, 2880)
    assert_same("3-D", [x.view(shape) for x in case.xs], case.residual.view(shape), everything)
    transposed = [x.t().contiguous().t() for x in (*case.xs, case.residual)]
    assert_same("transposed", transposed[:-1], transposed[-1], everything)
    shifted = [torch.cat([x[:, :1], x], dim=-1)[:, 1:] for x in (*case.xs, case.residual)]
    assert_same("misaligned", shifted[:-1], shifted[-1], everything)

    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_same(f"{count} threads", case.xs, case.residual, everything)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("form", checks.FORMS)
def test_shapes_dtypes_purity_and_empty_calls(dtype, form):
    case = checks.make_case(3, 2, 40, dtype, form, weight_dtype=FP32)
    given_tensors = [*case.xs, case.weight, case.residual, case.post_weight]
    copies = [None if t is None else t.clone() for t in given_tensors]
    outputs = [*case.expected(), *reference.add_rmsnorm(case.xs[0], case.weight, **case.options)]
    outputs += reference.fused_allreduce_gemma_rmsnorm(case.xs[:1], case.weight, **case.options)
    outputs.append(reference.all_reduce(case.xs[:1]))
    for tensor, copy in zip(given_tensors, copies, strict=True):
        if tensor is not None and copy is not None:
            checks.assert_bit_equal(tensor, copy, case)  # not mutated
            assert all(out.data_ptr() != tensor.data_ptr() for out in outputs)  # nor returned
    assert all(out.shape == (2, 40) and out.dtype == dtype for out in outputs)

    for shape in ((0, 40), (2, 0, 40)):
        x = torch.empty(shape, dtype=dtype)
        options = case.options | {"residual": None if form == "plain" else x}
        for out in reference.fused_allreduce_gemma_rmsnorm([x, x], case.weight, **options):
            assert (out.shape, out.dtype) == (shape, dtype)


def test_ulp_is_the_distance_to_the_neighbour():
    """Of every positive finite 16-bit number but the largest; and of random fp32."""
    for dtype in (BF16, FP16):
        bits = torch.arange(0x7F7F if dtype == BF16 else 0x7BFF, dtype=torch.int16)
        values, following = bits.view(dtype).double(), (bits + 1).view(dtype).double()
        assert torch.equal(checks.ulp(values, dtype), following - values)
    bits = torch.randint(0, 0x7F7FFFFF, (100_000,), dtype=torch.int32)
    values, following = bits.view(FP32).double(), (bits + 1).view(FP32).double()
    assert torch.equal(checks.ulp(-values, FP32), following - values)


def test_bit_equality_can_fail():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    checks.assert_bit_equal(zero / zero, -(zero / zero))
    for got in (-zero, one, zero / zero, zero.to(BF16), zero[:1], zero + 2.0**-149):
        with pytest.raises(AssertionError):
            checks.assert_bit_equal(got, zero)


@pytest.mark.parametrize("special", checks.SPECIALS)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_planted_values_are_there(special, dtype):
    """In every second row, and in no other; and the case is remade by its label."""
    case = checks.make_case(2, 9, 64, dtype, "residual", special=special)
    a = torch.stack([x.float() for x in case.xs])
    tiny = torch.finfo(dtype).tiny
    found = {
        "zeros": (a == 0).all(-1).all(0),
        "negative_zero": ((a == 0) & a.signbit()).all(0).any(-1),
        "nan": a.isnan().any(-1).any(0),
        "inf": a.isinf().any(-1).any(0),
        "subnormal": ((a != 0) & (a.abs() < tiny)).double().mean(-1).amin(0) > 0.2,
        "empty_words": (case.xs[1].view(torch.int32) == -1)[:, :4].all(-1),
        "overflow": (a.abs() > torch.finfo(dtype).max ** 0.5 * 0.9).any(-1).any(0),
    }[special]
    assert found.tolist() == [row % 2 == 0 for row in range(9)], case
    remade = eval(case.label, vars(checks) | {"torch": torch})
    for got, want in zip(remade.expected(), case.expected(), strict=True):
        checks.assert_bit_equal(got, want, case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_same_bits_on_a_gpu(dtype):
    for form in checks.FORMS:
        for hidden in (8, 640, 5376, 16384):
            case = checks.make_case(5, 37, hidden, dtype, form, weight_bias=0.3, special="mixed")
            moved = replace(
                case,
                xs=[x.cuda() for x in case.xs],
                weight=case.weight.cuda(),
                residual=None if case.residual is None else case.residual.cuda(),
                post_weight=None if case.post_weight is None else case.post_weight.cuda(),
            )
            for out, want in zip(moved.expected(), case.expected(), strict=True):
                checks.assert_bit_equal(out.cpu(), want, case)
