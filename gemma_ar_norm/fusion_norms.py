"""Recognises the contract's RMSNorm in a graph of Inductor's: what it normalises, by which weight.

    norm_out = T( (v * rstd(v)) * (bias + weight) ),   rstd(v) = 1 / sqrt( mean(v^2) + eps )

A norm is found from its one reciprocal root: upwards from there to the row, downwards to the
rounding at its end. Each step takes either order of its operands. What looks like a norm and is not
exactly this arithmetic is kept with the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten: Any = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
ADDS = (aten.add.Tensor, aten.add.Scalar)
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Left(Exception):
    """Why something is left alone. Nothing is wrong: the graph stays as it is."""


@dataclass(frozen=True)
class Norm:
    """A norm in a graph. `v` and `out` have the dtype T.

    casts: v in fp32, where v is not; others may use them too. inner: what lies between v and out,
    and nobody else uses. scale: what makes bias + weight.
    """

    v: Node
    out: Node
    weight: Node
    bias: float
    eps: float
    casts: tuple[Node, ...] = ()
    inner: tuple[Node, ...] = ()
    scale: tuple[Node, ...] = ()


@dataclass(frozen=True)
class AddNorm:
    """A residual add and the norm of its sum. add: the node that adds; sums: those that hold h."""

    add: Node
    operands: tuple[Node, Node]
    sums: tuple[Node, ...]
    norm: Norm | str  # a str: why this is not the contract's norm


class Norms:
    """All norms of a graph, by the node that each normalises."""

    def __init__(self, graph: Graph) -> None:
        self._found: dict[Node, list[Norm | str]] = {}
        for node in graph.nodes:
            v, read = _candidate(node)
            if v is None:
                continue
            norm: Norm | str
            try:
                norm = read(node, v)
            except Left as left:
                norm = str(left)
            self._found.setdefault(v, []).append(norm)

    def of(self, v: Node) -> Norm | str | None:
        """The first norm of v that can be fused, else why the first cannot, or None."""
        found = self._found.get(v, [])
        return next((norm for norm in found if isinstance(norm, Norm)), found[0] if found else None)

    def of_sum(self, add: Node) -> AddNorm | None:
        """The residual add that `add` is, with the norm of its sum; None where it is none."""
        if is_call(add, "vllm_ir::fused_add_rms_norm"):
            return _vllm_add_norm(add)
        if add.target is not aten.add.Tensor:
            return None
        norm = self.of(add)
        left, right = add.args[:2]
        if norm is None or not isinstance(left, Node) or not isinstance(right, Node):
            return None
        if arguments(add)[2] != 1:
            norm = "the residual add multiplies one summand (alpha)"
        return AddNorm(add, (left, right), (add,), norm)


# ------------------------------------------------------------------------------------------ values


def value(node: Any) -> Tensor:
    """The fake tensor that the node stands for."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(found, Tensor):
        raise Left(f"{node} is no tensor")
    return found


