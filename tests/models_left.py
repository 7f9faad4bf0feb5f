"""The cases of what `fuse` leaves as it was, and of what it refuses: the rows of docs/models.md.

models_worker.py runs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import checks
import models
import pytest
import torch
import torch.distributed as dist
from models_tools import (
    BF16,
    BOUND,
    FP32,
    Rank,
    assert_within,
    case,
    case_of,
    counted,
    logits_of,
    run,
    sharded_embeddings,
    stacks_of,
)

import gemma_ar_norm
from gemma_ar_norm import fuse_plan


@case_of("gemma", "gemma3")
def what_the_kernels_cannot_do(me: Rank, name: str) -> None:
    """Is left as it was, or refused, by `fuse` and not by the first call."""
    with pytest.raises(ValueError, match=r"it is torch\.float64; bfloat16, float16 and float32"):
        gemma_ar_norm.fuse(me.load(name, torch.float64))
    with (
        mock.patch.object(fuse_plan, "PACK_BYTES", 16 * models.BASE["hidden_size"]),
        pytest.raises(ValueError, match=r"its hidden size is 64, no multiple of 256 up to"),
    ):
        gemma_ar_norm.fuse(me.load(name))
    model = me.load(name, BF16)
    stack = stacks_of(model, name)[-1]
    stack.norm.half()  # neither the sum's dtype nor fp32
    before = logits_of(model, me.ids)
    fusion = gemma_ar_norm.fuse(model)
    last = len(stack.layers) - 1
    assert any("float16" in why for where, why in fusion.left if f"layers.{last}.mlp" in where)
    assert_within(logits_of(model, me.ids), before, BOUND[BF16], f"{name}, a norm in fp16")


def left_alone(me: Rank, name: str, model: Any, left: dict[str, str]) -> gemma_ar_norm.Fusion:
    """`fuse` leaves these blocks as they were, for these reasons, and fuses all others. The logits
    are those of before."""
    blocks = 2 * models.LAYERS + sharded_embeddings(model, name)
    with counted() as before:
        want = logits_of(model, me.ids)
    fusion = gemma_ar_norm.fuse(model)
    assert dict(fusion.left) == left, str(fusion)
    assert fusion.count() == blocks - len(left), str(fusion)
    with counted() as during:
        got = logits_of(model, me.ids)
    all_reduces = before["all_reduce"] - fusion.all_reduces
    assert during == {"fused": fusion.count(), "all_reduce": all_reduces}, (during, before)
    assert_within(got, want, BOUND[FP32], f"{name}, {len(left)} blocks left")
    return fusion


def assert_differs(me: Rank, model: Any, ordinary: Any) -> None:
    """What a case changed in the model can be seen in its logits."""
    got, other = (logits_of(one, me.ids) for one in (model, ordinary))
    assert (got - other).abs().max() > 100 * BOUND[FP32] * other.abs().max()


@case_of("gemma")
def a_bias(me: Rank, name: str) -> None:
    """Comes between the all-reduce and the norm."""
    model = me.load(name, attention_bias=True)
    with torch.no_grad():
        for layer in stacks_of(model, name)[-1].layers:
            layer.self_attn.o_proj.bias.fill_(0.5)
    why = "o_proj: it has a bias, which is added between the all-reduce and the norm"
    attention = {f"model.layers.{n}.self_attn": why for n in range(models.LAYERS)}
    left_alone(me, name, model, attention)
    assert_differs(me, model, me.load(name))


@case_of("gemma", "gemma3")
def another_eps(me: Rank, name: str) -> None:
    """A sandwich has one eps; where a layer's two differ it is left. Else each call has its own."""
    model = me.load(name)
    stacks_of(model, name)[-1].layers[0].post_attention_layernorm.eps = 0.5
    why = "its norms have two eps, 0.5 and 1e-06"
    left = {"model.layers.0.self_attn": why} if name == "gemma3" else {}
    left_alone(me, name, model, left)
    assert_differs(me, model, me.load(name))


@case_of("gemma3")
def a_part_of_the_plan(me: Rank, name: str) -> None:
    """A linear that is whole on every rank has nothing to reduce."""
    for part, other, linear in (("self_attn", "mlp", "down_proj"), ("mlp", "self_attn", "o_proj")):
        model = me.load(name, plan=models.part_of_plan(name, part))
        why = f"{linear}: {models.UNSHARDED}"
        left = {f"model.layers.{n}.{other}": why for n in range(models.LAYERS)}
        fusion = left_alone(me, name, model, left)
        assert fusion.collectives == (), fusion.collectives  # not even those that are "replicate"


