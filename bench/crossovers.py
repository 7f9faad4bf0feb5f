#!/usr/bin/env python3
"""What several GPUs' measurements say of the plan: which algorithm from which size on.

    python bench/crossovers.py REPORT.json ... [--links LINKS.json] [--json FILE]

REPORT.json: of bench_fused.py with the algorithms `floor` and `ours`, and `nccl` if there; one rank
a GPU; all of one kind of GPU, with the same L2 and calls. LINKS.json: of links/run.py on the same
machine. For every number of ranks:

  - up to which size one-shot is no slower than two-shot, beside what plan.py takes;
  - how far the plan's choice is from the faster algorithm, and NCCL + norm from the plan's;
  - with --links, a model of each call, and the measurement over it:
        one-shot: floor + latency + (ranks - 1) bytes / speed
        two-shot: floor + 2 latency + 2 (ranks - 1) / ranks bytes / speed
    floor: the residual add and norm alone, measured at that size; bytes: of x; latency: of a push;
    speed: what a GPU can push to all others at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import report as reports

ONE, TWO, PLAN, NCCL = "ours/one_shot", "ours/two_shot", "ours/auto", "nccl + norm"
ALIKE = 1.02  # times that differ by less say nothing
# What all reports must have alike: they may be of different numbers of ranks.
CONDITIONS = [name for name in reports.CONDITIONS if name not in ("gpus", "placement")]


@dataclass(frozen=True)
class Links:
    """latency_us: of a push of one pack. gb_s: of each GPU that pushes to all others at once."""

    latency_us: float
    gb_s: float

    @staticmethod
    def of(path: Path) -> Links:
        found = reports.load(path)
        if found.get("harness") != "links":
            raise ValueError(f"{path}: a report of links/run.py is required; got another; run it")
        try:
            return Links._of(path, found)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: a report of links/run.py is required; got {error!r} in it; run it"
            ) from None

    @staticmethod
    def _of(path: Path, found: reports.Report) -> Links:
        between = [
            one["ns"]
            for one in found["latency_ns"]
            if one["packs"] == 1 and (one["from"] != one["to"] or found["gpus"] == 1)
        ]
        by_pattern: dict[str, float] = {}
        for one in found["bandwidth"]:
            by_pattern[one["pattern"]] = max(one["gb_s"], by_pattern.get(one["pattern"], 0.0))
        if not between or not by_pattern:
            raise ValueError(f"{path}: latencies and bandwidths are required; got none")
        # One GPU alone, or where some do not reach each other, has no "all".
        return Links(statistics.median(between) / 1e3, by_pattern.get("all", by_pattern["pair"]))

    def model_us(self, algorithm: str, ranks: int, floor_us: float, size: int) -> float:
        hops, moved = (1, ranks - 1) if algorithm == ONE else (2, 2 * (ranks - 1) / ranks)
        return floor_us + hops * self.latency_us + moved * size / self.gb_s / 1e3


@dataclass
class Point:
    """A shape of call that was measured. us: by algorithm; size: the bytes of x."""

    ranks: int
    dtype: str
    form: str
    hidden: int
    rows: int
    size: int
    path: str  # what the plan took
    us: dict[str, float]
    model_us: dict[str, float]

    def over_best(self) -> float | None:
        found = [self.us[name] for name in (ONE, TWO) if name in self.us]
        return self.us[PLAN] / min(found) if found and PLAN in self.us else None

    def nccl_over_plan(self) -> float | None:
        return self.us[NCCL] / self.us[PLAN] if {NCCL, PLAN} <= self.us.keys() else None

    def over_model(self) -> float | None:
        """The plan's call over the model of the better algorithm."""
        return self.us[PLAN] / min(self.model_us.values()) if self.model_us else None


def require_alike(found: Sequence[reports.Report]) -> None:
    for name in CONDITIONS:
        if any(report[name] != found[0][name] for report in found):
            values = ", ".join(str(report[name]) for report in found)
            raise ValueError(
                f"{name}: one for all reports is required; got {values}; pass them one by one"
            )


def points_of(found: Iterable[reports.Report], links: Links | None) -> list[Point]:
    by_shape: dict[reports.Key, Point] = {}
    for report in found:
        for cell in report["cells"]:
            if cell["us"] is None:
                continue
            size = cell["rows"] * cell["hidden"] * reports.ITEM_BYTES[cell["dtype"]]
            kind = [cell[name] for name in ("ranks", "dtype", "form", "hidden", "rows")]
            point = by_shape.setdefault(reports.shape(cell), Point(*kind, size, "", {}, {}))
            if cell["algorithm"] in point.us:
                raise ValueError(
                    f"REPORT.json: each cell once is required; got two of "
                    f"{reports.name_of(reports.key(cell))}; pass one of their reports"
                )
            point.us[cell["algorithm"]] = cell["us"]
            if cell["algorithm"] == PLAN:
                point.path = cell["path"]
    points = [point for point in by_shape.values() if PLAN in point.us]
    if not points:
        raise ValueError(
            "REPORT.json: cells of ours/auto are required; got none; see bench_fused.py"
        )
    for point in points:
        floor = point.us.get(reports.FLOOR)
        if links is not None and floor is not None:
            point.model_us = {
                name: links.model_us(name, point.ranks, floor, point.size) for name in (ONE, TWO)
            }
    return sorted(points, key=lambda p: (p.ranks, p.dtype, p.form, p.hidden, p.rows))


