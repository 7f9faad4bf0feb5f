"""The forwards that `fuse` gives to a decoder layer, the final norm and the embedding.

They are functions on the instances. `Handoff` carries a norm from where it was computed, behind a
layer, to the module that transformers calls for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import api
from .families import Call, parameters_of
from .fuse_hooks import are_watched

WEIGHT_BIAS = 1.0  # of all families in families.py


@dataclass
class Site:
    """A fused call of a layer. modules: those whose hooks it would hide something from, or show
    this rank's part of a sum. While there are any, all is computed as before.

    reduces: whether its linear is to sum over ranks in the call that runs.
    """

    modules: tuple[Any, ...]
    reduces: bool = False

    def is_as_before(self, hidden: Tensor) -> bool:
        """Also under autocast, where the linear's dtype is not that of the residual."""
        return torch.is_autocast_enabled(hidden.device.type) or are_watched(self.modules)

    def run_as_before(self, mixer: Any, *args: Any, **kwargs: Any) -> Any:
        self.reduces = True
        try:
            return mixer(*args, **kwargs)
        finally:
            self.reduces = False


@dataclass(frozen=True)
class Step:
    """A block of a layer, as it will run. site: of its fused call; None where it stays as it is."""

    mixer: Any
    call: Call
    post_norm: Any
    dropout: Any
    site: Site | None


class Handoff:
    """From one layer to the next: a hidden state, and the norm of it that the next one will need.

    giver, taker: the modules on both sides. exposed: users call the giver too, as they do an
        embedding; they may write to what it returns before the taker has it.
    `take` gives the norm to whoever asks with that very tensor, once; None for any other, and for
    one that was written to since. Where torch does not count writes, then or in between, nothing is
    handed over past a user or a hook, who might write.
    """

    def __init__(self, giver: Any, taker: Any, *, exposed: bool = False) -> None:
        self._giver, self._taker, self._exposed = giver, taker, exposed
        self._hidden: Tensor | None = None
        self._normed: Tensor | None = None
        self._writes: int | None = None

    def put(self, hidden: Tensor, normed: Tensor) -> None:
        self._writes = _writes(hidden)
        if self._writes is None and (self._exposed or are_watched((self._giver, self._taker))):
            return
        self._hidden, self._normed = hidden, normed

    def take(self, hidden: Tensor) -> Tensor | None:
        same = self._hidden is hidden and self._writes == _writes(hidden)
        normed = self._normed if same else None
        self._hidden = self._normed = None
        return normed


def _writes(hidden: Tensor) -> int | None:
    """How often it was written to; None where torch does not count."""
    uncounted = torch.compiler.is_compiling() or hidden.is_inference()
    return None if uncounted else hidden._version


def _refuse_gradients() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fuse: disabled gradients are required, for no gradient is computed; got enabled ones; "
            "call within torch.no_grad() or torch.inference_mode(), or unfuse(model)"
        )


def layer_forward(
    original: Callable[..., Any],
    steps: list[Step],
    norms: list[Any],
    before: Handoff,
    behind: Handoff,
    group: Any,
) -> Callable[..., Any]:
    """A decoder layer's forward. norms: one before each step, and that behind the last."""
    parameters = parameters_of(original)
    names = [p.name for p in parameters]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _refuse_gradients()
        given = {**defaults, **dict(zip(names, args))}  # noqa: B905
        given.update((name, kwargs.pop(name)) for name in names if name in kwargs)

        h = hidden_states
        x = before.take(h)
        if x is None:
            x = norms[0](h)
        for step, norm in zip(steps, norms[1:], strict=True):
            arguments = {one.keyword: one.value(given) for one in step.call.arguments}
            fused = step.site is not None and not step.site.is_as_before(h)
            run = step.mixer
            if step.site is not None and not fused:
                run = functools.partial(step.site.run_as_before, step.mixer)
            y = run(hidden_states=x, **arguments, **kwargs) if arguments else run(x)
            if step.call.takes_first or isinstance(y, tuple):
                y = y[0]
            if step.dropout is not None and step.dropout.training and step.dropout.p > 0.0:
                raise RuntimeError(
                    f"fuse: a model without dropout is required; got p={step.dropout.p} while "
                    "training; call model.eval()"
                )
            if fused:
                x, h = api.fused_allreduce_gemma_rmsnorm(
                    y,
                    norm.weight,
                    h,
                    post_weight=None if step.post_norm is None else step.post_norm.weight,
                    eps=norm.eps,
                    weight_bias=WEIGHT_BIAS,
                    group=group,
                )
            else:
                h = h + (y if step.post_norm is None else step.post_norm(y))
                x = norm(h) if norm is not norms[-1] else None
        if x is not None:
            behind.put(h, x)
        return h

    return forward


def norm_forward(norm: Any, before: Handoff) -> Callable[..., Any]:
    """The final norm's forward."""
    own = norm.__dict__.get("forward")

    def forward(x: Tensor) -> Any:
        normed = before.take(x)
        if normed is not None:
            return normed
        return type(norm).forward(norm, x) if own is None else own(x)

    return forward


def embedding_forward(
    partial: Callable[[Tensor], Tensor], norm: Any, behind: Handoff, group: Any
) -> Callable[..., Any]:
    """The embedding's forward, which computes the first layer's norm too."""

    def forward(input_ids: Tensor) -> Tensor:
        _refuse_gradients()
        normed, hidden = api.fused_allreduce_gemma_rmsnorm(
            partial(input_ids),
            norm.weight,
            eps=norm.eps,
            weight_bias=WEIGHT_BIAS,
            group=group,
        )
        if not are_watched((norm,)):
            behind.put(hidden, normed)
        return hidden

    return forward
