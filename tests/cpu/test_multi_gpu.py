"""bench/multi_gpu.sh and bench/crossovers.py, as far as a machine without a GPU has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_ar_norm import plan

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import crossovers  # noqa: E402
from harness import report as reports  # noqa: E402

GPUS2 = {
    "schema": 1,
    "harness": "bench_fused",
    "date": "2026-01-02 03:04 UTC",
    "gpu": "NVIDIA H200",
    "gpus": 2,
    "complete": True,
    "driver": "580.1",
    "versions": {"torch": "2.11.0"},
    "placement": "2 GPUs, one rank each",
    "l2": "cold",
    "start": "on the device: a fused call of one row",
    "calls": 20,
    "environment": {},
}


def cells_of(rows: int, **us: float) -> list[dict]:
    names = {"floor": "floor", "one": "ours/one_shot", "two": "ours/two_shot", "auto": "ours/auto"}
    names |= {"nccl": "nccl + norm"}
    return [
        reports.as_cell(
            reports.Cell(2, 4096, rows, "bf16", "residual", names[name], "one_shot", us=time)
        )
        for name, time in us.items()
    ]


def made_files(directory: Path) -> tuple[Path, Path]:
    """8 KiB and 16 KiB, where one-shot is faster, and 32 KiB, where it is not."""
    cells = [
        *cells_of(1, floor=2.0, one=3.0, two=4.0, auto=3.1, nccl=9.3),
        *cells_of(2, floor=2.0, one=4.0, two=3.95, auto=4.0, nccl=8.0),
        *cells_of(4, floor=2.0, one=6.0, two=5.0, auto=6.0, nccl=9.0),
    ]
    links = {
        "schema": 1,
        "harness": "links",
        "gpus": 2,
        "latency_ns": [
            {"from": 0, "to": 0, "packs": 1, "ns": 300.0},
            {"from": 0, "to": 1, "packs": 1, "ns": 700.0},
            {"from": 1, "to": 0, "packs": 1, "ns": 900.0},
            {"from": 0, "to": 1, "packs": 32, "ns": 950.0},
        ],
        "bandwidth": [
            {"pattern": "pair", "gb_s": 999.0},
            {"pattern": "all", "gb_s": 50.0},
            {"pattern": "all", "gb_s": 100.0},
        ],
    }
    files = directory / "report.json", directory / "links.json"
    for path, content in zip(files, ({**GPUS2, "cells": cells}, links), strict=True):
        path.write_text(json.dumps(content))
    return files


def test_where_two_shot_begins_and_what_the_plan_costs(tmp_path, capsys):
    report, links = made_files(tmp_path)
    points_file = tmp_path / "points.json"
    arguments = [str(report), "--links", str(links), "--json", str(points_file)]
    assert crossovers.main(arguments) == 0
    said = capsys.readouterr().out
    # 4.0 and 3.95 are alike.
    assert "one-shot is no slower up to 16384 bytes; two-shot is faster at 32768" in said
    assert f"the plan has one-shot up to {plan.crossover_bytes(2, 9)} bytes" in said
    assert "over the faster algorithm, at most: 1.20 (4 x 4096 bf16 residual)" in said
    least = "1.50 (4 x 4096 bf16 residual)"
    assert f"at least: {least}; up to 256 KiB: {least}" in said
    assert "latency 0.80 us; 100 GB/s" in said
    points = json.loads(points_file.read_text())
    assert [point["size"] for point in points] == [8192, 16384, 32768]
    # floor + hops * latency + bytes / speed
    assert points[0]["model_us"] == {
        "ours/one_shot": pytest.approx(2.0 + 0.8 + 0.08192),
        "ours/two_shot": pytest.approx(2.0 + 1.6 + 0.08192),
    }
    assert "at most: 1.92 (4 x 4096 bf16 residual)" in said  # 6.0 / 3.13 us


def test_links_within_one_gpu_and_reports_that_are_cut_short(tmp_path, capsys):
    report, links = made_files(tmp_path)
    content = json.loads(links.read_text())
    content["gpus"] = 1
    content["latency_ns"] = content["latency_ns"][:1]
    content["bandwidth"] = content["bandwidth"][:1]
    links.write_text(json.dumps(content))
    report.write_text(json.dumps({**json.loads(report.read_text()), "complete": False}))
    assert crossovers.main([str(report), "--links", str(links)]) == 0
    said = capsys.readouterr().out
    assert "latency 0.30 us; 999 GB/s" in said
    assert "NOT COMPLETE" in said


def test_one_shot_faster_everywhere_or_nowhere():
    def points(*times: tuple[float, float]) -> list[crossovers.Point]:
        cells = [
            cell
            for i, (one, two) in enumerate(times)
            for cell in cells_of(2**i, one=one, two=two, auto=one)
        ]
        return crossovers.points_of([{**GPUS2, "cells": cells}], None)

    assert crossovers.crossover(points((1.0, 2.0), (2.0, 3.0))) == (16384, None)
    assert crossovers.crossover(points((2.0, 1.0), (3.0, 2.0))) == (None, 8192)


def test_reports_that_say_nothing_are_refused(tmp_path, capsys):
    report, _ = made_files(tmp_path)
    content = json.loads(report.read_text())
    content["cells"] = [cell for cell in content["cells"] if cell["algorithm"] == "floor"]
    report.write_text(json.dumps(content))
    assert crossovers.main([str(report)]) == 2
    assert "cells of ours/auto are required" in capsys.readouterr().err
    assert crossovers.main([str(tmp_path / "none.json")]) == 2
    report, links = made_files(tmp_path)
    assert crossovers.main([str(report), "--links", str(report)]) == 2
    assert "a report of links/run.py is required; got another" in capsys.readouterr().err
    assert crossovers.main([str(links)]) == 2
    assert "a report of bench_fused.py or streams/run.py is required" in capsys.readouterr().err
    links.write_text("[1]")
    assert crossovers.main([str(report), "--links", str(links)]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        crossovers.main([str(report), "--json", "/nowhere/a.json"])
    assert "--json: a file in a directory that exists is required" in capsys.readouterr().err


def test_reports_of_other_conditions_are_not_mixed(tmp_path, capsys):
    report, _ = made_files(tmp_path)
    other = tmp_path / "other.json"
    content = json.loads(report.read_text())
    more = {"gpus": 4, "placement": "4 GPUs, one rank each"}
    more["cells"] = [{**cell, "ranks": 4} for cell in content["cells"]]
    other.write_text(json.dumps({**content, **more}))
    assert crossovers.main([str(report), str(other)]) == 0
    assert crossovers.main([str(report), str(report)]) == 2
    assert "each cell once is required; got two of floor, 2 ranks" in capsys.readouterr().err
    other.write_text(json.dumps({**json.loads(report.read_text()), "l2": "warm"}))
    assert crossovers.main([str(report), str(other)]) == 2
    assert "l2: one for all reports is required; got cold, warm" in capsys.readouterr().err


def test_dtypes_and_forms_have_crossovers_of_their_own(tmp_path, capsys):
    report, _ = made_files(tmp_path)
    content = json.loads(report.read_text())
    content["cells"] += [{**cell, "form": "sandwich"} for cell in content["cells"][:5]]
    content["cells"] += [{**cell, "dtype": "fp32"} for cell in content["cells"][:5]]
    report.write_text(json.dumps(content))
    assert crossovers.main([str(report)]) == 0
    said = capsys.readouterr().out
    assert "hidden 4096 bf16 residual: one-shot is no slower up to 16384 bytes; two-" in said
    assert "hidden 4096 bf16 sandwich: one-shot is no slower up to 8192 bytes\n" in said
    assert "hidden 4096 fp32 residual: one-shot is no slower up to 16384 bytes\n" in said


# -------------------------------------------------------------------------------------- the script


def run_script(directory: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(BENCH / "multi_gpu.sh"), str(directory / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_a_gpu_the_script_says_so(tmp_path):
    result = run_script(tmp_path, PYTHON=sys.executable)
    assert result.returncode == 2
    assert "a machine with a GPU is required; got none" in result.stderr


STAND_IN = """#!/bin/bash
case "$*" in
  *device_count*) echo {gpus}; [ {gpus} != none ] || exit 1 ;;
  *"import matplotlib"*) exit 1 ;;
  *test_processes*) echo no; exit 3 ;;
  *)
    echo "did $*; multicast $NCCL_NVLS_ENABLE $TORCH_SYMM_MEM_DISABLE_MULTICAST"
    [[ "$*" =~ --json\\ ([^ ]+) ]] && echo x > "${{BASH_REMATCH[1]}}" ;;
