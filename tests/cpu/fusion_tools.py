"""What the tests of fusion share: a world of two ranks in one process, and Inductor without its
code generation.

torch's fake process group has peers that are not there: its all-reduce leaves x as it is. So the
CPU path's all-gather is made to say that the other rank has zeros, and a fused graph computes what
the unfused one does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.testing._internal.distributed.fake_pg import FakeStore

import gemma_ar_norm
from gemma_ar_norm import debug, groups
from gemma_ar_norm.fusion import PASS_OPTION

FUSED = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm.default


@contextlib.contextmanager
def two_fake_ranks() -> Iterator[None]:
    """This process is rank 0 of 2. The other is not there, and its partial sums are zeros."""

    def gathered(group: groups.Group, x: Tensor, *time_limit: float) -> list[Tensor]:
        return [x] + [torch.zeros_like(x)] * (group.size - 1)

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with (
            mock.patch.object(groups, "all_gather_rows", gathered),
            mock.patch.object(debug, "compare"),  # there is nobody to compare calls with
        ):
            yield
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()


@dataclass
class Compiled:
    """A model that was compiled up to Inductor's passes after the gradient, ours among them."""

    call: Callable[..., Any]
    graphs: list[GraphModule] = field(default_factory=list)
    before: list[list[str]] = field(default_factory=list)  # each graph's nodes before our pass
    records: list[gemma_ar_norm.FusionRecord] = field(default_factory=list)

    def __call__(self, *arguments: Any) -> Any:
        gemma_ar_norm.fusion_report(clear=True)
        results = self.call(*arguments)
        self.records += gemma_ar_norm.fusion_report(clear=True)
        return results

    def nodes(self, name: str) -> list[Node]:
        """The calls of all graphs whose target has this name in its own."""
        return [n for g in self.graphs for n in g.graph.nodes if name in str(n.target)]

    @property
    def forms(self) -> list[str]:
        return [record.form or record.reason for record in self.records]


def compiled(
    model: Callable[..., Any],
    *,
    change: Callable[[torch.fx.Graph], None] = lambda graph: None,
    dynamic: bool | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """torch.compile with everything of Inductor's before the pass, then the pass, then the graph as
    it is. change: what else to do to each graph before our pass."""
    fusion_pass = gemma_ar_norm.inductor_options(options)[PASS_OPTION]
    result = Compiled(lambda: None)

    def inner(gm: GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        change(gm.graph)
        result.before.append(lines(gm))
        fusion_pass(gm.graph)
        gm.graph.lint()
        gm.recompile()
        result.graphs.append(gm)
        return lambda *arguments: gm(*arguments)

    def backend(gm: GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(gm, inputs, inner_compile=inner)

    torch._dynamo.reset()
    result.call = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    return result


def lines(gm: GraphModule) -> list[str]:
    return [f"{n.name} = {n.target}{n.args}{n.kwargs}" for n in gm.graph.nodes]


# ------------------------------------------------------------------------------------- vLLM's ops


@contextlib.contextmanager
def defined_vllm_ops() -> Iterator[Any]:
    """Ops of vLLM's names and schemas, with its definitions."""
    library = [torch.library.Library(name, "FRAGMENT") for name in ("vllm", "vllm_ir")]
    library[0].define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    library[1].define(
        "rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor"
    )
    library[1].define(
        "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, "
        "int? variance_size=None) -> (Tensor, Tensor)"
    )

    def all_reduce(x, group_name):
        return x.clone()  # the other rank has zeros

    def rms_norm(x, weight, epsilon, variance_size=None):
        v32 = x.float()
        squares = v32[..., :variance_size].pow(2)
        normed = v32 * torch.rsqrt(squares.mean(-1, keepdim=True) + epsilon)
        return (normed if weight is None else normed.to(weight.dtype) * weight).to(x.dtype)

    def fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size=None):
        h = x + x_residual
        return rms_norm(h, weight, epsilon), h

    for one, function in (
        (library[0], all_reduce),
        (library[1], rms_norm),
        (library[1], fused_add_rms_norm),
    ):
        one.impl(function.__name__, function, "CompositeExplicitAutograd")
    yield torch.ops
    for one in library:
        one._destroy()
