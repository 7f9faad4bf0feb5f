"""Decides what may be fused: from each all-reduce of a graph to the norm behind it.

    plain      a -> N                 other users of a get residual_out, which is a
    residual   a -> + r -> N          a has no other user; those of the sum get residual_out
    sandwich   a -> N -> + r -> N     the same, and neither a nor the first norm has other users

`find` gives an all-reduce, `match` what becomes of it, or raises Left with the reason. Nothing here
changes the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .fusion_norms import (
    AddNorm,
    Left,
    Norm,
    Norms,
    arguments,
    aten,
    is_call,
    only_user,
    same_shape,
    value,
)
from .plan import PACK_BYTES
from .workspace import DTYPES, MAX_HIDDEN

C10D_ALL_REDUCE = "_c10d_functional::all_reduce"
C10D_WAIT = "_c10d_functional::wait_tensor"
VLLM_ALL_REDUCE = "vllm::all_reduce"
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce: the sum of all ranks' x is in `result`.

    view: where the sum has another shape before anything uses it, the node that gives it (and is
    `result`); x is to be given the same. nodes: what the fused op replaces.
    """

    x: Node
    result: Node
    group_name: str
    view: Node | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Match:
    """The fused call, and what it replaces.

    sums: the nodes whose users get residual_out. dead: what is left without users. after: the node
    behind which the call goes: all its arguments are there, and nobody has used the results yet.
    """

    form: str
    all_reduce: AllReduce
    norm: Norm
    residual: Node | None
    post_weight: Node | None
    sums: tuple[Node, ...]
    dead: tuple[Node, ...]
    after: Node
    note: str = ""


# ------------------------------------------------------------------------------------ all-reduces


def all_reduces(graph: Graph) -> Iterator[Node]:
    """The calls that are, or look like, all-reduces."""
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is not None and "all_reduce" in schema.name.split("::")[-1]:
            yield node


def find(call: Node) -> AllReduce:
    """The all-reduce of this call."""
    if is_call(call, C10D_ALL_REDUCE):
        x, operation, group, *_ = arguments(call)
        if operation != "sum":
            raise Left(f"it is no sum but {operation!r}")
        result = only_user(call)
        if result is None or not is_call(result, C10D_WAIT):
            raise Left("not waited for once, right where it is used")
        nodes = [call, result]
    elif is_call(call, VLLM_ALL_REDUCE):
        x, group = arguments(call)[:2]
        result, nodes = call, [call]
        group = _vllm_group_name(group)
    else:
        raise Left(f"{call.target} is not an all-reduce that is matched")
    if not isinstance(group, str):
        raise Left("the group is no constant name")
    view = only_user(result)
    if view is not None and view.target in VIEWS:
        result = view
        nodes.append(view)
    else:
        view = None
    return AllReduce(x, result, group, view, tuple(nodes))


def vllm_group_names() -> dict[str, str]:
    """vLLM has names of its own for groups ("tp:0"): the process group's name for each of them."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    found = {name: get() for name, get in getattr(state, "_groups", {}).items()}
    return {
        name: group.device_group.group_name for name, group in found.items() if group is not None
    }


def _vllm_group_name(name: Any) -> Any:
    known = vllm_group_names()
    if name in known:
        return known[name]
    try:
        torch._C._distributed_c10d._resolve_process_group(name)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        raise Left(f"no group is known by the name {name!r}") from None
    return name


# ------------------------------------------------------------------------------------------ forms


def match(all_reduce: AllReduce, norms: Norms) -> Match:
    """The form in which this all-reduce can be fused. Raises Left with the reason."""
    a = all_reduce.result
    _check_rows(all_reduce)
    norm = norms.of(a)
    if isinstance(norm, Norm):
        try:
            return _sandwich(all_reduce, norm, norms)
        except Left as left:
            return _plain(all_reduce, norm, str(left))
    if norm is not None:
        raise Left(norm)
    sums = [found for user in a.users if (found := norms.of_sum(user)) is not None]
    if not sums:
        users = ", ".join(user.name for user in a.users) or "nothing"
        raise Left(f"no RMSNorm follows; the sum goes to {users}")
    if len(a.users) > 1:
        others = ", ".join(user.name for user in a.users if user is not sums[0].add)
        raise Left(f"the all-reduce's result has other users: {others}")
    norm, residual = _checked_sum(all_reduce, sums[0], a)
    dead = (*all_reduce.nodes, sums[0].add, *sums[0].sums, *_nodes(norm))
    return _placed("residual", all_reduce, norm, residual, None, sums[0], dead)


def _plain(all_reduce: AllReduce, norm: Norm, note: str) -> Match:
    a = all_reduce.result
    _check_weight(norm, value(a))
    dead = (*all_reduce.nodes, *_nodes(norm))
    return _placed("plain", all_reduce, norm, None, None, None, dead, note)


def _sandwich(all_reduce: AllReduce, post: Norm, norms: Norms) -> Match:
    a, p = all_reduce.result, post.out
    add = only_user(p)
    add_norm = norms.of_sum(add) if add is not None else None
    if add_norm is None:
        raise Left("")  # it does not look like one
    norm, residual = _checked_sum(all_reduce, add_norm, p)
    _check_weight(post, value(a))
    inside = {*post.inner, *post.casts, p}
    for node in (a, *post.casts):
        for user in node.users:
            if user not in inside:
                raise Left(f"not the sandwich: {node.name} is used by {user.name} too")
    if (post.eps, post.bias) != (norm.eps, norm.bias):
        raise Left("not the sandwich: its norms have different eps or bias")
    if value(post.weight).dtype != value(norm.weight).dtype:
        raise Left("not the sandwich: its weights have different dtypes")
    dead = (*all_reduce.nodes, *_nodes(post), add_norm.add, *add_norm.sums, *_nodes(norm))
    return _placed("sandwich", all_reduce, norm, residual, post.weight, add_norm, dead)


def _nodes(norm: Norm) -> tuple[Node, ...]:
    """What goes with the norm. A cast of its row that others use too is one of the row's users."""
    casts = (cast for cast in norm.casts if not set(cast.users) - set(norm.inner))
    return (*norm.scale, *casts, *norm.inner, norm.out)


