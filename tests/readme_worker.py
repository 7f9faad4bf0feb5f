"""One of two ranks that run the lines of README.md's "Swap it" and "Compile it".

    python tests/readme_worker.py DIRECTORY      (started by cpu/test_readme.py)

What they stand on there (`model`, `layer`, `linear`, `x`) is a tiny one here. The results are
compared with what the model computes without those lines.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import checks
import torch
import torch.distributed as dist
from fusion_models import RMSNorm, in_place
from models_tools import BOUND, FP32, Rank, assert_within, logits_of
from torch import Tensor, nn

import gemma_ar_norm
from gemma_ar_norm import launcher

README = (Path(__file__).parents[1] / "README.md").read_text()
HIDDEN = 64


def blocks_of(heading: str) -> list[str]:
    """The indented blocks of a section."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n)+", section, re.M)]


def execute(lines: str, names: dict[str, Any]) -> str:
    """What they print."""
    names |= {"torch": torch, "gemma_ar_norm": gemma_ar_norm}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(lines, "<README.md>", "exec"), names)
    return printed.getvalue()


class Layer(nn.Module):
    """x = norm(residual + linear(x)), summed over the ranks, as README has it before the swap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())  # a row-parallel linear: other columns on each rank
        self.linear = nn.Linear(HIDDEN, HIDDEN, bias=False)
        generator = torch.Generator().manual_seed(0)
        self.norm = RMSNorm(torch.randn(HIDDEN, generator=generator))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + in_place(self.linear(x))
        return self.norm(residual), residual


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(5, HIDDEN), torch.randn(5, HIDDEN, generator=generator)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """The sum of two ranks is exact; a norm's sum of squares may have another order."""
    checks.assert_bit_equal(got[1], want[1], "residual_out")
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)


def fuse_a_model(lines: str, me: Rank) -> None:
    model = me.load("gemma3")
    before = logits_of(model, me.ids)
    printed = execute(lines, {"model": model})
    assert re.match(r"Gemma 3 on 2 ranks: .*\b4 sandwich\b", printed), printed
    assert_within(logits_of(model, me.ids), before, BOUND[FP32], "fuse")
    gemma_ar_norm.unfuse(model)  # as its comment says
    checks.assert_bit_equal(logits_of(model, me.ids), before, "unfuse")


def swap_a_norm(lines: str) -> None:
    layer = Layer()
    x, residual = inputs()
    want = layer(x, residual)
    names = {"layer": layer, "linear": layer.linear, "group": dist.group.WORLD}
    names |= {"x": x, "residual": residual}
    execute(lines, names)
    assert type(layer.norm) is gemma_ar_norm.FusedAllReduceGemmaRMSNorm
    assert_same((names["x"], names["residual"]), want)


def compile_a_model(lines: str) -> None:
    compiles, reports = lines.splitlines()
    names = {"model": Layer()}
    x, residual = inputs()
    want = names["model"](x, residual)
    gemma_ar_norm.fusion_report(clear=True)
    execute(compiles, names)
    assert_same(names["model"](x, residual), want)
    printed = execute(reports, names).splitlines()
    assert len(printed) == 1, printed
    assert re.fullmatch(r"graph 0, all_reduce: fused \(residual\) \[.*\]", printed[0]), printed


def main() -> None:
    rank, world, device = launcher.init_from_env()
    fuse_lines, swap_lines = blocks_of("Swap it")
    (compile_lines,) = blocks_of("Compile it")
    fuse_a_model(fuse_lines, Rank(rank, world, device, Path(sys.argv[1])))
    with torch.no_grad():
        swap_a_norm(swap_lines)
        compile_a_model(compile_lines)
    print("all three ran")
    gemma_ar_norm.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
