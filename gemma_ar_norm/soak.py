"""The soak: random calls against the contract, for as long as one likes.

    python -m gemma_ar_norm soak --minutes M [--seed S] [--ranks N] [--as streams|processes]

Every output of every call must have the bits of reference.py (NaN equals NaN), and inputs that are
no outputs must be left alone. What is called follows from the seed (soak_calls.py): the same seed
makes the same calls in the same order, on any machine of the same kind. The first batch with a
mismatch or an exception ends the run on all ranks, with exit code 1 and the command that repeats
that batch.

Calls are eager and in graphs, of all ranks and of one alone, with the fused algorithms. Not among
them: algorithm="unfused", which promises no bits on GPUs; torch.compile; debug mode.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import secrets
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gemma_ar_norm
from gemma_ar_norm import demo, groups, launcher
from gemma_ar_norm.plan import MAX_RANKS, MIN_RANKS
from gemma_ar_norm.soak_calls import (
    BATCHES_A_WORKSPACE,
    Batch,
    Call,
    Data,
    Setting,
    all_categories,
    batch_of,
    categories_of,
    data_of,
    workspace_of,
)

WORKER = (sys.executable, "-m", "gemma_ar_norm", "soak", "--worker")
START_AND_END_S = 300.0  # what processes may take beyond the minutes asked for
WITHOUT_MINUTES_S = 3600.0  # what processes may take for batches that are asked for by number
PROGRESS_S, PROGRESS_ON_A_TERMINAL_S = 10.0, 0.2
# What ranks wait for each other: in exchanges of init and of calls on the CPU; and in agreeing on
# how a batch ended, to which a rank may come late, from such an exchange or a kernel (TIMEOUT_S).
GROUP_TIMEOUT_S, AGREE_TIMEOUT_S = 120.0, 180.0
EXIT_INTERRUPTED = 130  # as a shell has it after Ctrl-C
MAX_PROBLEM = 3000  # characters

# Of each stream: what the outputs and dense copies of a batch take, so that the allocator asks CUDA
# for none while ranks wait for each other. Torch keeps tensors of up to 1 MiB apart.
RESERVED_BYTES, RESERVED_SMALL = 128 << 20, 64

Report = dict[str, Any]


# ------------------------------------------------------------------------------------------- ranks


class Streams:
    """All ranks, as streams of this process.

    Their kernels wait for each other. So a batch is queued on all ranks before anything that waits
    for the device; and memory and torch's kernels are there before.
    """

    alone = None  # one rank, for there is no default group

    def __init__(self, ranks: int) -> None:
        self.setting = Setting(ranks, gpu=True, streams=True)
        self.mine = range(ranks)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.where = f"{ranks} ranks as streams on {torch.cuda.get_device_name(self.device)}"
        self._group: Any = None
        # The first call of one rank loads its kernels: before a rank waits.
        x = torch.ones(1, 64, device=self.device)
        gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, x[0], group=self.alone)

    def renew(self, *, how: str, **arguments: Any) -> None:
        """A new workspace, made in this way."""
        self.close()
        torch.cuda.empty_cache()  # graphs that have gone, and streams of the old group
        self._group = gemma_ar_norm.local_group(self.setting.ranks, **arguments)
        for rank in self._group:
            with torch.cuda.stream(rank.stream):
                kept = [torch.empty(RESERVED_BYTES, dtype=torch.uint8, device=self.device)]
                for _ in range(RESERVED_SMALL):
                    kept.append(torch.empty(1 << 20, dtype=torch.uint8, device=self.device))
                del kept
        self.synchronize()

    @property
    def group(self) -> Any:
        """That `explain` is to be asked for."""
        return self._group[0]

    def queue(self, calls: Sequence[Call], how: str) -> None:
        for call in calls:
            for rank in self._group:
                with torch.cuda.stream(rank.stream):
                    self._run(call, rank)

    def _run(self, call: Call, rank: Any) -> None:
        call.run(rank.rank, self.alone if call.kind.alone else rank)

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """A graph a rank; returns what replays them."""

        def of_rank(rank: Any) -> None:
            for call in calls:
                self._run(call, rank)

        graphs = [
            capture(functools.partial(of_rank, rank), rank.stream, self.device)
            for rank in self._group
        ]

        def replay() -> None:
            for rank, graph in zip(self._group, graphs, strict=True):
                with torch.cuda.stream(rank.stream):
                    graph()

        return replay

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def check(self) -> None:
        """Raises PeerTimeoutError where a call has missed a peer, WorkspaceError in debug mode."""
        self._group.synchronize()

    def failed(self, text: str, *, raised: bool) -> None:
        """Nobody else is to hear of it."""

    def agree(self, message: Any) -> list[Any]:
        return [message]

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class Processes:
    """This process's rank among the others, on a GPU or on the CPU."""

    def __init__(self) -> None:
        rank, world, self.device = launcher.init_from_env(timeout_s=GROUP_TIMEOUT_S)
        gpu = self.device.type == "cuda"
        self.setting = Setting(world, gpu=gpu, streams=False)
        self.mine = (rank,)
        self.group: Any = None
        self.alone, _ = dist.new_subgroups(1, backend="gloo")
        # Not the group of calls and init: there a rank may still be when another has failed.
        limit = timedelta(seconds=AGREE_TIMEOUT_S)
        self._agreement = groups.resolve(dist.new_group(backend="gloo", timeout=limit))
        where = os.environ.get(launcher.PLACEMENT, f"{world} processes")
        name = f" on {torch.cuda.get_device_name(self.device)}" if gpu else ""
        self.where = f"{world} ranks as processes{name} ({where})"
        self._streams = [torch.cuda.Stream(self.device) for _ in range(3)] if gpu else []

    def renew(self, *, how: str, **arguments: Any) -> None:
        if self.group is not None:
            gemma_ar_norm.close(self.group)
            dist.destroy_process_group(self.group)
            self.group = None
        if how.startswith("close"):
            gemma_ar_norm.close()
        if self.setting.gpu:
            torch.cuda.empty_cache()  # graphs that have gone
        if how == "new group":
            self.group = dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT_S))
        if how == "close, first call":
            hidden = arguments["hidden_size"]
            x = torch.ones(1, hidden, dtype=arguments["dtype"], device=self.device)
            gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, x[0])
        else:
            workspace = gemma_ar_norm.init(self.group, **arguments)
            if self.setting.gpu and not workspace.fused:
                raise gemma_ar_norm.WorkspaceError(
                    "soak: ranks that reach each other's memory are required, for the unfused path "
                    f"promises no bits; got an unfused workspace: {workspace.reason}"
                )

    def queue(self, calls: Sequence[Call], how: str) -> None:
        streams = itertools.cycle(self._streams[:2] if how == "two streams" else [None])
        for call, stream in zip(calls, streams, strict=False):
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                self._run(call)
                if call.kind.between:  # torch's work, in memory that it gets and gives back
                    other = torch.full((8, call.kind.hidden), -1.0, device=self.device)
                    other.mul_(other).sum()

    def _run(self, call: Call) -> None:
        call.run(self.mine[0], self.alone if call.kind.alone else self.group)

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """A graph; on the CPU the calls themselves. Returns what replays it."""

        def of_rank() -> None:
            for call in calls:
                self._run(call)

        if not self.setting.gpu:
            return of_rank
        return capture(of_rank, self._streams[2], self.device)

    def synchronize(self) -> None:
        if self.setting.gpu:
            torch.cuda.synchronize(self.device)

    def check(self) -> None:
        gemma_ar_norm.synchronize(self.group)

    def failed(self, text: str, *, raised: bool) -> None:
        """Says so at once, for the others may never come to agree.

        raised: they may wait for this rank in an exchange. It closes its connections, so that they
        fail there now and not after GROUP_TIMEOUT_S.
        """
        print(text, file=sys.stderr, flush=True)
        if raised:
            for group in [None] if self.group is None else [None, self.group]:
                with contextlib.suppress(ValueError):  # it has been destroyed
                    groups.hang_up(groups.resolve(group))

    def agree(self, message: Any) -> list[Any]:
        return groups.all_gather_json(self._agreement, message)

    def close(self) -> None:
        """With the default group, and so all workspaces."""
        dist.destroy_process_group()