def _checked_sum(all_reduce: AllReduce, add_norm: AddNorm, summand: Node) -> tuple[Norm, Node]:
    """(the norm, the residual) of a residual add to `summand`."""
    if isinstance(add_norm.norm, str):
        raise Left(add_norm.norm)
    left, right = add_norm.operands
    residual = right if left is summand else left
    a, r = value(all_reduce.result), value(residual)
    if residual is summand:
        raise Left("the sum is added to itself")
    if r.dtype != a.dtype or value(add_norm.norm.out).dtype != a.dtype:
        raise Left(f"the residual is {r.dtype}; {a.dtype} as of the all-reduce is required")
    if not same_shape(r.shape, a.shape):
        raise Left(f"the residual's shape is {_text(r)} instead of {_text(a)}")
    if r.device != a.device:
        raise Left(f"the residual is on {r.device} instead of {a.device}")
    for node in (*add_norm.sums, add_norm.norm.out):
        if not _is_contiguous(value(node)):
            raise Left(f"{node.name} is not contiguous, and the fused result would be")
    _check_weight(add_norm.norm, a)
    return add_norm.norm, residual


# ----------------------------------------------------------------------------------------- checks


def _check_rows(all_reduce: AllReduce) -> None:
    x, a = value(all_reduce.x), value(all_reduce.result)
    if a.dtype not in DTYPES or x.dtype != a.dtype:
        raise Left(f"the rows are {x.dtype}")
    if a.device.type not in ("cpu", "cuda"):
        raise Left(f"the rows are on {a.device}")
    if a.dim() < 1 or x.dim() < 1 or not same_shape(x.shape[-1:], a.shape[-1:]):
        raise Left("there are no rows, or a view changes their length")
    hidden, pack = a.shape[-1], PACK_BYTES // a.dtype.itemsize
    if not isinstance(hidden, int):
        raise Left("the hidden size is not constant")
    if hidden % pack or not pack <= hidden <= MAX_HIDDEN:
        raise Left(f"the hidden size {hidden} is no multiple of {pack} from {pack} to {MAX_HIDDEN}")
    if not _is_contiguous(x) or not _is_contiguous(a):
        raise Left("the rows are not contiguous, and the fused result would be")


def _check_weight(norm: Norm, a: Tensor) -> None:
    weight = value(norm.weight)
    if value(norm.out).dtype != a.dtype or not same_shape(value(norm.out).shape, a.shape):
        raise Left("the norm's result has another dtype or shape than the all-reduce")
    if not same_shape(weight.shape, a.shape[-1:]):
        raise Left(f"the weight's shape is {_text(weight)} instead of one row's")
    if weight.device != a.device:
        raise Left(f"the weight is on {weight.device} instead of {a.device}")


def _placed(
    form: str,
    all_reduce: AllReduce,
    norm: Norm,
    residual: Node | None,
    post_weight: Node | None,
    add_norm: AddNorm | None,
    dead: tuple[Node, ...],
    note: str = "",
) -> Match:
    """The match, if there is a place in the graph for the call."""
    sums = (all_reduce.result,) if add_norm is None else add_norm.sums
    needed = [all_reduce.result if add_norm is None else add_norm.add, norm.weight]
    after = max([*needed, *(node for node in (residual, post_weight) if node is not None)])
    for node in sums:
        for user in node.users:
            if user not in dead and user < after:
                raise Left(f"{user.name} needs the sum before {after.name}, which the norm needs")
    # The call reads all of its arguments in one place.
    node, last = all_reduce.nodes[0], max(after, norm.out)
    while node is not last:
        node = node.next
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise Left(f"{node.name}, in between, writes in place")
    return Match(form, all_reduce, norm, residual, post_weight, sums, dead, after, note)


def _is_contiguous(t: Tensor) -> bool:
    """As Tensor.is_contiguous, and known without a guard for symbolic shapes."""
    expected: Any = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if not statically_known_true(size == 1) and not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def _text(t: Tensor) -> str:
    return str(tuple(t.shape))
