"""One rank of the tests of `fuse`: takes a tiny model of each family through it.

    python tests/models_worker.py DIRECTORY CASE-FAMILY ...      (started by models_runs.py)

Every rank writes DIRECTORY/rank<r>.jsonl, a line a case: {"case", "failures", "seconds"}. One run
has all families, because importing transformers takes longer than all its cases. It runs on GPUs
and on the CPU, where a CUDA graph is left out.
"""

from __future__ import annotations

import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import checks
import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import fuse_forward, groups, huggingface, launcher, tensor_parallel
from gemma_ar_norm.fusion import PASS_OPTION

BF16, FP32 = torch.bfloat16, torch.float32
PROMPT = [[5, 9, 77, 31, 2, 64], [11, 3, 8, 100, 41, 7]]
NEW_TOKENS = 8

# Bounds of |logits - unfused logits|, as parts of the largest logit; docs/models.md says what was
# seen. Where two sums become one in bfloat16, a router may choose another expert.
BOUND = {BF16: 0.03, FP32: 2e-5}
BOUND_OF_EXPERTS = {BF16: 0.1, FP32: 2e-5}

CASES: dict[str, Callable[[Rank, str], None]] = {}


def case(function: Callable[[Rank, str], None]) -> Callable[[Rank, str], None]:
    CASES[function.__name__] = function
    return function


class Rank:
    def __init__(self, rank: int, world: int, device: torch.device, directory: Path):
        self.rank, self.world, self.device, self.directory = rank, world, device, directory
        self.ids = torch.tensor(PROMPT, device=device)

    def load(self, name: str, dtype: torch.dtype = FP32, **options: Any) -> Any:
        return models.load(name, self.directory, dtype, self.device, **options)


def stacks_of(model: Any, name: str) -> list[Any]:
    """What has layers and a norm; the last one is what makes the text."""
    return [model.get_submodule(path) for path in models.TINY[name].stacks]


