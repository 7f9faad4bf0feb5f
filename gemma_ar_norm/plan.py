"""The plan: which kernel a call takes, and in which shape.

Made once for each workspace from values that all its ranks agreed on, so that every rank launches
the same shape; looked up in C++ at every call (csrc/host/plan.h), so that a compiled graph has no
guard on the number of rows. Pure: no torch, no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

ALGORITHMS = ("auto", "one_shot", "unfused")
"""What `algorithm=` takes. "auto" follows the plan; "unfused" is the group's own all-reduce and our
local norm."""

ONE_SHOT = 0
"""Algorithm::kOneShot of csrc/host/plan.h."""

MIN_RANKS, MAX_RANKS = 2, 8

NO_LIMIT = 2**32 - 1

MAX_THREADS = 512
"""Of a block. Two such blocks fit on a multiprocessor, so that the next kernel starts early; longer
rows take several packs a thread, or several blocks."""


class Trigger:
    """When a kernel lets the next one of its stream start (programmatic dependent launch)."""

    NEVER = 0
    AT_START = 1
    AFTER_PUSH = 2


class Rule(NamedTuple):
    """The shape of calls up to a size. Of several rules the first that takes a call counts; the
    last takes every call."""

    max_rows: int
    max_row_packs: int  # a pack is 16 bytes of a row
    algorithm: int
    blocks_a_team: int  # blocks of a cluster that share a row
    max_threads: int  # of a block
    trigger: int
    multiprocessors: int  # of a rank: the least of all ranks


class TeamSize(NamedTuple):
    """How many blocks share a row, in calls of at most so many rows of at most so many packs."""

    max_rows: int
    max_row_packs: int
    blocks: int


# Measured with bench/streams on one H100 (132 SMs, 132/N a rank) on 2026-11-24 (bench/results):
# bf16, residual, graphs of 20 calls, us a call, for 1, 2 and 4 blocks a row. Not measured with one
# rank a GPU.
#   hidden 640, 1 row:      N=2 2.54 2.67 -       N=4 2.84 2.83 -       N=8 3.62 3.75 -
#   hidden 640, 64 rows:    N=2 2.99 3.10 -       N=4 3.66 3.80 -       N=8 6.33 7.70 -
#   hidden 4096, 1 row:     N=2 2.44 2.29 2.42    N=4 3.57 3.11 3.03    N=8 5.30 4.81 4.37
#   hidden 4096, 8 rows:    N=2 3.32 2.93 2.83    N=4 4.01 3.60 3.56    N=8 6.41 6.02 5.95
#   hidden 4096, 64 rows:   N=2 4.08 3.62 3.97    N=4 8.18 7.37 8.47    N=8 32.7 32.8 36.4
#   hidden 8192, 8 rows:    N=2 4.65 3.26 2.96    N=4 5.86 4.27 4.12    N=8 9.19 9.07 9.99
#   hidden 8192, 64 rows:   N=2 6.11 5.13 5.23    N=4 17.6 17.1 18.0    N=8 78.7 78.2 78.3
#   hidden 16384, 8 rows:   N=2 7.54 4.80 3.60    N=4 9.57 6.42 5.87    N=8 17.2 18.0 18.2
#   hidden 16384, 64 rows:  N=2 10.1 11.2 11.0    N=4 39.1 39.5 40.2    N=8 163 163 161
_TEAM_SIZES = (
    TeamSize(NO_LIMIT, 128, 1),
    TeamSize(8, NO_LIMIT, 4),
    TeamSize(NO_LIMIT, 1024, 2),
    TeamSize(NO_LIMIT, NO_LIMIT, 1),
)


def make_rules(
    *,
    ranks: int,
    multiprocessors: int,
    compute_capability: tuple[int, int],
    max_cluster: int,
    shared_device: bool,
) -> list[Rule]:
    """The rules of a workspace.

    Args:
        ranks: 2 to 8. The rules are the same for all of them today.
        multiprocessors: that every rank may fill with its blocks. Where `shared_device`, its share
        of them.
        compute_capability: the least of all ranks' GPUs.
        max_cluster: blocks a cluster can have on all of them; 1 where there are no clusters.
        shared_device: several ranks run at the same time on one GPU that is not partitioned between
        them. Then kernels do
            not start early: a rank's next kernel could take the place that another rank's present
            one needs, and both would wait for ever.
    """
    if not MIN_RANKS <= ranks <= MAX_RANKS:
        raise ValueError(f"ranks: {MIN_RANKS} to {MAX_RANKS} are required; got {ranks}")
    starts_early = compute_capability >= (9, 0) and not shared_device
    return [
        Rule(
            size.max_rows,
            size.max_row_packs,
            ONE_SHOT,
            max(1, min(size.blocks, max_cluster, multiprocessors)),
            MAX_THREADS,
            Trigger.AT_START if starts_early else Trigger.NEVER,
            multiprocessors,
        )
        for size in _TEAM_SIZES
    ]
