"""The demo: decoder layers' all-reduce + residual + norm on whatever this machine has, checked.

    python -m gemma_ar_norm [--ranks N] [--rows 1 8 64 512] [--json FILE] [--timeout SECONDS]

Starts the ranks (or joins those that torchrun started), and for each model and number of rows
  1. calls the fused op once, and checks both outputs: the bits of reference.py, equal bits on all
     ranks, and the distance from float64;
  2. times it beside the unfused sequence: the group's own all-reduce, then our local add-and-norm.
It prints one table. The exit code is 0 only if every check of every rank passed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import hashlib
import itertools
import json
import math
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import groups, launcher, reference

WORKER = (sys.executable, "-m", "gemma_ar_norm", "--worker")
EPS = 1e-6

# Half an ulp of bf16 is one rounding. a or p, and then h, are rounded one after the other, and the
# fp32 steps of p may carry a value over a tie.
MAX_NORM_ULPS = 1.0
MAX_RESIDUAL_ULPS = 1.001
# |norm_out - float64| / |float64|, end to end and with nothing rounded: three or four roundings of
# 2^-9 at most, each about 0.58 of that in the mean square.
MAX_RELATIVE_ERROR = 5e-3

GRAPH_CALLS = 20  # dependent calls in one graph
EAGER_ROUNDS, EAGER_ROUND_S = 5, 0.1
REPLAYS = 30
SLOW_REPLAY_S = 0.05  # time-sliced ranks: three replays must do


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    sandwich: bool  # post-norm, residual add, next pre-norm; else residual add, next pre-norm

    @property
    def form(self) -> str:
        return "sandwich" if self.sandwich else "residual"


# hidden_size of the text model's config.json, and its decoder layer in transformers.
MODELS = (
    Model("Gemma 3 27B", 5376, sandwich=True),
    Model("Qwen3.5-397B", 4096, sandwich=False),
)


@dataclass
class Layer:
    """What one fused call takes on this rank, and what all ranks contribute."""

    xs: list[Tensor]
    residual: Tensor
    weight: Tensor
    post_weight: Tensor | None

    @staticmethod
    def random(
        model: Model, rows: int, ranks: int, generator: torch.Generator, device: torch.device
    ) -> Layer:
        """Made on the CPU, so that ranks whose generators have one seed have the same."""

        def normal(*shape: int, std: float) -> Tensor:
            values = torch.randn(shape, generator=generator) * std
            return values.to(device=device, dtype=torch.bfloat16)

        return Layer(
            xs=[normal(rows, model.hidden, std=ranks**-0.5) for _ in range(ranks)],
            residual=normal(rows, model.hidden, std=1.0),
            weight=normal(model.hidden, std=0.2),
            post_weight=normal(model.hidden, std=0.2) if model.sandwich else None,
        )

    def call(self, x: Tensor, residual: Tensor, algorithm: str = "auto") -> tuple[Tensor, Tensor]:
        return gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
            x,
            self.weight,
            residual,
            post_weight=self.post_weight,
            eps=EPS,
            weight_bias=1.0,
            algorithm=algorithm,
        )


# ------------------------------------------------------------------------------------------ checks


def errors(layer: Layer, norm_out: Tensor, residual_out: Tensor) -> dict[str, float]:
    """How far the outputs are from float64.

    norm_ulps: from the float64 norm of the returned residual: one rounding, so about half an ulp.
    residual_ulps: from the float64 residual + p, where p is the sum over ranks or, in the sandwich
        form, the float64 norm of the rounded sum; in ulps at the larger of |p| and |h|, and less
        what the fp32 additions may add where the values of the ranks cancel each other.
    relative: |norm_out - value| / |value|, where value is computed from the inputs in float64.
    """
    norm = _norm64(residual_out.double(), layer.weight)
    total = torch.stack([x.double() for x in layer.xs]).sum(0)
    p = exact_p = total
    if layer.post_weight is not None:
        p = _norm64(reference.all_reduce(layer.xs).double(), layer.post_weight)
        exact_p = _norm64(total, layer.post_weight)
    h = layer.residual.double() + p
    ulp = _ulp(torch.maximum(p.abs(), h.abs()))
    sizes = torch.stack([v.double().abs() for v in (*layer.xs, layer.residual)]).sum(0)
    fp32_error = (len(layer.xs) + 1) * 2.0**-24 * sizes
    exact_norm = _norm64(layer.residual.double() + exact_p, layer.weight)
    return {
        "norm_ulps": _largest((norm_out.double() - norm).abs() / _ulp(norm)),
        "residual_ulps": _largest(
            ((residual_out.double() - h).abs() - fp32_error).clamp(min=0) / ulp
        ),
        "relative": ((norm_out.double() - exact_norm).norm() / exact_norm.norm()).item(),
    }


def _norm64(v: Tensor, weight: Tensor) -> Tensor:
    rstd = 1 / (v.square().mean(-1, keepdim=True) + EPS).sqrt()
    return v * rstd * (1 + weight.double())


def _ulp(magnitude: Tensor) -> Tensor:
    """The distance of neighbouring bf16 numbers at this magnitude."""
    exponent = torch.frexp(magnitude).exponent - 1  # 2^exponent <= magnitude
    return torch.pow(2.0, (exponent.clamp(min=-126) - 7).double())


def _largest(values: Tensor) -> float:
    """0 where there are none; NaN if there is one, which no limit admits."""
    return values.max().item() if values.numel() else 0.0


def _bits(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def failures(
    row: dict[str, Any], outputs: Sequence[Tensor], expected: Sequence[Tensor], digests: set[str]
) -> list[str]:
    """What is wrong with a result, in words."""
    found = []
    for name, got, want in zip(("norm_out", "residual_out"), outputs, expected, strict=True):
        if _bits(got) != _bits(want):
            found.append(f"{name} has other bits than reference.py")
    if len(digests) != 1:
        found.append("ranks have different bits")
    for name, limit in (
        ("norm_ulps", MAX_NORM_ULPS),
        ("residual_ulps", MAX_RESIDUAL_ULPS),
        ("relative", MAX_RELATIVE_ERROR),
    ):
        if not row[name] <= limit:
            found.append(f"{name} is {row[name]:.3g}, allowed are {limit}")
    return found


# ------------------------------------------------------------------------------------------ timing


def chain(layer: Layer, rank: int, algorithm: str) -> Callable[[int], None]:
    """Dependent calls, each on the outputs of the one before, as the layers of a model."""
    first_x, first_residual = layer.xs[rank].clone(), layer.residual.clone()

    def calls(count: int) -> None:
        x, residual = first_x, first_residual
        for _ in range(count):
            x, residual = layer.call(x, residual, algorithm)

    return calls


def graph_us(calls: Callable[[int], None]) -> float:
    """Microseconds a call: the median over replays of a CUDA graph of GRAPH_CALLS calls."""
    calls(2)  # communicators, lazily loaded kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's threads may ask CUDA something meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        calls(GRAPH_CALLS)

    dist.barrier()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    # The slowest rank's, so that all replay equally often.
    slowest = max(_gather(time.perf_counter() - start))
    replays = REPLAYS if slowest < SLOW_REPLAY_S else 3

    # All are enqueued at once: ranks start at different times, but only the first replays see it.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    dist.barrier()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)]
    return statistics.median(times[replays // 6 :]) / GRAPH_CALLS


def eager_us(calls: Callable[[int], None], device: torch.device) -> float:
    """Microseconds a call: the median over rounds of GRAPH_CALLS calls at most, host included."""

    def seconds(count: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        calls(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(1)
    slowest = max(_gather(seconds(1)))  # equal on all ranks, so that all call equally often
    count = min(GRAPH_CALLS, max(1, int(EAGER_ROUND_S / slowest)))
    return statistics.median(seconds(count) for _ in range(EAGER_ROUNDS)) / count * 1e6


# ------------------------------------------------------------------------------------- in each rank


def _gather(message: Any) -> list[Any]:
    return groups.all_gather_json(groups.resolve(None), message)


def work(rows: Sequence[int], report_file: str | None, *, show: bool) -> int:
    """What every rank does; returns its exit code. Rank 0 writes the report, and may print it."""
    rank, world, device = launcher.init_from_env()
    try:
        with gemma_ar_norm.init(
            hidden_size=max(model.hidden for model in MODELS),
            max_rows=max(1, *rows),
            dtype=torch.bfloat16,
        ) as workspace:
            report = header(world, device, workspace)
            seed = report["seed"] = _gather(secrets.randbits(32))[0]
            generator = torch.Generator().manual_seed(seed)
            report["rows"] = [
                examine(model, count, rank, world, device, generator)
                for model in MODELS
                for count in rows
            ]
    finally:
        dist.destroy_process_group()
    report["failed"] = any(row["failures"] for row in report["rows"])
    if rank == 0 and show:
        print(table(report), flush=True)
    if rank == 0 and report_file is not None:
        Path(report_file).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["failed"] else 0


def examine(
    model: Model,
    rows: int,
    rank: int,
    world: int,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, Any]:
    """One line of the table, the same on every rank."""
    layer = Layer.random(model, rows, world, generator, device)
    x, residual = layer.xs[rank], layer.residual
    outputs = layer.call(x, residual)
    expected = reference.fused_allreduce_gemma_rmsnorm(
        layer.xs, layer.weight, residual, post_weight=layer.post_weight, eps=EPS, weight_bias=1.0
    )
    own: dict[str, Any] = errors(layer, *outputs)
    digest = hashlib.sha256(b"".join(map(_bits, outputs))).hexdigest()
    digests = set(_gather(digest))
    own["failures"] = failures(own, outputs, expected, digests)

    fused, unfused = chain(layer, rank, "auto"), chain(layer, rank, "unfused")
    if device.type == "cuda":
        own["fused_us"] = graph_us(fused)
        # NCCL can be captured; gloo goes through the host.
        captured = world == 1 or groups.devices_of(dist.group.WORLD).get("cuda") == "nccl"
        own["unfused_us"] = graph_us(unfused) if captured else eager_us(unfused, device)
    else:
        captured = False
        own["fused_us"], own["unfused_us"] = eager_us(fused, device), eager_us(unfused, device)

    ranks = _gather(own)
    row = {
        "model": model.name,
        "form": model.form,
        "hidden": model.hidden,
        "rows": rows,
        "path": gemma_ar_norm.explain(rows, model.hidden, x.dtype, device=device).path,
        "unfused_captured": captured,
    }
    for name in ("norm_ulps", "residual_ulps", "relative", "fused_us", "unfused_us"):
        values = [one[name] for one in ranks]
        row[name] = math.nan if any(map(math.isnan, values)) else max(values)
    row["failures"] = [
        f"rank {r}: {failure}" for r, one in enumerate(ranks) for failure in one["failures"]
    ]
    return row


def header(world: int, device: torch.device, workspace: Any) -> dict[str, Any]:
    gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "ranks": world,
        "placement": os.environ.get(launcher.PLACEMENT, f"{world} ranks, not started by the demo"),
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "driver": driver_version() if gpu else None,
        # Of one rank: under MPS, its share.
        "multiprocessors": (
            torch.cuda.get_device_properties(device).multi_processor_count if gpu else None
        ),
        "torch": torch.__version__,
        "backend": dist.get_backend(),
        "fused": workspace.fused,
        "reason": workspace.reason,
        "graph_calls": GRAPH_CALLS,
    }


def driver_version() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return asked.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# ------------------------------------------------------------------------------------------- report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    gpu = report["device"] != "CPU"
    where = f"{report['device']}, driver {report['driver']}" if gpu else "CPU"
    share = f"; {report['multiprocessors']} multiprocessors a rank" if gpu else ""
    lines = [
        f"gemma_ar_norm {gemma_ar_norm.__version__}: all-reduce + residual + (1 + w) RMSNorm, bf16",
        f"{where}; torch {report['torch']}; {report['date']}",
        f"{report['placement']}{share}; torch.distributed: {report['backend']}",
    ]
    if gpu and not report["fused"]:
        lines.append(f"not fused: {report['reason']}")
    lines.append("")

    columns = ["model", "form", "hidden", "rows", "path", "norm ulp", "residual ulp", "rel. error"]
    columns += ["fused us", "unfused us", "ratio", "check"]
    cells = [columns]
    for row in report["rows"]:
        note = "" if row["unfused_captured"] else "*"
        cells.append(
            [
                row["model"],
                row["form"],
                str(row["hidden"]),
                str(row["rows"]),
                row["path"],
                f"{row['norm_ulps']:.3f}",
                f"{row['residual_ulps']:.3f}",
                f"{row['relative']:.1e}",
                f"{row['fused_us']:.1f}",
                f"{row['unfused_us']:.1f}{note}",
                f"{row['unfused_us'] / row['fused_us']:.1f}x" if gpu else "-",
                "FAILED" if row["failures"] else "ok",
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    left = {0, 1, 4, len(columns) - 1}
    for line in cells:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join(padded).rstrip())
    lines += ["", *_notes(report, gpu)]
    for row in report["rows"]:
        name = f"{row['model']}, {row['rows']} rows"
        lines += [f"FAILED: {name}: {failure}" for failure in row["failures"]]
    return "\n".join(lines)


def _notes(report: dict[str, Any], gpu: bool) -> list[str]:
    notes = [
        "check: both outputs have the bits of reference.py and of every other rank, and lie within",
        f"  {MAX_NORM_ULPS:g} ulp of bf16 of float64. The errors are the largest of all elements "
        "and ranks.",
    ]
    calls = report["graph_calls"]
    if gpu:
        notes.append(
            f"us: a call of {calls} dependent ones in a CUDA graph; median, of the slowest rank."
        )
        if not all(row["unfused_captured"] for row in report["rows"]):
            notes.append(
                f"* eager: {report['backend']} cannot be captured in a graph, and goes through the "
                "host. Not what NCCL would take."
            )
    else:
        notes.append(
            f"* us: a call of up to {calls} dependent eager ones on the CPU, where both columns go "
            "through gloo: they say nothing about GPUs."
        )
    return notes


# --------------------------------------------------------------------------------------------- main


def default_ranks(gpus: int) -> int:
    """A rank a GPU where there are several, 4 on one GPU, 2 on the CPU."""
    return min(gpus, 8) if gpus >= 2 else 4 if gpus == 1 else 2


def main(arguments: Sequence[str] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Runs the demo and returns its exit code. worker: the command that one rank runs."""
    parser = argparse.ArgumentParser(
        prog="python -m gemma_ar_norm",
        description="Decoder layers' all-reduce + residual + RMSNorm in one kernel, checked and "
        "timed on this machine's GPUs, or on its CPU.",
        epilog="python -m gemma_ar_norm soak --help: random calls of everything, for as long as "
        "you like.",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes; default: a GPU each (at most 8), 4 on one GPU, or 2 on the CPU",
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512], metavar="ROWS")
    parser.add_argument("--json", metavar="FILE", help="where to write all numbers")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--no-mps", action="store_true", help="start no CUDA MPS")
    parser.add_argument("--worker", metavar="REPORT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.rows) < 1:
        parser.error("--rows: 1 or more")
    if options.worker is not None:
        return work(options.rows, options.worker, show=False)
    if "RANK" in os.environ:  # torchrun's
        return work(options.rows, options.json, show=True)

    with tempfile.TemporaryDirectory(prefix="gan_demo_") as directory:
        report_file = Path(options.json or Path(directory) / "report.json")
        report_file.unlink(missing_ok=True)
        result = launcher.run(
            [*worker, str(report_file), "--rows", *map(str, options.rows)],
            options.ranks or default_ranks(launcher.gpu_count()),
            timeout_s=options.timeout,
            mps=not options.no_mps,
            show="nothing",
        )
        if not report_file.exists():
            print(result.transcript())
        else:
            report = json.loads(report_file.read_text())
            print(table(report))
            if not report["failed"] and result.exit_code != 0:
                print(result.transcript())
    if result.reason:
        print(f"{result.placement}: {result.reason}", file=sys.stderr)
    return result.exit_code
