"""The pass that Inductor runs on each graph: finds what can be fused, and replaces it.

Its place is `post_grad_custom_pre_pass`: the graph is functional there, in-place collectives and
views of them are gone, and nothing of Inductor's own has been fused yet.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import re
from pathlib import Path
from typing import Any

import torch
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from . import fusion, fusion_match, fusion_norms
from .fusion_match import AllReduce, Match
from .fusion_norms import Left, Norms, value
from .library import _C

FUSED = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm.default

# Inductor tells passes of this class alone whether the graph is for inference; a pass of the user's
# may be one. Older torch does not have it.
_InferenceAware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
_Base: Any = _InferenceAware or CustomGraphPass

_graphs = itertools.count()


class FusionPass(_Base):
    """Fuses all-reduce, residual add and norm, after the passes that were there before."""

    def __init__(self, before: tuple[Any, ...] = ()) -> None:
        self.before = before

    def __call__(self, graph: Graph, is_inference: bool = True) -> None:
        for one in self.before:
            if _InferenceAware is not None and isinstance(one, _InferenceAware):
                one(graph, is_inference)
            else:
                one(graph)
        fuse(graph)

    def uuid(self) -> Any:
        """What Inductor's cache keys graphs by: our sources, vLLM's groups, the passes before ours.
        None, so no caching, where one of those has no name."""
        names = []
        for one in self.before:
            name = one.uuid() if isinstance(one, CustomGraphPass) else None
            if not name:
                return None
            names.append(name)
        # The graph has vLLM's name of a group, and what is compiled has the process group's.
        return (_source_hash(), tuple(sorted(fusion_match.vllm_group_names().items())), *names)


def after(users: Any) -> FusionPass:
    """Our pass, behind the user's: None, a pass, or a list of passes."""
    passes = tuple(users) if isinstance(users, list | tuple) else (users,) if users else ()
    for one in passes:
        if not callable(one):
            raise TypeError(
                f"{fusion.PASS_OPTION}: a pass, a list of passes or None is required; got "
                f"{type(one).__name__}; pass a CustomGraphPass"
            )
    if len(passes) == 1 and isinstance(passes[0], FusionPass):
        return passes[0]  # options that are made of our own
    return FusionPass(passes)


@functools.cache
def _source_hash() -> str:
    files = [Path(module.__file__ or "") for module in (fusion, fusion_match, fusion_norms)]
    digest = hashlib.sha256(_C.build_info()["version"].encode())
    for file in [*files, Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def fuse(graph: Graph) -> None:
    """Rewrites the graph, and notes what became of each all-reduce."""
    calls = list(fusion_match.all_reduces(graph))
    if not calls:
        return
    number, norms = next(_graphs), Norms(graph)
    for call in calls:
        name, where = call.name, _line_of(call)
        try:
            found = fusion_match.match(fusion_match.find(call), norms)
        except Left as left:
            fusion.note(fusion.FusionRecord(number, name, "", str(left), where))
            continue
        _replace(graph, found)
        fusion.note(fusion.FusionRecord(number, name, found.form, found.note, where))
    graph.lint()


def _replace(graph: Graph, found: Match) -> None:
    norm = found.norm
    with graph.inserting_after(found.after):
        x = _x_in_the_sum_s_shape(graph, found.all_reduce)
    with graph.inserting_after(x if x is not found.all_reduce.x else found.after):
        call = graph.call_function(
            FUSED,
            (
                x,
                norm.weight,
                found.residual,
                found.post_weight,
                norm.eps,
                norm.bias,
                found.all_reduce.group_name,
                "auto",
            ),
        )
    with graph.inserting_after(call):
        norm_out = graph.call_function(operator.getitem, (call, 0))
    with graph.inserting_after(norm_out):
        residual_out = graph.call_function(operator.getitem, (call, 1))
    rows = value(x)
    for node in (norm_out, residual_out):
        node.meta["val"] = rows.new_empty(rows.shape)
    call.meta["val"] = (norm_out.meta["val"], residual_out.meta["val"])
    for node in (call, norm_out, residual_out):
        if "stack_trace" in norm.out.meta:
            node.meta["stack_trace"] = norm.out.meta["stack_trace"]

    norm.out.replace_all_uses_with(norm_out)
    inside = {*found.dead, call}
    for node in found.sums:
        node.replace_all_uses_with(residual_out, delete_user_cb=lambda user: user not in inside)
    for node in sorted(set(found.dead), reverse=True):
        if not node.users:
            graph.erase_node(node)


def _x_in_the_sum_s_shape(graph: Graph, all_reduce: AllReduce) -> Node:
    """x, or a view of it where the sum is used in another shape only."""
    if all_reduce.view is None:
        return all_reduce.x
    view = graph.node_copy(all_reduce.view, lambda node: node)
    view.args = (all_reduce.x, *view.args[1:])
    return view


def _line_of(call: Node) -> str:
    """File and line of the model's code that the graph notes for the call: the last not torch's."""
    lines = re.findall(r'File "(.+?)", line (\d+)', call.meta.get("stack_trace") or "")
    torch_directory = str(Path(torch.__file__).parent)
    return ":".join(next((one for one in reversed(lines) if torch_directory not in one[0]), ()))
