"""`fuse(model)`: the fused call in models of Hugging Face transformers, in eager mode.

In a layer of a tensor-parallel model, transformers computes

    y = all_reduce(o_proj(...));  [y = post_norm(y)];  h = residual + y;  x = next_norm(h)

`fuse` lets the linear return this rank's part of y, and gives the decoder layer a forward that
makes one fused call of the rest. Behind the last block of a layer the next norm is that of the
next layer, or the final one: what was computed for it is handed over (fuse_forward.py), together
with the hidden state it belongs to. Who gets that very tensor takes it; for any other tensor the
norm is computed, as before. So what others do between layers is respected.

Only forwards are replaced, on the instances. Parameters, hooks and the state_dict stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from . import families, tensor_parallel
from .fuse_plan import FusedSite, make_plan

OURS = "_gemma_ar_norm_fused"  # marks forwards of ours
RECORD = "_gemma_ar_norm_fusion"  # what `unfuse` needs, on the model


# ----------------------------------------------------------------------------------- what is said


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did. `print(fusion)` says it in words.

    left: (module, why) of collectives that stay, and of norms that stand behind no all-reduce.
    collectives: (module, style) of all that still communicates beside the fused calls. Where it is
        empty, the forward can be captured in a CUDA graph whatever the group's backend.
    """

    family: str
    ranks: int
    sites: tuple[FusedSite, ...]
    left: tuple[tuple[str, str], ...]
    collectives: tuple[tuple[str, str], ...]

    def count(self, form: str | None = None) -> int:
        """The number of fused calls in one forward, of this form or of all."""
        return sum(form in (None, site.form) for site in self.sites)

    @property
    def all_reduces(self) -> int:
        """The number of all-reduces that they took the place of."""
        return sum(len(site.reduced) for site in self.sites)

    def __str__(self) -> str:
        forms = [f for f in ("plain", "residual", "sandwich") if self.count(f)]
        counts = ", ".join(f"{self.count(form)} {form}" for form in forms)
        lines = [
            f"{self.family} on {self.ranks} ranks: {self.count()} fused calls ({counts}) in the "
            f"place of {self.all_reduces} all-reduces"
        ]
        for site in self.sites:
            lines.append(f"  {site.form}: {' + '.join(site.reduced)} -> {', '.join(site.weights)}")
        lines += [f"  as it was: {name}: {why}" for name, why in self.left]
        if self.collectives:
            lines.append(
                f"  still communicating: {len(self.collectives)} modules, such as "
                f"{self.collectives[0][0]} ({self.collectives[0][1]})"
            )
        return "\n".join(lines)


# ------------------------------------------------------------------------------------ fuse, unfuse


def fuse(model: nn.Module, group: Any = None) -> Fusion:
    """Puts the fused call into a tensor-parallel model of transformers, and says where.

    model: one that from_pretrained loaded with tensor parallelism (`tp_plan="auto"`, or a
        `DistributedConfig`), of a family in docs/models.md, or a model around one: Gemma, Gemma 2,
        Gemma 3, VaultGemma, Qwen3-Next, Qwen3.5 dense and MoE; transformers 5.17 or newer.
    group: the process group of the fused calls; the model's own unless given. It must have the
        same ranks in the same order.

    Every all-reduce that a residual add and a Gemma RMSNorm follow (or post-norm, residual add and
    norm) becomes part of one fused call; of two whose sum they follow (Qwen's shared expert), one.
    Others stay as they are, and the Fusion says so. The results differ from before by roundings
    only (docs/models.md has the bounds), and are the same bits on every rank. Weights are not
    touched, and updates of them are seen. generate(), caches, hooks and output_hidden_states work
    as before: while somebody has a hook on a linear that reduces, its attention or MLP, or a norm
    behind it, that part is computed as it was, and so is all under autocast. An attention or MLP
    called by itself returns this rank's part of its sum. Replace modules before, not after.

    Inference only: the forward raises RuntimeError while gradients are enabled. Not collective:
    call it on every rank, before a CUDA graph is captured and before torch.compile, which traces
    the fused calls.

    Raises ValueError, having changed nothing, for a family that it does not know, a model without
    tensor parallelism, source that is not what it knows, a group of other ranks, and a model that
    is fused already; TypeError for what is no module.

    >>> model = AutoModelForCausalLM.from_pretrained("google/gemma-3-1b-it", tp_plan="auto")
    >>> print(gemma_ar_norm.fuse(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: a model of transformers is required; got {type(model).__name__}; pass what "
            "from_pretrained returned"
        )
    _refuse_fused(model)
    plans = [
        make_plan(name, stack, family, group)
        for name, stack in model.named_modules()
        if (family := families.family_of(stack)) is not None
    ]
    if not plans:
        known = ", ".join(family.name for family in families.FAMILIES)
        raise ValueError(
            f"model: one of a family that fuse() knows ({known}) is required; got "
            f"{type(model).__name__}; put FusedAllReduceGemmaRMSNorm into its layers yourself"
        )
    for plan in plans:
        if not plan.sites:
            reasons = "; ".join(f"{name}: {why}" for name, why in plan.left[:2])
            raise ValueError(
                "model: a model with tensor parallelism, whose o_proj or down_proj reduce, is "
                f"required; got {type(model).__name__} without ({reasons}); load it with "
                'from_pretrained(..., tp_plan="auto") or distributed_config=, transformers 5.17 '
                "or newer"
            )
    without = {id(module) for plan in plans for module in plan.no_longer_reducing}
    fusion = Fusion(
        ", ".join(dict.fromkeys(plan.family.name for plan in plans)),
        plans[0].ranks,
        tuple(site for plan in plans for site in plan.sites),
        tuple(left for plan in plans for left in plan.left),
        tuple(tensor_parallel.other_collectives(model, without)),
    )
    replaced: list[tuple[Any, Any, Any]] = []
    for plan in plans:
        for module, forward in plan.forwards:
            setattr(forward, OURS, True)
            replaced.append((module, module.__dict__.get("forward"), forward))
            module.forward = forward
    model.__dict__[RECORD] = replaced
    return fusion


def unfuse(model: nn.Module) -> None:
    """Gives a model that `fuse` changed the forwards back that it had.

    Raises ValueError, having changed nothing, for a model that is not fused, and where somebody
    replaced one of the forwards after `fuse`.
    """
    replaced = getattr(model, "__dict__", {}).get(RECORD)
    if replaced is None:
        raise ValueError(
            f"model: a model that fuse() was called with is required; got {type(model).__name__}, "
            "which was not; pass the same module"
        )
    for module, _, forward in replaced:
        if module.__dict__.get("forward") is not forward:
            raise ValueError(
                f"model: the forwards that fuse() made are required; got another on a "
                f"{type(module).__name__}, put there since; undo that first"
            )
    for module, before, _ in replaced:
        if before is None:
            del module.forward
        else:
            module.forward = before
    del model.__dict__[RECORD]


def _refuse_fused(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module.__dict__.get("forward"), OURS, False):
            raise ValueError(
                f"model: a model that is not fused is required; got one whose {name or 'forward'} "
                "is; call unfuse() with the model that was fused"
            )
