"""Small models for the tests of fusion: the norms, blocks and all-reduces that are found in others.

A block does all-reduce, residual add and norm, in one of the three forms; what goes into its
all-reduce is 2 x, so that no graph input does. All are for CPU and GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

EPS = 1e-6

# ---------------------------------------------------------------------------------- the all-reduce


def functional(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def in_place(x: Tensor) -> Tensor:
    """As transformers does it; x is a result of the model's own."""
    dist.all_reduce(x)
    return x


ALL_REDUCES = {"functional": functional, "in place": in_place}

# --------------------------------------------------------------------------------------- the norms
# Each computes T( (v * rstd(v)) * (bias + weight) ), and each writes it down in its own way.


def hugging_face(v: Tensor, weight: Tensor, bias: float, eps: float) -> Tensor:
    """Gemma3RMSNorm and Qwen3NextRMSNorm."""
    v32 = v.float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (bias + weight.float() if bias else weight.float())).type_as(v)


def swapped(v: Tensor, weight: Tensor, bias: float, eps: float) -> Tensor:
    """Every pair of operands the other way round."""
    v32 = v.float()
    normed = torch.rsqrt(eps + torch.mean(v32 * v32, dim=v.dim() - 1, keepdim=True)) * v32
    return ((weight.float() + bias if bias else weight.float()) * normed).to(v.dtype)


def power(v: Tensor, weight: Tensor, bias: float, eps: float) -> Tensor:
    """Gemma3nRMSNorm and Gemma4RMSNorm."""
    v32 = v.float()
    normed = v32 * torch.pow(v32.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    return (normed * (bias + weight.float() if bias else weight.float())).type_as(v)


def reciprocal(v: Tensor, weight: Tensor, bias: float, eps: float) -> Tensor:
    v32 = v.float()
    normed = v32 * torch.sqrt(v32.square().mean(-1, keepdim=True) + eps).reciprocal()
    return (normed * (bias + weight.float() if bias else weight.float())).type_as(v)


def functional_norm(v: Tensor, weight: Tensor, bias: float, eps: float) -> Tensor:
    """F.rms_norm in fp32, which is given 1 + weight."""
    scale = bias + weight.float() if bias else weight.float()
    return nn.functional.rms_norm(v.float(), v.shape[-1:], scale, eps).type_as(v)


NORMS = {f.__name__: f for f in (hugging_face, swapped, power, reciprocal, functional_norm)}


class RMSNorm(nn.Module):
    def __init__(
        self,
        weight: Tensor,
        bias: float = 1.0,
        eps: float = EPS,
        how: Callable[[Tensor, Tensor, float, float], Tensor] = hugging_face,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias, self.eps, self.how = bias, eps, how

    def forward(self, v: Tensor) -> Tensor:
        return self.how(v, self.weight, self.bias, self.eps)


# -------------------------------------------------------------------------------------- the blocks


class Block(nn.Module):
    """One block of a form: (norm_out, residual_out), as the fused call returns them."""

    def __init__(
        self,
        form: str,
        norm: RMSNorm,
        post_norm: RMSNorm | None = None,
        all_reduce: Callable[[Tensor], Tensor] = functional,
        residual_first: bool = True,
    ) -> None:
        super().__init__()
        self.form, self.norm, self.post_norm = form, norm, post_norm
        self.all_reduce, self.residual_first = all_reduce, residual_first

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = self.all_reduce(2 * x)
        if self.form == "sandwich":
            assert self.post_norm is not None
            h = self.post_norm(h)
        if self.form != "plain":
            h = residual + h if self.residual_first else h + residual
        return self.norm(h), h


class Decoder(nn.Module):
    """Layers of a decoder, in tensor parallel: after each product of matrices a block."""

    def __init__(self, blocks: list[Block], dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        hidden = blocks[0].norm.weight.shape[0]
        weights = [torch.randn(hidden, hidden, generator=generator) for _ in blocks]
        self.weights = nn.ParameterList(
            nn.Parameter((w * hidden**-0.5).to(dtype), requires_grad=False) for w in weights
        )

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for weight, block in zip(self.weights, self.blocks, strict=True):
            x, residual = block(x @ weight, residual)
        return x, residual


class VllmTestModel(nn.Module):
    """The model of vLLM's test of its fusion of all-reduce and RMSNorm, with Gemma's norms.

    Four norms, products of matrices between them; the sum of the first all-reduce is also the
    residual of the next. ops: vLLM's ops instead of PyTorch's, as vLLM's models have them.
    """

    def __init__(self, hidden: int, dtype: torch.dtype, seed: int, ops: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.ops = ops
        self.norms = nn.ParameterList(
            nn.Parameter((torch.randn(hidden, generator=generator) * 0.1).to(dtype), False)
            for _ in range(4)
        )
        self.w = nn.ParameterList(
            nn.Parameter(torch.rand(hidden, hidden, generator=generator).to(dtype), False)
            for _ in range(3)
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.ops is not None:
            return self.ops.vllm.all_reduce(x, dist.group.WORLD.group_name)
        return functional(x)

    def norm(self, i: int, x: Tensor, residual: Tensor | None = None) -> Any:
        weight = self.norms[i]
        if self.ops is not None:
            scale = weight.float() + 1.0
            if residual is None:
                return self.ops.vllm_ir.rms_norm(x, scale, EPS)
            return self.ops.vllm_ir.fused_add_rms_norm(x, residual, scale, EPS)
        if residual is None:
            return hugging_face(x, weight, 1.0, EPS)
        residual = x + residual
        return hugging_face(residual, weight, 1.0, EPS), residual

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(x)
        x = residual = self.all_reduce(z)
        y = self.norm(0, x)
        for i, w in enumerate(self.w):
            y, residual = self.norm(i + 1, self.all_reduce(y @ w), residual)
        return y
