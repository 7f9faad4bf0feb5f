"""The fused call as a module, in place of a model's Gemma RMSNorm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import api


class FusedAllReduceGemmaRMSNorm(nn.Module):
    """All-reduce of the partial sums x, residual add and Gemma RMSNorm, as a module.

    x, residual = norm(x, residual)
    x = norm(x)

    It has the arguments and the results of the GemmaRMSNorm of vLLM and SGLang, and x is this
    rank's partial sums: what a row-parallel linear returns that does not reduce. The linear must
    leave its own all-reduce out (vLLM, SGLang: `reduce_results=False`).

    In the sandwich form (Gemma 2, Gemma 3) it holds two weights, that of the norm before the
    residual add and that of the norm after it, and needs a residual.

    The weights are read at each call, and 1 is added to them in fp32 there: an update in place is
    seen, also under a captured graph, and no rounded 1 + weight is kept.

    hidden_size: elements of a row; see `fused_allreduce_gemma_rmsnorm`, as for all that follows.
    eps, weight_bias, algorithm, group: handed to it. group: kept, not copied.
    sandwich: True makes `post_weight`, the weight of the norm before the residual add.
    dtype, device: of the weights, which are zeros: with weight_bias=1 the norm scales by 1.

    Raises what the call raises, and ValueError for a hidden_size that is not a positive int.

    >>> layer.post_attention_layernorm = FusedAllReduceGemmaRMSNorm.from_module(
    ...     layer.post_attention_layernorm, group=tensor_parallel_group)
    """

    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        group: Any = None,
        weight_bias: float = 1.0,
        sandwich: bool = False,
        algorithm: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if not isinstance(hidden_size, int) or isinstance(hidden_size, bool) or hidden_size < 1:
            raise ValueError(
                f"hidden_size: a positive int is required; got {hidden_size!r}; pass the model's"
            )
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight_bias = weight_bias
        self.group = group
        self.algorithm = algorithm

        def zeros() -> nn.Parameter:
            return nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))

        self.weight = zeros()
        self.register_parameter("post_weight", zeros() if sandwich else None)
        # A norm whose weight is the post_weight. In a tuple, so that it is no submodule: it stays
        # one of the model, where its weight keeps its name in the state_dict.
        self._post_norm: tuple[nn.Module, ...] = ()

    @classmethod
    def from_module(
        cls,
        norm: nn.Module,
        *,
        post_norm: nn.Module | None = None,
        group: Any = None,
        weight_bias: float = 1.0,
        algorithm: str = "auto",
    ) -> FusedAllReduceGemmaRMSNorm:
        """A module with the very weight of `norm`, a Gemma RMSNorm of transformers, vLLM or SGLang.

        In the place of `norm` it leaves the keys of the state_dict as they were. post_norm: makes
        it a sandwich, with the weight of this norm before the residual add; post_norm itself stays
        where it is in the model, and must not be called any more.

        What `norm` computes is looked at, on a few rows: ValueError where it is not
        v / sqrt(mean(v^2) + eps) * (weight_bias + weight), as a norm with ones for weights is not;
        TypeError where it has no weight or eps.

        >>> fused = FusedAllReduceGemmaRMSNorm.from_module(
        ...     layer.pre_feedforward_layernorm, post_norm=layer.post_attention_layernorm)
        >>> x, residual = fused(layer.self_attn.o_proj(x), residual)
        """
        weight, eps = read_norm("norm", norm, weight_bias)
        made = cls(
            weight.shape[0],
            eps,
            group=group,
            weight_bias=weight_bias,
            algorithm=algorithm,
            device="meta",
        )
        made.weight = weight
        if post_norm is not None:
            post_weight, post_eps = read_norm("post_norm", post_norm, weight_bias)
            if post_eps != eps or post_weight.shape != weight.shape:
                raise ValueError(
                    f"post_norm: the eps ({eps}) and hidden size ({weight.shape[0]}) of norm are "
                    f"required; got {post_eps} and {post_weight.shape[0]}; call the two apart"
                )
            made._post_norm = (post_norm,)
        return made

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """(norm_out, residual_out) where a residual is given, else norm_out alone.

        x, residual: [..., hidden_size], bfloat16, float16 or float32, as in
        `fused_allreduce_gemma_rmsnorm`. Call the function itself where the sum is needed and there
        is no residual: it always returns both.
        """
        post_weight: Any = self._post_norm[0].weight if self._post_norm else self.post_weight
        norm_out, residual_out = api.fused_allreduce_gemma_rmsnorm(
            x,
            self.weight,
            residual,
            post_weight=post_weight,
            eps=self.eps,
            weight_bias=self.weight_bias,
            group=self.group,
            algorithm=self.algorithm,
        )
        return norm_out if residual is None else (norm_out, residual_out)

    def extra_repr(self) -> str:
        form = ", sandwich" if self._post_norm or self.post_weight is not None else ""
        return f"{self.hidden_size}, eps={self.eps}, weight_bias={self.weight_bias}{form}"


# ---------------------------------------------------------------------------------- other's norms

# What a norm's own results may be off, in its roundings and ours: of the largest in a row.
PROBE_TOLERANCE = 0.02


def read_norm(name: str, norm: Any, weight_bias: float) -> tuple[nn.Parameter, float]:
    """(weight, eps) of a Gemma RMSNorm module, having looked at what it computes.

    Raises TypeError, ValueError, as `from_module` says. A norm on the meta device is not looked at.
    """
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        raise TypeError(
            f"{name}: a module with a weight of one dimension and an eps (or variance_epsilon) is "
            f"required; got {type(norm).__name__}; make a FusedAllReduceGemmaRMSNorm(hidden_size)"
        )
    if weight.device.type != "meta" and not _computes(norm, weight, eps, weight_bias):
        raise ValueError(
            f"{name}: v / sqrt(mean(v^2) + {eps:g}) * ({weight_bias:g} + weight) is required; "
            f"{type(norm).__name__} computes something else; pass its own weight_bias (Gemma 3n "
            "and 4: 0), or leave it as it is"
        )
    return weight, eps


@torch.no_grad()
def _computes(norm: nn.Module, weight: Tensor, eps: float, weight_bias: float) -> bool:
    """Whether the norm, in rows where eps counts and where it does not, computes the formula."""
    hidden = weight.shape[0]
    # Numbers in no pattern, the same on all ranks. Every second row is small beside eps.
    v = torch.arange(4 * hidden, device=weight.device).remainder(37).sub(17.5).view(4, hidden)
    scale = 0.01 * math.sqrt(max(eps, 1e-12))
    v = torch.where(
        torch.arange(4, device=weight.device).remainder(2).bool()[:, None], v * scale, v
    )
    v = v.to(weight.dtype if weight.dtype.is_floating_point else torch.float32)
    got = norm.forward(v).float()  # not norm(v): it may have hooks
    exact = v.float()
    want = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    want = want * (weight_bias + weight.float())
    largest = want.abs().amax(-1, keepdim=True)
    return bool(((got - want).abs() <= PROBE_TOLERANCE * largest).all())