@torch.no_grad()
def run(model: Any, ids: Tensor, **options: Any) -> Any:
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids.flip(-1)
    return model(ids, use_cache=False, **options)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """The logits; of a model without a head, its last hidden state."""
    out = run(model, ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def states_of(model: Any, ids: Tensor) -> Tensor:
    """What goes into the head."""
    return run(model.model, ids).last_hidden_state


def assert_within(got: Tensor, want: Tensor, part: float, what: str) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    largest = want.abs().max().item()
    difference = (got.float() - want.float()).abs().max().item()
    print(f"{what}: {difference / largest:.2e} of the largest logit", flush=True)
    assert difference <= part * largest, f"{what}: off by {difference} of {largest}"


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts fused calls, and all-reduces of torch.distributed, also those of DTensors."""
    counts = {"fused": 0, "all_reduce": 0}
    fused, all_reduce = fuse_forward.api.fused_allreduce_gemma_rmsnorm, dist.all_reduce

    def counting(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[key] += 1
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(
            fuse_forward.api, "fused_allreduce_gemma_rmsnorm", counting("fused", fused)
        ),
        mock.patch.object(dist, "all_reduce", counting("all_reduce", all_reduce)),
        mock.patch.object(funcol, "all_reduce", counting("all_reduce", funcol.all_reduce)),
    ):
        yield counts


@contextmanager
def norms_of_the_contract(stack: Any) -> Iterator[None]:
    """Meanwhile the model's RMSNorms compute as reference.py does: in its order of additions."""
    norm_class = type(stack.norm)

    def forward(self: Any, x: Tensor) -> Tensor:
        out, _ = gemma_ar_norm.reference.fused_allreduce_gemma_rmsnorm(
            [x.contiguous()], self.weight, eps=self.eps
        )
        return out

    with mock.patch.object(norm_class, "forward", forward):
        yield


# ------------------------------------------------------------------------------------------- cases


@case
def sites(me: Rank, name: str) -> None:
    """As many fused calls as the table expects, and no all-reduce beside them; then none again."""
    tiny, model = models.TINY[name], me.load(name)
    keys = {key: value.data_ptr() for key, value in model.state_dict().items()}
    stacks = stacks_of(model, name)
    reduced_embedding = tensor_parallel.reduced_embedding
    embeddings = sum(reduced_embedding(stack.embed_tokens)[0] is not None for stack in stacks)
    plain = {"plain": embeddings} if embeddings else {}

    with counted() as before:
        logits_of(model, me.ids)
    fusion = gemma_ar_norm.fuse(model)
    found = {form: fusion.count(form) for form in ("plain", "residual", "sandwich")}
    assert {k: v for k, v in found.items() if v} == {**tiny.sites, **plain}, str(fusion)
    assert fusion.all_reduces == tiny.all_reduces + embeddings
    assert fusion.ranks == me.world
    parameters = dict(model.named_parameters())
    for site in fusion.sites:
        assert all(weight in parameters for weight in site.weights), site
        assert len(site.weights) == (2 if site.form == "sandwich" else 1), site
    gathers = [where for where, style in fusion.collectives if "lm_head" not in where]
    assert (not gathers) == tiny.alone, fusion.collectives
    assert str(fusion).count(":") >= fusion.count()

    with counted() as during:
        logits_of(model, me.ids)
    left = before["all_reduce"] - fusion.all_reduces
    assert before["fused"] == 0
    assert during == {"fused": fusion.count(), "all_reduce": left}, (during, before)
    assert left == tiny.all_reduces_left, (during, before)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == keys

    gemma_ar_norm.unfuse(model)
    with counted() as after:
        logits_of(model, me.ids)
    assert after == before, after
    ours = [m for m in model.modules() if hasattr(m.__dict__.get("forward"), huggingface.OURS)]
    assert ours == []


@case
def logits(me: Rank, name: str) -> None:
    """Within the rounding of what was before; the same bits where only the norm's order differs."""
    bounds = BOUND if models.TINY[name].one_sum else BOUND_OF_EXPERTS
    for dtype in (FP32, BF16):
        model = me.load(name, dtype)
        before, stack = logits_of(model, me.ids), stacks_of(model, name)[-1]
        with norms_of_the_contract(stack):
            exact = logits_of(model, me.ids)
        gemma_ar_norm.fuse(model)
        fused = logits_of(model, me.ids)
        assert_through_the_kernel(me, name, dtype)
        assert_within(fused, before, bounds[dtype], f"{name} {dtype}")
        with norms_of_the_contract(stack):
            fused_exact = logits_of(model, me.ids)
        # Two ranks' sum is the same in any order.
        if me.world == 2 and models.TINY[name].one_sum:
            checks.assert_bit_equal(fused_exact, exact, f"{name} {dtype}")
        assert_within(fused_exact, exact, bounds[dtype], f"{name} {dtype}, norms as in reference")
        everybody = [torch.empty_like(fused).cpu() for _ in range(me.world)]
        dist.all_gather(everybody, fused.cpu())
        for other in everybody:
            checks.assert_bit_equal(other, fused.cpu(), f"{name} {dtype}, across ranks")
        gemma_ar_norm.unfuse(model)
        checks.assert_bit_equal(logits_of(model, me.ids), before, f"{name} {dtype}, unfused again")


def assert_through_the_kernel(me: Rank, name: str, dtype: torch.dtype) -> None:
    """On GPUs the calls that were made took the CUDA kernel, not torch.distributed."""
    hidden = models.BASE["hidden_size"]
    answer = gemma_ar_norm.explain(me.ids.numel(), hidden, dtype, device=me.device)
    paths = ("one_shot", "two_shot") if me.device.type == "cuda" else ("cpu",)
    assert answer.path in paths, f"{name}: {answer}"


@case
def generation(me: Rank, name: str) -> None:
    """generate() with its cache gives the same tokens; hidden states are where they were."""
    if not models.TINY[name].generates:
        return
    model = me.load(name)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    mask = torch.ones_like(me.ids)
    want = model.generate(me.ids, attention_mask=mask, **options)
    states = _hidden_states(model, me.ids)
    gemma_ar_norm.fuse(model)
    assert torch.equal(model.generate(me.ids, attention_mask=mask, **options), want)
    start = 1 if models.TINY[name].is_encoder_decoder else me.ids.shape[1]
    assert want.shape[1] == start + NEW_TOKENS
    fused_states = _hidden_states(model, me.ids)
    assert len(fused_states) == len(states) == models.LAYERS + 1
    for number, (got, expected) in enumerate(zip(fused_states, states, strict=True)):
        assert_within(got, expected, 1e-5, f"{name} hidden state {number}")


def _hidden_states(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    out = run(model, ids, output_hidden_states=True)
    return getattr(out, "hidden_states", None) or out.decoder_hidden_states


@case
def weights_and_hooks(me: Rank, name: str) -> None:
    """An update of a norm's weight, and a hook between two layers, count as they did before."""
    model, other = me.load(name), me.load(name)
    gemma_ar_norm.fuse(model)
    fused_before = logits_of(model, me.ids)
    for one in (model, other):
        with torch.no_grad():
            stack = stacks_of(one, name)[-1]
            norms = [m for m in stack.layers[1].children() if type(m) is type(stack.norm)]
            for norm in (stack.norm, *norms):
                norm.weight.mul_(1.5)
    changed = logits_of(other, me.ids)
    assert_within(logits_of(model, me.ids), changed, BOUND[FP32], f"{name}, new weights")
    assert (fused_before - changed).abs().max() > 100 * BOUND[FP32] * changed.abs().max()

    def replaces(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.roll(1, -1)

    def writes(module: Any, args: Any, output: Tensor) -> None:
        output.copy_(output.roll(1, -1))

    for hook in (replaces, writes):
        both = [stacks_of(one, name)[-1].layers[0] for one in (model, other)]
        handles = [layer.register_forward_hook(hook) for layer in both]
        want = logits_of(other, me.ids)
        assert (want - changed).abs().max() > 100 * BOUND[FP32] * want.abs().max()
        assert_within(logits_of(model, me.ids), want, BOUND[FP32], f"{name}, {hook.__name__}")
        with torch.inference_mode():  # there torch does not count writes
            got = logits_of(model, me.ids.clone())
        assert_within(got, want, BOUND[FP32], f"{name}, {hook.__name__}, inference mode")
        for handle in handles:
            handle.remove()


@case
def hooks_within_a_layer(me: Rank, name: str) -> None:
    """Whoever has a hook on what a fused call would hide, or show in part, sees what was before; so
    do global hooks. When it is removed all is fused again."""
    if name not in ("gemma", "gemma3", "qwen3_5_moe"):  # the two forms, and experts
        return
    model, other = me.load(name), me.load(name)
    fusion = gemma_ar_norm.fuse(model)

    def changes(module: Any, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = first.clamp(-0.05, 0.05).roll(1, -1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def modules_of(one: Any) -> Iterator[tuple[str, Any]]:
        stack = stacks_of(one, name)[-1]
        for child, module in stack.layers[0].named_modules():
            last = child.rsplit(".", 1)[-1]
            if last in ("mlp", "self_attn", "down_proj", "o_proj", "shared_expert", "experts"):
                yield child, module
            if type(module) is type(stack.norm) and "self_attn" not in child:
                yield child, module
        yield (
            "the next layer's",
            next(m for m in stack.layers[1].children() if type(m) is type(stack.norm)),
        )
        yield "the final norm", stack.norm

    before = logits_of(other, me.ids)
    for (child, module), (_, same) in zip(modules_of(model), modules_of(other), strict=True):
        handles = [one.register_forward_hook(changes) for one in (module, same)]
        want = logits_of(other, me.ids)
        assert_within(logits_of(model, me.ids), want, BOUND[FP32], f"{name}, hook on {child}")
        with torch.inference_mode():
            got = logits_of(model, me.ids.clone())
        assert_within(got, want, BOUND[FP32], f"{name}, hook on {child}, inference mode")
        for handle in handles:
            handle.remove()

    layer_class = type(stacks_of(model, name)[-1].layers[0])

    def writes(module: Any, args: Any, output: Any) -> None:
        if type(module) is layer_class:
            output.copy_(output.roll(1, -1))

    with torch.inference_mode():
        handle = torch.nn.modules.module.register_module_forward_hook(writes)
        want, got = (logits_of(one, me.ids.clone()) for one in (other, model))
        handle.remove()
    assert (want - before).abs().max() > 100 * BOUND[FP32] * want.abs().max()
    assert_within(got, want, BOUND[FP32], f"{name}, global hook")
    with counted() as counts:
        assert_within(logits_of(model, me.ids), before, BOUND[FP32], f"{name}, without hooks")
    assert counts["fused"] == fusion.count()


@case
def autocast(me: Rank, name: str) -> None:
    """Under it all is as before: a linear's dtype is not the residual's."""
    if name not in ("gemma", "gemma3", "qwen3_5_moe"):
        return
    model = me.load(name)
    with torch.autocast(me.device.type, dtype=BF16):
        before = logits_of(model, me.ids)
        fusion = gemma_ar_norm.fuse(model)
        with counted() as counts:
            fused = logits_of(model, me.ids)
    assert_within(fused, before, BOUND_OF_EXPERTS[BF16], f"{name}, autocast")
    assert counts["fused"] == sum(site.layer is None for site in fusion.sites)  # an embedding's


@case
def layers_of_which_one_is_compiled(me: Rank, name: str) -> None:
    """A hook that writes between two layers counts, also where only one of them counts writes."""
    if name != "gemma3":
        return
    for which in (0, 1):
        torch._dynamo.reset()
        models = [me.load(name, plan=_plan_to_trace(name)) for _ in range(2)]
        for model in models:
            layers = stacks_of(model, name)[-1].layers
            layers[0].register_forward_hook(lambda module, args, out: out.copy_(out.roll(1, -1)))
            layers[which].compile(backend="eager")
        gemma_ar_norm.fuse(models[0])
        got, want = (logits_of(model, me.ids) for model in models)
        assert_within(got, want, BOUND[FP32], f"{name}, layer {which} compiled")


@case
def what_the_kernels_cannot_do(me: Rank, name: str) -> None:
    """Is left as it was, or refused, by `fuse` and not by the first call."""
    if name not in ("gemma", "gemma3"):
        return
    with pytest.raises(ValueError, match=r"it is torch\.float64; bfloat16, float16 and float32"):
        gemma_ar_norm.fuse(me.load(name, torch.float64))
    model = me.load(name, BF16)
    stack = stacks_of(model, name)[-1]
    stack.norm.half()  # neither the sum's dtype nor fp32
    before = logits_of(model, me.ids)
    fusion = gemma_ar_norm.fuse(model)
    last = len(stack.layers) - 1
    assert any("float16" in why for where, why in fusion.left if f"layers.{last}.mlp" in where)
    assert_within(logits_of(model, me.ids), before, BOUND[BF16], f"{name}, a norm in fp16")


@case
def a_graph(me: Rank, name: str) -> None:
    """A decoder in a CUDA graph, where no other collective is left, computes as in eager mode.

    On the CPU only that none is left is looked at.
    """
    tiny = models.TINY[name]
    if not tiny.alone or tiny.is_encoder_decoder:
        return
    model = me.load(name, BF16)
    # Its mask is the same in a graph; sdpa has other kernels there than in eager mode.
    model.set_attn_implementation("eager")
    fusion = gemma_ar_norm.fuse(model)
    # The head gathers its part of the vocabulary, through the group's own backend.
    assert all("lm_head" in where for where, _ in fusion.collectives), fusion.collectives
    if me.device.type != "cuda":
        return
    inputs = [(me.ids + shift) % models.VOCABULARY for shift in (0, 1, 2)]
    wanted = [states_of(model, ids) for ids in inputs]
    for one, other in zip(wanted, wanted[1:], strict=False):
        assert (one - other).abs().max() > 5 * BOUND[BF16] * one.abs().max()

    ids, stream = me.ids.clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        states_of(model, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with scalars_made_on_the_gpu(), torch.cuda.graph(graph):
        captured = states_of(model, ids)

    def replay(with_ids: Tensor, want: Tensor, what: str) -> None:
        ids.copy_(with_ids)
        graph.replay()
        torch.cuda.synchronize()
        gemma_ar_norm.check()
        assert_within(captured, want, BOUND[BF16], f"{name}, {what}")

    for shift in (0, 1, 2, 0):
        replay(inputs[shift], wanted[shift], f"replay {shift}")
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    changed = states_of(model, inputs[0])
    assert (changed - wanted[0]).abs().max() > 5 * BOUND[BF16] * changed.abs().max()
    replay(inputs[0], changed, "replay with new weights")


@contextmanager
def scalars_made_on_the_gpu() -> Iterator[None]:
    """transformers' mask for eager attention copies a scalar to the GPU, which no graph can."""
    tensor = torch.tensor

    def made(value: Any, **options: Any) -> Tensor:
        if isinstance(value, int | float):
            return torch.full((), value, **options)
        return tensor(value, **options)

    with mock.patch.object(torch, "tensor", made):
        yield


@case
def compiled(me: Rank, name: str) -> None:
    """torch.compile of the model that is not fused, with the pass, fuses the same calls."""
    options = getattr(gemma_ar_norm, "inductor_options", None)
    tiny = models.TINY[name]
    if options is None or name not in ("gemma", "gemma3"):  # the two forms; it takes a minute
        return
    model = me.load(name, BF16, plan=_plan_to_trace(name))
    want = states_of(model, me.ids)
    torch._dynamo.reset()
    # What comes from Inductor's cache is fused, but not in the report.
    torch._inductor.config.force_disable_caches = True
    before = len(gemma_ar_norm.fusion_report())
    decoder = torch.compile(model.model, options=options())
    with torch.no_grad():
        got = decoder(me.ids, use_cache=False).last_hidden_state
    assert_within(got, want, BOUND[BF16], f"{name}, compiled")
    records = gemma_ar_norm.fusion_report()[before:]
    forms = [record.form for record in records]
    assert {form: forms.count(form) for form in set(forms)} == tiny.sites, records


@case
def through_the_pass(me: Rank, name: str) -> None:
    """Traced, the model that is not fused goes through Inductor up to and with the pass, which
    finds the same calls. No code is generated: the graph runs as it is, so it takes seconds."""
    tiny = models.TINY[name]
    if name == "step3p7":  # it loops over the experts that were chosen, at which a graph breaks
        return
    # The eager experts of the others loop too.
    model = me.load(name, BF16, plan=_plan_without_hooks(name), experts="batched_mm")
    base = model.model if tiny.generates else model
    for module in base.modules():
        if hasattr(module, "chunk_gated_delta_rule"):  # of 64 steps to trace, for six tokens
            module.chunk_gated_delta_rule = module.recurrent_gated_delta_rule
    want = run(base, me.ids).last_hidden_state
    graphs: list[Any] = []
    torch._dynamo.reset()
    gemma_ar_norm.fusion_report(clear=True)
    traced = torch.compile(base, backend=_up_to_the_pass(graphs), fullgraph=True)
    got = run(traced, me.ids).last_hidden_state
    bounds = BOUND if tiny.one_sum else BOUND_OF_EXPERTS
    assert_within(got, want, bounds[BF16], f"{name}, through the pass")

    records = gemma_ar_norm.fusion_report(clear=True)
    forms = [record.form for record in records if record.form]
    sites = tiny.sites if tiny.compiled_sites is None else tiny.compiled_sites
    assert {form: forms.count(form) for form in set(forms)} == sites, records
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("fused_allreduce_rmsnorm" in call for call in calls) == len(forms), calls
    left = tiny.all_reduces + tiny.all_reduces_left - len(forms)
    assert sum("all_reduce." in call for call in calls) == left, records


def _plan_without_hooks(name: str) -> dict[str, str]:
    """transformers' plan, with head and embedding whole, and without what sets backward hooks."""
    plan = models.make(name).tp_plan
    whole = ("lm_head", "embed_tokens")
    return {
        key: style
        for key, style in plan.items()
        if not any(part in key for part in whole) and style != "replicated_with_grad_allreduce"
    }


def _up_to_the_pass(graphs: list[Any]) -> Callable[..., Any]:
    """A backend for torch.compile: Inductor's passes and ours, and then the graph, which goes to
    `graphs` too, instead of code."""
    from torch._inductor import compile_fx

    fusion_pass = gemma_ar_norm.inductor_options()[PASS_OPTION]

    def inner(graph: Any, inputs: Any, **options: Any) -> Callable[..., Any]:
        fusion_pass(graph.graph)
        graph.recompile()
        graphs.append(graph)
        return lambda *arguments: graph(*arguments)

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=inner)


@case
def a_fused_model_in_one_graph(me: Rank, name: str) -> None:
    """torch.compile traces a fused model without a break, and its calls are the eager ones."""
    if name != "gemma3":  # tracing takes seconds
        return
    model = me.load(name, FP32, plan=_plan_to_trace(name))
    model.set_attn_implementation("eager")  # as in a_graph
    fusion = gemma_ar_norm.fuse(model)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    decoder = torch.compile(model.model, backend=backend, fullgraph=True)
    for shift in (0, 1):
        ids = me.ids + shift
        with torch.no_grad():
            got = decoder(ids, use_cache=False).last_hidden_state
        checks.assert_bit_equal(got, states_of(model, ids), f"{name}, traced, {shift}")
    assert len(graphs) == 1, len(graphs)
    assert graphs[0].count("fused_allreduce_rmsnorm") >= fusion.count(), graphs[0]
    assert "all_reduce_" not in graphs[0].replace("fused_allreduce", ""), graphs[0]


def _plan_to_trace(name: str) -> dict[str, str]:
    """transformers' plan with head and embedding whole on every rank, and without backward hooks,
    at which a graph breaks."""
    plan = models.type_of(name).config_class.base_model_tp_plan
    return {f"model.{key}": style for key, style in plan.items() if style in ("colwise", "rowwise")}


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


# -------------------------------------------------------------------------------------------- main


def gather_through_the_host() -> None:
    """Has DTensors' all-gather go through the host. Over gloo, torch's own ends the process where
    tensors are on a GPU: it reads them as if they were on the host (pytorch issue 152645; seen with
    torch 2.11). Ranks that share a GPU have no other backend."""
    all_gather = funcol.all_gather_tensor

    def all_gather_tensor(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return all_gather(tensor.cpu(), *args, **kwargs).to(tensor.device)

    funcol.all_gather_tensor = all_gather_tensor


def main() -> int:
    directory, wanted = Path(sys.argv[1]), sys.argv[2:]
    rank, world, device = launcher.init_from_env()
    if device.type == "cuda" and groups.devices_of(dist.group.WORLD).get("cuda") == "gloo":
        gather_through_the_host()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    me, failed = Rank(rank, world, device, directory), False
    with open(directory / f"rank{rank}.jsonl", "w", buffering=1) as results:
        for both in wanted:
            print(f"case {both}", flush=True)
            case_name, name = both.split("-")
            start, failures = time.monotonic(), []
            try:
                CASES[case_name](me, name)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except (Exception, pytest.fail.Exception):
                failures.append(traceback.format_exc()[-4000:])
                print(failures[0], flush=True)
            seconds = time.monotonic() - start
            line = {"case": both, "failures": failures, "seconds": seconds}
            results.write(json.dumps(line) + "\n")
            failed = failed or bool(failures)
            # Where only some ranks raised, the others have gone on: their calls do not meet again.
            raised = [None] * world
            dist.all_gather_object(raised, bool(failures))
            if any(raised) and not all(raised):
                break
    dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
