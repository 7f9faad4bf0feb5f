"""The plan: which kernel a call takes, and in which shape.

Made once for each workspace from values that all its ranks agreed on, so that every rank launches
the same kernels in the same shape; looked up in C++ at every call (csrc/host/plan.h), so that a
compiled graph has no guard on the number of rows. Pure: no torch, no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FUSED_ALGORITHMS = ("one_shot", "two_shot")
"""By their numbers in csrc/host/plan.h, Algorithm."""

ONE_SHOT, TWO_SHOT = range(2)

ALGORITHMS = ("auto", *FUSED_ALGORITHMS, "unfused")
"""What `algorithm=` takes. "auto" follows the plan; "unfused" is the group's own all-reduce and our
local norm."""

MIN_RANKS, MAX_RANKS = 2, 8
PACK_BYTES = 16

NO_LIMIT = 2**32 - 1

MAX_THREADS = 512
"""Of a block; longer rows take several packs a thread, or several blocks."""

THREADS_A_MULTIPROCESSOR = 1024
"""What fits on it, at the kernels' 64 registers a thread. A launch takes half of it where the next
kernel of the stream is to start early."""


class Trigger:
    """When a kernel lets the next one of its stream start (programmatic dependent launch)."""

    NEVER = 0
    AT_START = 1
    AFTER_PUSH = 2


class Rule(NamedTuple):
    """Algorithm and shape of calls up to a size. Of several rules the first that takes a call
    counts; the last takes every call. Where an algorithm is asked for, only its rules count."""

    max_rows: int
    max_row_packs: int  # a pack is 16 bytes of a row
    max_packs: int  # of all rows together
    algorithm: int
    blocks_a_team: int  # blocks of a cluster that share a row
    max_threads: int  # of a block
    threads_a_multiprocessor: int
    trigger: int
    lead_rows: int
    multiprocessors: int  # that a launch may fill: at most what every rank has
    evidence: str  # where the rule comes from

    @property
    def numbers(self) -> tuple[int, ...]:
        """What C++ needs of it."""
        return self[:-1]


class Size(NamedTuple):
    """Calls of at most so many rows, of at most so many packs each and together."""

    max_rows: int = NO_LIMIT
    max_row_packs: int = NO_LIMIT
    max_packs: int = NO_LIMIT


class Shape(NamedTuple):
    """A line of a table: how calls up to a size are launched.

    The limits of rows and packs are for each multiprocessor that a rank has. full: a launch takes
    the whole of each, and the next kernel does not start early.
    """

    blocks: int  # that share a row
    full: bool = False
    lead_rows: int = 1
    rows: float = NO_LIMIT
    row_packs: int = NO_LIMIT
    packs: float = NO_LIMIT

    def size(self, multiprocessors: int) -> Size:
        def limit(of_one: float) -> int:
            return max(1, min(NO_LIMIT, int(of_one * multiprocessors)))

        return Size(limit(self.rows), self.row_packs, limit(self.packs))


# ----------------------------------------------------------------------------------- the tables
# Measured with bench/streams on one H200 (132 SMs, 132/N a rank) on 2026-11-29: bf16, residual,
# graphs of 20 calls, 1 to 1024 rows of hidden 1024 to 16384, 2, 3, 4, 6 and 8 ranks, 196 cells;
# bench/results/2026-11-29-h200/sweep_HIDDEN.txt has all of it. Of the shapes that were tried the
# tables take one within 5 % of the best in all cells but 10, and within 9 % in all but one (8 rows
# of 16384, N=8: 16 %). With one rank a GPU only one-shot was looked at, on two H200 with 1 to 256
# rows of hidden 4096 and 5120 (bench/results/2026-11-28-2xh200): other shapes gain 1 %.
#
# A row in more, smaller blocks takes less time, until there are more rows than places for them.
# Launches of many rows a block gain more by taking all places than by the next one's early start;
# two-shot, and rows of more than 512 packs, which fill half the places, sooner than others. Early
# start after the pushes, not at the start, is up to 7 % better (64 rows of 4096, N=8).

MANY_RANKS = 6


def shapes_of(ranks: int) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """The tables of one-shot and of two-shot."""
    many = ranks >= MANY_RANKS
    # Beyond it pushes two rows ahead take longer than one: 1024 rows of 4096, N=8, 2 %. (512 rows:
    # not. Of other numbers of ranks such sizes were not measured, or are alike.)
    most_ahead = 20_000 if ranks == MAX_RANKS else NO_LIMIT
    row_in_eight = Shape(8, rows=1 / 8 if many else 1 / 64)
    short_rows = (
        Shape(4, row_packs=512, rows=1 / 2),
        Shape(2, row_packs=512, packs=1900 if ranks == 2 else 3000),
        Shape(1, full=True, row_packs=512),
    )
    one_shot = (
        Shape(1, row_packs=128),
        *((row_in_eight, *short_rows) if many else (*short_rows, row_in_eight)),
        Shape(4, rows=1 / 2),
        Shape(2, packs=1250),
        Shape(2, full=True),
    )
    large = (
        (
            Shape(1, rows=1, lead_rows=2),
            Shape(2, full=True, packs=5000, lead_rows=2),
            Shape(1, full=True, packs=16_000, lead_rows=2),
            Shape(1, full=True),
        )
        if many
        else (
            Shape(2, packs=600),
            Shape(2, full=True, packs=16_000, lead_rows=2),
            Shape(2, full=True),
        )
    )
    two_shot = (
        Shape(1, row_packs=128, packs=2000),
        Shape(4, rows=1 / 2, packs=1250),
        Shape(1, row_packs=256, packs=1600, lead_rows=2),
        Shape(2, row_packs=512, packs=1250),
        Shape(1, full=True, row_packs=512, packs=most_ahead, lead_rows=2),
        *large,
    )
    return one_shot, two_shot


# Up to which size ranks that share a GPU do calls by one-shot. 5 and 7 were not measured: what lies
# between their neighbours.
_ONE_SHOT_ON_ONE_GPU = {
    2: (Size(max_packs=550_000),),
    3: (Size(max_packs=150_000),),
    4: (Size(max_packs=28_000),),
    5: (Size(max_packs=18_000),),
    6: (Size(max_row_packs=512, max_packs=13_000), Size(max_packs=9000)),
    7: (Size(max_packs=7000),),
    8: (Size(max_packs=4200),),
}
_ON_ONE_GPU = "measured on one H200 that all ranks share, 2026-11-29"
_NOT_MEASURED = (5, 7)

# ---------------------------------------------------- several GPUs: two measured, more by a model

TWO_RANKS_BYTES = 7 << 20
"""Up to which size of x one-shot is no slower than two-shot between two GPUs. Both move the same
there; two-shot is a hop slower, and faster a byte (why was not looked into). Two H200 over NVLink,
2026-11-28, hidden 2048 to 8192: one-shot is faster up to 5.25 MiB, they are alike at 8 (2 %), and
two-shot is from 10.5 on (13 %): bench/results/2026-11-28-2xh200/crossovers.txt."""

HOP_S = 1.1e-6
"""What a second hop over NVLink costs, in seconds: an H100's one-way store of 762 ns and a load of
its memory, as published. (Two H200: 720 to 740 ns one way; one row by two-shot 1.1 to 1.45 us more
than by one-shot.)"""

LINK_BYTES_A_SECOND = {8: 240e9, 9: 360e9, 10: 720e9, 12: 720e9}
"""What a GPU's NVLinks bring in one direction, by major compute capability, as published. (An H200
pushes 365e9. GPUs without NVLink have no native peer atomics, so their ranks take the unfused path:
`init`.)"""


def crossover_bytes(ranks: int, major: int) -> int:
    """The bytes of x up to which one-shot is no slower than two-shot over NVLink; of three and more
    ranks by the model

        one-shot: latency + (ranks - 1) bytes / speed
        two-shot: latency + HOP_S + 2 (ranks - 1) bytes / (ranks speed)
    """
    if ranks == 2:
        return TWO_RANKS_BYTES
    speed = LINK_BYTES_A_SECOND.get(major, LINK_BYTES_A_SECOND[max(LINK_BYTES_A_SECOND)])
    return int(HOP_S * speed * ranks / ((ranks - 1) * (ranks - 2)))


# ---------------------------------------------------------------------------------------- the plan


def make_rules(
    *,
    ranks: int,
    multiprocessors: int,
    compute_capability: tuple[int, int],
    max_cluster: int,
    shared_device: bool,
    one_gpu: bool,
    clusters_fill: bool = True,
) -> list[Rule]:
    """The rules of a workspace.

    Args:
        ranks: 2 to 8.
        multiprocessors: that every rank may fill with its blocks. Where `shared_device`, its share
            of them.
        compute_capability: the least of all ranks' GPUs.
        max_cluster: blocks a cluster can have on all of them; 1 where there are no clusters.
        shared_device: several ranks run at the same time on one GPU that is not partitioned between
            them. Then kernels do not start early: a rank's next kernel could take the place that
            another rank's present one needs, and both would wait for ever.
        one_gpu: all ranks are on one GPU, whose memory is the only link between them.
        clusters_fill: a launch that takes whole multiprocessors may be of clusters. Where not, only
            launches that leave half of the places free are.
    """
    if not MIN_RANKS <= ranks <= MAX_RANKS:
        raise ValueError(
            f"ranks: {MIN_RANKS} to {MAX_RANKS} are required; got {ranks}; pass a group's"
        )
    starts_early = compute_capability >= (9, 0) and not shared_device

    def rule(size: Size, algorithm: int, shape: Shape, evidence: str) -> Rule:
        early = starts_early and not shape.full
        most = max(1, min(max_cluster, multiprocessors))  # and a power of two, as all shapes are
        if not (early or clusters_fill):
            most = 1
        blocks = min(shape.blocks, 1 << (most.bit_length() - 1))
        # Clusters need places beside each other. Where launches of all ranks filled (nearly) all
        # places of a GPU, with torch's kernels among them, some never started: four ranks as
        # streams, one H200, 2026-11-28.
        places = multiprocessors
        if shared_device and blocks > 1:
            places = max(blocks, multiprocessors // 2)
        return Rule(
            *size,
            algorithm,
            blocks,
            MAX_THREADS,
            THREADS_A_MULTIPROCESSOR // (2 if early else 1),
            Trigger.AFTER_PUSH if early else Trigger.NEVER,
            shape.lead_rows,
            places,
            evidence,
        )

    if one_gpu:
        one_shot_sizes = _ONE_SHOT_ON_ONE_GPU[ranks]
        evidence = _ON_ONE_GPU
        if ranks in _NOT_MEASURED:
            evidence = f"between what was {_ON_ONE_GPU}, with {ranks - 1} and {ranks + 1} ranks"
    else:
        most_bytes = crossover_bytes(ranks, compute_capability[0])
        one_shot_sizes = (Size(max_packs=most_bytes // PACK_BYTES),)
        measured = "measured between two H200, 2026-11-28"
        how = measured if ranks == 2 else "by a model of NVLink, not measured"
        evidence = (
            f"one-shot up to {most_bytes} bytes {how}; shapes measured on one H200 that all ranks "
            "share, 2026-11-29"
        )
    one_shot, two_shot = (
        [(shape.size(multiprocessors), algorithm, shape) for shape in shapes]
        for algorithm, shapes in enumerate(shapes_of(ranks))
    )
    rules = [
        rule(_smaller(size, most), algorithm, shape, evidence)
        for most in one_shot_sizes
        for size, algorithm, shape in one_shot
    ]
    rules += [rule(*line, evidence) for line in two_shot]
    # For those who ask for one-shot at any size.
    rules += [rule(*line, "asked for by algorithm") for line in one_shot]
    return rules


def _smaller(a: Size, b: Size) -> Size:
    return Size(*map(min, a, b))


def most_one_shot_rows(rules: Sequence[Rule], max_rows: int, row_packs: int) -> int:
    """The rows of the largest call, of at most `max_rows`, that the rules have done by one-shot."""
    most = 0
    for rule in rules:
        if rule.algorithm == TWO_SHOT:
            break  # the rest of one-shot is for those who ask for it
        if row_packs <= rule.max_row_packs:
            most = max(most, min(rule.max_rows, rule.max_packs // row_packs, max_rows))
    return most
