"""torch.ops.gemma_ar_norm: what C++ cannot give the ops, and the checks of their arguments.

The schemas and the CUDA kernels are C++ (csrc/binding/ops.cpp). Here are the fake kernels (the
stable ABI has no SymInt), the CPU kernels (an all-gather and reference.py), and the slow path, to
which the C++ kernels turn where a group has no fused workspace (the stable ABI has no c10d).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import debug, groups, plan, reference, workspace
from .errors import PeerTimeoutError, WorkspaceError, shown
from .library import _C
from .plan import PACK_BYTES
from .workspace import DTYPES, MAX_HIDDEN

NAMESPACE = "gemma_ar_norm"
MAX_FLOAT32 = torch.finfo(torch.float32).max

fused_allreduce_rmsnorm = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm.default
fused_allreduce_rmsnorm_out = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm.out
add_rmsnorm_out = torch.ops.gemma_ar_norm.add_rmsnorm.out


# ---------------------------------------------------------------------------------- the arguments


def check_arguments(
    x: Any,
    weight: Any,
    residual: Any,
    post_weight: Any,
    eps: Any,
    weight_bias: Any,
    algorithm: Any = "auto",
    out: Any = None,
) -> None:
    """Raises TypeError or ValueError for what the ops do not take; says what to do.

    It is what the fake and CPU kernels do first. The CUDA kernels check what they need in C++;
    when they raise, api.py comes here for the better text.
    """
    _check_rows("x", x)
    hidden, multiple = x.shape[-1], PACK_BYTES // x.dtype.itemsize
    if hidden % multiple != 0 or not multiple <= hidden <= MAX_HIDDEN:
        raise ValueError(
            f"x: a last dimension that is a multiple of {multiple} ({_name(x.dtype)}) from "
            f"{multiple} to {MAX_HIDDEN} is required; got {hidden}; pad the rows"
        )
    _check_memory("x", x)
    if residual is not None:
        _check_like("residual", residual, x)
    _check_weight("weight", weight, x, (x.dtype, torch.float32))
    if post_weight is not None:
        if residual is None:
            raise ValueError(
                "post_weight: a residual beside it is required; got residual=None; pass the "
                "residual, or leave post_weight out"
            )
        _check_weight("post_weight", post_weight, x, (weight.dtype,))
    _check_number("eps", eps, lowest=0.0)
    _check_number("weight_bias", weight_bias)
    if not isinstance(algorithm, str):
        raise TypeError(
            f"algorithm: a str is required; got {type(algorithm).__name__}; pass 'auto'"
        )
    if algorithm not in plan.ALGORITHMS:
        raise ValueError(
            f"algorithm: one of {', '.join(plan.ALGORITHMS)} is required; got {algorithm!r}; "
            "pass 'auto'"
        )
    if out is not None:
        _check_out(out, x, weight, residual, post_weight)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: a Tensor is required; got {type(value).__name__}; pass a torch.Tensor"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: a dense tensor is required; got {value.layout}; call to_dense()")
    if value.is_nested:
        raise TypeError(
            f"{name}: a dense tensor is required; got a nested one; call to_padded_tensor()"
        )


def _check_rows(name: str, x: Any) -> None:
    _check_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name}: bfloat16, float16 or float32 is required; got {_name(x.dtype)}; convert it"
        )
    if x.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(
            f"{name}: a CUDA or CPU tensor is required; got one on {x.device}; move it"
        )
    if x.dim() < 1:
        raise ValueError(
            f"{name}: a shape [..., hidden] is required; got a tensor without dimensions; "
            "pass x.unsqueeze(0)"
        )


def _check_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(
            f"{name}: the device of x, {x.device}, is required; got {value.device}; move it"
        )


def _check_like(name: str, value: Any, x: Tensor) -> None:
    _check_tensor(name, value)
    if value.dtype != x.dtype:
        raise TypeError(
            f"{name}: the dtype of x, {_name(x.dtype)}, is required; got {_name(value.dtype)}; "
            "convert it"
        )
    if value.shape != x.shape:
        raise ValueError(
            f"{name}: the shape of x, {_shape(x)}, is required; got {_shape(value)}; "
            f"{name} is not broadcast: expand or reshape it"
        )
    _check_device(name, value, x)
    _check_memory(name, value)


def _check_weight(name: str, value: Any, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_tensor(name, value)
    if value.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(map(_name, dtypes)))
        whose = "of weight" if name == "post_weight" else "of x, or float32"
        raise TypeError(
            f"{name}: the dtype {whose} ({allowed}) is required; got {_name(value.dtype)}; "
            "convert it"
        )
    if value.dim() != 1 or value.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{name}: the shape ({x.shape[-1]},), one number for each of a row of x, is required; "
            f"got {_shape(value)}; reshape it"
        )
    _check_device(name, value, x)
    _check_memory(name, value)


def _check_number(name: str, value: Any, lowest: float = -math.inf) -> None:
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return  # under torch.compile with dynamic floats; the kernel looks at its value
    number = value
    if hasattr(value, "item"):  # the ops take tensors of one element too, and numpy's numbers
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            number = value.item()
    if not isinstance(number, int | float):
        raise TypeError(
            f"{name}: a float is required; got {type(value).__name__}; pass a Python number"
        )
    if not max(lowest, -MAX_FLOAT32) <= number <= MAX_FLOAT32:  # NaN is not either
        what = "a finite number" if lowest == -math.inf else "a finite number, 0 or more,"
        raise ValueError(
            f"{name}: {what} in the range of float32 is required; got {shown(number)}; see the "
            "model's configuration"
        )


def _check_out(
    out: Any, x: Tensor, weight: Tensor, residual: Tensor | None, post_weight: Tensor | None
) -> None:
    if not isinstance(out, tuple | list) or len(out) != 2:
        got = f"{len(out)} of them" if isinstance(out, tuple | list) else type(out).__name__
        raise TypeError(f"out: two tensors are required; got {got}; pass (norm_out, residual_out)")
    outputs = dict(zip(("norm_out", "residual_out"), out, strict=True))
    for name, value in outputs.items():
        _check_like(name, value, x)
        if not value.is_contiguous():
            raise ValueError(
                f"{name}: a contiguous tensor is required; got strides {tuple(value.stride())}; "
                "pass a tensor of torch.empty"
            )
    if torch.compiler.is_compiling() or not _have_addresses(x, *out) or x.numel() == 0:
        return
    for name, value in outputs.items():
        beyond = value.data_ptr() % PACK_BYTES  # no address: error texts go into logs
        if beyond:
            raise ValueError(
                f"{name}: an address that is a multiple of {PACK_BYTES} is required; got one "
                f"{beyond} bytes beyond such; pass a tensor of torch.empty, not a slice of one"
            )
        for other, tensor in (("weight", weight), ("post_weight", post_weight)):
            if tensor is not None and _overlap(value, tensor):
                raise ValueError(
                    f"{name}: memory apart from {other}'s is required; got memory that overlaps "
                    "it; pass another tensor"
                )
        for other, tensor in (("x", x), ("residual", residual)):
            if tensor is not None and _overlap(value, tensor) and not _same(value, tensor):
                raise ValueError(
                    f"{name}: memory apart from {other}'s, or exactly {other}, is required; got "
                    f"memory that overlaps a part of it; pass {other} itself or another tensor"
                )
    if _overlap(*out):
        raise ValueError(
            "out: norm_out and residual_out in memory of their own are required; got two that "
            "overlap; pass two tensors"
        )


def _have_addresses(*tensors: Tensor) -> bool:
    """False for fake, meta and functional tensors, and for what wraps others: no memory there."""
    return all(
        type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
        and t.device.type != "meta"
        and not torch._is_functional_tensor(t)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in tensors
    )


def _check_memory(name: str, t: Tensor) -> None:
    """A storage can be resized, to nothing too, under a tensor that keeps its shape."""
    if not _have_addresses(t) or t.numel() == 0:
        return
    reached = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    needed = (t.storage_offset() + reached + 1) * t.element_size()
    if needed > t.untyped_storage().nbytes():
        raise ValueError(
            f"{name}: a storage of at least {needed} bytes is required; got one of "
            f"{t.untyped_storage().nbytes()}, which was resized; pass a tensor whose memory is "
            "there"
        )


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses from the first to behind the last element."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first_a, end_a), (first_b, end_b) = _span(a), _span(b)
    return first_a < end_b and first_b < end_a


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and b.is_contiguous()


def refuse_gradients(**tensors: Any) -> None:
    """Raises ValueError for the first tensor that requires a gradient: there is none to be had."""
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name}: requires_grad=False is required, for no gradient is computed; got True; "
                "call within torch.no_grad() or torch.inference_mode(), or pass "
                f"{name}.detach()"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


# ----------------------------------------------------------------------------------- fake kernels
# Outputs are contiguous whatever the strides of x.


def _fake(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group_name: str,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    check_arguments(x, weight, residual, post_weight, eps, weight_bias, algorithm)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_out(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group_name: str,
    algorithm: str,
    *,
    norm_out: Tensor,
    residual_out: Tensor,
) -> None:
    out = (norm_out, residual_out)
    check_arguments(x, weight, residual, post_weight, eps, weight_bias, algorithm, out)


def _fake_add_rmsnorm_out(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    *,
    norm_out: Tensor,
    residual_out: Tensor,
) -> None:
    out = (norm_out, residual_out)
    check_arguments(x, weight, residual, post_weight, eps, weight_bias, out=out)


# ------------------------------------------------------------------------------------ CPU kernels


def _cpu(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group_name: str,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    check_arguments(x, weight, residual, post_weight, eps, weight_bias, algorithm)
    group = groups.resolve(group_name)
    groups.refuse_cpu_tensors(group)
    with _time_limit(group) as timeout_s:
        arguments = (x, weight, residual, post_weight, eps, weight_bias, algorithm)
        debug.compare(group, timeout_s, *arguments)
        xs = groups.all_gather_rows(group, x.contiguous(), timeout_s)
    return reference.fused_allreduce_gemma_rmsnorm(
        xs,
        weight,
        None if residual is None else residual.contiguous(),
        post_weight=post_weight,
        eps=eps,
        weight_bias=weight_bias,
    )


@contextlib.contextmanager
def _time_limit(group: groups.Group) -> Iterator[float]:
    """How long, in s, a call may wait for its peers; PeerTimeoutError where some are lost."""
    found = workspace.find(group.name)
    timeout_s = workspace.DEFAULT_TIMEOUT_S if found is None else found.timeout_s
    try:
        yield timeout_s
    except groups.RanksLost as lost:
        raise PeerTimeoutError(
            f"{lost}: to take part in a call on group {group.name!r} is required within "
            f"{timeout_s:g} s; got nothing; {groups.AFTER_A_LOSS}",
            lost.ranks[0] if lost.ranks else -1,
            -1,
            -1,
        ) from lost


def _cpu_out(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group_name: str,
    algorithm: str,
    *,
    norm_out: Tensor,
    residual_out: Tensor,
) -> None:
    out = (norm_out, residual_out)
    check_arguments(x, weight, residual, post_weight, eps, weight_bias, algorithm, out)
    results = _cpu(x, weight, residual, post_weight, eps, weight_bias, group_name, algorithm)
    for output, result in zip(out, results, strict=True):
        output.copy_(result)


def _cpu_add_rmsnorm_out(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    *,
    norm_out: Tensor,
    residual_out: Tensor,
) -> None:
    _cpu_out(
        x,
        weight,
        residual,
        post_weight,
        eps,
        weight_bias,
        groups.NO_GROUP,
        "auto",
        norm_out=norm_out,
        residual_out=residual_out,
    )


# ------------------------------------------------------------------------- views of negatives
# torch's fallback for tensors with the negative bit (torch._neg_view) makes copies of inputs, as is
# right. Of an output too; but then it runs the op, and fails when it looks for what that returned:
# too late for ranks that have been pushed to. So it is refused here, where only such tensors come.


def _with_negatives(op: Any) -> Any:
    def kernel(*arguments: Any, norm_out: Tensor, residual_out: Tensor) -> None:
        for name, value in (("norm_out", norm_out), ("residual_out", residual_out)):
            if isinstance(value, Tensor) and value.is_neg():  # None comes this far
                raise ValueError(
                    f"{name}: a tensor that holds its values is required; got a view of their "
                    "negatives; pass a tensor of torch.empty"
                )
        plain = (a.resolve_neg() if isinstance(a, Tensor) else a for a in arguments)
        op(*plain, norm_out=norm_out, residual_out=residual_out)

    return kernel


# ---------------------------------------------------------------------------------- the slow path


class _Stored(threading.local):
    error: BaseException | None = None


_stored = _Stored()


def _take_stored() -> BaseException | None:
    error, _stored.error = _stored.error, None
    return error


def slow_path(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    group_name: str,
    algorithm: str,
    norm_out: Tensor,
    residual_out: Tensor,
) -> None:
    """A call that C++ found no fused workspace for, or that is to be unfused.

    An exception would lose its text on its way through the stable ABI of torch before 2.13. So none
    leaves: its text goes to C++, which raises it as a RuntimeError, and the exception itself is
    kept for api.py (`better_error`).
    """
    rest = (weight, residual, post_weight, eps, weight_bias)
    out = {"norm_out": norm_out, "residual_out": residual_out}
    _take_stored()
    try:
        if algorithm != "unfused" and _is_fused(x, group_name, algorithm):
            fused_allreduce_rmsnorm_out(x, *rest, group_name, algorithm, **out)
        else:
            found = workspace.find(group_name)
            # With a fused workspace it has been done on the device.
            compared = debug.is_on() if found is None else found.debug and not found.fused
            if compared and not workspace.is_capturing():
                group = groups.resolve(group_name)
                with _time_limit(group) as timeout_s:
                    debug.compare(group, timeout_s, x, *rest, algorithm)
            add_rmsnorm_out(_all_reduce(x, group_name), *rest, **out)
    except BaseException as error:
        # The inner call may have come here too, and have kept what it raised.
        inner = _take_stored()
        if inner is not None and _text(inner) in str(error):
            error = inner
        _stored.error = error
        _C.set_slow_path_error(_text(error))


def _is_fused(x: Tensor, group_name: str, algorithm: str) -> bool:
    """Whether the group's ranks have, or now make, a fused workspace. Making is collective."""
    found = workspace.find(group_name)
    if found is not None and found.fused:
        raise WorkspaceError(
            f"group: an open workspace is required; got that of {group_name!r}, given up while "
            "this call began; call init() on all ranks"
        )
    if found is None:
        group = groups.resolve(group_name)
        if group.is_local:
            raise WorkspaceError(
                f"group: an open local group is required; got {group_name!r}, which was closed; "
                "call local_group() again"
            )
        if group.size == 1:
            found = workspace.Workspace(group, "one rank: there is nothing to reduce")
        else:
            found = workspace.init(group_name, hidden_size=x.shape[-1], dtype=x.dtype)
    if not found.fused:
        refuse_fused(algorithm, found.reason)
    return found.fused