def capture(
    calls: Callable[[], None], stream: torch.cuda.Stream, device: torch.device
) -> Callable[[], None]:
    """A graph of these calls; returns its replay. (Without torch.cuda.graph, which empties the
    cache of memory: that is needed while ranks wait for each other.)"""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # others' threads may call CUDA
        try:
            calls()
        finally:
            graph.capture_end()
    torch.cuda.synchronize(device)
    return graph.replay


# ----------------------------------------------------------------------------------------- batches


class Counts:
    """Calls by category, and what they are expected to be."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.by_category: dict[str, Counter[str]] = defaultdict(Counter)
        self._paths: dict[tuple[Any, ...], dict[str, str]] = {}

    def new_workspace(self, how: str) -> None:
        self.by_category["workspace"][how] += 1
        self._paths.clear()

    def add(self, batch: Batch, index: int, data: Data, group: Any) -> None:
        kind = batch.calls[index]
        found = categories_of(batch, kind, data)
        if batch.chained and index > 0:
            del found["values"]  # they come from the call before
        if self._setting.gpu:
            found |= self._path(kind, group)
        for category, value in found.items():
            self.by_category[category][value] += 1

    def _path(self, kind: Any, group: Any) -> dict[str, str]:
        key = (kind.rows, kind.hidden, kind.dtype, kind.algorithm, kind.alone)
        if key not in self._paths:
            said = gemma_ar_norm.explain(*key[:3], group=group, algorithm=kind.algorithm)
            launches = str(said.launches) if said.launches < 2 else "several"
            self._paths[key] = {"path": said.path, "launches": launches}
        return self._paths[key]

    def missing(self) -> list[str]:
        """What no call was, in words."""
        return [
            f"{category}: {value}"
            for category, values in all_categories(self._setting).items()
            for value in values
            if value not in self.by_category.get(category, ())
        ]


def run_batch(ranks: Any, seed: int, batch: Batch, counts: Counts) -> tuple[int, int, list[str]]:
    """(calls that were made, those with mismatches, what is wrong, in words)."""
    calls: list[Call] = []
    for kind in batch.calls:
        before = calls[-1] if batch.chained and calls else None
        calls.append(Call(kind, ranks.setting.ranks, ranks.mine, ranks.device, before))
    made, problems = 0, []
    replay: Callable[[], None] | None = None
    for number in range(batch.replays):
        for i, call in enumerate(calls):
            call.fill(data_of(seed, batch.number, i, number))
        ranks.synchronize()
        if batch.how == "graph":
            replay = replay or ranks.capture(calls)
            replay()
        else:
            ranks.queue(calls, batch.how)
        ranks.synchronize()
        wrong = torch.stack([call.wrong() for call in calls]).tolist()
        made += len(calls)
        for i, (call, count) in enumerate(zip(calls, wrong, strict=True)):
            assert call.data is not None
            group = ranks.alone if call.kind.alone else ranks.group
            counts.add(batch, i, call.data, group)
            if count:
                text = call.explain() or f"{count} elements differed, and none when looked at again"
                which = f"call {i} of {len(calls)}, {batch.mode}, {number + 1} of {batch.replays}"
                problems.append(f"{which}: {text}\n    {call.kind}\n    {call.data}")
        if problems:
            break
    mismatches = len(problems)
    try:
        ranks.check()
    except RuntimeError as error:  # a timeout says more than its NaN
        problems.insert(0, f"{type(error).__name__}: {error}")
    return made, mismatches, problems


def soak(
    ranks: Any,
    seed: int,
    batches: tuple[int, int | None],
    minutes: float | None,
    tell: Callable[[Report], None],
) -> Report:
    """Runs batches, from the first to the last or until time is up; returns the report.

    Collective. tell: is shown the report before every batch, and at the end.
    """
    first, last = batches
    counts, start = Counts(ranks.setting), time.monotonic()
    report: Report = {
        "seed": seed,
        "ranks": ranks.setting.ranks,
        "as": "streams" if ranks.setting.streams else "processes",
        "where": ranks.where,
        "minutes": minutes,
        "seconds": 0.0,
        "batch": first,
        "calls": 0,
        "mismatches": 0,
        "problems": [],
        "counts": counts.by_category,
        "missing": [],
        "finished": False,
    }
    for number in itertools.count(first):
        report["batch"] = number
        tell(report)
        made, mismatches, raised = 0, 0, False
        problems: list[str] = []
        try:
            if number == first or number % BATCHES_A_WORKSPACE == 0:
                chosen = workspace_of(seed, number, ranks.setting)
                ranks.renew(**chosen)
                counts.new_workspace(chosen["how"])
            batch = batch_of(seed, number, ranks.setting)
            made, mismatches, problems = run_batch(ranks, seed, batch, counts)
        except Exception:
            problems, raised = [traceback.format_exc().strip()[-MAX_PROBLEM:]], True
        report["calls"] += made
        report["seconds"] = time.monotonic() - start
        if problems:
            ranks.failed("\n".join(failure(report, problems[:1])), raised=raised)
        own = {
            "problem": problems[0][:MAX_PROBLEM] if problems else "",
            "mismatches": mismatches,
            "over": minutes is not None and report["seconds"] >= minutes * 60,
        }
        said = ranks.agree(own)
        report["mismatches"] += max(one["mismatches"] for one in said)
        report["problems"] = [
            f"on rank {rank}: {one['problem']}" if len(said) > 1 else one["problem"]
            for rank, one in enumerate(said)
            if one["problem"]
        ]
        over = said[0]["over"]  # rank 0's clock
        if report["problems"] or over or number == last:
            break
    report["finished"] = True
    report["missing"] = counts.missing() if over and not report["problems"] else []
    tell(report)
    return report


# ------------------------------------------------------------------------------------------- words


def summary(report: Report) -> str:
    """How a run ended, as text: the last line says it in one."""
    lines = []
    for category, values in report["counts"].items():
        in_order = sorted(values.items(), key=lambda item: -item[1])
        lines.append(f"  {category}: " + ", ".join(f"{name} {n:,}" for name, n in in_order))
    if report["missing"]:
        lines.append("no call of: " + "; ".join(report["missing"]))
    if report["problems"]:
        lines += failure(report, report["problems"])
    elif not report["finished"]:
        lines += ["", *repeat_commands(report)]
    ended = "" if report["finished"] else "did not finish: "
    lines.append(
        f"soak: {ended}{report['calls']:,} calls in {report['seconds']:.0f} s, "
        f"{report['mismatches']:,} mismatches, seed {report['seed']}, {report['where']}"
    )
    return "\n".join(lines)


def failure(report: Report, problems: Sequence[str]) -> list[str]:
    first = f"FAILED in batch {report['batch']} of seed {report['seed']}:"
    return ["", first, *(f"  {problem}" for problem in problems), "", *repeat_commands(report)]


def repeat_commands(report: Report) -> list[str]:
    batch = report["batch"]
    first = batch // BATCHES_A_WORKSPACE * BATCHES_A_WORKSPACE
    command = (
        f"python -m gemma_ar_norm soak --seed {report['seed']} --ranks {report['ranks']} "
        f"--as {report['as']} --batch"
    )
    return [
        f"to repeat that batch alone:          {command} {batch}",
        f"and all before it on its workspace:  {command} {first}-{batch}",
    ]


class Progress:
    """A line that is rewritten on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.report: Report | None = None  # the latest
        self._on_terminal = sys.stdout.isatty()
        self._every_s = PROGRESS_ON_A_TERMINAL_S if self._on_terminal else PROGRESS_S
        self._next = time.monotonic() + self._every_s

    def __call__(self, report: Report) -> None:
        self.report = report
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every_s
        of = f"/{report['minutes'] * 60:.0f}" if report["minutes"] is not None else ""
        line = (
            f"soak: {report['seconds']:.0f}{of} s, {report['calls']:,} calls, "
            f"{report['mismatches']:,} mismatches, seed {report['seed']}, batch {report['batch']}"
        )
        if self._on_terminal:
            print(f"\r{line}\x1b[K", end="", flush=True)
        else:
            print(line, flush=True)

    def end(self) -> None:
        if self._on_terminal:
            print("\r\x1b[K", end="", flush=True)