def crossover(points: Iterable[Point]) -> tuple[int | None, int | None]:
    """(the largest size up to which one-shot is no slower, the next one measured), of points that
    differ in rows alone, by size; None where there is none."""
    last = None
    for point in points:
        if not {ONE, TWO} <= point.us.keys():
            continue
        if point.us[ONE] > point.us[TWO] * ALIKE:
            return last, point.size
        last = point.size
    return last, None


def table(points: Sequence[Point]) -> list[str]:
    head = ("ranks", "dtype", "form", "hidden", "rows", "KiB", "floor", "one_shot", "two_shot")
    head += ("plan", "took", "/best", "nccl", "nccl/plan", "model", "/model")
    rows: list[Sequence[str]] = [head]
    for p in points:
        times = [reports.number(p.us.get(n), 2) for n in (reports.FLOOR, ONE, TWO, PLAN)]
        model = min(p.model_us.values(), default=None)
        rows.append(
            [
                *(str(p.ranks), p.dtype, p.form, str(p.hidden), str(p.rows)),
                reports.number(p.size / 1024, 0),
                *times,
                p.path,
                reports.number(p.over_best(), 2),
                reports.number(p.us.get(NCCL), 2),
                reports.number(p.nccl_over_plan(), 2),
                reports.number(model, 2),
                reports.number(p.over_model(), 2),
            ]
        )
    return reports.columns(rows, {"dtype", "form", "took"})


def worst(points: Sequence[Point], value: Any, *, largest: bool = True) -> str:
    known = [(found, p) for p in points if (found := value(p)) is not None]
    if not known:
        return "not measured"
    found, p = (max if largest else min)(known, key=lambda one: one[0])
    return f"{found:.2f} ({p.rows} x {p.hidden} {p.dtype} {p.form})"


def conclusions(points: Sequence[Point], planned: Any) -> list[str]:
    lines = []
    for ranks in sorted({p.ranks for p in points}):
        mine = [p for p in points if p.ranks == ranks]
        lines.append(f"{ranks} ranks; the plan has one-shot up to {planned(ranks)}")
        for (dtype, form, hidden), group in itertools.groupby(
            mine, lambda p: (p.dtype, p.form, p.hidden)
        ):
            last, following = crossover(group)
            upto = "at no size" if last is None else f"up to {last} bytes"
            then = "" if following is None else f"; two-shot is faster at {following}"
            lines.append(f"  hidden {hidden} {dtype} {form}: one-shot is no slower {upto}{then}")
        small = [p for p in mine if p.size <= 256 << 10]
        lines += [
            f"  the plan over the faster algorithm, at most: {worst(mine, Point.over_best)}",
            "  NCCL + norm over the plan, at least: "
            f"{worst(mine, Point.nccl_over_plan, largest=False)}; up to 256 KiB: "
            f"{worst(small, Point.nccl_over_plan, largest=False)}",
            f"  over the model, at most: {worst(mine, Point.over_model)}",
        ]
    return lines


def planned_by(gpu: str) -> Any:
    """What plan.py has for GPUs of this name, in words."""
    from streams import run as streams

    plan = streams.load_plan()
    majors = {"A100": 8, "A800": 8, "B100": 10, "B200": 10, "B300": 10}  # the others: as an H100
    major = next((major for name, major in majors.items() if name in gpu), 9)

    return lambda ranks: f"{plan.crossover_bytes(ranks, major)} bytes"


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("reports", nargs="+", metavar="REPORT.json")
    p.add_argument("--links", type=Path, metavar="LINKS.json")
    p.add_argument("--json", type=Path, metavar="FILE", help="the points, with models")
    given = p.parse_args(arguments)
    if problem := reports.no_place("--json", given.json):
        p.error(problem)
    try:
        found = [reports.load_cells(path) for path in given.reports]
        require_alike(found)
        links = None if given.links is None else Links.of(given.links)
        points = points_of(found, links)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(reports.head(found[0]))
    for path, report in zip(given.reports, found, strict=True):
        if not report["complete"]:
            print(f"NOT COMPLETE: {path}: the run ended before all was measured")
    if links is not None:
        print(f"latency {links.latency_us:.2f} us; {links.gb_s:.0f} GB/s from a GPU to all others")
    print("", *table(points), "", *conclusions(points, planned_by(found[0]["gpu"])), sep="\n")
    if given.json:
        given.json.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
