"""Builds bench/links and runs it: latency and bandwidth of pushes between this machine's GPUs.

    python bench/links/run.py [--json FILE] [options of links.cu, see its top]

Prints tables, and writes the JSON (bench/README.md has its keys). Needs nvcc and CMake, neither
torch nor the installed package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from harness import cmake, progress  # noqa: E402
from harness import report as reports  # noqa: E402

LISTS = ("latency_ns", "bandwidth", "peer")


def measure(links: Path, options: Sequence[str]) -> tuple[list[str], int]:
    """The lines that links printed, and its exit code."""
    lines = []
    bar = progress.Bar(0)
    with subprocess.Popen([links, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            bar.show(line.strip())
    bar.close()
    return lines, process.returncode


def report_of(lines: Iterable[str], complete: bool) -> reports.Report:
    """Each line is an object: entries of the report, or one item for one of its lists."""
    found: reports.Report = {
        "schema": reports.SCHEMA,
        "harness": "links",
        "complete": complete,
        "date": reports.now(),
        "gpu": None,
        "gpus": 0,
        "driver": reports.driver_version(),
        "versions": {},
        "round_trips": None,
        **{name: [] for name in LISTS},
    }
    for line in lines:
        for name, value in json.loads(line).items():
            if name in LISTS:
                found[name].append(value)
            else:
                found[name] = value
    return found


# ------------------------------------------------------------------------------------- what it says


def table(found: reports.Report) -> str:
    """The report as text."""
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    lines = [
        f"links: pushes from GPU to GPU; {found['date']}",
        f"{found['gpus']} x {found['gpu']}, driver {found['driver'] or 'unknown'}; {versions}",
    ]
    trips = f"one way, ns: half of {found['round_trips']} round trips a launch; packs of 16 bytes:"
    for title, rows in (
        ("what the driver says of each pair:", found["peer"]),
        (trips, found["latency_ns"]),
        ("GB/s that a GPU pushes, by the bytes to each target:", by_size(found["bandwidth"])),
    ):
        if rows:
            words = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
            lines += ["", title, *reports.columns(words, {"pattern"})]
    if not found["complete"]:
        lines += ["", "NOT COMPLETE: the run ended before all was measured."]
    return "\n".join(lines)


def by_size(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each pattern and pair, a column for each size."""
    sizes = {str(item["bytes"]): None for item in items}
    rows: dict[reports.Key, dict[str, Any]] = {}
    for item in items:
        names = {name: item[name] for name in ("pattern", "from", "to")}
        row = rows.setdefault(tuple(names.values()), {**names, **sizes})
        row[str(item["bytes"])] = item["gb_s"]
    return list(rows.values())


def text(value: Any) -> str:
    return reports.number(value, 1) if value is None or isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Latency and bandwidth of pushes between GPUs, from one process.",
        epilog="All other options go to links; they are at the top of links.cu.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="where to write all numbers")
    given, options = parser.parse_known_args(arguments)
    if problem := reports.no_place("--json", given.json):
        parser.error(problem)
    try:
        links = cmake.build("links")
    except cmake.CannotBuildError as error:
        print(error, file=sys.stderr)
        return 2
    lines, exit_code = measure(links, options)
    if lines:
        found = report_of(lines, complete=exit_code == 0)
        reports.note_commit(found["versions"])
        print(table(found))
        if given.json:
            reports.save(found, given.json)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
