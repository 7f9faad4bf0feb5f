"""One rank of the tests of `fuse`: takes a tiny model of each family through it.

    python tests/models_worker.py DIRECTORY CASE-FAMILY ...      (started by models_runs.py)

Every rank writes DIRECTORY/rank<r>.jsonl, a line a case: {"case", "failures", "seconds"}. One run
has all families, because importing transformers takes longer than all its cases. It runs on GPUs
and on the CPU, where a CUDA graph is left out.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import checks
import models
import models_compiled  # noqa: F401 - for its cases
import models_left  # noqa: F401 - for its cases
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from models_tools import (
    BF16,
    BOUND,
    BOUND_OF_EXPERTS,
    CASES,
    FP16,
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
    states_of,
)
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import groups, huggingface, launcher

NEW_TOKENS = 8


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
    embeddings = sharded_embeddings(model, name)
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
    assert dict(fusion.left) == tiny.left, str(fusion)
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
    for dtype in (FP32, BF16, FP16) if name in ("gemma", "gemma3") else (FP32, BF16):
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


@case_of(*(name for name, tiny in models.TINY.items() if tiny.generates))
def generation(me: Rank, name: str) -> None:
    """generate() with its cache gives the same tokens; hidden states are where they were."""
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


@case_of("gemma", "gemma3", "qwen3_5")
def embeddings_that_are_written_to(me: Rank, name: str) -> None:
    """By whoever calls the embedding, as for soft prompts: the layers take what was written."""
    model, other = me.load(name), me.load(name)
    gemma_ar_norm.fuse(model)

    def prompted(one: Any) -> Tensor:
        embedded = one.get_input_embeddings()(me.ids.clone())
        embedded[:, :1] = 0.25
        return one(inputs_embeds=embedded, use_cache=False).logits

    with torch.no_grad():
        want = prompted(other)
        assert_within(prompted(model), want, BOUND[FP32], name)
    assert (logits_of(other, me.ids) - want).abs().max() > 100 * BOUND[FP32] * want.abs().max()
    with torch.inference_mode():  # there torch does not count writes
        assert_within(prompted(model), want, BOUND[FP32], f"{name}, inference mode")


@case_of("gemma", "gemma3", "qwen3_5_moe")  # the two forms, and experts
def hooks_within_a_layer(me: Rank, name: str) -> None:
    """Whoever has a hook on what a fused call would hide, or show in part, sees what was before; so
    do global hooks. When it is removed all is fused again."""
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


@case_of("gemma", "gemma3", "qwen3_5_moe")
def autocast(me: Rank, name: str) -> None:
    """Under it all is as before: a linear's dtype is not the residual's."""
    model = me.load(name)
    with torch.autocast(me.device.type, dtype=BF16):
        before = logits_of(model, me.ids)
        fusion = gemma_ar_norm.fuse(model)
        with counted() as counts:
            fused = logits_of(model, me.ids)
    assert_within(fused, before, BOUND_OF_EXPERTS[BF16], f"{name}, autocast")
    assert counts["fused"] == sum(site.layer is None for site in fusion.sites)  # an embedding's


@case_of(
    *(name for name, tiny in models.TINY.items() if tiny.alone and not tiny.is_encoder_decoder)
)
def a_graph(me: Rank, name: str) -> None:
    """A decoder in a CUDA graph, where no other collective is left, computes as in eager mode.

    On the CPU only that none is left is looked at.
    """
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