@case_of("qwen3_5_moe")
def experts(me: Rank, name: str) -> None:
    """Their block is left where a gate is sharded, and under expert parallelism. In 5.17 that takes
    the place of tensor parallelism, so that no linear reduces; in 5.24 it comes on top."""

    def left(why: str) -> dict[str, str]:
        mlps = {f"model.layers.{n}.mlp": why for n in range(models.LAYERS)}
        return models.LINEAR_ATTENTION | mlps

    gate = {"model.layers.*.mlp.shared_expert_gate": "rowwise_split_input"}
    model = me.load(name, plan=models.make(name).tp_plan | gate)
    left_alone(me, name, model, left("its shared_expert_gate is not the same on every rank"))

    model = me.load(name, experts="batched_mm", expert_parallel=True)
    if hasattr(model.config.distributed_config, "ep_size"):
        left_alone(me, name, model, left("its experts are not sharded by tensor parallelism"))
        return
    before = logits_of(model, me.ids)
    with pytest.raises(ValueError, match="whose o_proj or down_proj reduce, is required"):
        gemma_ar_norm.fuse(model)
    checks.assert_bit_equal(logits_of(model, me.ids), before, "after the refusal")


@case
def refusals(me: Rank, name: str) -> None:
    """What cannot be fused is refused in words, and nothing is changed."""
    model = me.load(name)
    before = logits_of(model, me.ids)

    def refused(text: str, function: Callable[[], Any], error: type = ValueError) -> None:
        with pytest.raises(error, match=re.escape(text)):
            function()

    def fuse(**options: Any) -> Any:
        return gemma_ar_norm.fuse(model, **options)

    stack = stacks_of(model, name)[-1]
    layer, norm = stack.layers[0], stack.norm
    refused("fuse() was called with", lambda: gemma_ar_norm.unfuse(model))
    refused("model: a model of transformers", lambda: gemma_ar_norm.fuse("gemma"), TypeError)
    reduces = [reduced for site in fuse().sites for reduced in site.reduced]
    gemma_ar_norm.unfuse(model)
    alone = dist.new_group([0])
    if me.rank == 0:
        refused("group: a process group of the model's own ranks", lambda: fuse(group=alone))
    with mock.patch.object(type(layer), "forward", _another_layer):
        refused("the statement `hidden_states = hidden_states * 2`", fuse)
    with mock.patch.object(type(layer.mlp), "forward", _another_mlp):
        if hasattr(layer.mlp, "shared_expert"):
            refused("mlp with another forward", fuse)
        elif any("mlp" in reduced for reduced in reduces):
            refused("does not return what its down_proj returns", fuse)
    with mock.patch.object(type(norm), "forward", lambda self, x: x * self.weight):
        refused("computes something else", fuse)
    layer.forward = layer.forward
    refused("somebody else replaced", fuse)
    del layer.forward
    if any("mlp" in reduced for reduced in reduces):
        layer.mlp.forward = layer.mlp.forward
        refused("mlp with a forward that somebody else replaced", fuse)
        del layer.mlp.forward
    checks.assert_bit_equal(logits_of(model, me.ids), before, "after refusals")

    another = dist.new_group(list(range(me.world)))
    fuse(group=another)
    fused = logits_of(model, me.ids)
    refused("not fused is required", fuse)
    refused("not fused is required", lambda: gemma_ar_norm.fuse(stack))
    with torch.enable_grad():
        refused(
            "disabled gradients are required",
            lambda: run.__wrapped__(model, me.ids),
            RuntimeError,
        )
    checks.assert_bit_equal(logits_of(model, me.ids), fused, "after refusals, fused")
    ours = layer.forward
    layer.forward = type(layer).forward.__get__(layer)
    refused("put there since", lambda: gemma_ar_norm.unfuse(model))
    layer.forward = ours
    gemma_ar_norm.unfuse(model)
    checks.assert_bit_equal(logits_of(model, me.ids), before, "after all")
    dist.destroy_process_group(another)


def _another_mlp(self, x):
    return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _another_layer(self, hidden_states, **kwargs):
    residual = hidden_states
    hidden_states = hidden_states * 2
    return residual + hidden_states
