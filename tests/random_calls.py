"""Random calls of one rank, valid or not, for the CPU and the GPU. Needs hypothesis.

A recipe is plain data, so that hypothesis can print it and make it smaller. What it makes may be
wrong in up to two ways. Whether it is, is found out from the arguments themselves, in `is_valid`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import checks
import pytest
import torch
from bad_arguments import (
    BF16,
    ENTRIES,
    FP16,
    FP32,
    HUGE,
    INF,
    NAN,
    assert_in_words,
    resized,
    takes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_ar_norm import WorkspaceError, reference

MAX_FLOAT32 = 3.4028234663852886e38

GOOD = {
    "rows": ((3,), (1,), (0,), (), (2, 3), (2, 0)),
    "hidden": (8, 16, 264, 640),
    "dtype": (BF16, FP16, FP32),
    "x": ("plain", "strided", "shifted", "expanded", "negative", "parameter"),
    "weight": ("like x", "fp32", "strided", "shifted"),
    "residual": ("none", "like x", "strided", "shifted", "is x"),
    "post_weight": ("none", "like weight", "is weight"),
    "eps": (1e-6, 0.0, 0, 1, 0.25, 3e38, True),
    "weight_bias": (1.0, 0, -2.5, 3e38, -3.4028234663852886e38),
    "algorithm": ("auto", "unfused"),
    "out": ("none", "new", "is x", "is residual"),
}
WILD = {
    "rows": GOOD["rows"],
    "hidden": (4, 12, 0, 1, 16392, 16400),
    "dtype": (torch.float64, torch.int32, torch.complex64, torch.float8_e5m2),
    "x": ("list", "none", "scalar", "sparse", "emptied", "elsewhere"),
    "weight": ("none", "fp64", "fp16", "short", "rows", "elsewhere", "emptied"),
    "residual": ("int", "fp64", "fp16", "one row", "transposed", "elsewhere", "emptied"),
    "post_weight": ("int", "fp64", "fp32", "short", "elsewhere"),
    "eps": (NAN, INF, -1e-9, -INF, 1e39, "1e-6", None, HUGE, 1j),
    "weight_bias": (NAN, -INF, 3.5e38, "1", None, -HUGE),
    "algorithm": ("one_shot", "two_shot", "Auto", "", None, 1, "\0"),
    "out": ("one", "int", "none in it", "same", "part of x", "on weight", "shifted", "strided",
            "fp64", "flat", "elsewhere", "emptied", "negative", "x and x"),
}  # fmt: skip


@st.composite
def recipes(draw: Any) -> dict[str, Any]:
    recipe = {field: draw(st.sampled_from(values)) for field, values in GOOD.items()}
    for field in draw(st.lists(st.sampled_from(sorted(WILD)), max_size=2)):
        recipe[field] = draw(st.sampled_from(WILD[field]))
    return recipe


@dataclass
class Maker:
    """Makes the arguments of a recipe, from numbers that are fresh in each run."""

    recipe: dict[str, Any]
    device: str

    def values(self, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def formed(self, form: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """A tensor of such a form, or what is none."""
        other = "meta" if self.device == "cpu" else "cpu"
        if form in ("none", "list", "int"):
            return {"none": None, "list": [1.0], "int": 1}[form]
        if form == "scalar":
            return self.values(dtype=dtype)
        if form in ("fp64", "fp16", "fp32"):
            return self.values(*shape).to({"fp64": torch.float64, "fp16": FP16, "fp32": FP32}[form])
        if form == "strided":
            return self.values(*shape, 2, dtype=dtype)[..., 1]
        if form == "shifted":
            buffer = self.values(math.prod(shape) + 1, dtype=dtype)
            return buffer[1:].view(shape)
        if form == "expanded":
            return self.values(shape[-1], dtype=dtype).expand(shape)
        plain = self.values(*shape, dtype=dtype)
        if form == "negative" and dtype.is_floating_point and dtype.itemsize > 1:
            return torch._neg_view(plain)
        if form == "parameter":
            return torch.nn.Parameter(plain, requires_grad=False)
        if form == "sparse":
            return self.values(*shape).to_sparse()
        if form == "emptied":
            return resized(plain)
        if form == "elsewhere":
            return plain.to(other)
        return plain

    def arguments(self) -> dict[str, Any]:
        r, dtype, hidden = self.recipe, self.recipe["dtype"], self.recipe["hidden"]
        shape = (*r["rows"], hidden)
        x = self.formed(r["x"], shape, dtype)
        weight = self.formed(
            r["weight"],
            {"short": (max(hidden - 1, 0),), "rows": (1, hidden)}.get(r["weight"], (hidden,)),
            dtype,
        )
        residual_shape = {"one row": (1, hidden), "transposed": shape[::-1]}
        residual = self.formed(r["residual"], residual_shape.get(r["residual"], shape), dtype)
        if r["residual"] == "is x":
            residual = x
        post_dtype = weight.dtype if isinstance(weight, Tensor) else dtype
        post_shape = (max(hidden - 1, 0),) if r["post_weight"] == "short" else (hidden,)
        post_weight = self.formed(r["post_weight"], post_shape, post_dtype)
        if r["post_weight"] == "is weight":
            post_weight = weight
        made = {
            "x": x,
            "weight": weight,
            "residual": residual,
            "post_weight": post_weight,
            "eps": r["eps"],
            "weight_bias": r["weight_bias"],
            "algorithm": r["algorithm"],
        }
        self._add_out(made, shape, dtype)
        return made

    def _add_out(self, made: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        form = self.recipe["out"]
        new = self.formed("plain", shape, dtype)
        if form == "none":
            made["out"] = None
        elif form == "one":
            made["out"] = (new,)
        elif form == "int":
            made["out"] = 7
        elif form == "none in it":
            made["out"] = (new, None)
        elif form == "same":
            made["out"] = (new, new)
        elif form == "x and x":
            made["out"] = (made["x"], made["x"])
        elif form == "is x":
            made["out"] = (made["x"], new)
        elif form == "is residual":
            made["out"] = (new, made["residual"])
        elif form == "part of x":  # a pack further on in the same memory
            size, pack = math.prod(shape), max(1, 16 // dtype.itemsize)
            buffer = self.values(size + pack, dtype=dtype)
            made["x"] = buffer[:size].view(shape)
            made["out"] = (new, buffer[pack:].view(shape))
        elif form == "on weight":
            made["out"] = (new, new.clone())
            if dtype.is_floating_point and shape[-1] and math.prod(shape):
                made["weight"] = made["out"][1].view(-1, shape[-1])[0]
        elif form == "flat":
            made["out"] = (new.flatten(), new.clone())
        else:
            made["out"] = (self.formed(form, shape, dtype), new)


def is_valid(arguments: dict[str, Any], device: str) -> bool:
    """Whether the documents allow these arguments of one rank. Written anew, from the docstring."""
    x, weight = arguments["x"], arguments["weight"]
    residual, post_weight = arguments["residual"], arguments["post_weight"]

    def is_there(t: Any) -> bool:
        if not isinstance(t, Tensor) or t.layout is not torch.strided or t.device.type != device:
            return False
        return t.numel() == 0 or t.untyped_storage().nbytes() > 0

    def is_number(value: Any, lowest: float) -> bool:
        return isinstance(value, int | float) and lowest <= value and abs(value) <= MAX_FLOAT32

    if not is_there(x) or x.dtype not in (BF16, FP16, FP32) or x.dim() < 1:
        return False
    hidden = x.shape[-1]
    if not 0 < hidden <= 16384 or hidden * x.element_size() % 16:
        return False
    if not is_there(weight) or weight.dtype not in (x.dtype, FP32) or weight.shape != (hidden,):
        return False
    if residual is not None and not (
        is_there(residual) and residual.dtype == x.dtype and residual.shape == x.shape
    ):
        return False
    if post_weight is not None and not (
        residual is not None
        and is_there(post_weight)
        and post_weight.dtype == weight.dtype
        and post_weight.shape == (hidden,)
    ):
        return False
    if not is_number(arguments["eps"], 0) or not is_number(arguments["weight_bias"], -INF):
        return False
    # One rank on a GPU has no fused workspace; on the CPU an algorithm makes no difference.
    algorithms = ("auto", "unfused") + (("one_shot", "two_shot") if device == "cpu" else ())
    if arguments["algorithm"] not in algorithms:
        return False
    return arguments["out"] is None or _are_outputs(arguments["out"], arguments, is_there)


def _are_outputs(out: Any, arguments: dict[str, Any], is_there: Callable[[Any], bool]) -> bool:
    x = arguments["x"]
    if not isinstance(out, tuple) or len(out) != 2:
        return False
    for t in out:
        if not is_there(t) or t.dtype != x.dtype or t.shape != x.shape or not t.is_contiguous():
            return False
        if t.is_neg() or (t.numel() and t.data_ptr() % 16):
            return False
    if x.numel() == 0:
        return True

    def addresses(t: Tensor) -> range:
        reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return range(t.data_ptr(), t.data_ptr() + reach * t.element_size())

    def meet(a: Tensor, b: Tensor) -> bool:
        return max(addresses(a).start, addresses(b).start) < min(
            addresses(a).stop, addresses(b).stop
        )

    for t in out:
        for name in ("x", "residual"):
            other = arguments[name]
            if other is not None and meet(t, other):
                same = t.data_ptr() == other.data_ptr() and other.is_contiguous()
                if not same:
                    return False
        for name in ("weight", "post_weight"):
            if arguments[name] is not None and meet(t, arguments[name]):
                return False
    return not meet(*out)


def assert_random_call(recipe: dict[str, Any], device: str) -> bool:
    """A valid call has the bits of the reference, and an invalid one raises. Whether it was."""
    valid = None
    for entry in ENTRIES:
        arguments = Maker(recipe, device).arguments()
        valid = is_valid(arguments, device)
        given = {k: v for k, v in arguments.items() if not (k == "out" and v is None)}
        if entry == "add_rmsnorm":
            if given.pop("algorithm") != "auto" or not takes(entry, given):
                continue
        elif not takes(entry, given):
            continue
        if valid:
            want = expected(arguments)
            for got, one in zip(ENTRIES[entry](**given), want, strict=True):
                checks.assert_bit_equal(got, one, f"{entry}: {recipe}")
            continue
        errors = (TypeError, ValueError, WorkspaceError) if entry == "call" else Exception
        with pytest.raises(errors) as caught:
            ENTRIES[entry](**given)
        assert isinstance(caught.value, TypeError | ValueError | RuntimeError), repr(caught.value)
        if entry == "call":
            assert type(caught.value) in (TypeError, ValueError, WorkspaceError), repr(caught.value)
            assert_in_words(caught.value, *given.values())
    assert valid is not None
    return valid


def expected(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    plain = {
        name: None if arguments[name] is None else arguments[name].detach().clone().contiguous()
        for name in ("x", "weight", "residual", "post_weight")
    }
    return reference.fused_allreduce_gemma_rmsnorm(
        [plain["x"].resolve_neg()],
        plain["weight"],
        plain["residual"] if plain["residual"] is None else plain["residual"].resolve_neg(),
        post_weight=plain["post_weight"],
        eps=arguments["eps"],
        weight_bias=arguments["weight_bias"],
    )


def run(device: str, examples: int) -> Counter[bool]:
    """So many random calls; how many were valid, and how many not."""
    found: Counter[bool] = Counter()

    @settings(max_examples=examples, deadline=None, database=None)
    @given(recipe=recipes())
    def one(recipe: dict[str, Any]) -> None:
        found[assert_random_call(recipe, device)] += 1

    one()
    return found