def same_shape(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether shapes, symbolic ones too, are known to be equal. Adds no guard."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in pairs)


def is_call(node: Any, name: str) -> bool:
    """Whether the node calls the op of this name. By name: vLLM's ops need not exist."""
    schema = getattr(node.target, "_schema", None) if isinstance(node, Node) else None
    return schema is not None and schema.name == name


def arguments(node: Node) -> list[Any]:
    """The call's arguments in the order of the op's schema, with its defaults."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    values = list(node.args)
    for argument in schema.arguments[len(values) :]:
        default = argument.default_value if argument.has_default_value() else None
        values.append(node.kwargs.get(argument.name, default))
    return values


def operand_beside(node: Node, one: Node) -> Any:
    """The other operand of a binary call."""
    left, right = node.args[:2]
    return right if left is one else left


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ----------------------------------------------------------------------------- norms of many nodes


def _candidate(node: Node) -> tuple[Node | None, Any]:
    """(what is normalised, the function that reads the norm) where the node marks a norm."""
    if is_call(node, "vllm_ir::rms_norm"):
        v = node.args[0] if node.args else None
        return (v if isinstance(v, Node) else None), _read_vllm_norm
    if node.op != "call_function" or not _is_reciprocal_root(node):
        return None, None
    mean = next((n for n in _summands(node.args[0]) if _is_mean(n)), None)
    row = _squared(mean.args[0]) if mean is not None else None
    if row is None:
        return None, None
    return _before_cast(row), _read_norm


def _is_reciprocal_root(node: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] == -0.5)
    if node.target is aten.reciprocal.default:
        return isinstance(node.args[0], Node) and node.args[0].target is aten.sqrt.default
    return node.target is aten.rsqrt.default


def _summands(node: Any) -> Iterator[Node]:
    """The operands of mean + eps, or mean where nothing is added to it; through a root."""
    if isinstance(node, Node) and node.target is aten.sqrt.default:
        node = node.args[0]
    if isinstance(node, Node):
        yield from (a for a in node.args if isinstance(a, Node)) if node.target in ADDS else [node]


def _is_mean(node: Node) -> bool:
    return node.target is aten.mean.dim


def _squared(node: Any) -> Node | None:
    """v where the node is v^2."""
    if isinstance(node, Node):
        if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
            return node.args[0]  # type: ignore[return-value]
        if node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
            return node.args[0]  # type: ignore[return-value]
    return None


def _before_cast(node: Node) -> Node:
    """v, where the node is v in fp32; a row that is fp32 by itself is its own v."""
    if node.target is CONVERT and node.args[1] == torch.float32:
        source = node.args[0]
        found = source.meta.get("val") if isinstance(source, Node) else None
        if isinstance(found, Tensor) and found.dtype in LOW_PRECISION:
            return source  # type: ignore[return-value]
    return node


def _read_norm(root: Node, v: Node) -> Norm:
    dtype = value(v).dtype
    radicand: Any = root.args[0]
    inner = [root]
    if root.target is aten.reciprocal.default:
        inner.append(radicand)
        radicand = radicand.args[0]
    mean, eps = _mean_and_eps(radicand)
    square: Any = mean.args[0]
    row = _squared(square)
    assert row is not None
    if radicand is not mean:
        inner.append(radicand)
    inner += [mean, square]
    _check_mean(mean, row)

    normed = only_user(root)
    if normed is None:
        raise Left("the reciprocal root is used elsewhere too, as for a backward pass")
    again: Any = operand_beside(normed, root) if normed.target is aten.mul.Tensor else None
    if not isinstance(again, Node) or _before_cast(again) is not v:
        raise Left("the reciprocal root does not multiply the row that it is of")
    if value(row).dtype != torch.float32 or value(again).dtype != torch.float32:
        raise Left(f"the norm is computed in {value(row).dtype}, not in float32")
    casts = tuple(cast for cast in dict.fromkeys((row, again)) if cast is not v)
    inner.append(normed)
    scaled = only_user(normed)
    if scaled is None:
        raise Left("the normalised row is used elsewhere too")
    if scaled.target is CONVERT:
        raise Left("the row is rounded before the weight, as in Llama's norm, or has no weight")
    if scaled.target is not aten.mul.Tensor:
        raise Left("the normalised row is not multiplied by a weight")
    weight, bias, scale = _read_scale(operand_beside(scaled, normed), dtype)
    out = scaled
    if dtype != torch.float32:
        inner.append(scaled)
        rounded = only_user(scaled)
        if rounded is None or rounded.target is not CONVERT or value(rounded).dtype != dtype:
            raise Left(f"the norm's result is not rounded to {dtype} at its end")
        out = rounded
    for node in inner:
        if any(user not in inner and user is not out for user in node.users):
            raise Left(f"{node.name}, within the norm, is used elsewhere too")
    return Norm(v, out, weight, bias, eps, casts, tuple(inner), scale)


def _mean_and_eps(radicand: Node) -> tuple[Node, float]:
    if _is_mean(radicand):
        return radicand, 0.0
    left, right, alpha = arguments(radicand)[:3]
    mean, eps = (left, right) if isinstance(left, Node) and _is_mean(left) else (right, left)
    if not _is_number(eps):
        raise Left("eps is no constant: dynamic=True makes it an input; leave dynamic out")
    if alpha != 1 or not math.isfinite(eps) or eps < 0:
        raise Left(f"eps is {eps}")
    return mean, float(eps)


def _check_mean(mean: Node, row: Node) -> None:
    _, dims, keepdim, dtype = arguments(mean)[:4]
    last = value(row).dim() - 1
    if list(dims or []) not in ([-1], [last]) or not keepdim:
        raise Left("the mean is not over the last dimension, kept as 1")
    if dtype not in (None, torch.float32):
        raise Left(f"the mean is computed in {dtype}")


def _read_scale(scale: Any, dtype: torch.dtype) -> tuple[Node, float, tuple[Node, ...]]:
    """(weight, bias, the nodes between) of bias + weight, added in fp32."""
    if not isinstance(scale, Node):
        raise Left("the normalised row is multiplied by a number instead of a weight")
    nodes, bias = [], 0.0
    if scale.target in ADDS and any(map(_is_number, scale.args[:2])):
        left, right, alpha = arguments(scale)[:3]
        weight, number = (right, left) if _is_number(left) else (left, right)
        if value(scale).dtype != torch.float32:
            raise Left(f"{number} + weight is added in {value(scale).dtype} instead of float32")
        bias = float(number)
        if alpha != 1 or not math.isfinite(bias):
            raise Left(f"{number} + weight has an alpha, or is not finite")
        nodes.append(scale)
        scale = weight
    if scale.target is CONVERT and value(scale).dtype == torch.float32:
        source = scale.args[0]
        if value(source).dtype in (dtype, torch.float32):
            nodes.append(scale)
            scale = source
            if bias == 0 and scale.target in ADDS and any(map(_is_number, scale.args[:2])):
                raise Left(f"a number is added to the weight in {value(scale).dtype}")
    if value(scale).dtype not in (dtype, torch.float32):
        raise Left(f"the weight is {value(scale).dtype}; {dtype} or float32 is required")
    return scale, bias, tuple(nodes)


# ------------------------------------------------------------------------------------- vLLM's norms


def _read_vllm_norm(node: Node, v: Node) -> Norm:
    _, weight, eps, *rest = arguments(node)
    return _vllm_norm(v, node, weight, eps, rest)


def _vllm_norm(v: Node, out: Node, weight: Any, eps: Any, rest: list[Any]) -> Norm:
    dtype = value(v).dtype
    if not isinstance(weight, Node) or any(size is not None for size in rest):
        raise Left("vllm_ir's norm without a weight, or with a variance_size")
    if value(weight).dtype != torch.float32:
        raise Left("vllm_ir's norm rounds before a weight that is not float32")
    if value(out).dtype != dtype:
        raise Left(f"the norm's result is {value(out).dtype} instead of {dtype}")
    if not _is_number(eps) or not math.isfinite(eps) or eps < 0:
        raise Left(f"eps is {eps}")
    weight, bias, scale = _read_scale(weight, dtype)
    return Norm(v, out, weight, bias, float(eps), scale=scale)


def _vllm_add_norm(node: Node) -> AddNorm | None:
    x, residual, weight, eps, *rest = arguments(node)
    parts: dict[Any, list[Node]] = {0: [], 1: []}
    for user in node.users:
        if user.target is not operator.getitem or user.args[1] not in parts:
            return None
        parts[user.args[1]].append(user)
    if len(parts[0]) != 1 or not isinstance(x, Node) or not isinstance(residual, Node):
        return None
    try:
        norm: Norm | str = _vllm_norm(x, parts[0][0], weight, eps, rest)
    except Left as left:
        norm = str(left)
    return AddNorm(node, (x, residual), tuple(parts[1]), norm)
