"""Debug mode, GEMMA_AR_NORM_DEBUG=1: before a call its ranks compare what they are about to call.

In the fused kernels' place csrc/device/debug_mode.cuh does it, on the device; on the unfused path
the ranks exchange it through their group. Set it on all ranks or on none. On the CPU path they
always do, whatever it is: gloo does not check that what comes has the size of what was asked for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import groups, plan
from .errors import WorkspaceError

VARIABLE = "GEMMA_AR_NORM_DEBUG"

FIELDS = ("rows", "hidden", "x.dtype", "form", "algorithm", "weight.dtype", "eps", "weight_bias")
"""What all ranks must have alike in a call; in the order of CallField in csrc/device/params.h."""

FORMS = ("plain", "residual", "sandwich")

_DTYPES = ("bfloat16", "float16", "float32")  # as DType of params.h has them
_UNFUSED = 0xFFFFFFFF


def is_on() -> bool:
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def summary_of(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    algorithm: str,
) -> list[Any]:
    """A call's values of FIELDS."""
    hidden = x.shape[-1]
    return [
        x.numel() // hidden,
        hidden,
        _name(x.dtype),
        FORMS[(residual is not None) + (post_weight is not None)],
        algorithm,
        _name(weight.dtype),
        eps,
        weight_bias,
    ]


def summary_of_words(words: Sequence[int]) -> list[Any]:
    """The same, of a CallSummary of C++."""
    rows, hidden, dtype, form, algorithm, weights_fp32, eps, weight_bias = words
    asked = "unfused" if algorithm == _UNFUSED else ("auto", *plan.FUSED_ALGORITHMS)[algorithm]
    weight_dtype = "float32" if weights_fp32 else _DTYPES[dtype]
    numbers = struct.unpack("2f", struct.pack("2I", eps, weight_bias))
    return [rows, hidden, _DTYPES[dtype], FORMS[form], asked, weight_dtype, *numbers]


def difference(calls: Sequence[Sequence[Any]]) -> str:
    """In words, in what the ranks' calls differ and on which ranks; "" where they are alike."""
    found = []
    for field, values in zip(FIELDS, zip(*calls, strict=True), strict=True):
        differ = groups.who_has(values, _as_in_kernels)
        if differ:
            found.append(f"{field} {differ}")
    if not found:
        return ""
    return (
        f"call: the same on all ranks is required; got {', '.join(found)}; make the same calls in "
        "the same order on all ranks, then call init() on all of them"
    )


def compare(group: groups.Group, timeout_s: float, *arguments: Any) -> None:
    """Raises WorkspaceError on every rank where their calls (`summary_of`) differ. Collective.

    And where some are not in a call. RanksLost, after timeout_s: see groups.all_gather_json.
    """
    if group.process_group is None:  # one rank, or a local group
        return
    summaries = groups.all_gather_json(group, summary_of(*arguments), "a call", timeout_s)
    text = difference(summaries)
    if text:
        raise WorkspaceError(text)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_in_kernels(value: Any) -> Any:
    """eps and weight_bias as float32, and -0.0 as 0.0: what the device compares."""
    if not isinstance(value, float):
        return value
    return struct.unpack("f", struct.pack("f", value))[0] + 0.0
