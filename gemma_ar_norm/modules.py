"""The fused call as a module, in place of a model's Gemma RMSNorm."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from . import api, groups


class FusedAllReduceGemmaRMSNorm(nn.Module):
    """All-reduce of the partial sums x, residual add and Gemma RMSNorm, as a module.

    x, residual = norm(x, residual)
    x = norm(x)

    It has the arguments and the results of the GemmaRMSNorm of vLLM and SGLang, and x is this
    rank's partial sums: what a row-parallel linear returns that does not reduce. The linear must
    leave its own all-reduce out (vLLM, SGLang: `reduce_results=False`).

    All of x is summed over the ranks. So it does not take the place of a norm whose input is whole
    on every rank: the first of a stack of layers, a q_norm or k_norm. Nor does it where the layer
    computes norm(residual + y), unless that line is changed, too: the residual is whole, and goes
    in beside y, as below.

    In the sandwich form (Gemma 2, Gemma 3) it holds two weights, that of the norm before the
    residual add and that of the norm after it, and needs a residual.

    The weights are read at each call, and 1 is added to them in fp32 there: an update in place is
    seen, also under a captured graph, and no rounded 1 + weight is kept.

    hidden_size: elements of a row; see `fused_allreduce_gemma_rmsnorm`, as for all that follows.
    eps, weight_bias, algorithm, group: handed to it. group: a copy of the module has the same. A
        pickle has its name, and needs a live group of that name when it is loaded.
    sandwich: True makes `post_weight`, the weight of the norm before the residual add.
    dtype, device: of the weights, which are zeros: with weight_bias=1 the norm scales by 1.

    Raises what the call raises, and ValueError for a hidden_size that is not a positive int.

    >>> layer.post_attention_layernorm = FusedAllReduceGemmaRMSNorm.from_module(
    ...     layer.post_attention_layernorm, group=tensor_parallel_group)
    >>> x, residual = layer.post_attention_layernorm(layer.self_attn.o_proj(x), residual)
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

        What `norm` computes is looked at, on rows of its weight's dtype: ValueError where it is not
        v / sqrt(mean(v^2) + eps) * (weight_bias + weight) in fp32, rounded once, as Llama's is not;
        TypeError where it has no weight or eps. It is looked at with the weights that it has, so
        load them first: some hide a difference, as ones hide Llama's rounding before the weight.

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

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedAllReduceGemmaRMSNorm:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo[id(self.group)] = self.group  # as if it had been copied: a group has no copies
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not (self.group is None or isinstance(self.group, str)):
            state["group"] = None
            state[GROUP_NAME] = groups.name_of(self.group)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = state.copy()
        name = state.pop(GROUP_NAME, None)
        super().__setstate__(state)
        if name is not None:
            self.group = _group_of_pickle(name)


GROUP_NAME = "group_name"  # in a pickle, in the place of a group


def _group_of_pickle(name: str) -> Any:
    try:
        return groups.named(name)
    except ValueError:
        raise ValueError(
            f"group: the group {name!r}, which the module was pickled with, is required; got a "
            "process without it; make that group before loading, or set the module's group to None "
            "before pickling"
        ) from None


# ---------------------------------------------------------------------------------- other's norms

# How far another order of the sum, or an approximate rsqrt, may move a value before it is rounded
# to T, relative to its own size: 32 ulps of fp32. Far less than an ulp of bf16 or fp16.
PROBE_TOLERANCE = 2.0**-18
PROBE_ELEMENTS = 8192  # at least: a weight of 1e-5 that 1 + weight loses in bf16 changes 1 in 1000


def read_norm(name: str, norm: Any, weight_bias: float) -> tuple[nn.Parameter, float]:
    """(weight, eps) of a Gemma RMSNorm module, having looked at what it computes.

    Raises TypeError, ValueError, as `from_module` says. A norm on the meta device is not looked at.
    """
    weight = getattr(norm, "weight", None)
    eps: Any = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    has_eps = isinstance(eps, (int, float)) and not isinstance(eps, bool)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not has_eps:
        raise TypeError(
            f"{name}: a module with a weight of one dimension and an eps (or variance_epsilon) is "
            f"required; got {type(norm).__name__}; make a FusedAllReduceGemmaRMSNorm(hidden_size)"
        )
    eps = float(eps)
    if weight.device.type != "meta" and not _computes(norm, weight, eps, weight_bias):
        raise ValueError(
            f"{name}: v / sqrt(mean(v^2) + {eps:g}) * ({weight_bias:g} + weight) in fp32, rounded "
            f"once, is required; got {type(norm).__name__}, which computes something else; pass "
            "its own weight_bias (Gemma 3n and 4: 0), or leave it as it is"
        )
    return weight, eps


@torch.no_grad()
def _computes(norm: nn.Module, weight: Tensor, eps: float, weight_bias: float) -> bool:
    """Whether the norm computes the formula, with one rounding to the dtype of its rows.

    Rounding keeps order. So what is near enough to the formula's value before it is rounded lies
    between the roundings of the nearest and farthest such value afterwards; nearly always these are
    one number. A norm that rounds on the way there, or adds the bias in bf16, misses many.
    """
    v = _probe_rows(weight, eps)
    got = norm.forward(v)  # not norm(v): it may have hooks
    if not isinstance(got, Tensor) or got.dtype != v.dtype or got.shape != v.shape:
        return False
    exact, factor = v.float(), weight.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    want = normed * (weight_bias + factor)
    # Of both parts of the sum, which may cancel out.
    off = PROBE_TOLERANCE * normed.abs() * (abs(weight_bias) + factor.abs())
    return bool(((want - off).to(v.dtype) <= got).all() and (got <= (want + off).to(v.dtype)).all())


def _probe_rows(weight: Tensor, eps: float) -> Tensor:
    """Random rows without zeros, the same on all ranks. Every second one is small beside eps."""
    hidden = weight.shape[0]
    shape = 4 + PROBE_ELEMENTS // max(hidden, 1), hidden
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    rows += torch.copysign(torch.tensor(0.5, device="cpu"), rows)
    rows[1::2] *= 0.1 * math.sqrt(max(eps, 1e-10))  # smaller ones would be 0 in fp16
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    return rows.to(weight.device, dtype)
