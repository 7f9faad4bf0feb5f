"""What the tensor parallelism of transformers made of a module, and the module without its reduce.

From 5.17 on, transformers shards weights as DTensors and gives a module a `forward` of its own:

    args = style.transform_inputs_pre_forward(module, args, kwargs, mesh)
    with style.context_around_forward(module, mesh): output = original_forward(*args)
    return style.transform_output_post_forward(module, output, mesh)       # here it reduces

The style, the mesh and the original forward are found in that function's closure. `partial_forward`
is the same without the last step. transformers itself is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Style:
    """How transformers parallelised a module. style: its object; original: the forward before."""

    module: Any
    style: Any
    mesh: Any
    original: Callable[..., Any]

    @property
    def name(self) -> str:
        return type(self.style).__name__

    @property
    def group(self) -> Any:
        """The process group that it reduces over."""
        return self.mesh.get_group() if self.mesh.ndim == 1 else self.mesh.get_group("tp")


STEPS = ("transform_inputs_pre_forward", "context_around_forward", "transform_output_post_forward")


def style_of(module: Any) -> Style | None:
    """How transformers parallelised this module's forward; None where it did not. The style
    "replicate" (5.24) is none: that class is the base of all, and its steps do nothing."""
    style = wrapper_of(module)
    return None if style is None or style.name == "TensorParallelLayer" else style


def wrapper_of(module: Any) -> Style | None:
    """The style in whose steps transformers wrapped this module's forward, of any kind."""
    forward = module.__dict__.get("forward")
    code = getattr(forward, "__code__", None)
    if code is None or forward.__closure__ is None:
        return None
    held = dict(zip(code.co_freevars, forward.__closure__, strict=True))
    if not {"self", "mesh", "original_forward"} <= held.keys():
        return None
    style, mesh, original = (held[n].cell_contents for n in ("self", "mesh", "original_forward"))
    if not all(callable(getattr(style, step, None)) for step in STEPS):
        return None
    return Style(module, style, mesh, original)


def is_sharded(parameter: Any) -> bool:
    return isinstance(parameter, DTensor) and any(
        not placement.is_replicate() for placement in parameter.placements
    )


def is_whole(module: nn.Module) -> bool:
    """Whether every rank has all of this module's parameters, and runs it by itself."""
    return style_of(module) is None and not any(map(is_sharded, module.parameters()))


def row_parallel(linear: Any) -> tuple[Style | None, str]:
    """(style, "") of a linear whose output is a plain sum over ranks, else (None, why not)."""
    found = style_of(linear)
    if found is None or not is_sharded(getattr(linear, "weight", None)):
        return None, "not a linear that transformers made row-parallel"
    style, placements = found.style, tuple(linear.weight.placements)
    if not isinstance(linear, nn.Linear) or found.name != "RowwiseParallel":
        return None, f"{type(linear).__name__} made {found.name}, not a linear made RowwiseParallel"
    if not isinstance(style.output_layouts, Replicate) or not style.use_local_output:
        return None, f"its output becomes {style.output_layouts}, not a plain replicated tensor"
    if placements != (Shard(1),):
        return None, f"its weight is placed as {placements}, not sharded by columns"
    if getattr(linear, "bias", None) is not None:
        return None, "it has a bias, which is added between the all-reduce and the norm"
    if getattr(found.original, "__func__", None) is not nn.Linear.forward:
        return None, "somebody else replaced its forward"
    return found, ""


def reduced_experts(experts: Any) -> tuple[Style | None, str]:
    """(style, "") of a module of experts whose output is a plain sum over ranks, else why not."""
    found = style_of(experts)
    if found is None or found.name != "MoeExpertsParallel":
        return None, "its experts are not sharded by tensor parallelism"
    if not any(is_sharded(parameter) for parameter in experts.parameters()):
        return None, "its experts are whole on every rank"
    return found, ""


def reduced_embedding(embedding: Any) -> tuple[Style | None, str]:
    """(style, "") of an embedding whose rows are shared out over ranks, else why not."""
    found = style_of(embedding)
    if found is None or not is_sharded(getattr(embedding, "weight", None)):
        return None, ""
    placements = tuple(embedding.weight.placements)
    if not isinstance(embedding, nn.Embedding) or placements != (Shard(0),):
        return None, f"its weight is placed as {placements}, not sharded by rows"
    if found.name not in ("RowwiseParallel", "EmbeddingParallel"):
        return None, f"transformers made it {found.name}, which is not known here"
    if embedding.max_norm is not None or not found.style.use_local_output:
        return None, "it does more than look up"
    if first_row(embedding, found.mesh) is None:
        return None, "its rows are not shared out in equal chunks"
    return found, ""


def partial_forward(found: Style, site: Any) -> Callable[..., Any]:
    """The module's forward without its all-reduce: this rank's part of the sum. With it while
    `site.reduces` (fuse_forward.Site)."""
    module, style, mesh, original = found.module, found.style, found.mesh, found.original
    whole = module.__dict__["forward"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if site.reduces:
            return whole(*args, **kwargs)
        args, kwargs = style.transform_inputs_pre_forward(module, args, kwargs, mesh)
        with style.context_around_forward(module, mesh):
            return original(*args, **kwargs)

    return forward


def first_row(embedding: Any, mesh: Any) -> int | None:
    """The id of the first row that this rank has; None where they are not cut as torch.chunk does.

    Chunks of one size, the last ones shorter or empty.
    """
    rows = embedding.weight.shape[0]
    chunk = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * chunk, rows)
    return first if embedding.weight.to_local().shape[0] == min(chunk, rows - first) else None


def partial_embedding(found: Style) -> Callable[[Tensor], Tensor]:
    """The embedding of the ids whose rows this rank has, and zeros for the others.

    One rank has each row, so the sum over ranks is exact, also of what was scaled before.
    """
    embedding = found.module
    first = first_row(embedding, found.mesh)
    scale = getattr(embedding, "embed_scale", None)
    assert first is not None

    def forward(input_ids: Tensor) -> Tensor:
        rows = embedding.weight.to_local()
        local = input_ids - first
        elsewhere = (local < 0) | (local >= rows.shape[0])
        if rows.shape[0] == 0:
            found_rows = rows.new_zeros((*input_ids.shape, rows.shape[1]))
        else:
            found_rows = F.embedding(local.masked_fill(elsewhere, 0), rows)
            found_rows = found_rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return found_rows if scale is None else found_rows * scale.to(rows.dtype)

    return forward


def other_collectives(model: nn.Module, without: set[int]) -> list[tuple[str, str]]:
    """(module, style) of what communicates in this model's forward, but the modules in `without`.

    without: their ids. By transformers' styles; what a model calls itself is not seen.
    """
    left = []
    for name, module in model.named_modules():
        found = style_of(module)
        if found is None or id(module) in without:
            continue
        output = getattr(found.style, "output_layouts", None)
        quiet = found.name.startswith("Colwise") and isinstance(output, Shard)
        quiet = quiet or found.name in ("PackedColwiseParallel", "MoeIdentityParallel")
        if not quiet:
            left.append((name, found.name))
    return left
