"""Arguments that the package must refuse: one table for the CPU and the GPU.

A line of CALLS says what is passed in place of a good argument, the exception of the public call,
and words of its message. tests/cpu/test_bad_arguments.py and tests/gpu/test_bad_arguments.py pass
each to the public call and to the raw ops, and then make the good call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import checks
import pytest
import torch
from torch import Tensor

import gemma_ar_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, HIDDEN = 4, 640
NAN, INF = math.nan, math.inf

NAMES = ("x", "weight", "residual", "post_weight", "norm_out", "residual_out")
FORMAT = re.compile(r"(rank \d+: )?\w+: [^;]+; got [^;]+; [^;]+")  # what is required; got; do
POINTER = re.compile(r"0x[0-9a-fA-F]{6,}")


class Given:
    """Good arguments of rank 0 on a device, and what bad ones are made of."""

    def __init__(self, device: str, ranks: int = 1) -> None:
        self.case = checks.make_case(ranks, ROWS, HIDDEN, BF16, device=device)
        self.x, self.weight, self.residual = self.case.xs[0], self.case.weight, self.case.residual
        self.device = self.x.device  # with its number
        self.other = "meta" if self.device.type == "cpu" else "cpu"
        self.buffer = self.t(8 * HIDDEN)
        self.good = {"x": self.x, "weight": self.weight, "residual": self.residual}

    def t(self, *shape: int, dtype: torch.dtype = BF16, device: Any = None) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=self.device if device is None else device)

    def like(self) -> Tensor:
        return self.t(ROWS, HIDDEN)

    def rows_at(self, first: int) -> Tensor:
        """A tensor like x in the buffer, from this element on."""
        return self.buffer[first : first + ROWS * HIDDEN].view(ROWS, HIDDEN)

    def on_another_gpu(self, t: Tensor) -> Tensor:
        if self.device.type != "cuda" or torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        return t.to(f"cuda:{torch.cuda.device_count() - 1 - self.device.index}")

    def cpu_only(self, t: Tensor) -> Tensor:
        if self.device.type != "cpu":
            pytest.skip("there is no such tensor on a GPU")
        return t


def resized(t: Tensor, bytes_: int = 0, *, own: bool = False) -> Tensor:
    """A tensor of its own whose storage was taken away, or a part of it."""
    t = t if own else t.clone()
    t.untyped_storage().resize_(bytes_)
    return t


class Bad(NamedTuple):
    change: Callable[[Given], dict[str, Any]]
    error: type[Exception]
    words: str  # a pattern of the public call's message; <device>, <other>: names of them
    # Who refuses it in the raw op: the "op" itself; or "torch", in words of its own.
    by: str = "op"


TORCH = "torch"
X_DTYPE = "x: bfloat16, float16 or float32 is required; got "
NO_TENSOR = "a Tensor is required; got "
DENSE = "a dense tensor is required; got "
STORAGE = "a storage of at least {} bytes is required; got one of "
EPS = "eps: a finite number, 0 or more, in the range of float32 is required; got "
BIAS = "weight_bias: a finite number in the range of float32 is required; got "
HUGE = 10**400  # has no float

CALLS = {
    # ---- x
    "x no tensor": Bad(lambda g: {"x": [1.0]}, TypeError, f"x: {NO_TENSOR}list", TORCH),
    "x None": Bad(lambda g: {"x": None}, TypeError, f"x: {NO_TENSOR}NoneType", TORCH),
    "x object": Bad(lambda g: {"x": object()}, TypeError, f"x: {NO_TENSOR}object", TORCH),
    "x coo": Bad(lambda g: {"x": g.x.to_sparse()}, TypeError, f"x: {DENSE}torch.sparse_coo", TORCH),
    "x csr": Bad(lambda g: {"x": g.x.float().to_sparse_csr()}, TypeError,
                 f"x: {DENSE}torch.sparse_csr", TORCH),
    "x mkldnn": Bad(lambda g: {"x": g.cpu_only(g.x).to_mkldnn()}, TypeError,
                    f"x: {DENSE}torch._mkldnn", TORCH),
    "x nested": Bad(lambda g: {"x": torch.nested.nested_tensor([g.t(1, 640), g.t(2, 640)])},
                    TypeError, f"x: {DENSE}a nested one", TORCH),
    "x jagged": Bad(lambda g: {"x": torch.nested.nested_tensor([g.t(1, 640), g.t(2, 640)],
                                                               layout=torch.jagged)},
                    TypeError, f"x: {DENSE}torch.jagged", TORCH),
    "x quantized": Bad(lambda g: {"x": torch.quantize_per_tensor(g.x.float(), 0.1, 0,
                                                                 torch.qint8)},
                       TypeError, f"{X_DTYPE}qint8", TORCH),
    "x double": Bad(lambda g: {"x": g.x.double()}, TypeError, f"{X_DTYPE}float64"),
    "x int": Bad(lambda g: {"x": g.x.int()}, TypeError, f"{X_DTYPE}int32"),
    "x bool": Bad(lambda g: {"x": g.x.bool()}, TypeError, f"{X_DTYPE}bool"),
    "x complex": Bad(lambda g: {"x": g.x + 0j}, TypeError, f"{X_DTYPE}complex"),
    "x float8": Bad(lambda g: {"x": g.x.to(torch.float8_e4m3fn)}, TypeError, f"{X_DTYPE}float8_e4"),
    "x no dimension": Bad(lambda g: {"x": g.t()}, ValueError,
                          r"x: a shape \[..., hidden\] is required"),
    "x elsewhere": Bad(lambda g: {"x": g.x.to(g.other)}, ValueError,
                       "residual: the device of x, <other>, is required; got <device>"),
    "x storage gone": Bad(lambda g: {"x": resized(g.x)}, ValueError,
                          f"x: {STORAGE.format(5120)}0, which was resized"),
    "x storage cut": Bad(lambda g: {"x": resized(g.x, 5119)}, ValueError,
                         f"x: {STORAGE.format(5120)}5119"),
    "x strided storage cut": Bad(lambda g: {"x": resized(g.t(640, 4).t(), 5118, own=True)},
                                 ValueError,
                                 f"x: {STORAGE.format(5120)}5118"),
    "x storage of a part": Bad(lambda g: {"x": resized(g.t(5, 640)[1:], 6399, own=True)},
                               ValueError,
                               f"x: {STORAGE.format(6400)}6399"),
    "hidden bf16": Bad(lambda g: {"x": g.t(4, 644)}, ValueError,
                       "x: .* multiple of 8 .bfloat16. from 8 to 16384.*644"),
    "hidden fp32": Bad(lambda g: {"x": g.t(4, 6, dtype=FP32)}, ValueError,
                       "x: .* multiple of 4 .float32. from 4.*got 6"),
    "hidden 0": Bad(lambda g: {"x": g.t(4, 0)}, ValueError, "x: .* 8 to 16384 is required; got 0"),
    "hidden large": Bad(lambda g: {"x": g.t(1, 16392)}, ValueError,
                        "x: .* got 16392; pad the rows"),
    "hidden huge": Bad(lambda g: {"x": g.t(1).expand(1 << 40)}, ValueError,
                       "x: .* got 1099511627776; pad the rows"),
    # ---- weight
    "weight no tensor": Bad(lambda g: {"weight": None}, TypeError, f"weight: {NO_TENSOR}NoneType",
                            TORCH),
    "weight sparse": Bad(lambda g: {"weight": g.weight.to_sparse()}, TypeError, f"weight: {DENSE}",
                         TORCH),
    "weight dtype": Bad(lambda g: {"weight": g.weight.half()}, TypeError,
                        r"weight: the dtype of x, or float32 \(bfloat16 or float32\).*got float16"),
    "weight dtype fp32": Bad(lambda g: {"x": g.x.float(), "residual": None}, TypeError,
                             r"weight: the dtype of x, or float32 \(float32\).*got bfloat16"),
    "weight rows": Bad(lambda g: {"weight": g.t(1, 640)}, ValueError,
                       r"weight: the shape \(640,\).*\(1, 640\)"),
    "weight number": Bad(lambda g: {"weight": g.t()}, ValueError,
                         r"weight: the shape \(640,\).*\(\)"),
    "weight short": Bad(lambda g: {"weight": g.t(639)}, ValueError,
                        r"weight: the shape \(640,\).*\(639,\)"),
    "weight of one": Bad(lambda g: {"weight": g.t(1)}, ValueError,
                         r"weight: the shape \(640,\).*\(1,\)"),
    "weight elsewhere": Bad(lambda g: {"weight": g.weight.to(g.other)}, ValueError,
                            "weight: the device of x, <device>, is required; got <other>"),
    "weight another GPU": Bad(lambda g: {"weight": g.on_another_gpu(g.weight)}, ValueError,
                              "weight: the device of x, <device>, is required; got cuda:"),
    "weight storage gone": Bad(lambda g: {"weight": resized(g.weight)}, ValueError,
                               f"weight: {STORAGE.format(1280)}0"),
    # ---- residual
    "residual no tensor": Bad(lambda g: {"residual": 1}, TypeError, f"residual: {NO_TENSOR}int",
                              TORCH),
    "residual nested": Bad(lambda g: {"residual": torch.nested.nested_tensor([g.t(1, 640)])},
                           TypeError, f"residual: {DENSE}a nested one", TORCH),
    "residual dtype": Bad(lambda g: {"residual": g.residual.float()}, TypeError,
                          "residual: the dtype of x, bfloat16, is required; got float32"),
    "residual one row": Bad(lambda g: {"residual": g.t(1, 640)}, ValueError,
                            r"residual: the shape of x, \(4, 640\).*\(1, 640\); residual is not b"),
    "residual reshaped": Bad(lambda g: {"residual": g.t(1, 4, 640)}, ValueError,
                             r"residual: the shape of x, \(4, 640\).*\(1, 4, 640\)"),
    "residual transposed": Bad(lambda g: {"residual": g.t(640, 4)}, ValueError,
                               r"residual: the shape of x, \(4, 640\).*\(640, 4\)"),
    "residual elsewhere": Bad(lambda g: {"residual": g.residual.to(g.other)}, ValueError,
                              "residual: the device of x, <device>, is required; got <other>"),
    "residual another GPU": Bad(lambda g: {"residual": g.on_another_gpu(g.residual)}, ValueError,
                                "residual: the device of x, <device>, is required; got cuda:"),
    "residual storage gone": Bad(lambda g: {"residual": resized(g.residual)}, ValueError,
                                 f"residual: {STORAGE.format(5120)}0"),
    # ---- post_weight
    "post_weight alone": Bad(lambda g: {"residual": None, "post_weight": g.weight}, ValueError,
                             "post_weight: a residual beside it is required; got residual=None"),
    "post_weight number": Bad(lambda g: {"post_weight": 1.0}, TypeError,
                              f"post_weight: {NO_TENSOR}float", TORCH),
    "post_weight dtype": Bad(lambda g: {"post_weight": g.weight.float()}, TypeError,
                             r"post_weight: the dtype of weight \(bfloat16\).*got float32"),
    "post_weight shape": Bad(lambda g: {"post_weight": g.t(8)}, ValueError,
                             r"post_weight: the shape \(640,\)"),
    "post_weight elsewhere": Bad(lambda g: {"post_weight": g.weight.to(g.other)}, ValueError,
                                 "post_weight: the device of x, <device>, is .*; got <other>"),
    "post_weight storage gone": Bad(lambda g: {"post_weight": resized(g.weight)}, ValueError,
                                    f"post_weight: {STORAGE.format(1280)}0"),
    # ---- numbers
    "eps str": Bad(lambda g: {"eps": "1e-6"}, TypeError, "eps: a float .*got str", TORCH),
    "eps None": Bad(lambda g: {"eps": None}, TypeError, "eps: a float .*got NoneType", TORCH),
    "eps tensor": Bad(lambda g: {"eps": g.t(4)}, TypeError, "eps: a float .*got Tensor", TORCH),
    "eps complex": Bad(lambda g: {"eps": 1e-6j}, TypeError, "eps: a float .*got complex", TORCH),
    "eps object": Bad(lambda g: {"eps": object()}, TypeError, "eps: a float .*got object", TORCH),
    "eps negative": Bad(lambda g: {"eps": -1e-6}, ValueError, f"{EPS}-1e-06"),
    "eps nan": Bad(lambda g: {"eps": NAN}, ValueError, f"{EPS}nan"),
    "eps inf": Bad(lambda g: {"eps": INF}, ValueError, f"{EPS}inf"),
    "eps -inf": Bad(lambda g: {"eps": -INF}, ValueError, f"{EPS}-inf"),
    "eps no float32": Bad(lambda g: {"eps": 1e39}, ValueError, rf"{EPS}1e\+39"),
    "eps double": Bad(lambda g: {"eps": 1e308}, ValueError, rf"{EPS}1e\+308"),
    "eps no float": Bad(lambda g: {"eps": HUGE}, ValueError, f"{EPS}an int of 1329 bits", TORCH),
    "bias nan": Bad(lambda g: {"weight_bias": NAN}, ValueError, f"{BIAS}nan"),
    "bias inf": Bad(lambda g: {"weight_bias": INF}, ValueError, f"{BIAS}inf"),
    "bias no float32": Bad(lambda g: {"weight_bias": -1e39}, ValueError, rf"{BIAS}-1e\+39"),
    "bias no float": Bad(lambda g: {"weight_bias": -HUGE}, ValueError, f"{BIAS}an int of", TORCH),
    "bias None": Bad(lambda g: {"weight_bias": None}, TypeError, "weight_bias: a float .*NoneType",
                     TORCH),
    # ---- algorithm, group
    "algorithm": Bad(lambda g: {"algorithm": "best"}, ValueError,
                     "algorithm: one of auto, one_shot.*got 'best'"),
    "algorithm empty": Bad(lambda g: {"algorithm": ""}, ValueError, "algorithm: one of .*got ''"),
    "algorithm NUL": Bad(lambda g: {"algorithm": "auto\0"}, ValueError, "algorithm: one of "),
    "algorithm surrogate": Bad(lambda g: {"algorithm": "\udc80"}, ValueError,
                               "algorithm: one of", TORCH),
    "algorithm type": Bad(lambda g: {"algorithm": 1}, TypeError,
                          "algorithm: a str is required; got int", TORCH),
    "group number": Bad(lambda g: {"group": 1.0}, TypeError,
                        "group: None, a ProcessGroup,.*got float", TORCH),
    "group bytes": Bad(lambda g: {"group": b"nobody"}, TypeError, "group: None, .*bytes", TORCH),
    "group object": Bad(lambda g: {"group": object()}, TypeError, "group: None, .*object", TORCH),
    "group name": Bad(lambda g: {"group": "nobody"}, ValueError,
                      "group: the name of a live.*got 'nobody'"),
    "group NUL": Bad(lambda g: {"group": "\0nobody"}, ValueError, "group: the name of a live.*x00"),
    "group not ASCII": Bad(lambda g: {"group": "gr\u00fcp"}, ValueError, "group: the name of a li"),
    "group surrogate": Bad(lambda g: {"group": "\udc80"}, ValueError, "group: the name of a live",
                           TORCH),
    "group gone": Bad(lambda g: {"group": "gemma_ar_norm.local.0.99"}, ValueError,
                      "group: the name of a live process group or local group"),
    # ---- out
    "out number": Bad(lambda g: {"out": 3}, TypeError, "out: two tensors are required; got int"),
    "out no pair": Bad(lambda g: {"out": g.like()}, TypeError, "out: two tensors .*got Tensor"),
    "out dict": Bad(lambda g: {"out": {"a": g.like(), "b": g.like()}}, TypeError,
                    "out: two tensors are required; got dict"),
    "out one": Bad(lambda g: {"out": (g.like(),)}, TypeError, "out: two tensors .*got 1 of them"),
    "out three": Bad(lambda g: {"out": (g.like(), g.like(), g.like())}, TypeError,
                     "out: two tensors are required; got 3 of them"),
    "out None": Bad(lambda g: {"out": (None, g.like())}, TypeError, f"norm_out: {NO_TENSOR}NoneT",
                    TORCH),
    "out dtype": Bad(lambda g: {"out": (g.like(), g.like().float())}, TypeError,
                     "residual_out: the dtype of x, bfloat16"),
    "out shape": Bad(lambda g: {"out": (g.t(640), g.like())}, ValueError,
                     r"norm_out: the shape of x, \(4, 640\)"),
    "out to be resized": Bad(lambda g: {"out": (g.like(), g.t(0))}, ValueError,
                             r"residual_out: the shape of x, \(4, 640\).*got \(0,\)"),
    "out elsewhere": Bad(lambda g: {"out": (g.like(), g.like().to(g.other))}, ValueError,
                         "residual_out: the device of x, <device>, is required; got <other>"),
    "out strided": Bad(lambda g: {"out": (g.like(), g.t(640, 4).t())}, ValueError,
                       r"residual_out: a contiguous tensor is required; got strides \(1, 4\)"),
    "out expanded": Bad(lambda g: {"out": (g.t(1, 640).expand(4, 640), g.like())}, ValueError,
                        r"norm_out: a contiguous tensor is required; got strides \(0, 1\)"),
    "out negative": Bad(lambda g: {"out": (torch._neg_view(g.like()), g.like())}, ValueError,
                        "norm_out: a tensor that holds its values is required"),
    "out misaligned": Bad(lambda g: {"out": (g.rows_at(1), g.like())}, ValueError,
                          "norm_out: an address that is a multiple of 16 is required; got one 2 "),
    "out storage gone": Bad(lambda g: {"out": (g.like(), resized(g.like()))}, ValueError,
                            f"residual_out: {STORAGE.format(5120)}0"),
    "out each other": Bad(lambda g: {"out": (g.rows_at(0), g.rows_at(8))}, ValueError,
                          "out: norm_out and residual_out in memory of their own"),
    "out the same": Bad(lambda g: {"out": (g.rows_at(0), g.rows_at(0))}, ValueError,
                        "out: norm_out and residual_out in memory of their own"),
    "out on a part of x": Bad(lambda g: {"x": g.rows_at(0), "out": (g.rows_at(8), g.like())},
                              ValueError, "norm_out: memory apart from x's, or exactly x"),
    "out on a part of residual": Bad(lambda g: {"residual": g.rows_at(0),
                                                "out": (g.like(), g.rows_at(640))},
                                     ValueError, "residual_out: memory apart from residual's, or"),
    "out on weight": Bad(lambda g: {"weight": g.buffer[:640], "out": (g.like(), g.rows_at(0))},
                         ValueError, "residual_out: memory apart from weight's"),
    "out on post_weight": Bad(lambda g: {"post_weight": g.buffer[640:1280],
                                         "out": (g.rows_at(0), g.like())},
                              ValueError, "norm_out: memory apart from post_weight's"),
}  # fmt: skip


def label(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 1 << 128:
        return "huge" if value > 0 else "-huge"
    if isinstance(value, str):
        return ascii(value[:9])
    return str(value) if isinstance(value, int | float | torch.device) else type(value).__name__


class BadUse(NamedTuple):
    """Of the functions beside the call: wrong before any GPU or other rank is looked at."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    error: type[Exception]
    words: str


