"""The contract, executable: what every path of this package computes, in plain fp32 torch.

Read it beside "The contract" in docs/design.md. Every torch call below is one IEEE operation on
each element: nothing here is contracted to FMA, reassociated, approximated or flushed. So the
results have the same bits on the CPU and on a GPU, for any number of rows, threads and strides, and
the kernels are required to equal them (NaN equals NaN).

Four things this file avoids, because each one changes bits:
  torch.sum, torch.mean   their order depends on the device, the shape and the number of threads;
  torch.rsqrt of fp32     not correctly rounded on a GPU;
  torch.sqrt of fp32      not correctly rounded on a CPU, where it is vectorised (8 rows and more);
  tensor / number         on a GPU torch multiplies by the number's rounded reciprocal.

T is the dtype of the inputs: bfloat16, float16 or float32. All functions are pure: they leave their
arguments alone and return tensors that alias none of them. They check next to nothing (the public
API does). They are made for eager mode, with torch.set_flush_denormal off, its default.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

PACK_BYTES = 16  # what one GPU thread loads at a time: 8 elements of bf16 or fp16, 4 of fp32
LANES = 32  # the threads of a warp; LANES consecutive packs are a segment


def fused_allreduce_gemma_rmsnorm(
    xs: Sequence[Tensor] | Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    post_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """All-reduce, residual add and RMSNorm as one rank of the fused call returns them.

        norm_out, residual_out = add_rmsnorm(all_reduce(xs), weight, residual, ...)

    xs: the partial sums of all N ranks, in rank order: N tensors [..., hidden] of dtype T, or one
        tensor [N, ..., hidden]. The other arguments and the result: see `add_rmsnorm`.

    >>> xs = torch.randn(4, 16, 640, dtype=torch.bfloat16)  # 4 ranks, 16 rows
    >>> weight, residual = torch.zeros(640, dtype=torch.bfloat16), torch.zeros_like(xs[0])
    >>> norm_out, residual_out = fused_allreduce_gemma_rmsnorm(xs, weight, residual)
    """
    return add_rmsnorm(
        all_reduce(xs), weight, residual, post_weight=post_weight, eps=eps, weight_bias=weight_bias
    )


def all_reduce(xs: Sequence[Tensor] | Tensor) -> Tensor:
    """a = T( fp32 sum of x_0 + x_1 + ... + x_{N-1}, in rank order ): rounded to T once.

    The sum starts from x_0, not from 0, so that -0.0 from every rank stays -0.0.

    xs: N tensors [..., hidden] of dtype T, or one tensor [N, ..., hidden].
    Returns [..., hidden], T.

    >>> x = torch.tensor([1.0, -0.0], dtype=torch.float16)
    >>> all_reduce([x, x])
    tensor([2., -0.], dtype=torch.float16)
    """
    total = reduce(operator.add, [x.float() for x in xs])
    return total.to(xs[0].dtype, copy=True)


def add_rmsnorm(
    a: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    post_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm of an already reduced `a`: (norm_out, residual_out).

        plain     (no residual):  h = a
        residual:                 h = T( fp32(residual) + fp32(a) )
        sandwich  (post_weight):  p = T( (fp32(a) * rstd(a)) * (bias + fp32(post_weight)) )
                                  h = T( fp32(residual) + fp32(p) )
        norm_out     = T( (fp32(h) * rstd(h)) * (bias + fp32(weight)) )
        residual_out = h

    The formula is Gemma3RMSNorm's and Qwen3NextRMSNorm's in transformers,
    `x32 * rsqrt(mean(x32^2) + eps) * (1.0 + w.float())`, with their rounding of every residual add;
    the sandwich is Gemma 2's and 3's post-norm, residual add and next pre-norm.

    a, residual: [..., hidden], T. weight, post_weight: [hidden], T or float32.
    eps: added to the mean of squares, in the square of the inputs' unit; rounded to fp32.
    weight_bias: 1 for Gemma, Gemma 2 and 3, Qwen3-Next and Qwen3.5, 0 for Gemma 3n and 4; rounded
        to fp32. It is added in fp32: in bf16, 1 + 0.0039 would be 1.
    Returns two tensors like `a`. Raises ValueError for a post_weight without a residual.

    >>> a = torch.full((1, 8), 2.0)
    >>> add_rmsnorm(a, torch.zeros(8), torch.ones(1, 8), eps=0.0)[1]
    tensor([[3., 3., 3., 3., 3., 3., 3., 3.]])
    """
    if residual is None:
        if post_weight is not None:
            raise ValueError("post_weight: needs a residual; got residual=None; pass the residual")
        h = a.clone()
    else:
        p = a if post_weight is None else _rmsnorm(a, post_weight, eps, weight_bias)
        h = (residual.float() + p.float()).to(a.dtype)
    return _rmsnorm(h, weight, eps, weight_bias), h


