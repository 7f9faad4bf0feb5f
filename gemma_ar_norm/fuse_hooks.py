"""Hooks that others registered on a model's modules, from which `fuse` must hide nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn.modules import module as nn_module


def are_watched(modules: Iterable[Any]) -> bool:
    """Whether a hook sees, or may change, what goes into one of these modules or comes out of it.

    transformers' own for output_hidden_states, which stay once they were asked for, do not count:
    they only note what comes out.
    """
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return True
    for one in modules:
        for hooks in (one._forward_hooks, one._forward_pre_hooks):
            if hooks and not all(map(_only_notes, hooks.values())):
                return True
    return False


def _only_notes(hook: Callable[..., Any]) -> bool:
    return (
        getattr(hook, "__name__", "") == "output_capturing_hook"
        and getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
    )
