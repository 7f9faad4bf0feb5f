"""The demo: what it prints, and that it fails when anything is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import gemma_ar_norm
from gemma_ar_norm import demo, launcher, reference

ENV = {
    **os.environ,
    "PYTHONPATH": str(Path(gemma_ar_norm.__file__).parents[1]),
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Also where there are GPUs."""
    monkeypatch.setattr(launcher, "gpu_count", lambda: 0)
    monkeypatch.delenv("RANK", raising=False)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gemma_ar_norm", *arguments]


def test_two_cpu_ranks(tmp_path):
    file = tmp_path / "report.json"
    demo_run = subprocess.run(
        command("--ranks", "2", "--rows", "1", "5", "--json", str(file)),
        env=ENV,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert demo_run.returncode == 0, demo_run.stdout + demo_run.stderr

    report = json.loads(file.read_text())
    assert report["ranks"] == 2
    assert report["placement"] == "2 CPU processes"
    assert report["failed"] is False
    shapes = [(r["model"], r["form"], r["hidden"], r["rows"]) for r in report["rows"]]
    assert shapes == [
        ("Gemma 3 27B", "sandwich", 5376, 1),
        ("Gemma 3 27B", "sandwich", 5376, 5),
        ("Qwen3.5-397B", "residual", 4096, 1),
        ("Qwen3.5-397B", "residual", 4096, 5),
    ]
    for row in report["rows"]:
        assert row["failures"] == []
        assert row["path"] == "cpu"
        assert 0.3 < row["norm_ulps"] <= 0.51
        assert 0.3 < row["residual_ulps"] <= demo.MAX_RESIDUAL_ULPS
        assert 1e-4 < row["relative"] < demo.MAX_RELATIVE_ERROR
        assert row["fused_us"] > 0
        assert row["unfused_us"] > 0

    lines = demo_run.stdout.splitlines()
    assert lines[0].startswith(f"gemma_ar_norm {gemma_ar_norm.__version__}")
    assert lines[1].startswith(f"CPU; torch {torch.__version__}; 20")
    assert "2 CPU processes" in lines[2]
    assert sum(line.endswith("  ok") for line in lines) == 4
    assert "they say nothing about GPUs" in lines[-1]
    assert demo_run.stdout == demo.table(report) + "\n"


# The demo with a fused call that is changed on rank 1; the rest of it is untouched.
PLANT = """
import os, sys
import gemma_ar_norm
from gemma_ar_norm import demo

right = gemma_ar_norm.fused_allreduce_gemma_rmsnorm

def wrong(x, *rest, **options):
    norm_out, residual_out = right(x, *rest, **options)
    if os.environ["RANK"] == "1":
{plants}
    return norm_out, residual_out

gemma_ar_norm.fused_allreduce_gemma_rmsnorm = wrong
sys.exit(demo.main(sys.argv[1:]))
"""


def planted(file: Path, *plants: str) -> list[str]:
    """The command of a rank, with these statements in calls of 1 row, of 2, ..."""
    lines = [f"        if len(x) == {rows}: {plant}" for rows, plant in enumerate(plants, 1)]
    file.write_text(PLANT.format(plants="\n".join(lines)))
    return [sys.executable, str(file), "--worker"]


# A wrong result, and what the demo says of it.
WRONG = {
    "norm_out[-1, -1] *= 1.5": ("norm_out has other bits than reference.py", "norm_ulps is"),
    "residual_out[0, 7] += 1": ("residual_out has other bits", "residual_ulps is"),
    "norm_out[0, 0] = float('nan')": ("norm_out has other bits", "norm_ulps is nan"),
    "norm_out.mul_(1.01)": ("relative is", "norm_ulps is"),
    "pass": (),
}


def test_wrong_results_fail(tmp_path, capsys):
    """Each in calls of another number of rows, so that they take one run."""
    numbers = [str(rows) for rows in range(1, len(WRONG) + 1)]
    code = demo.main(
        ["--ranks", "2", "--rows", *numbers, "--timeout", "100"],
        worker=planted(tmp_path / "planted.py", *WRONG),
    )
    printed = capsys.readouterr().out
    assert code == 1
    for rows, words in zip(numbers, WRONG.values(), strict=True):
        start = f"FAILED: Gemma 3 27B, {rows} row"
        lines = [line for line in printed.splitlines() if line.startswith(start)]
        assert any("ranks have different bits" in line for line in lines) == bool(words), printed
        for part in words:
            assert any(f"rank 1: {part}" in line for line in lines), printed
        assert not any("rank 0" in line and "reference.py" in line for line in lines)


def test_a_rank_that_dies_fails(tmp_path, capsys):
    code = demo.main(
        ["--ranks", "2", "--rows", "1"], worker=planted(tmp_path / "planted.py", "os._exit(9)")
    )
    printed = capsys.readouterr()
    assert code != 0
    assert "ended with" in printed.err
    assert "ok" not in printed.out.split()


def test_a_hang_fails(tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text("an older report")
    sleep = textwrap.dedent("import time; print('waiting', flush=True); time.sleep(60)")
    code = demo.main(
        ["--ranks", "2", "--timeout", "1.5", "--json", str(file)],
        worker=[sys.executable, "-c", sleep],
    )
    printed = capsys.readouterr()
    assert code == launcher.EXIT_TIMEOUT
    assert "[rank 1] waiting" in printed.out
    assert "still running: ranks 0, 1" in printed.err
    assert not file.exists()


def test_started_by_something_else(tmp_path):
    """As by torchrun: each process is a rank, and rank 0 prints the table."""
    file = tmp_path / "report.json"
    result = launcher.run(
        command("--rows", "2", "--json", str(file)),
        2,
        timeout_s=100,
        gpus=0,
        env={"PYTHONPATH": ENV["PYTHONPATH"]},
        show="nothing",
    )
    assert result.exit_code == 0, result.transcript()
    assert demo.table(json.loads(file.read_text())) in result.outputs[0]
    assert "Qwen3.5-397B" not in result.outputs[1]


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 4), (2, 2), (7, 7), (8, 8), (16, 8)])
def test_default_ranks(gpus, ranks):
    assert demo.default_ranks(gpus) == ranks