class ReportFile:
    """What the first process writes, and the one that started it reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, report: Report) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(report))
        new.replace(self._path)

    def read(self) -> Report | None:
        try:
            found: Report = json.loads(self._path.read_text())
            return found
        except FileNotFoundError:
            return None


# -------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Runs the soak and returns its exit code. worker: the command that one process runs."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.minutes is None and (options.batch is None or options.batch[1] is None):
        parser.error("--minutes: how long to run is required; got none; pass --minutes 5")
    batches = options.batch or (0, None)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    if options.worker is not None:
        return _work(Path(options.worker), seed, batches, options.minutes)

    if options.ranks_as != "processes":
        # A hardware queue for each stream, or a rank that waits could hold up another. Before CUDA
        # starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    gpus = launcher.gpu_count()
    ranks = options.ranks or demo.default_ranks(gpus)
    ranks_as = options.ranks_as or ("streams" if gpus == 1 else "processes")
    if ranks_as == "streams" and gpus == 0:
        parser.error(
            "--as: processes is required where there is no CUDA GPU; got streams; leave it out"
        )
    print(f"soak: seed {seed}, {ranks} ranks as {ranks_as}", flush=True)
    run = _run_streams if ranks_as == "streams" else functools.partial(_run_processes, worker)
    with _shown() as progress:
        try:
            report, exit_code, more = run(ranks, seed, batches, options.minutes, progress)
        except KeyboardInterrupt:
            report, exit_code, more = progress.report, EXIT_INTERRUPTED, "soak: interrupted"
    if report is None:
        print(f"soak: did not finish: no batch, seed {seed}, {ranks} ranks as {ranks_as}")
    else:
        print(summary(report))
        if options.json is not None:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if more:
        print(more, file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    def number(least: float, most: float, kind: type, what: str) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            with contextlib.suppress(ValueError):
                if least <= kind(text) <= most:
                    return kind(text)
            raise argparse.ArgumentTypeError(f"{what} is required; got {text!r}")

        return read

    def some_batches(text: str) -> tuple[int, int | None]:
        first, dash, last = text.partition("-")
        if first.isdecimal() and (last.isdecimal() or not last):
            found = int(first), int(last) if last else None if dash else int(first)
            if found[1] is None or found[0] <= found[1]:
                return found
        raise argparse.ArgumentTypeError(f"17, 0-17 or 17- is required; got {text!r}")

    parser = argparse.ArgumentParser(
        prog="python -m gemma_ar_norm soak",
        description="Random calls, each compared with reference.py bit for bit. Exit code 1 and "
        "the command that repeats it at the first mismatch or exception; 130 after Ctrl-C. Not "
        'among the calls: algorithm="unfused", torch.compile and debug mode.',
    )
    parser.add_argument(
        "--minutes",
        type=number(0, 1e6, float, "a number from 0 to 1000000"),
        metavar="M",
        help="how long to run",
    )
    parser.add_argument(
        "--seed",
        type=number(0, 2**63, int, "an integer, 0 or more,"),
        metavar="S",
        help="makes the calls that a run with this seed made; default: a new one",
    )
    parser.add_argument(
        "--ranks",
        type=number(MIN_RANKS, MAX_RANKS, int, f"an integer from {MIN_RANKS} to {MAX_RANKS}"),
        metavar="N",
        help="default: a GPU each (at most 8), 4 on one GPU, or 2 on the CPU",
    )
    parser.add_argument(
        "--as",
        dest="ranks_as",
        choices=("streams", "processes"),
        help="streams: of one process, on one GPU, the default where there is one; processes: on "
        "all GPUs, or on the CPU",
    )
    parser.add_argument(
        "--batch",
        type=some_batches,
        metavar="B",
        help="batches of the seed to run, such as 17, 0-17, or 17- until time is up; default: 0-",
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the report")
    parser.add_argument("--worker", metavar="REPORT", help=argparse.SUPPRESS)
    return parser


@contextlib.contextmanager
def _shown() -> Iterator[Progress]:
    progress = Progress()
    try:
        yield progress
    finally:
        progress.end()


Outcome = tuple[Report | None, int, str]  # report, exit code, what else is to be said


def _run_streams(
    ranks: int,
    seed: int,
    batches: tuple[int, int | None],
    minutes: float | None,
    progress: Progress,
) -> Outcome:
    streams = Streams(ranks)
    try:
        report = soak(streams, seed, batches, minutes, progress)
    finally:
        streams.close()
    return report, 1 if report["problems"] else 0, ""


def _run_processes(
    worker: Sequence[str],
    ranks: int,
    seed: int,
    batches: tuple[int, int | None],
    minutes: float | None,
    progress: Progress,
) -> Outcome:
    first, last = batches
    with tempfile.TemporaryDirectory(prefix="gan_soak_") as directory:
        file = Path(directory) / "report.json"
        command = [*worker, str(file), "--seed", str(seed)]
        command += ["--batch", f"{first}-{'' if last is None else last}"]
        limit = WITHOUT_MINUTES_S
        if minutes is not None:
            command += ["--minutes", str(minutes)]
            limit = minutes * 60 + START_AND_END_S
        report_file, ended = ReportFile(file), threading.Event()

        def show() -> None:
            while not ended.wait(PROGRESS_ON_A_TERMINAL_S):
                report = report_file.read()
                if report is not None:
                    progress(report)

        shower = threading.Thread(target=show, daemon=True)
        shower.start()
        try:
            result = launcher.run(command, ranks, timeout_s=limit, show="nothing")
        finally:
            ended.set()
            shower.join()
        report = report_file.read()
    more = f"{result.placement}: {result.reason}" if result.reason else ""
    if report is None or not report["finished"] or (result.exit_code and not report["problems"]):
        more = f"{result.transcript()[-8000:]}\n{more}"
    return report, result.exit_code, more


def _work(
    report_file: Path, seed: int, batches: tuple[int, int | None], minutes: float | None
) -> int:
    """What each process does; returns its exit code."""
    processes = Processes()
    try:
        first = processes.mine[0] == 0
        tell = ReportFile(report_file) if first else lambda report: None
        report = soak(processes, seed, batches, minutes, tell)
    finally:
        processes.close()
    return 1 if report["problems"] else 0