def _rmsnorm(v: Tensor, weight: Tensor, eps: float, weight_bias: float) -> Tensor:
    """T( (fp32(v) * rstd(v)) * (bias + fp32(weight)) ), in this order."""
    scale = _fp32(weight_bias, weight) + weight.float()
    return ((v.float() * rstd(v, eps).unsqueeze(-1)) * scale).to(v.dtype)


def rstd(v: Tensor, eps: float) -> Tensor:
    """1 / sqrt( (sum of fp32(v)^2) / hidden + eps ): one correctly rounded fp32 operation a step.

    v: [..., hidden], T. Returns [...], fp32, in the inverse of v's unit. Rows of zeros give inf
    where eps is 0; a sum of squares beyond fp32 gives 0.

    >>> rstd(torch.tensor([2.0, 2.0, -2.0, 2.0]), eps=0.0)
    tensor(0.5000)
    """
    mean = sum_of_squares(v) / _fp32(v.shape[-1], v)
    return _fp32(1, v) / _sqrt(mean + _fp32(eps, v))


def sum_of_squares(v: Tensor) -> Tensor:
    """The fp32 sum of fp32(v)^2 over the last dimension, in the contract's fixed order.

    The order is that of a GPU which keeps one pack a thread and one segment a warp, and it depends
    on hidden and T alone:
      1. the squares of one pack (16 bytes) are added in element order;
      2. the 32 packs of a segment are added by xor-shuffle; missing packs are 0;
      3. lane l of a last warp adds the segments l, l + 32, l + 64, ... in order, from 0;
      4. its 32 lanes are added by xor-shuffle.

    v: [..., hidden], T; hidden at least 1. Returns [...], fp32, in the square of v's unit.

    >>> sum_of_squares(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([25.,  1.])
    """
    pack = PACK_BYTES // v.element_size()
    segments = math.ceil(v.shape[-1] / (LANES * pack))
    rounds = math.ceil(segments / LANES)

    squares = v.float() * v.float()
    packs = _sum_in_order(_pad(squares, segments, LANES, pack), dim=-1)  # [..., segments, LANES]
    segment_sums = _sum_by_xor_shuffle(packs)  # [..., segments]
    lanes = _sum_in_order(_pad(segment_sums, rounds, LANES), dim=-2)  # [..., LANES]
    return _sum_by_xor_shuffle(lanes)


def _pad(v: Tensor, *sizes: int) -> Tensor:
    """The last dimension filled up with zeros and split into dimensions of these sizes."""
    missing = math.prod(sizes) - v.shape[-1]
    return torch.nn.functional.pad(v, (0, missing)).unflatten(-1, sizes)


def _sum_in_order(v: Tensor, dim: int) -> Tensor:
    """((v_0 + v_1) + v_2) + ... along `dim`. (Squares are never -0.0, so 0 + v_0 is v_0.)"""
    return reduce(operator.add, v.unbind(dim))


def _sum_by_xor_shuffle(lanes: Tensor) -> Tensor:
    """The sum of 32 lanes (the last dimension) by xor-shuffle 16, 8, 4, 2, 1.

    In a warp lane l adds the value of lane l ^ 16, and so on. Addition commutes, so lanes l and
    l ^ 16 then hold the same bits, and halving does the same: [0, 16) + [16, 32), ...
    """
    for half in (16, 8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.squeeze(-1)


def _sqrt(v: Tensor) -> Tensor:
    """The correctly rounded fp32 root, by way of float64.

    No root of an fp32 number lies nearer than 4 ulps of float64 to the middle of two fp32 numbers
    (the middle is m odd, of 25 bits; m^2 and the number, as integers, differ by at least 1; so the
    roots differ by at least 1 / 2m). An error of an ulp or two in float64 is thus rounded away.
    """
    return torch.sqrt(v.double()).float()


def _fp32(number: float, like: Tensor) -> Tensor:
    """The number rounded to fp32, as a tensor on the same device (see the top: tensor / number)."""
    return torch.full((), number, dtype=torch.float32, device=like.device)
