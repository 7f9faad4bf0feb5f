"""What `fuse` will do with a model, decided before anything is changed: which sums, which norms.

All checks of the model are here and in what this file calls; `Unknown` from any of them becomes the
ValueError that refuses the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import families, groups, modules, tensor_parallel
from .families import Family, ReadBlock, Unknown
from .fuse_forward import (
    WEIGHT_BIAS,
    Handoff,
    Site,
    Step,
    embedding_forward,
    layer_forward,
    norm_forward,
)
from .plan import PACK_BYTES
from .tensor_parallel import Style
from .workspace import DTYPES, MAX_HIDDEN


@dataclass(frozen=True)
class FusedSite:
    """One fused call of a model's forward.

    layer: its number, None for the embedding. form: "plain", "residual" or "sandwich".
    reduced: the modules that no longer reduce, by name; two where two all-reduces became one.
    weights: the norm's, after that of the norm before the residual add in a sandwich.
    """

    layer: int | None
    form: str
    reduced: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass
class Plan:
    """What is to become of one stack of layers. Making it changes nothing."""

    family: Family
    ranks: int
    sites: list[FusedSite]
    left: list[tuple[str, str]]
    forwards: list[tuple[Any, Callable[..., Any]]]
    no_longer_reducing: list[Any]


def make_plan(name: str, stack: Any, family: Family, group: Any) -> Plan:
    try:
        return _Planner(name, stack, family, group).plan()
    except Unknown as problem:
        version = getattr(sys.modules.get("transformers"), "__version__", "")
        raise ValueError(
            f"model: {family.name} as fuse() knows it is required; got {problem}, in "
            f"{type(stack).__name__} of transformers {version}; use a version named in "
            "docs/models.md, or add this one to gemma_ar_norm/families.py"
        ) from None


class _Planner:
    def __init__(self, name: str, stack: Any, family: Family, group: Any):
        self.prefix = f"{name}." if name else ""
        self.stack = stack
        self.family = family
        self.asked_group = group
        self.group: Any = None  # of the fused calls
        self.own_group: Any = None  # that the model itself reduces over
        self.ranks = 0
        self.sites: list[FusedSite] = []
        self.left: list[tuple[str, str]] = []
        self.forwards: list[tuple[Any, Callable[..., Any]]] = []
        self.no_longer_reducing: list[Any] = []

    def plan(self) -> Plan:
        stack, family = self.stack, self.family
        layers = list(stack.layers)
        # First all checks of the layers and norms, then the layers' forwards: each needs the next.
        layer_class = family.prefix + family.layer
        read: list[list[tuple[str, ReadBlock]]] = []
        for number, layer in enumerate(layers):
            self._require_class(f"layers.{number}", layer, layer_class)
            self._require_own_forward(f"layers.{number}", layer)
            read.append(families.check_layer(family, layer))
            for block in family.blocks:
                for norm in (block.norm, block.post_norm):
                    if norm is not None:
                        self._check_norm(f"layers.{number}.{norm}", getattr(layer, norm))
        self._check_norm("norm", stack.norm)

        if not layers:
            raise Unknown("a model without layers")
        in_order = [stack.embed_tokens, *layers, stack.norm]
        pairs = zip(in_order, in_order[1:])  # noqa: B905
        handoffs = [
            Handoff(giver, taker, exposed=giver is stack.embed_tokens) for giver, taker in pairs
        ]
        self._plan_embedding(layers[0], handoffs[0])
        for number, layer in enumerate(layers):
            following = layers[number + 1] if number + 1 < len(layers) else None
            self._plan_layer(number, layer, following, read[number], handoffs)
        final = norm_forward(stack.norm, handoffs[-1])
        self.forwards.append((stack.norm, final))
        return Plan(
            family, self.ranks, self.sites, self.left, self.forwards, self.no_longer_reducing
        )

    # ---- checks

    def _require_class(self, name: str, module: Any, wanted: str) -> None:
        if type(module).__name__ != wanted:
            raise Unknown(f"{self.prefix}{name} of the class {type(module).__name__}, not {wanted}")

    def _check_norm(self, name: str, norm: Any) -> None:
        self._require_class(name, norm, self.family.prefix + families.NORM)
        weight = getattr(norm, "weight", None)
        if tensor_parallel.style_of(norm) is not None or not isinstance(weight, Tensor):
            raise Unknown(f"{self.prefix}{name} parallelised too")
        if type(weight.data) is not Tensor:
            raise Unknown(f"the weight of {self.prefix}{name} as a {type(weight.data).__name__}")
        try:
            modules.read_norm(name, norm, WEIGHT_BIAS)
        except (TypeError, ValueError) as error:
            raise Unknown(f"a norm that is another: {error}") from None

    def _require_own_forward(self, name: str, module: Any) -> None:
        """That of its class, which was read; transformers' parallel ones are looked for before."""
        if "forward" in module.__dict__:
            raise Unknown(f"{self.prefix}{name} with a forward that somebody else replaced")

    def _why_not_by_kernel(self, dtype: torch.dtype, norms: list[Any]) -> str:
        """Why the fused call cannot have sums of this dtype and these norms, or ""."""
        hidden, pack = norms[0].weight.shape[0], PACK_BYTES // dtype.itemsize
        weights = {norm.weight.dtype for norm in norms}
        if dtype not in DTYPES:
            return f"it is {dtype}; bfloat16, float16 and float32 are fused"
        if hidden % pack or hidden > MAX_HIDDEN:
            return f"its hidden size is {hidden}, no multiple of {pack} up to {MAX_HIDDEN}"
        if len(weights) > 1 or not weights <= {dtype, torch.float32}:
            return f"its norms' weights are {', '.join(sorted(map(str, weights)))}, and it {dtype}"
        return ""

    def _use(self, found: Style) -> None:
        """Notes the group of a module that reduces: it must be the same for all."""
        try:
            group = found.group
        except KeyError:
            raise Unknown("a mesh of several dimensions, none of them named tp") from None
        if self.own_group is None:
            self.own_group = group
            ranks = dist.get_process_group_ranks(group)
            self.ranks = len(ranks)
            self.group = group if self.asked_group is None else self._checked_group(ranks)
        elif group is not self.own_group:
            raise Unknown("modules that reduce over different groups")

    def _checked_group(self, ranks: list[int]) -> Any:
        asked = groups.resolve(self.asked_group).process_group
        theirs = [] if asked is None else dist.get_process_group_ranks(asked)
        if theirs != ranks:
            raise ValueError(
                f"group: a process group of the model's own ranks, {ranks}, is required; got one "
                f"of {theirs}; leave group out"
            )
        return asked

    # ---- the parts

    def _plan_layer(
        self,
        number: int,
        layer: Any,
        following: Any,
        read: list[tuple[str, ReadBlock]],
        handoffs: list[Handoff],
    ) -> None:
        steps = []
        norms = [(f"layers.{number}.{b.norm}", getattr(layer, b.norm)) for _, b in read]
        if following is None:
            norms.append(("norm", self.stack.norm))
        else:
            first = self.family.blocks[0].norm
            norms.append((f"layers.{number + 1}.{first}", getattr(following, first)))
        for at, (mixer_name, block) in enumerate(read):
            name = f"layers.{number}.{mixer_name}"
            mixer = getattr(layer, mixer_name)
            post_norm = getattr(layer, block.post_norm) if block.post_norm else None
            next_name, next_norm = norms[at + 1]
            reducing, why = self._reducing(name, mixer_name, mixer)
            if reducing and post_norm is not None and post_norm.eps != next_norm.eps:
                reducing, why = [], f"its norms have two eps, {post_norm.eps} and {next_norm.eps}"
            if reducing:
                both = [one for one in (next_norm, post_norm) if one is not None]
                dtype = next(reducing[0][1].module.parameters()).dtype
                why = self._why_not_by_kernel(dtype, both)
                reducing = [] if why else reducing
            if reducing:
                weights: tuple[str, ...] = (f"{self.prefix}{next_name}.weight",)
                if block.post_norm:
                    weights = (f"{self.prefix}layers.{number}.{block.post_norm}.weight", *weights)
                self.sites.append(
                    FusedSite(
                        number,
                        "sandwich" if post_norm is not None else "residual",
                        tuple(n for n, _ in reducing),
                        weights,
                    )
                )
                watched = [mixer, next_norm, *(found.module for _, found in reducing)]
                watched += [getattr(mixer, "shared_expert", None), post_norm]
                site = Site(tuple(one for one in watched if one is not None))
                for _, found in reducing:
                    self._stop_reducing(found, tensor_parallel.partial_forward(found, site))
            else:
                site = None
                self.left.append((self.prefix + name, why))
            call = block.calls[mixer_name]
            dropout = layer.dropout if block.dropout else None
            steps.append(Step(mixer, call, post_norm, dropout, site))
        forward = layer_forward(
            type(layer).forward,
            steps,
            [norm for _, norm in norms],
            handoffs[number],
            handoffs[number + 1],
            self.group,
        )
        self.forwards.append((layer, forward))

    def _stop_reducing(self, found: Style, forward: Callable[..., Any]) -> None:
        self._use(found)
        self.forwards.append((found.module, forward))
        self.no_longer_reducing.append(found.module)

    def _reducing(
        self, name: str, mixer_name: str, mixer: Any
    ) -> tuple[list[tuple[str, Style]], str]:
        """The modules whose sum is what this mixer returns; or none, and why it has to be left."""
        linear = families.LINEARS.get(mixer_name)
        if linear is None:
            return [], "its output is gathered, not reduced"
        if hasattr(mixer, "experts"):
            return self._shared_expert_block(name, mixer)
        return self._one_linear(name, mixer, linear)

    def _one_linear(
        self, name: str, mixer: Any, linear: str
    ) -> tuple[list[tuple[str, Style]], str]:
        ends = families.MLP if linear == "down_proj" else families.ATTENTION
        class_name = type(mixer).__name__
        if not (class_name.startswith(self.family.prefix) and class_name.endswith(ends)):
            raise Unknown(f"{self.prefix}{name} of the class {class_name}")
        found, why = tensor_parallel.row_parallel(getattr(mixer, linear, None))
        if found is None:
            return [], f"{linear}: {why}"
        if not families.returns_output_of(type(mixer).forward, linear):
            raise Unknown(f"{self.prefix}{name} that does not return what its {linear} returns")
        if tensor_parallel.wrapper_of(mixer) is not None:
            return [], "it is parallelised as a whole"
        self._require_own_forward(name, mixer)
        return [(f"{self.prefix}{name}.{linear}", found)], ""

    def _shared_expert_block(self, name: str, mixer: Any) -> tuple[list[tuple[str, Style]], str]:
        """Experts and shared expert: their two sums become one, where the gates are not sharded."""
        if not hasattr(mixer, "shared_expert_gate"):
            return [], "something is done between its all-reduce and the residual add"
        if not families.has_body(type(mixer).forward, families.SHARED_EXPERT_BLOCK):
            raise Unknown(f"{self.prefix}{name} with another forward")
        if tensor_parallel.wrapper_of(mixer) is not None:
            return [], "it is parallelised as a whole"
        self._require_own_forward(name, mixer)
        self._require_own_forward(f"{name}.shared_expert", mixer.shared_expert)
        if not families.returns_output_of(type(mixer.shared_expert).forward, "down_proj"):
            raise Unknown(f"{self.prefix}{name}.shared_expert with another forward")
        for gate in ("gate", "shared_expert_gate"):
            if not tensor_parallel.is_whole(getattr(mixer, gate)):
                return [], f"its {gate} is not the same on every rank"
        experts, why = tensor_parallel.reduced_experts(mixer.experts)
        if experts is None:
            return [], why
        shared, why = tensor_parallel.row_parallel(mixer.shared_expert.down_proj)
        if shared is None:
            return [], f"shared_expert.down_proj: {why}"
        path = self.prefix + name
        return [(f"{path}.experts", experts), (f"{path}.shared_expert.down_proj", shared)], ""

    def _plan_embedding(self, first_layer: Any, handoff: Handoff) -> None:
        embedding = self.stack.embed_tokens
        found, why = tensor_parallel.reduced_embedding(embedding)
        name = f"{self.prefix}embed_tokens"
        if found is None:
            if why:
                self.left.append((name, why))
            return
        lookup = type(embedding).forward
        plain = lookup is nn.Embedding.forward
        if not plain and not families.has_body(lookup, families.SCALED_EMBEDDING):
            raise Unknown(f"{name} with another forward")
        norm_name = self.family.blocks[0].norm
        norm = getattr(first_layer, norm_name)
        why = self._why_not_by_kernel(embedding.weight.dtype, [norm])
        if why:
            self.left.append((name, why))
            return
        weight = f"{self.prefix}layers.0.{norm_name}.weight"
        self.sites.append(FusedSite(None, "plain", (name,), (weight,)))
        self._use(found)
        forward = embedding_forward(
            tensor_parallel.partial_embedding(found), norm, handoff, self.group
        )
        self.forwards.append((embedding, forward))
        self.no_longer_reducing.append(embedding)
