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


# Measured with bench/streams on one H200 (132 SMs, 132/N a rank) on 2026-11-23: bf16, residual,
# graphs of 20 calls, us a call, for 1, 2 and 4 blocks a row. Not measured with one rank a GPU.
#   hidden 640, 1 row:      N=2 2.79 2.90 -       N=4 -                 N=8 3.68 3.74 -
#   hidden 4096, 1 row:     N=2 2.73 2.43 2.34    N=4 3.76 3.04 3.00    N=8 5.80 4.56 4.07
#   hidden 4096, 8 rows:    N=2 3.32 2.99 2.82    N=4 4.37 3.73 3.66    N=8 6.36 5.98 5.78
#   hidden 4096, 64 rows:   N=2 4.09 3.66 3.97    N=4 8.87 7.72 8.29    N=8 30.5 29.2 30.1
#   hidden 8192, 64 rows:   N=2 5.62 5.47 6.36    N=4 -                 N=8 59.6 60.2 59.2
#   hidden 16384, 64 rows:  N=2 8.40 9.04 11.9    N=4 -                 N=8 121 123 125
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
