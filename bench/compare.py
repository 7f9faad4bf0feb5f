#!/usr/bin/env python3
"""Says what got slower between two reports of bench_fused.py or streams/run.py.

    python bench/compare.py BEFORE.json AFTER.json [--percent 5] [--force]

Exit code 0: nothing is slower by more than --percent. 1: something is, or came to be wrong, or one
of ours (floor, ours/..., plan) has no time any more at a size at which others have. 2: the two
cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from harness import report as reports

SLOWER, NOT_COMPARED = 1, 2
OURS = ("floor", "ours/", "plan")  # the last in streams, of which shapes may be left out


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("before")
    p.add_argument("after")
    p.add_argument("--percent", type=float, default=5.0, help="that are no difference (5)")
    p.add_argument("--force", action="store_true", help="also where the conditions differ")
    given = p.parse_args(arguments)
    if not given.percent >= 0:
        p.error(f"--percent: 0 or more is required; got {given.percent:g}")
    try:
        before, after = reports.load_cells(given.before), reports.load_cells(given.after)
    except ValueError as error:
        print(error, file=sys.stderr)
        return NOT_COMPARED
    if problems := differences(before, after):
        print("not the same conditions:", *problems, sep="\n  ", file=sys.stderr)
        if not given.force:
            print("nothing is compared; --force does it all the same", file=sys.stderr)
            return NOT_COMPARED
    return compare(cells_of(before), cells_of(after), given.percent)


def differences(before: reports.Report, after: reports.Report) -> list[str]:
    """Why the times of the two say nothing about each other."""
    found = []
    for name in (*reports.CONDITIONS, reports.OPTIONS):
        values = [report[name] for report in (before, after) if name in report]
        if len(values) < 2:
            continue  # options, in an older report
        if name == "placement":  # without the launcher's note on how MPS came to be
            values = [value.split(" (")[0] for value in values]
        if values[0] != values[1]:
            found.append(f"{name}: {values[0]} before, {values[1]} after")
    for when, report in (("before", before), ("after", after)):
        if not report["complete"]:
            found.append(f"complete: the run {when} ended before all was measured")
    shares = [
        {key: cell["multiprocessors"] for key, cell in cells_of(report).items()}
        for report in (before, after)
    ]
    for key in shares[0]:
        if key in shares[1] and shares[0][key] != shares[1][key]:
            found.append(
                f"multiprocessors a rank: {shares[0][key]} before, {shares[1][key]} after, "
                f"{reports.name_of(key)}"
            )
            break  # one says enough
    if not found and before["gpu"] == "CPU":
        found.append("gpu: none: the times of the CPU path mean nothing")
    return found


def cells_of(report: reports.Report) -> dict[reports.Key, dict[str, Any]]:
    return {reports.key(cell): cell for cell in report["cells"]}


def compare(
    before: dict[reports.Key, dict[str, Any]],
    after: dict[reports.Key, dict[str, Any]],
    percent: float,
) -> int:
    common = [key for key in before if key in after]
    for title, keys in (
        ("missing", [key for key in before if key not in after]),
        ("new", [key for key in after if key not in before]),
    ):
        for key in keys:
            print(f"{title}: {reports.name_of(key)}")
    broken = [key for key in common if after[key]["wrong"] and not before[key]["wrong"]]
    for key in broken:
        print(f"wrong now: {reports.name_of(key)}: {after[key]['wrong']}")

    sizes = {reports.shape(cell) for cell in after.values() if cell["us"]}
    gone = [
        key
        for key, cell in before.items()
        if cell["us"] and cell["algorithm"].startswith(OURS) and reports.shape(cell) in sizes
        if key not in after or not (after[key]["us"] or after[key]["wrong"])
    ]

    changes = {
        key: (after[key]["us"] / before[key]["us"] - 1) * 100
        for key in common
        if after[key]["us"] and before[key]["us"]
    }
    if not changes and not broken and not gone:
        print("no cell of the one is in the other", file=sys.stderr)
        return NOT_COMPARED
    slower = sorted((key for key in changes if changes[key] > percent), key=lambda k: -changes[k])
    faster = [key for key in changes if changes[key] < -percent]
    lines: list[Sequence[str]] = [(*reports.KEY, "before us", "after us", "change")]
    for key in slower:
        times = [f"{cells[key]['us']:.2f}" for cells in (before, after)]
        lines.append((*map(str, key), *times, f"{changes[key]:+.1f}%"))
    if slower:
        print(*reports.columns(lines, reports.LEFT), sep="\n")
    print(
        f"{len(changes)} cells: {len(slower)} slower by more than {percent:g}%, "
        f"{len(faster)} faster, {len(broken)} wrong now, {len(gone)} of ours without a time now"
    )
    return SLOWER if slower or broken or gone else 0


if __name__ == "__main__":
    sys.exit(main())