@pytest.mark.parametrize("model", demo.MODELS, ids=lambda model: model.form)
def test_errors_are_those_of_float64(model):
    """Correctly rounded results are half an ulp away; a shifted one is as far as shifted."""
    layer = demo.Layer.random(model, 6, 3, torch.Generator().manual_seed(5), torch.device("cpu"))
    norm_out, residual_out = reference.fused_allreduce_gemma_rmsnorm(
        layer.xs,
        layer.weight,
        layer.residual,
        post_weight=layer.post_weight,
        eps=demo.EPS,
        weight_bias=1.0,
    )
    found = demo.errors(layer, norm_out, residual_out)
    assert 0.45 < found["norm_ulps"] < 0.51
    assert 0.9 < found["residual_ulps"] <= demo.MAX_RESIDUAL_ULPS
    assert 2e-3 < found["relative"] < 4e-3

    bits = norm_out.view(torch.int16)
    bits[3, 100] += 3  # three neighbours on
    assert 2.4 < demo.errors(layer, norm_out, residual_out)["norm_ulps"] < 3.6
    residual_out.view(torch.int16)[2, 9] += 4
    assert demo.errors(layer, norm_out, residual_out)["residual_ulps"] > 1.4


def test_a_table_of_a_gpu():
    row = {
        "model": "Gemma 3 27B",
        "form": "sandwich",
        "hidden": 5376,
        "rows": 64,
        "path": "one_shot",
        "unfused_captured": False,
        "norm_ulps": 0.5,
        "residual_ulps": 1.0,
        "relative": 0.0029,
        "fused_us": 7.0,
        "unfused_us": 210.0,
        "failures": [],
    }
    report = {
        "date": "2026-01-02 03:04 UTC",
        "ranks": 4,
        "placement": "4 processes on one GPU, side by side under CUDA MPS",
        "device": "NVIDIA H100",
        "driver": "580.1",
        "multiprocessors": 32,
        "torch": "2.11.0+cu130",
        "backend": "gloo",
        "fused": True,
        "reason": "",
        "graph_calls": 20,
        "rows": [row],
        "failed": False,
    }
    text = demo.table(report)
    assert "NVIDIA H100, driver 580.1; torch 2.11.0+cu130; 2026-01-02 03:04 UTC" in text
    assert "side by side under CUDA MPS; 32 multiprocessors a rank" in text
    assert (
        "64  one_shot     0.500         1.000     2.9e-03       7.0      210.0*  30.0x  ok" in text
    )
    assert "20 dependent ones in a CUDA graph" in text
    assert "* eager: gloo cannot be captured" in text

    captured = demo.table({**report, "rows": [{**row, "unfused_captured": True}]})
    assert "eager" not in captured
    unfused = demo.table({**report, "fused": False, "reason": "no peer access"})
    assert "not fused: no peer access" in unfused
    failed = demo.table({**report, "rows": [{**row, "failures": ["rank 2: other bits"]}]})
    assert "FAILED: Gemma 3 27B, 64 rows: rank 2: other bits" in failed
    assert any(line.endswith("30.0x  FAILED") for line in failed.splitlines())
