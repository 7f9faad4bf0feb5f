"""bench_fused.py on GPUs: ours is right and in graphs, and all others run or say why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_two_ranks(tmp_path):
    file = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "bench" / "bench_fused.py"), "--ranks", "2"]
    command += ["--rows", "1", "64", "--hidden", "4096", "--form", "residual", "sandwich"]
    command += ["--calls", "5", "--replays", "5", "--json", str(file), "--timeout", "200"]
    command += ["--algorithms", "floor", "ours", "nccl", "unfused/eager"]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(file.read_text())
    assert report["complete"]
    assert report["gpu"] == torch.cuda.get_device_name(0)
    assert report["start"] == "on the device: a fused call of one row"
    assert "MEAN NOTHING" not in run.stdout

    names = {"floor", "ours/auto", "ours/one_shot", "ours/two_shot"}
    for cell in report["cells"]:
        assert cell["wrong"] == "", cell
        assert 0 < cell["p10"] <= cell["us"] <= cell["p90"]
        assert cell["copy_gb_s"] > 10
        assert cell["captured"] or cell["algorithm"] not in names
    counts = [cell["algorithm"] for cell in report["cells"]]
    assert all(counts.count(name) == 4 for name in names)
    nccl = "NCCL takes one rank a GPU; here ranks share one, or torch has no NCCL"
    if torch.cuda.device_count() == 1:
        assert [(s["algorithm"], s["reason"]) for s in report["skipped"]] == [("nccl + norm", nccl)]
    else:
        assert counts.count("nccl + norm") == 4