esac
exit 0
"""


def stand_in(directory: Path, gpus: object) -> Path:
    """A Python that only says what it was asked for."""
    python = directory / "python"
    python.write_text(STAND_IN.format(gpus=gpus))
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_a_step_that_fails_stops_nothing_else(tmp_path, gpus):
    python = stand_in(tmp_path, gpus)
    result = run_script(tmp_path, PYTHON=str(python))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED: tests\n" in result.stdout
    assert "tests: FAILED with 3" in result.stdout
    out = tmp_path / "out"
    ranks = range(2, max(gpus, 2) + 1)
    assert {f"sweep_{n}" for n in ranks} == {path.stem for path in out.glob("sweep_*.txt")}
    assert [path.stem for path in out.glob("others_*.txt")] == [f"others_{max(ranks)}"]
    asked = (out / "crossovers.txt").read_text().splitlines()[0]
    assert asked.count(".json") == len(ranks) + 2  # sweeps, links, and what it writes
    assert f"--ranks {max(gpus, 2)} --as processes" in (out / "soak.txt").read_text()
    assert "multicast 0 1" in (out / "soak.txt").read_text()
    wanted = " or ".join(f"{n}-" for n in (2, 4, 8) if n in ranks)
    assert f"test_case and ({wanted})" in (out / "tests.txt").read_text()


def test_a_python_without_torch_is_refused(tmp_path):
    python = stand_in(tmp_path, "none")
    assert run_script(tmp_path, PYTHON=str(python)).returncode == 2


def test_reports_of_an_earlier_run_are_not_taken(tmp_path):
    (tmp_path / "out").mkdir()
    old = tmp_path / "out" / "sweep_2.json"
    old.write_text("old")
    run_script(tmp_path, PYTHON=sys.executable)  # ends for want of a GPU
    assert not old.exists()


def test_no_time_left(tmp_path):
    python = stand_in(tmp_path, 2)
    result = run_script(tmp_path, PYTHON=str(python), LIMIT="5")
    assert result.returncode == 1
    assert "soak: not run: no time is left" in result.stdout
    assert not (tmp_path / "out" / "soak.txt").exists()
