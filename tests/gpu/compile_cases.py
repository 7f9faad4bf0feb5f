"""The cases of worker.py in which torch.compile finds the calls in a model, by all of Inductor.

What is matched, and what is not, is tested on the CPU (tests/cpu/test_fusion.py). Here are the
values, Inductor's cache and CUDA graphs. On the CPU too, but for the graphs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import checks
import torch
import torch.distributed as dist
from checks import Case
from fusion_models import Block, Decoder, RMSNorm, functional, in_place
from torch import Tensor, nn

import gemma_ar_norm

HIDDEN = 1024
# A rank may take longer to compile than another.
COMPILE_TIMEOUT_S = 120.0


class ThreeForms(nn.Module):
    """A block of each form, with the weights of a case of that form."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        blocks = []
        for form, made in zip(checks.FORMS, cases, strict=True):
            post_norm = None if made.post_weight is None else norm_of(made, made.post_weight)
            all_reduce = in_place if form == "residual" else functional
            blocks.append(Block(form, norm_of(made, made.weight), post_norm, all_reduce))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, xs: list[Tensor], residuals: list[Tensor | None]) -> list[Tensor]:
        outputs: list[Tensor] = []
        for block, x, residual in zip(self.blocks, xs, residuals, strict=True):
            outputs += block(x, residual)
        return outputs


def norm_of(made: Case, weight: Tensor) -> RMSNorm:
    return RMSNorm(weight, made.weight_bias, made.eps)


def cases_of(ranks: Any, rows: int, seed: int, like: list[Case] | None = None) -> list[Case]:
    """A case for each form; with the weights of other cases, if those are given."""
    made = [
        ranks.case(rows, HIDDEN, form=form, seed=seed + i) for i, form in enumerate(checks.FORMS)
    ]
    if like is None:
        return made
    return [
        replace(new, weight=old.weight, post_weight=old.post_weight)
        for new, old in zip(made, like, strict=True)
    ]


def call_and_check(ranks: Any, model: Callable[..., Any], cases: list[Case], what: str) -> None:
    # A block doubles what it is given.
    xs = [made.xs[ranks.rank] * 0.5 for made in cases]
    outputs = model(xs, [made.residual for made in cases])
    for i, made in enumerate(cases):
        ranks.expect_result(made, outputs[2 * i : 2 * i + 2], f"{what}, {checks.FORMS[i]}")


def counted(name: str) -> int:
    from torch._dynamo.utils import counters

    return sum(group[name] for group in counters.values())


@contextmanager
def an_empty_cache() -> Iterator[None]:
    """Inductor's: what an earlier run left there would not go through the pass."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        with mock.patch.dict(os.environ, environment):
            torch._dynamo.reset()
            gemma_ar_norm.fusion_report(clear=True)
            yield
            torch._dynamo.reset()


@torch.no_grad()
def a_compiled_model(ranks: Any) -> None:
    """The bits of the contract, for several numbers of rows, eager and in CUDA graphs; and again
    from Inductor's cache."""
    gemma_ar_norm.init(timeout_s=COMPILE_TIMEOUT_S)
    first = cases_of(ranks, 4, seed=0)
    model = ThreeForms(first)
    with an_empty_cache():
        for graphs in (False, True) if ranks.gpu else (False,):
            _compile_and_call(ranks, model, first, graphs)


