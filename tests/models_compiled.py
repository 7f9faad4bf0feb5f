"""The cases of `fuse` and of the torch.compile pass in which a tiny model is traced or compiled.

models_worker.py runs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import checks
import models
import torch
from models_tools import (
    BF16,
    BOUND,
    BOUND_OF_EXPERTS,
    FP32,
    Rank,
    assert_within,
    case_of,
    logits_of,
    run,
    sharded_embeddings,
    stacks_of,
    states_of,
)

import gemma_ar_norm
from gemma_ar_norm.fusion import PASS_OPTION


@case_of("gemma3")
def layers_of_which_one_is_compiled(me: Rank, name: str) -> None:
    """A hook that writes between two layers counts, also where only one of them counts writes."""
    for which in (0, 1):
        torch._dynamo.reset()
        both = [me.load(name, plan=_plan_without_hooks(name)) for _ in range(2)]
        for model in both:
            layers = stacks_of(model, name)[-1].layers
            layers[0].register_forward_hook(lambda module, args, out: out.copy_(out.roll(1, -1)))
            layers[which].compile(backend="eager")
        gemma_ar_norm.fuse(both[0])
        got, want = (logits_of(model, me.ids) for model in both)
        assert_within(got, want, BOUND[FP32], f"{name}, layer {which} compiled")


@case_of("gemma", "gemma3")  # the two forms; it takes a minute
def compiled(me: Rank, name: str) -> None:
    """torch.compile of the model that is not fused, with the pass, fuses the same calls."""
    model = me.load(name, BF16, plan=_plan_without_hooks(name))
    want = states_of(model, me.ids)
    torch._dynamo.reset()
    # What comes from Inductor's cache is fused, but not in the report.
    torch._inductor.config.force_disable_caches = True
    before = len(gemma_ar_norm.fusion_report())
    decoder = torch.compile(model.model, options=gemma_ar_norm.inductor_options())
    with torch.no_grad():
        got = decoder(me.ids, use_cache=False).last_hidden_state
    assert_within(got, want, BOUND[BF16], f"{name}, compiled")
    assert_fused_by_the_pass(model, name, gemma_ar_norm.fusion_report()[before:])


def assert_fused_by_the_pass(
    model: Any, name: str, records: list[gemma_ar_norm.FusionRecord]
) -> int:
    """It fused what the table expects and saw each of the model's all-reduces. How many it fused.

    The embedding's, where there is one, has a norm behind it (plain), or is scaled first: Gemma's
    norm is of the product, so the sum is left. No other sum of such a family is.
    """
    tiny, embeddings = models.TINY[name], sharded_embeddings(model, name)
    sites = dict(tiny.sites if tiny.compiled_sites is None else tiny.compiled_sites)
    if embeddings and not tiny.scales_embedding:
        sites["plain"] = embeddings
    forms = [record.form for record in records if record.form]
    assert {form: forms.count(form) for form in set(forms)} == sites, records
    assert len(records) == tiny.all_reduces + tiny.all_reduces_left + embeddings, records
    if tiny.scales_embedding:
        left = [record.reason for record in records if not record.form]
        assert len(left) == embeddings, records
        assert all(re.fullmatch(SCALED, reason) for reason in left), records
    return len(forms)


SCALED = r"no RMSNorm follows; the sum goes to mul(_\d+)?"


# Not step3p7: it loops over the experts that were chosen, at which a graph breaks.
@case_of(*(name for name in models.TINY if name != "step3p7"))
def through_the_pass(me: Rank, name: str) -> None:
    """Traced, the model that is not fused goes through Inductor up to and with the pass, which
    finds the same calls. No code is generated: the graph runs as it is, so it takes seconds."""
    tiny = models.TINY[name]
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
    fused = assert_fused_by_the_pass(model, name, records)
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("fused_allreduce_rmsnorm" in call for call in calls) == fused, calls
    assert sum("all_reduce." in call for call in calls) == len(records) - fused, records


def _plan_without_hooks(name: str) -> dict[str, str]:
    """transformers' plan, with head and embedding whole, and without what sets backward hooks.
    5.24 completes a plan from the family's own: it shards the embedding too, and sets no hooks."""
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


@case_of("gemma3")  # tracing takes seconds
def a_fused_model_in_one_graph(me: Rank, name: str) -> None:
    """torch.compile traces a fused model without a break, and its calls are the eager ones."""
    model = me.load(name, FP32, plan=_plan_without_hooks(name))
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
