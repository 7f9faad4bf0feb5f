"""The soak on a GPU, for a short time, as streams and as processes; it sees what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import checks
import pytest
import torch

import gemma_ar_norm
from gemma_ar_norm import soak, soak_calls

ROOT = Path(gemma_ar_norm.__file__).parents[1]
TIME_LIMIT_S = 200


@pytest.mark.parametrize(("ranks", "ranks_as"), [(4, "streams"), (2, "processes")])
def test_twenty_seconds(ranks, ranks_as, tmp_path):
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "gemma_ar_norm", "soak", "--minutes", "0.333"]
    command += ["--ranks", str(ranks), "--as", ranks_as, "--json", str(file)]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )
    print(run.stdout)  # the last line is the number of calls; shown with -s
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    report = json.loads(file.read_text())
    assert report["problems"] == []
    assert (report["ranks"], report["as"], report["mismatches"]) == (ranks, ranks_as, 0)
    assert report["calls"] >= 100  # of time-sliced processes too
    assert sum(report["counts"]["form"].values()) == report["calls"]
    paths, of_ranks = report["counts"]["path"], report["counts"]["ranks"]
    assert set(paths) - {"local"} == {"one_shot", "two_shot"}
    assert paths.get("local", 0) == of_ranks.get("one", 0)  # few: none, where calls are slow
    assert {"1", "several"} <= set(report["counts"]["launches"])
    assert "0 mismatches, seed" in run.stdout.splitlines()[-1]


def test_streams_with_a_wrong_result(monkeypatch):
    """Of rank 1 alone, eager or in a graph: it is found in the first batch that has it."""
    right = gemma_ar_norm.fused_allreduce_gemma_rmsnorm

    def wrong(x, *rest, group, **options):
        norm_out, residual_out = right(x, *rest, group=group, **options)
        if group is not None and group.rank == 1:
            residual_out.fill_(5.5)
        return norm_out, residual_out

    setting = soak_calls.Setting(2, gpu=True, streams=True)
    monkeypatch.setattr(gemma_ar_norm, "fused_allreduce_gemma_rmsnorm", wrong)
    for how in ("eager", "graph"):
        number = next(
            n
            for n in range(1000)
            if soak_calls.batch_of(1, n, setting).mode == how
            and soak_calls.batch_of(1, n, setting).calls[0].rows > 0
            and not soak_calls.batch_of(1, n, setting).calls[0].alone
        )
        streams = soak.Streams(2)
        try:
            report = soak.soak(streams, 1, (number, number), None, lambda one: None)
        finally:
            streams.close()
        problem = report["problems"][0]
        assert f"call 0 of {len(soak_calls.batch_of(1, number, setting).calls)}, {how}" in problem
        assert "rank 1: residual_out[" in problem
        assert "is 5.5, must be" in problem
        assert report["mismatches"] > 0


def kind(rows: int, hidden: int, dtype: torch.dtype, form: str, algorithm: str, **others):
    usual = {
        "weight_dtype": torch.float32,
        "eps": 1e-6,
        "weight_bias": 1.0,
        "out": "none",
        "shape_of": "rows",
        **{f"{name}_layout": "dense" for name in ("x", "residual", "weight")},
        **dict.fromkeys(("differ", "between", "alone"), False),
    }
    return soak_calls.Kind(rows, hidden, dtype, form, algorithm, **{**usual, **others})


# (how, max_rows and hidden_size of the workspace, calls). Of four ranks on a GPU of 132 SMs, one
# rank's kernel did not start: clusters filled nearly all places, and other kernels ran beside.
DID_NOT_START = {
    "one rank's norm before": (
        ("graph", 256, 16384),
        [
            kind(42, 228, torch.float32, "sandwich", "auto", alone=True),
            kind(216, 2304, torch.float32, "sandwich", "two_shot"),
        ],
    ),
    "copies of x before": (
        ("eager", 1, 64),
        [kind(49, 5120, torch.float16, "plain", "auto", x_layout="wide rows")],
    ),
    "copies of residual before": (
        ("graph", 1, 8192),
        [
            kind(36, 16384, torch.float16, "plain", "auto"),
            kind(
                *(167, 3584, torch.float16, "residual", "two_shot"),
                residual_layout="every second",
                differ=True,
            ),
        ],
    ),
}


@pytest.mark.parametrize("name", DID_NOT_START)
def test_launches_that_did_not_start(name):
    (how, max_rows, hidden_size), calls = DID_NOT_START[name]
    batch = soak_calls.Batch(0, how, False, 2 if how == "graph" else 1, tuple(calls))
    streams = soak.Streams(4)
    try:
        for _ in range(5):
            streams.renew(
                how="local_group", max_rows=max_rows, hidden_size=hidden_size, timeout_s=5.0
            )
            counts = soak.Counts(streams.setting)
            made, _, problems = soak.run_batch(streams, 7, batch, counts)
            assert problems == []
            assert made == batch.replays * len(calls)
    finally:
        streams.close()


RAISES = """
import itertools, os, sys
import gemma_ar_norm
from gemma_ar_norm import soak, soak_calls

right, calls = gemma_ar_norm.fused_allreduce_gemma_rmsnorm, itertools.count(1)

def raises(*arguments, **options):
    if os.environ["RANK"] == "1" and next(calls) == 12:
        raise ZeroDivisionError("as planted")
    return right(*arguments, **options)

gemma_ar_norm.fused_allreduce_gemma_rmsnorm = raises
soak_calls.TIMEOUT_S = 5.0
sys.exit(soak.main(sys.argv[1:]))
"""


def test_an_exception_on_one_rank(tmp_path, capsys):
    """The other one's kernel waits for it then; both end, and say why."""
    program = tmp_path / "raises.py"
    program.write_text(RAISES)
    worker = [sys.executable, str(program), "--worker"]
    arguments = ["--batch", "0-100", "--ranks", "2", "--as", "processes", "--seed", "1"]
    started = time.monotonic()
    assert soak.main(arguments, worker) == 1
    assert time.monotonic() - started < soak.GROUP_TIMEOUT_S
    said = capsys.readouterr().out
    assert "on rank 1: Traceback" in said
    assert "ZeroDivisionError: as planted" in said
    assert "soak --seed 1 --ranks 2 --as processes --batch " in said
    assert "did not finish" not in said


def test_values_are_those_of_the_cpu():
    key = 987654321987654321
    on_both = [torch.device("cpu"), torch.device("cuda")]
    h, on_gpu = (soak_calls.hashed(key, 1_000_000, device) for device in on_both)
    assert torch.equal(h, on_gpu.cpu())
    for dtype in checks.DTYPES:
        want, got = (soak_calls.numbers(one, dtype, -2) for one in (h, on_gpu))
        checks.assert_bit_equal(got.cpu(), want, dtype)
