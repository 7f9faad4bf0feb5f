"""What users call: the fused call, and what it will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import groups, ops, plan, workspace
from .errors import shown
from .library import _C


def fused_allreduce_gemma_rmsnorm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    post_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 1.0,
    group: Any = None,
    algorithm: str = "auto",
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """All-reduce of the partial sums `x`, residual add and Gemma RMSNorm: (norm_out, residual_out).

        a = T( fp32 sum of x_0 + x_1 + ... + x_{N-1}, in rank order )
        plain      (no residual):  h = a
        residual:                  h = T( residual + a )
        sandwich   (post_weight):  p = T( (a * rstd(a)) * (weight_bias + post_weight) )
                                   h = T( residual + p )
        norm_out     = T( (h * rstd(h)) * (weight_bias + weight) )
        residual_out = h
        rstd(v)      = 1 / sqrt( (sum of v^2) / hidden + eps )

    T(...) rounds to the dtype of x; all else is fp32. The results are those of `reference.py` bit
    for bit, on the CPU and in the fused kernels, for any number of rows. (The unfused path on GPUs
    adds in the order of the group's all-reduce.) The formula is that of Gemma3RMSNorm and
    Qwen3NextRMSNorm in transformers, with their roundings.

    x: [..., hidden], this rank's partial sums, bfloat16, float16 or float32 (T). 0 rows are fine.
        hidden: a multiple of 16 bytes, at most 16384 elements.
    weight: [hidden], T or float32. residual: like x; it may differ between ranks.
    post_weight: like weight; needs a residual.
    eps: finite, 0 or more. weight_bias: finite; 1 for Gemma, Gemma 2 and 3, Qwen3-Next and
        Qwen3.5, 0 for Gemma 3n and 4. Both are rounded to float32, and in its range.
    group: a ProcessGroup, its name, a rank of a `local_group`, or None: the default group, or one
        rank where torch.distributed is not initialised.
    algorithm: "auto" follows the plan (see `explain`); "one_shot" and "two_shot" are the fused
        kernels; "unfused" is the group's own all-reduce. The fused ones compute the same bits.
    out: (norm_out, residual_out) to be written, and returned: contiguous, 16-byte aligned, like x.
        Each may be exactly x or exactly residual, and not otherwise overlap an argument or the
        other. Nothing is mutated without it.

    All ranks of the group make the same calls in the same order. A call is queued on the current
    stream and returns; eager calls from several streams run in the order in which they were queued.
    It can be captured in a CUDA graph, after `init(group)` or a first call outside; replays must
    not overlap other calls of the group.
    torch.compile sees one op, and keeps it on a rank that takes no results of it (with `out`: where
    something reads those tensors); the group's name is fixed in the graph. Not differentiable.

    Raises TypeError, ValueError for arguments, also when one requires a gradient; WorkspaceError
    when the group's first call cannot make its workspace; PeerTimeoutError when an earlier call
    missed a peer (on the CPU: this one); WorkspaceError when the ranks' calls differed (on the CPU
    always, on GPUs in debug mode: docs/guide.md) and, in debug mode, when two calls overlapped
    (all as RuntimeError, with their text, from a compiled graph).

    >>> dist.init_process_group("cpu:gloo,cuda:nccl")
    >>> gemma_ar_norm.init(hidden_size=5376)
    >>> x, residual = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(mlp(x), weight, residual)
    """
    if torch.is_grad_enabled():
        for tensor in (x, weight, residual, post_weight):
            if getattr(tensor, "requires_grad", False):  # asked here: a call less, a microsecond
                ops.refuse_gradients(x=x, weight=weight, residual=residual, post_weight=post_weight)
        if isinstance(out, (tuple, list)) and len(out) == 2:
            ops.refuse_gradients(norm_out=out[0], residual_out=out[1])
    if is_dynamo_compiling():
        name = groups.name_for_compile(group)
        return _call(x, weight, residual, post_weight, eps, weight_bias, name, algorithm, out)
    name = groups.name_for_call(group)
    try:
        return _call(x, weight, residual, post_weight, eps, weight_bias, name, algorithm, out)
    except (RuntimeError, TypeError, ValueError) as error:
        arguments = {
            "x": x,
            "weight": weight,
            "residual": residual,
            "post_weight": post_weight,
            "eps": eps,
            "weight_bias": weight_bias,
            "algorithm": algorithm,
            "out": out,
        }
        better = ops.better_error(error, name, arguments)
        if better is error:
            raise
        raise better from None


def _call(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    eps: float,
    weight_bias: float,
    name: str,
    algorithm: str,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    if out is None:
        result: tuple[Tensor, Tensor] = ops.fused_allreduce_rmsnorm(
            x, weight, residual, post_weight, eps, weight_bias, name, algorithm
        )
        return result
    norm_out, residual_out = out
    ops.fused_allreduce_rmsnorm_out(
        x,
        weight,
        residual,
        post_weight,
        eps,
        weight_bias,
        name,
        algorithm,
        norm_out=norm_out,
        residual_out=residual_out,
    )
    return norm_out, residual_out


# ---------------------------------------------------------------------------------------- explain

MOST = 1 << 46  # rows, or elements of a row, that explain() takes: no tensor has as many


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why: the result of `explain`.

    path: "one_shot": our kernel that pushes every row to every peer. "two_shot": our kernel in
        which each rank adds its slice of every row and pushes the sum to every peer. "unfused":
        the group's all-reduce, then our add-and-norm kernel. "local": one rank, our add-and-norm
        kernel. "cpu": all-gather, then torch. "undecided": the group has no workspace yet, and
        `init` will tell. Of a call of several launches: that of the first.
    launches: kernel launches of ours, 0 for 0 rows. blocks, threads: of the first; 0 where the path
        is not fused.
    evidence: where the plan's rule for the first launch comes from; "" where the path is not fused.
    """

    path: str
    reason: str
    rows: int
    hidden_size: int
    dtype: torch.dtype
    ranks: int
    launches: int = 0
    blocks: int = 0
    threads: int = 0
    evidence: str = ""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.rows} x {self.hidden_size} {dtype} on {self.ranks} rank(s)"
        launch = ""
        if self.blocks:
            times = "1 launch" if self.launches == 1 else f"{self.launches} launches"
            launch = f" [{times}, {self.blocks} blocks of {self.threads} threads]"
        plan = f"; plan: {self.evidence}" if self.evidence else ""
        return f"{shape}: {self.path}{launch}; {self.reason}{plan}"


