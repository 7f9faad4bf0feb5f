"""What every rank does. Rank 0 has the report; it writes it anew after every shape."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gemma_ar_norm
from gemma_ar_norm import groups, launcher

from . import report as reports
from .agree import attempt, first, gather
from .baselines import Baseline, World, all_baselines
from .cases import DTYPES, Case, Inputs, copies_needed, what_is_wrong
from .measure import Flush, Start, copy_gb_s, measure
from .progress import of_a_rank

# Of the group's own operations. Compilers run in the meantime: torch.compile's, FlashInfer's.
GROUP_TIMEOUT_S = 900.0
OURS = ("floor", "ours/")  # that these are right is asserted; of the others it is reported

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


@dataclass(frozen=True)
class Options:
    cases: Sequence[Case]
    algorithms: Sequence[str]  # names of baselines, or what they start with; empty: all
    calls: int
    replays: int
    warm_l2: bool


def without_multicast() -> dict[str, str]:
    """Sets what keeps NCCL and torch from NVLink multicast, where it is not set, and says what is.
    Before the group is made."""
    for name, value in NO_MULTICAST.items():
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in NO_MULTICAST}


def work(options: Options, file: Path | None) -> reports.Report:
    """The report, the same cells on every rank. Rank 0 writes `file`."""
    environment = without_multicast()
    # Every rank compiles for itself, beside the others.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    rank, ranks, device = launcher.init_from_env(timeout_s=GROUP_TIMEOUT_S)
    try:
        widest = max((case.torch_dtype for case in options.cases), key=lambda t: t.itemsize)
        with gemma_ar_norm.init(
            hidden_size=max(case.hidden for case in options.cases),
            max_rows=max(case.rows for case in options.cases),
            dtype=widest,
        ) as workspace:
            world = World(
                rank,
                ranks,
                device,
                nccl=groups.devices_of(dist.group.WORLD).get("cuda") == "nccl",
                shared_gpu=device.type == "cuda" and _gpus(ranks) < ranks,
                not_fused=_why_not_fused(device, workspace),
            )
            return _Run(options, world, environment, file).report()
    finally:
        dist.destroy_process_group()


def _why_not_fused(device: torch.device, workspace: Any) -> str:
    if device.type == "cpu":
        return "the CPU has one path, which ours/auto takes"
    return "" if workspace.fused else str(workspace.reason)


def _gpus(ranks: int) -> int:
    return min(ranks, torch.cuda.device_count()) if torch.cuda.is_available() else 0


class _Run:
    def __init__(
        self, options: Options, world: World, environment: dict[str, str], file: Path | None
    ):
        self.options, self.world, self.file = options, world, file
        self.l2_bytes = 0 if options.warm_l2 else _l2_bytes(world)
        self.start = Start(world)
        self.flush = Flush(world, self.l2_bytes)
        self.copy_gb_s = copy_gb_s(world, self.start)
        self.seed = gather(secrets.randbits(32))[0]
        self.result: reports.Report = {
            "schema": reports.SCHEMA,
            "harness": "bench_fused",
            "complete": False,
            "date": reports.now(),
            "gpu": torch.cuda.get_device_name(world.device) if world.gpu else "CPU",
            "gpus": _gpus(world.ranks),
            "driver": reports.driver_version() if world.gpu else None,
            "versions": versions(world),
            "placement": os.environ.get(launcher.PLACEMENT) or _placement(world),
            "backend": str(dist.get_backend_config(dist.group.WORLD)),
            "start": self.start.how,
            "l2": "warm" if options.warm_l2 else "cold",
            "calls": options.calls,
            "replays": options.replays,
            "seed": self.seed,
            "environment": environment if world.gpu else {},
            "cells": [],
            "skipped": [],
        }

    def report(self) -> reports.Report:
        usable = [b for b in self._chosen() if self._can_run(b)]
        progress = of_a_rank(self.world.rank, len(usable) * len(self.options.cases))
        prepared: dict[str, str] = {}  # the names of baselines that are, and why they could not be
        for case in self.options.cases:
            inputs, error = attempt(partial(self._inputs, case))  # there may be too little memory
            for baseline in usable:
                progress.show(f"{baseline.name}, {case}")
                if error or inputs is None:
                    self._skip(baseline, error, case)
                else:
                    self._one(baseline, case, inputs, prepared)
            del inputs
            gc.collect()
            self._save()
        progress.close()
        self.result["complete"] = True
        self._save()
        return self.result

    def _chosen(self) -> list[Baseline]:
        names = self.options.algorithms
        return [b for b in all_baselines() if not names or b.name.startswith(tuple(names))]

    def _can_run(self, baseline: Baseline) -> bool:
        reason, error = attempt(partial(baseline.why_not, self.world))
        reason = first(reason) or error
        if reason:
            self._skip(baseline, reason)
        return not reason

    def _inputs(self, case: Case) -> Inputs:
        copies = 1
        if self.l2_bytes:
            copies = copies_needed(case, self.options.calls, self.l2_bytes)
        world = self.world
        return Inputs.random(case, world.ranks, world.rank, self.seed, world.device, copies)

    def _one(
        self, baseline: Baseline, case: Case, inputs: Inputs, prepared: dict[str, str]
    ) -> None:
        """A cell, or why there is none."""
        world, options = self.world, self.options
        if baseline.name not in prepared:
            taken = [c for c in options.cases if not baseline.why_not_for(c, world)]
            _, problem = attempt(partial(baseline.prepare, world, taken) if taken else _nothing)
            prepared[baseline.name] = problem
        reason = prepared[baseline.name] or first(baseline.why_not_for(case, world))
        if reason:
            self._skip(baseline, reason, case)
            return
        exact = baseline.exact(world)

        def check(outputs: Any, calls: int) -> str:
            def look() -> str:
                want = inputs.expected(calls, reduces=baseline.reduces)
                return what_is_wrong(outputs, want, case, calls, exact=exact)

            wrong, error = attempt(look)
            return error or first(wrong)

        def cell(**found: Any) -> None:
            self.result["cells"].append(
                reports.as_cell(
                    reports.Cell(
                        ranks=world.ranks,
                        hidden=case.hidden,
                        rows=case.rows,
                        dtype=case.dtype,
                        form=case.form,
                        algorithm=baseline.name,
                        path=baseline.path(case, world),
                        captured=baseline.can_be_captured(world),
                        multiprocessors=_multiprocessors(world),
                        copy_gb_s=self.copy_gb_s,
                        **found,
                    )
                )
            )

        def failed(error: str) -> None:
            if baseline.name.startswith(OURS):
                cell(wrong=error)
            else:
                self._skip(baseline, error, case)

        call, error = attempt(partial(baseline.make, case, world))
        if error or call is None:
            return failed(error)
        outputs, error = attempt(partial(inputs.chain, call, 1))
        if error:
            return failed(error)
        if wrong := check(outputs, 1):
            return cell(wrong=wrong)
        timed, error = attempt(
            partial(
                measure,
                baseline,
                partial(inputs.chain, call),
                world,
                self.start,
                self.flush,
                options.calls,
                options.replays,
            )
        )
        if error or timed is None:
            return failed(error)
        if wrong := check(timed.outputs, options.calls):
            return cell(wrong=wrong)
        times = reports.summary(gather(timed.us))
        replays = len(timed.us) if len(timed.us) != options.replays else None
        cell(**times, replays=replays, calls=timed.calls if timed.calls != options.calls else None)

    def _skip(self, baseline: Baseline, reason: str, case: Case | None = None) -> None:
        for skipped in self.result["skipped"]:
            if (skipped["algorithm"], skipped["reason"]) == (baseline.name, reason) and case:
                skipped["cases"].append(str(case))
                return
        cases = [str(case)] if case else []
        self.result["skipped"].append(
            {"algorithm": baseline.name, "reason": reason, "about": baseline.about, "cases": cases}
        )

    def _save(self) -> None:
        if self.world.rank == 0 and self.file is not None:
            reports.save(self.result, self.file)


def is_wrong(report: reports.Report) -> bool:
    """Whether one of ours is: then the benchmark fails."""
    return any(c["wrong"] and c["algorithm"].startswith(OURS) for c in report["cells"])


def versions(world: World) -> dict[str, str]:
    found = {
        "gemma_ar_norm": gemma_ar_norm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    reports.note_commit(found)
    if world.nccl:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for package in ("flashinfer-python", "vllm"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _l2_bytes(world: World) -> int:
    if not world.gpu:
        return 1 << 20  # so that the CPU path, too, has its inputs several times over
    return torch.cuda.get_device_properties(world.device).L2_cache_size


def _multiprocessors(world: World) -> int | None:
    """That a rank has: under MPS, its share."""
    if not world.gpu:
        return None
    return torch.cuda.get_device_properties(world.device).multi_processor_count


def _nothing() -> None:
    pass


def _placement(world: World) -> str:
    if not world.gpu:
        return f"{world.ranks} CPU processes"
    gpus = _gpus(world.ranks)
    if gpus == world.ranks:
        return f"{gpus} GPUs, one rank each"
    return f"{world.ranks} processes on {gpus} GPU(s)"


def grid(
    rows: Sequence[int], hidden: Sequence[int], dtypes: Sequence[str], forms: Sequence[str]
) -> list[Case]:
    for dtype in dtypes:
        multiple = 16 // DTYPES[dtype].itemsize
        for size in hidden:
            if size % multiple or not 0 < size <= 16384:
                raise ValueError(
                    f"--hidden: a multiple of {multiple} up to 16384 is required for {dtype}; "
                    f"got {size}"
                )
    all_of_them = [Case(r, h, d, f) for h in hidden for d in dtypes for f in forms for r in rows]
    return list(dict.fromkeys(all_of_them))