def uses() -> dict[str, BadUse]:
    init, local_group, explain = (
        gemma_ar_norm.init,
        gemma_ar_norm.local_group,
        gemma_ar_norm.explain,
    )
    by_group = (gemma_ar_norm.check, gemma_ar_norm.synchronize, gemma_ar_norm.close)
    huge = 10**5000  # more digits than Python prints
    no_group = "group: None, a ProcessGroup, a rank of a local_group or a group's name .*; got "
    sizes = {
        "hidden_size odd": ({"hidden_size": 100}, ValueError,
                            "hidden_size: a multiple of 8 from 8 to 16384.*got 100"),
        "hidden_size large": ({"hidden_size": 16392}, ValueError, "hidden_size: .* got 16392"),
        "hidden_size negative": ({"hidden_size": -8}, ValueError, "hidden_size: .* got -8"),
        "hidden_size huge": ({"hidden_size": huge}, ValueError, "hidden_size: .* int of 16610 b"),
        "hidden_size float": ({"hidden_size": 8192.0}, TypeError,
                              "hidden_size: an int is required; got float"),
        "max_rows 0": ({"max_rows": 0}, ValueError, "max_rows: from 1 to .* got 0"),
        "max_rows negative": ({"max_rows": -1}, ValueError, "max_rows: from 1 to .* got -1"),
        "max_rows large": ({"max_rows": (1 << 27) + 1}, ValueError, "max_rows: .* got 134217729"),
        "max_rows huge": ({"max_rows": huge}, ValueError, "max_rows: from 1 to .* got an int of"),
        "max_rows bool": ({"max_rows": True}, TypeError, "max_rows: an int is required; got bool"),
        "dtype other": ({"dtype": torch.float64}, TypeError,
                        "dtype: bfloat16, float16 or float32.*got float64"),
        "dtype str": ({"dtype": "bf16"}, TypeError, "dtype: a torch.dtype is required; got str"),
        "dtype object": ({"dtype": object()}, TypeError, "dtype: a torch.dtype .*got object"),
        "timeout_s 0": ({"timeout_s": 0}, ValueError,
                        "timeout_s: more than 0 and at most 86400 .*got 0"),
        "timeout_s negative": ({"timeout_s": -1.0}, ValueError, "timeout_s: .* got -1.0"),
        "timeout_s inf": ({"timeout_s": INF}, ValueError, "timeout_s: .* got inf"),
        "timeout_s nan": ({"timeout_s": NAN}, ValueError, "timeout_s: .* got nan"),
        "timeout_s huge": ({"timeout_s": huge}, ValueError, "timeout_s: .* got an int of 16610 b"),
        "timeout_s str": ({"timeout_s": "30"}, TypeError,
                          "timeout_s: a number is required; got str"),
        "timeout_s object": ({"timeout_s": object()}, TypeError, "timeout_s: a number .*got obje"),
    }  # fmt: skip
    table = {}
    for name, (options, error, words) in sizes.items():
        table[f"init: {name}"] = BadUse(init, (), options, error, words)
        table[f"local_group: {name}"] = BadUse(local_group, (2,), options, error, words)
    for function in (*by_group, init, lambda group: explain(1, 640, group=group)):
        name = getattr(function, "__name__", "").replace("<lambda>", "explain")
        for group in (3, b"nobody", object(), torch.ones(2)):
            kind = type(group).__name__
            table[f"{name}: group {kind}"] = BadUse(
                function, (group,), {}, TypeError, no_group + kind
            )
        if function not in by_group:
            for group in ("nobody", "\0", "\udc80", "x" * 100_000):
                table[f"{name}: group {label(group)}"] = BadUse(
                    function, (group,), {}, ValueError, "group: the name of a live process group"
                )

    def add(name: str, function, arguments, options, error, words) -> None:
        table[name] = BadUse(function, arguments, options, error, words)

    for n, error in (
        (1, ValueError),
        (9, ValueError),
        (-2, ValueError),
        (huge, ValueError),
        (2.0, TypeError),
        (True, TypeError),
        ("2", TypeError),
        (None, TypeError),
    ):
        add(f"local_group: n {label(n)}", local_group, (n,), {}, error, r"^n: ")
    for device in (
        "nonsense",
        "cpu",
        "mps",
        "meta",
        "cuda:-1",
        "cuda:x",
        -1,
        1 << 40,
        huge,
        1.5,
        True,
        object(),
        torch.device("cpu"),
    ):
        add(
            f"local_group: device {label(device)}",
            local_group,
            (2,),
            {"device": device},
            ValueError,
            "device: a CUDA device",
        )
    for device in ("nonsense", "mps", "meta", "cuda:x", -1, huge, 1.5, object()):
        add(
            f"explain: device {label(device)}",
            explain,
            (1, 640),
            {"device": device},
            ValueError,
            "device: a CUDA device or the CPU is required",
        )
    for index, name in enumerate(("rows", "hidden_size")):
        for value, error in (
            (-1, ValueError),
            (1 << 62, ValueError),
            (huge, ValueError),
            (-huge, ValueError),
            (2.0, TypeError),
            (True, TypeError),
            (None, TypeError),
            ("8", TypeError),
            (object(), TypeError),
        ):
            arguments = [4, 640]
            arguments[index] = value
            add(
                f"explain: {name} {label(value)}",
                explain,
                tuple(arguments),
                {},
                error,
                f"^{name}: an int ",
            )
    add("explain: hidden_size odd", explain, (4, 5377), {}, ValueError, "^x: a last dimension")
    add("explain: hidden_size 0", explain, (4, 0), {}, ValueError, "^x: .* got 0; pad the rows")
    add("explain: dtype str", explain, (4, 640, "bf16"), {}, TypeError, "dtype: a torch.dtype")
    add("explain: dtype other", explain, (4, 640, torch.int8), {}, TypeError, "dtype: .*got int8")
    add(
        "explain: algorithm",
        explain,
        (4, 640),
        {"algorithm": "best"},
        ValueError,
        "algorithm: one of",
    )
    add(
        "explain: algorithm type",
        explain,
        (4, 640),
        {"algorithm": 1},
        TypeError,
        "algorithm: a str is required",
    )
    return table  # fmt: skip