def explain(
    rows: int,
    hidden_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    group: Any = None,
    device: torch.device | str | None = None,
    algorithm: str = "auto",
) -> Explanation:
    """Which path a call with x of [rows, hidden_size] takes here, and why. Not collective.

    It looks at what there is, and makes nothing: before `init` and the group's first call the
    answer for several ranks with GPUs is "undecided". device: of x; the GPU where there is one.
    Raises the TypeError or ValueError that the call would raise for this shape and algorithm, and
    its WorkspaceError where a fused algorithm is asked for and the ranks have no fused workspace.

    >>> print(gemma_ar_norm.explain(64, 5376))
    64 x 5376 bfloat16 on 1 rank(s): cpu; the tensors are on the CPU
    """
    for name, value in (("rows", rows), ("hidden_size", hidden_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"{name}: an int is required; got {type(value).__name__}; pass a shape's number"
            )
        if not 0 <= value <= MOST:
            raise ValueError(
                f"{name}: an int from 0 to {MOST} is required; got {shown(value)}; pass a shape's "
                "number"
            )
    wrong = workspace.dtype_error(dtype)
    if wrong is not None:
        raise wrong
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = workspace.device_of(device)
    x = torch.empty(0, hidden_size, dtype=dtype, device="meta")
    weight = torch.empty(hidden_size, dtype=dtype, device="meta")
    ops.check_arguments(x, weight, None, None, 0.0, 1.0, algorithm)

    me = groups.resolve(group)
    found = workspace.find(me.name)

    def answer(path: str, reason: str, **launch: Any) -> Explanation:
        return Explanation(path, reason, rows, hidden_size, dtype, me.size, **launch)

    if device.type == "cpu":
        return answer("cpu", "the tensors are on the CPU")
    norms = 1 if rows > 0 else 0
    if me.size == 1:
        reason = "one rank: there is nothing to reduce"
        ops.refuse_fused(algorithm, reason)
        return answer("local", reason, launches=norms)
    if algorithm == "unfused":
        ops.refuse_unfused(me)
        return answer("unfused", "asked for by algorithm", launches=norms)
    if found is None or found.closed:
        return answer("undecided", "no workspace yet; init(group), or the first call, makes one")
    if not found.fused:
        ops.refuse_fused(algorithm, found.reason)
        return answer("unfused", found.reason, launches=norms)
    if rows == 0:
        path = algorithm if algorithm in plan.FUSED_ALGORITHMS else "one_shot"
        return answer(path, "0 rows: nothing is launched")
    row_packs = hidden_size * dtype.itemsize // plan.PACK_BYTES
    numbers = [rule.numbers for rule in found.rules]
    where = (numbers, me.size, found.inbox_bytes)
    first = _C.launches(*where, rows, row_packs, algorithm, limit=1)[0]
    # Launches are alike until less is left than an inbox takes. A launch takes 7/8 of that at least
    # (next_launch in csrc/host/plan.h), so two of them are more.
    alike = max(0, rows // first["rows"] - 2)
    others = _C.launches(*where, rows - alike * first["rows"], row_packs, algorithm)
    return answer(
        plan.FUSED_ALGORITHMS[first["algorithm"]],
        found.reason,
        launches=alike + len(others),
        blocks=first["teams"] * first["blocks_a_team"],
        threads=first["threads"],
        evidence=found.rules[first["rule"]].evidence,
    )
