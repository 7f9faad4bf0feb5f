"""What the cases of `fuse` share: a rank, tiny models, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import models
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from gemma_ar_norm import fuse_forward, tensor_parallel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PROMPT = [[5, 9, 77, 31, 2, 64], [11, 3, 8, 100, 41, 7]]

# Bounds of |logits - unfused logits|, as parts of the largest logit; docs/models.md says what was
# seen. Where two sums become one in bfloat16, a router may choose another expert.
BOUND = {BF16: 0.03, FP16: 0.004, FP32: 2e-5}
BOUND_OF_EXPERTS = {BF16: 0.1, FP32: 2e-5}

Case = Callable[["Rank", str], None]
CASES: dict[str, Case] = {}
FAMILIES: dict[str, tuple[str, ...]] = {}  # of a case


def case_of(*families: str) -> Callable[[Case], Case]:
    """A case for these families alone: what the others have is like theirs, or takes too long."""

    def add(function: Case) -> Case:
        CASES[function.__name__], FAMILIES[function.__name__] = function, families
        return function

    return add


case = case_of(*models.TINY)


class Rank:
    def __init__(self, rank: int, world: int, device: torch.device, directory: Path):
        self.rank, self.world, self.device, self.directory = rank, world, device, directory
        self.ids = torch.tensor(PROMPT, device=device)

    def load(self, name: str, dtype: torch.dtype = FP32, **options: Any) -> Any:
        return models.load(name, self.directory, dtype, self.device, **options)


def stacks_of(model: Any, name: str) -> list[Any]:
    """What has layers and a norm; the last one is what makes the text."""
    return [model.get_submodule(path) for path in models.TINY[name].stacks]


def sharded_embeddings(model: Any, name: str) -> int:
    """How many of its embeddings are sharded, and so all-reduced. By transformers' own plan a tied
    one is, in 5.24 any; and there also where a plan of the test's does not name it."""
    reduced = tensor_parallel.reduced_embedding
    return sum(reduced(stack.embed_tokens)[0] is not None for stack in stacks_of(model, name))


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