def _compile_and_call(ranks: Any, model: nn.Module, first: list[Case], graphs: bool) -> None:
    what = "in CUDA graphs" if graphs else "compiled"
    options = gemma_ar_norm.inductor_options({"triton.cudagraphs": True} if graphs else {})
    sizes = (4, 7, 96) if ranks.gpu else (4, 7, 5)
    for round_ in ("new", "cached"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        gemma_ar_norm.fusion_report(clear=True)
        compiled = torch.compile(model, fullgraph=True, options=options)
        for rows in sizes:
            # Of CUDA graphs: the first call warms up, the second records, the third replays.
            for repeat in range(3):
                dist.barrier()
                torch.compiler.cudagraph_mark_step_begin()
                cases = cases_of(ranks, rows, seed=1000 * rows + 10 * repeat, like=first)
                call_and_check(ranks, compiled, cases, f"{what}, {round_}, call {repeat}")
        forms = [record.form for record in gemma_ar_norm.fusion_report(clear=True)]
        # One graph for the first number of rows, one for all others.
        expected = [*checks.FORMS] * 2 if round_ == "new" else []
        ranks.expect(forms == expected, f"{what}, {round_}: the report has {forms}")
        for form in checks.FORMS:
            count = counted(f"gemma_ar_norm_{form}")
            ranks.expect(count == 2, f"{what}, {round_}: {form} was counted {count} times")
        hits = counted("fxgraph_cache_hit") + counted("autograd_cache_hit")
        ranks.expect((hits > 0) == (round_ == "cached"), f"{what}, {round_}: {hits} cache hits")
    if graphs:
        skips, recorded = counted("cudagraph_skips"), _recorded_graphs(ranks.device)
        ranks.expect(skips == 0, f"CUDA graphs were skipped {skips} times")
        ranks.expect(recorded > 0, "no CUDA graph was recorded")


def _recorded_graphs(device: torch.device) -> int:
    from torch._inductor.cudagraph_trees import get_manager

    index = torch.cuda.current_device() if device.index is None else device.index
    manager = get_manager(index, create_if_none_exists=False)
    return 0 if manager is None else len(list(manager.get_roots()))


@torch.no_grad()
def a_compiled_decoder(ranks: Any) -> None:
    """Layers that depend on each other, with products of matrices between: as close to the model
    without any compiler as its roundings let it be, and the same bits on every rank."""
    gemma_ar_norm.init(timeout_s=COMPILE_TIMEOUT_S)
    generator = torch.Generator().manual_seed(1)

    def norm() -> RMSNorm:
        return RMSNorm((torch.randn(HIDDEN, generator=generator) * 0.1).bfloat16())

    forms = ("sandwich", "residual") * 2
    blocks = [Block(form, norm(), norm(), in_place) for form in forms]
    decoder = Decoder(blocks, torch.bfloat16, generator).to(ranks.device)
    x, residual = torch.randn(2, 6, HIDDEN, generator=generator).bfloat16().to(ranks.device)
    with an_empty_cache():
        compiled = torch.compile(decoder, fullgraph=True, options=gemma_ar_norm.inductor_options())
        got = compiled(x * (ranks.rank + 1), residual)
        found = [record.form for record in gemma_ar_norm.fusion_report(clear=True)]
    ranks.expect(found == [*forms], f"the report has {found}")
    want = decoder(x * (ranks.rank + 1), residual)
    for name, one, other in zip(("norm_out", "residual_out"), got, want, strict=True):
        error = ((one.double() - other.double()).norm() / other.double().norm()).item()
        # 4 layers of some 5 roundings of 2^-9 each, which the matrices' products spread.
        ranks.expect(error < 2**-6, f"{name} is {error:.2e} off the model that is not compiled")
    ranks.expect_same_bits_everywhere(*got)


@torch.no_grad()
def a_call_of_which_a_rank_takes_nothing(ranks: Any) -> None:
    """It is made all the same: the other ranks wait for it."""
    gemma_ar_norm.init(timeout_s=COMPILE_TIMEOUT_S)
    made = ranks.case(3, HIDDEN, form="residual", seed=5)

    def last_layer(x: Tensor) -> tuple[Tensor, ...]:
        results = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, made.weight, **made.options)
        return results if ranks.rank == 0 else (x + 1, x + 2)

    with an_empty_cache():
        compiled = torch.compile(last_layer, fullgraph=True)
        results = compiled(made.xs[ranks.rank])
    gemma_ar_norm.synchronize()  # raises where a peer did not come
    if ranks.rank == 0:
        ranks.expect_result(made, results, "of the rank that takes them")


CASES = (a_compiled_model, a_compiled_decoder, a_call_of_which_a_rank_takes_nothing)