# -------------------------------------------------------------------------- the entries to the op


def call(**arguments: Any) -> tuple[Tensor, Tensor]:
    return gemma_ar_norm.fused_allreduce_gemma_rmsnorm(**arguments)


def op(group="", algorithm="auto", out=None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The raw op, `.out` where there is an out."""
    raw = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm
    name = getattr(group, "group_name", group)
    positional = (*_positional(**arguments), name, algorithm)
    if out is None:
        return raw.default(*positional)
    raw.out(*positional, norm_out=out[0], residual_out=out[1])
    return out


def add_rmsnorm(out=None, **arguments: Any) -> tuple[Tensor, Tensor]:
    if out is None:
        x = arguments["x"]
        is_plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided
        if is_plain and not x.is_nested and x.numel() < 1 << 20:
            out = tuple(x.detach().new_full(x.shape, 77) for _ in range(2))
        else:
            out = (x, x)
    torch.ops.gemma_ar_norm.add_rmsnorm.out(
        *_positional(**arguments), norm_out=out[0], residual_out=out[1]
    )
    return out


def _positional(x, weight, residual=None, post_weight=None, eps=1e-6, weight_bias=1.0):
    return x, weight, residual, post_weight, eps, weight_bias


ENTRIES = {"call": call, "op": op, "add_rmsnorm": add_rmsnorm}


def takes(entry: str, arguments: dict[str, Any]) -> bool:
    """Whether such arguments can be passed to this entry at all."""
    if entry == "call":
        return True
    out = arguments.get("out")
    return out is None or (isinstance(out, tuple) and len(out) == 2)


def lines(*entries: str) -> list[tuple[str, str]]:
    """(name, entry) of each line of the table that these entries can be given."""
    no_pair = ("out number", "out no pair", "out dict", "out one", "out three")
    return [
        (name, entry)
        for name in CALLS
        for entry in entries
        if entry == "call" or name not in no_pair
        if entry != "add_rmsnorm" or not name.startswith(("group", "algorithm"))
    ]


# ------------------------------------------------------------------------------------------ checks


def assert_in_words(error: BaseException, *tensors: Any) -> None:
    """The message says what is required, what was got, what to do; and no address."""
    text = str(error)
    assert FORMAT.fullmatch(text), f"what is required; got; do: {text!r}"
    assert len(text) < 1000 or "x" * 1000 in text, text[:1000]
    assert_no_pointers(text, *tensors)


def assert_no_pointers(text: str, *tensors: Any) -> None:
    assert not POINTER.search(text), text
    for one in tensors:
        for t in one if isinstance(one, tuple | list) else (one,):
            if isinstance(t, Tensor) and t.layout is torch.strided and not t.is_nested:
                if t.device.type == "meta" or t.untyped_storage().nbytes() == 0 or not t.numel():
                    continue
                for address in (t.data_ptr(), t.untyped_storage().data_ptr()):
                    assert str(address) not in text, text
                    assert f"{address:x}" not in text, text


def assert_refused(given: Given, name: str, entry: str, **always: Any) -> None:
    """The bad call raises what the table says, and writes nothing. always: for each call."""
    bad = CALLS[name]
    changes = bad.change(given)
    arguments = {**given.good, **always, **changes}
    before = given.buffer.clone()
    with pytest.raises(Exception) as caught:  # noqa: PT011 which, and its words: below
        ENTRIES[entry](**arguments)
    error, text = caught.value, str(caught.value)
    checks.assert_bit_equal(given.buffer, before, f"{name}: the refused call wrote")
    if entry != "call" and bad.by == TORCH:
        assert isinstance(error, RuntimeError | TypeError | ValueError), repr(error)
        assert text.strip()
        return
    assert_in_words(error, *arguments.values())
    words = bad.words.replace("<device>", str(given.device)).replace("<other>", given.other)
    if entry != "call" and given.device.type == "cuda":  # C++ says less
        assert type(error) in (RuntimeError, bad.error), repr(error)
        assert text.split(":")[0] in (*changes, *NAMES, "out"), text
        assert "group" not in changes or re.search(words, text), text
    else:
        assert type(error) is bad.error, repr(error)
        assert re.search(words, text), f"{words!r} is not in {text!r}"


def assert_refuses(use: BadUse) -> None:
    """One of `uses()`."""
    with pytest.raises(use.error) as caught:
        use.function(*use.arguments, **use.options)
    assert type(caught.value) is use.error
    assert re.search(use.words, str(caught.value).removeprefix("rank 0: ")), str(caught.value)
    assert_in_words(caught.value, *use.arguments, *use.options.values())


def assert_right(outputs: tuple[Tensor, Tensor], case: checks.Case, what: object = "") -> None:
    for got, want in zip(outputs, case.expected(), strict=True):
        checks.assert_bit_equal(got, want, f"{what}: {case}")