def refuse_fused(algorithm: str, reason: str) -> None:
    """Raises where a fused algorithm is asked for that the ranks, for this reason, do not have."""
    if algorithm not in ("auto", "unfused"):
        raise WorkspaceError(
            f"algorithm: 'auto' or 'unfused' is required where the ranks have no fused workspace; "
            f"got {algorithm!r} ({reason}); pass 'auto'"
        )


def refuse_unfused(group: groups.Group) -> None:
    """Raises for a local group: it has no all-reduce but ours."""
    if group.is_local:
        raise ValueError(
            "algorithm: 'auto', 'one_shot' or 'two_shot' is required by a local group, which has "
            "no other all-reduce; got 'unfused'; pass 'auto'"
        )


def _all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum of all ranks' x by the group's own all-reduce; x itself for one rank."""
    group = groups.resolve(group_name)
    if group.size == 1 or x.numel() == 0:
        return x
    refuse_unfused(group)
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.process_group)
    return total


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def better_error(error: Exception, group_name: str, arguments: dict[str, Any]) -> BaseException:
    """The exception that api.py raises for `error`, which an op raised: of the right type."""
    stored = _take_stored()
    text = str(error)
    if stored is not None and _text(stored) in text:
        return stored
    if "PeerTimeoutError:" in text or "WorkspaceError:" in text:
        found = workspace.find(group_name)
        try:
            if found is not None:
                found.check()
        except (PeerTimeoutError, WorkspaceError) as typed:
            return typed
    try:
        check_arguments(**arguments)
        if "'group_name'" in text:  # torch takes no name that is not UTF-8
            groups.resolve(group_name)
        _check_place(group_name, arguments["x"])
    except (TypeError, ValueError) as better:
        return better
    return error


def _check_place(group_name: str, x: Tensor) -> None:
    found = workspace.find(group_name)
    if found is None or not found.fused or x.device.type != "cuda":
        return
    if x.device.index != found.device:
        raise ValueError(
            f"x: a tensor on cuda:{found.device}, where this group's workspace is, is required; "
            f"got {x.device}; move it, or call init() with that device current"
        )


# ----------------------------------------------------------------------------------- registration

torch.library.register_fake(f"{NAMESPACE}::fused_allreduce_rmsnorm", _fake)
torch.library.register_fake(f"{NAMESPACE}::fused_allreduce_rmsnorm.out", _fake_out)
torch.library.register_fake(f"{NAMESPACE}::add_rmsnorm.out", _fake_add_rmsnorm_out)

# Not register_kernel: its first call imports torch._dynamo, which takes seconds. (Compiled graphs
# run with dynamo switched off, so it need not be done for each kernel.)
_library: Any = torch.library.Library(NAMESPACE, "IMPL")
_library.impl("fused_allreduce_rmsnorm", _cpu, "CPU")
_library.impl("fused_allreduce_rmsnorm.out", _cpu_out, "CPU")
_library.impl("add_rmsnorm.out", _cpu_add_rmsnorm_out, "CPU")
_library.impl("_slow_path", slow_path, "CUDA")
for _name_of_op, _op in (
    ("fused_allreduce_rmsnorm.out", fused_allreduce_rmsnorm_out),
    ("add_rmsnorm.out", add_rmsnorm_out),
):
    _library.impl(_name_of_op, _with_negatives(_op), "Negative")
# A collective: torch.compile keeps a call of which nobody takes the results, for the other ranks
# wait for it.
torch.fx.node.has_side_effect(fused_allreduce_rmsnorm)
