"""README.md and docs/guide.md are true: their code runs, their names and numbers are the code's."""

from __future__ import annotations

import inspect
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import models_runs
import pytest
import torch

import gemma_ar_norm
from gemma_ar_norm import _C, launcher, plan

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs/guide.md").read_text()
BOTH = README + GUIDE
BLOCKS = re.findall(r"^```python\n(.*?)^```$", BOTH, re.MULTILINE | re.DOTALL)
PROGRAM = next(block for block in BLOCKS if "LOCAL_RANK" in block)
SNIPPETS = [block for block in BLOCKS if block != PROGRAM]


def tables() -> list[list[list[str]]]:
    """Every table: its lines, the first of which is the head, cell by cell."""
    found = re.findall(r"(?:^\|.*\|\n)+", BOTH, re.MULTILINE)
    rows = [[line.strip("| ").split(" | ") for line in table.splitlines()] for table in found]
    return [[table[0], *table[2:]] for table in rows]


def table_of(head: str) -> list[list[str]]:
    return next(table[1:] for table in tables() if head in table[0])


@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.splitlines()[0])
def test_snippets_run(block):
    names: dict = {"gemma_ar_norm": gemma_ar_norm}
    exec(compile(block, "README.md", "exec"), names)
    if "norm_out" in names:
        h = names["x"].float() + names["residual"].float()
        torch.testing.assert_close(names["residual_out"], h.bfloat16(), rtol=0, atol=0)
        norm = torch.nn.functional.rms_norm(h, (5376,), eps=1e-6)
        torch.testing.assert_close(names["norm_out"].float(), norm, rtol=2e-2, atol=1e-3)


def test_the_snippet_for_a_lost_peer_names_it(monkeypatch, capsys):
    def synchronize() -> None:
        raise gemma_ar_norm.PeerTimeoutError("why", 3, 17, 0)

    monkeypatch.setattr(gemma_ar_norm, "synchronize", synchronize)
    exec(next(b for b in SNIPPETS if "PeerTimeoutError" in b), {"gemma_ar_norm": gemma_ar_norm})
    assert capsys.readouterr().out == "rank 3 did not come to call 17: why\n"


def test_the_program_runs_as_it_is_said(tmp_path):
    """Two CPU ranks: 1 + 2 = 3, whose norm is 1, as is that of 0 + 1."""
    command = re.search(r"`torchrun (.*?layer\.py)`", README)
    assert command is not None
    check = "assert (x == 1).all() and (residual == 1).all(), (x, residual)\n"
    (tmp_path / "layer.py").write_text(PROGRAM + check)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *shlex.split(command[1])],
        cwd=tmp_path,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(gemma_ar_norm.__file__).parents[1]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("16 x 5376 bfloat16 on 2 rank(s): cpu") == 2, done.stdout[-4000:]


def test_the_lines_for_models_run(tmp_path):
    """Those under "Swap it" and "Compile it", on two CPU ranks and tiny models."""
    models_runs.need_transformers()
    tests = ROOT / "tests"
    result = launcher.run(
        [sys.executable, str(tests / "readme_worker.py"), str(tmp_path)],
        2,
        gpus=0,
        timeout_s=90,
        env={
            "PYTHONPATH": f"{tests}:{Path(gemma_ar_norm.__file__).parents[1]}",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # What comes from the cache is not in the report.
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        },
        show="nothing",
    )
    assert result.exit_code == 0, result.transcript()[-4000:]
    assert all("all three ran" in output for output in result.outputs)


def test_sizes_are_those_of_the_inbox():
    """Of a workspace on as many H100 as there are ranks."""
    for ranks, rows, hidden, dtype, size in table_of("max_rows"):
        row_bytes = int(hidden) * {"bf16": 2, "fp32": 4}[dtype]
        rules = plan.make_rules(
            ranks=int(ranks),
            multiprocessors=132,
            compute_capability=(9, 0),
            max_cluster=8,
            shared_device=False,
            one_gpu=False,
        )
        one_shot_rows = plan.most_one_shot_rows(rules, int(rows), row_bytes // 16)
        number = _C.inbox_bytes(int(ranks), one_shot_rows, int(rows), row_bytes)
        assert size == f"{number / 2**20:g} MiB", f"{ranks} ranks, {hidden} {dtype}"
        # By init's formula, give or take what makes areas round.
        one_shot = (int(ranks) - 1) * one_shot_rows * row_bytes
        two_shot = 2 * (int(ranks) - 1) * int(rows) * 512 * math.ceil(row_bytes / int(ranks) / 512)
        assert 0 <= number - 2 * max(one_shot, two_shot) < (2 << 20) + 16384


def described(function) -> list[tuple]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters]


def test_functions_and_their_defaults():
    """Of the table, and of the call's signature."""
    for cell, _ in table_of("name"):
        for call in re.findall(r"`(.*?)`", cell):
            name, arguments = re.fullmatch(r"(\w+)\((.*)\)", call).groups()
            parameters = inspect.signature(getattr(gemma_ar_norm, name)).parameters
            for argument in filter(None, arguments.split(", ")):
                parameter, _, default = argument.partition("=")
                assert parameter in parameters, call
                if default:
                    assert str(parameters[parameter].default) == default, call
    shown = re.search(r"norm_out, residual_out = (\w+)\(\n(.*?)\)\n", README, re.DOTALL)
    names = {}
    exec(f"def shown({shown[2]}): ...", names)
    assert described(names["shown"]) == described(getattr(gemma_ar_norm, shown[1]))


def test_commands_files_and_length():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    in_code = " ".join(re.findall(r"^ {4}.*|`[^`\n]+`", README, re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", in_code)) <= targets
    listed = README.split("lists the targets: ")[1].split(".")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) == targets - {"help", "FORCE"}
    for path in re.findall(r"`((?:bench|tests|gemma_ar_norm|docs)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text()
        assert len(text.splitlines()) <= 200, path
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path}: {link}"
