"""How a call is timed.

On a GPU: a CUDA graph of dependent calls, replayed. Before each replay, on every rank and all on
the device: a store over twice the L2 (not with --warm-l2), and a small collective through which all
ranks come together (`Start`). Then an event, the replay, an event. The host queues replays behind
one long sleep of the GPU and waits at the end, so that its own time is in none of them: all at
once, or fewer where it is too slow for that (graphs of NCCL's kernels: the queue takes no more).
What cannot be captured, and the CPU path: rounds of calls queued one after the other, by the host's
clock, from a barrier until all are done; the L2 is as they leave it.

A number is that of the slowest rank, replay by replay (report.summary).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

import gemma_ar_norm

from .agree import agreed, gather
from .baselines import Baseline, World, ours
from .cases import Outputs

WARM_UPS = 3
SLOW_REPLAY_S, SLOW_REPLAYS = 0.05, 3  # ranks that are time-sliced
EAGER_ROUNDS, EAGER_ROUND_S = 7, 0.1
SLEEP_CYCLES = 20_000_000  # 10 ms, about: as long as the host may take to queue replays
FEWER_REPLAYS = (8, 1)  # behind a sleep, where all take longer

COPY_BYTES, COPIES = {"cuda": 256 << 20, "cpu": 16 << 20}, 20

Calls = Callable[[int], Outputs]  # makes so many dependent calls


@dataclass
class Timed:
    us: list[float]  # a call, of each replay on this rank
    outputs: Outputs  # of the last call
    calls: int  # in a replay


class Start:
    """Has all ranks go on together."""

    def __init__(self, world: World):
        self._world = world
        self._small = torch.zeros(1, 256, dtype=torch.bfloat16, device=world.device)
        self._weight = torch.zeros(256, dtype=torch.bfloat16, device=world.device)
        self._go: Callable[[], object]
        self.on_the_host = False  # then the host waits in each replay, and its time is in none
        if world.ranks == 1:
            self.how, self._go = "one rank: nothing", lambda: None
        elif world.gpu and not world.not_fused:
            self.how = "on the device: a fused call of one row"
            self._go = lambda: ours(self._small, self._weight, None, None)
        elif world.gpu and world.nccl:
            self.how = "on the device: NCCL's all-reduce of one row"
            self._go = lambda: dist.all_reduce(self._small)
        else:
            self.how, self._go = "on the host: a barrier", self._barrier
            self.on_the_host = True

    def __call__(self) -> None:
        self._go()

    def _barrier(self) -> None:
        if self._world.gpu:
            torch.cuda.synchronize()
        dist.barrier()


class Flush:
    """Puts something else into the L2."""

    def __init__(self, world: World, l2_bytes: int):
        self._buffer = None
        if world.gpu and l2_bytes > 0:
            self._buffer = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=world.device)

    def __call__(self) -> None:
        if self._buffer is not None:
            self._buffer.zero_()


def measure(
    baseline: Baseline,
    calls: Calls,
    world: World,
    start: Start,
    flush: Flush,
    graph_calls: int,
    replays: int,
) -> Timed:
    if not baseline.can_be_captured(world):
        return host_us(calls, world, graph_calls)
    return graph_us(baseline, calls, world, start, flush, graph_calls, replays)


def graph_us(
    baseline: Baseline,
    calls: Calls,
    world: World,
    start: Start,
    flush: Flush,
    graph_calls: int,
    replays: int,
) -> Timed:
    def capture() -> tuple[torch.cuda.CUDAGraph, Outputs]:
        calls(2)  # communicators, lazily loaded kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's threads may ask CUDA something meanwhile.
        with (
            baseline.capturing(),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            outputs = calls(graph_calls)
        return graph, outputs

    def once() -> float:
        start()
        begin = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def all_of_them() -> Timed:
        times = timed([graph.replay] * (WARM_UPS + replays), start, flush)[WARM_UPS:]
        gemma_ar_norm.check()  # raises where one of our calls missed a peer
        copies = (outputs[0].clone(), outputs[1].clone())
        torch.cuda.synchronize()  # the graph goes, and its memory with it
        return Timed([us / graph_calls for us in times], copies, graph_calls)

    graph, outputs = agreed(capture)
    # The slowest rank's, so that all replay equally often.
    if max(gather(agreed(once))) > SLOW_REPLAY_S:
        replays = SLOW_REPLAYS
    return agreed(all_of_them)


def timed(works: list[Callable[[], None]], start: Start, flush: Flush) -> list[float]:
    """Microseconds of each on the device, from where all ranks have come together."""
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in works
    ]

    def queue(which: slice) -> bool:
        """Whether the GPU slept until all of these were queued."""
        dist.barrier()
        torch.cuda._sleep(SLEEP_CYCLES)
        for work, (begin, end) in zip(works[which], events[which], strict=True):
            flush()
            start()
            begin.record()
            work()
            end.record()
        in_time = start.on_the_host or not events[which][0][0].query()
        torch.cuda.synchronize()
        return in_time

    # On all ranks alike, for they meet in each replay.
    for at_a_time in (len(works), *FEWER_REPLAYS):
        groups = (slice(i, i + at_a_time) for i in range(0, len(works), at_a_time))
        if all(all(gather(queue(group))) for group in groups):
            return [begin.elapsed_time(end) * 1e3 for begin, end in events]
    raise RuntimeError(
        "timing: a host that queues a replay while the GPU sleeps for 10 ms is required; got a "
        "slower one; pass fewer --calls"
    )


def host_us(calls: Calls, world: World, most: int) -> Timed:
    def seconds(count: int) -> float:
        dist.barrier()
        begin = time.perf_counter()
        calls(count)
        if world.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def agreed_seconds(count: int) -> float:
        return agreed(partial(seconds, count))

    agreed_seconds(1)
    slowest = max(gather(agreed_seconds(1)))  # equal on all ranks, so that all call equally often
    count = min(most, max(1, int(EAGER_ROUND_S / slowest)))
    times = [agreed_seconds(count) / count * 1e6 for _ in range(EAGER_ROUNDS)]
    return Timed(times, calls(most), count)


def copy_gb_s(world: World, start: Start) -> float:
    """What a rank reads and writes in a second while all do: the median copy of the slowest."""
    source = torch.ones(COPY_BYTES[world.device.type] // 4, device=world.device)
    target = torch.empty_like(source)

    def copy() -> None:
        torch.neg(source, out=target)  # a kernel: a plain copy may take a copy engine

    def seconds() -> float:
        dist.barrier()
        begin = time.perf_counter()
        copy()
        return time.perf_counter() - begin

    copy()
    if world.gpu:
        us = timed([copy] * COPIES, start, Flush(world, 0))
    else:
        us = [seconds() * 1e6 for _ in range(3)]
    return min(gather(2 * source.numel() * 4 / statistics.median(us) / 1e3))
