"""The report of a run: its JSON (../README.md has the schema), its table, its ratios. No torch."""

from __future__ import annotations

import datetime
import json
import math
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PUBLISHED = Path(__file__).resolve().parents[1] / "published.json"
FLOOR = "floor"

Report = dict[str, Any]
Key = tuple[Any, ...]
SHAPE = ("ranks", "hidden", "rows", "dtype", "form")  # of a cell, in the order of the table
KEY = (*SHAPE, "algorithm")
# What must be equal of two reports for their times to be compared.
CONDITIONS = ("harness", "gpu", "gpus", "placement", "l2", "calls", "start", "environment")
# And of reports that have it: older ones do not.
OPTIONS = "options"


@dataclass
class Cell:
    """One number of the table. us, p10, p90: a call, of the slowest rank; None: not timed.
    replays, calls: of which they are, where those are not the report's."""

    ranks: int
    hidden: int
    rows: int
    dtype: str
    form: str
    algorithm: str
    path: str = ""
    us: float | None = None
    p10: float | None = None
    p90: float | None = None
    captured: bool = True
    multiprocessors: int | None = None
    copy_gb_s: float | None = None
    wrong: str = ""
    replays: int | None = None
    calls: int | None = None


OF_NEWER_REPORTS = {"replays", "calls"}
NUMBERS = ("us", "p10", "p90", "copy_gb_s")  # or None


def summary(ranks_us: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of the replays' times on each rank: median, p10, p90 of the slowest rank of each replay."""
    slowest = [max(of_one_replay) for of_one_replay in zip(*ranks_us, strict=True)]
    return quantiles(slowest)


def quantiles(us: Sequence[float]) -> dict[str, float]:
    if len(us) == 1:
        return dict.fromkeys(("us", "p10", "p90"), us[0])
    tenths = statistics.quantiles(us, n=10, method="inclusive")
    return {"us": statistics.median(us), "p10": tenths[0], "p90": tenths[-1]}


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return asked.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def note_commit(versions: dict[str, str]) -> None:
    """That of this checkout, with "-dirty" where files are changed; nothing without git."""
    describe = ["git", "-C", str(PUBLISHED.parent), "describe", "--always", "--dirty"]
    try:
        asked = subprocess.run(describe, capture_output=True, text=True, timeout=30, check=True)
        versions["commit"] = asked.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass


# ---------------------------------------------------------------------------------------- the file


def save(report: Report, path: Path) -> None:
    """All of it or nothing: a run that is stopped leaves the last whole report."""
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps(report, indent=1) + "\n")
    whole.replace(path)


def load(path: str | Path) -> Report:
    try:
        report = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: a report of bench is required; got {error}") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        got = report.get("schema") if isinstance(report, dict) else type(report).__name__
        raise ValueError(
            f"{path}: a report of schema {SCHEMA} is required; got {got!r}; run the benchmark again"
        )
    return report


def load_cells(path: str | Path) -> Report:
    """A report that has cells, with all that compare.py looks at."""
    report = load(path)

    def require(fine: bool, got: str) -> None:
        if not fine:
            what = "a report of bench_fused.py or streams/run.py is required"
            raise ValueError(f"{path}: {what}; got {got}; run the benchmark again")

    missing = [name for name in ("complete", "cells", *CONDITIONS) if name not in report]
    require(not missing, f"one without {', '.join(missing)}")
    cells = report["cells"]
    are_objects = isinstance(cells, list) and all(isinstance(cell, dict) for cell in cells)
    require(are_objects, "cells that are no list of objects")
    names = {f.name for f in fields(Cell)} - OF_NEWER_REPORTS
    missing = sorted({name for cell in cells for name in names if name not in cell})
    require(not missing, f"a cell without {', '.join(missing)}")
    require(isinstance(report["placement"], str), f"the placement {report['placement']!r}")
    for cell in cells:
        for name in KEY:
            kind = int if name in ("ranks", "hidden", "rows") else str
            require(isinstance(cell[name], kind), f"a cell with {name} {cell[name]!r}")
        for name in NUMBERS:
            good = cell[name] is None or isinstance(cell[name], (int, float))
            require(good, f"a cell with {name} {cell[name]!r}")
    return report


def stamp(path: Path) -> tuple[int, int] | None:
    """Another one after the file has been written."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def no_place(option: str, path: str | Path | None) -> str | None:
    """Why a file cannot be written at the end of a run, as far as one can tell before."""
    if path is None:
        return None
    # "there/" is a prefix of files in it, which the parent of Path("there/") would not show.
    file = Path(f"{path}_latency.png") if option == "--plot" else Path(path)
    if file.absolute().parent.is_dir() and not file.is_dir():
        return None
    return f"{option}: a file in a directory that exists is required; got {path}; make it first"


def as_cell(cell: Cell) -> dict[str, Any]:
    return asdict(cell)


def key(cell: Mapping[str, Any]) -> Key:
    return tuple(cell[name] for name in KEY)


def shape(cell: Mapping[str, Any]) -> Key:
    return tuple(cell[name] for name in SHAPE)


def name_of(cell_key: Key) -> str:
    ranks, hidden, rows, dtype, form, algorithm = cell_key
    return f"{algorithm}, {ranks} ranks, {rows} x {hidden} {dtype} {form}"


# ------------------------------------------------------------------------------------- what it says


def bytes_of(cell: Mapping[str, Any]) -> int:
    """What a rank's memory has to bring or take in any case: x, the residual and the weights read,
    both outputs written; and, with a sum, the bytes that an all-reduce must receive at least,
    2 (ranks - 1) / ranks of x, once written and once read."""
    item, weights = ITEM_BYTES[cell["dtype"]], 2 if cell["form"] == "sandwich" else 1
    rows, ranks = cell["rows"], cell["ranks"]
    tensors = 3 if cell["form"] == "plain" else 4
    own = (tensors * rows + weights) * cell["hidden"] * item
    if cell["algorithm"] == FLOOR:
        return own
    return own + 2 * int(2 * (ranks - 1) / ranks * rows * cell["hidden"] * item)


def gb_s(cell: Mapping[str, Any]) -> float | None:
    return bytes_of(cell) / cell["us"] / 1e3 if cell["us"] else None


def published(report: Report) -> dict[tuple[int, int], float]:
    """FlashInfer's us by (ranks, rows), where this run has the conditions of that measurement: the
    faster of its two algorithms."""
    for table in json.loads(PUBLISHED.read_text())["tables"]:
        met = table["conditions"]
        if (
            report["harness"] == met["harness"]
            and met["gpu"] in report["gpu"]
            and report["gpus"] == 1
            and met["placement"] in report["placement"]
            and report["l2"] == met["l2"]
            and report["calls"] == met["calls"]
        ):
            return {
                (int(ranks), int(rows)): min(us for us in values if us is not None)
                for ranks, by_rows in table["us"].items()
                for rows, values in by_rows.items()
            }
    return {}


PUBLISHED_SHAPE = {"hidden": 4096, "dtype": "bf16", "form": "residual"}


def ratios(report: Report) -> list[dict[str, float | None]]:
    """For each cell: its time over that of the floor, of the fastest one that sums, and of
    FlashInfer as measured before, each of the same shape; None where there is none."""
    flashinfer = published(report)
    floor: dict[Key, float] = {}
    best: dict[Key, float] = {}
    for cell in report["cells"]:
        if cell["us"] is None:
            continue
        if cell["algorithm"] == FLOOR:
            floor[shape(cell)] = cell["us"]
        else:
            best[shape(cell)] = min(cell["us"], best.get(shape(cell), math.inf))
    found = []
    for cell in report["cells"]:
        sums = cell["algorithm"] != FLOOR
        in_table = all(cell[name] == value for name, value in PUBLISHED_SHAPE.items()) and sums
        bases = {
            "floor": floor.get(shape(cell)),
            "best": best.get(shape(cell)) if sums else None,
            "flashinfer": flashinfer.get((cell["ranks"], cell["rows"])) if in_table else None,
        }
        found.append(
            {name: cell["us"] / of if of and cell["us"] else None for name, of in bases.items()}
        )
    return found


COLUMNS = (
    *KEY,
    *("path", "us", "p10", "p90"),
    *("/floor", "/best", "/FlashInfer", "GB/s", "of copy", "check"),
)
CHECKS = {
    "bench_fused": "check: ours has the bits of reference.py; the others are near it.",
    "streams": "check: all shapes of a size gave the same bits, sums on all ranks; or it ends.",
}
LEFT = {"dtype", "form", "algorithm", "path", "check"}


def table(report: Report) -> str:
    """The report as text."""
    lines = [head(report), ""]
    rows: list[Sequence[str]] = [COLUMNS]
    for cell, over in zip(report["cells"], ratios(report), strict=True):
        speed = gb_s(cell)
        share = speed / cell["copy_gb_s"] if speed and cell["copy_gb_s"] else None
        star = "" if cell["captured"] or cell["us"] is None else "*"
        rows.append(
            [
                *(str(cell[name]) for name in SHAPE),
                cell["algorithm"],
                cell["path"],
                number(cell["us"], 2) + star,
                number(cell["p10"], 2),
                number(cell["p90"], 2),
                number(over["floor"], 2),
                number(over["best"], 2),
                number(over["flashinfer"], 2),
                number(speed, 0),
                "-" if share is None else f"{share:.0%}",
                "WRONG" if cell["wrong"] else "ok",
            ]
        )
    lines += [*columns(rows, LEFT), ""]
    return "\n".join([*lines, *notes(report)])


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def columns(rows: Sequence[Sequence[str]], left: Iterable[str]) -> list[str]:
    """Rows of text, the first of which is the head, as lines of equal columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    to_the_left = [name in left for name in rows[0]]
    return [
        "  ".join(
            word.ljust(width) if is_left else word.rjust(width)
            for word, width, is_left in zip(row, widths, to_the_left, strict=True)
        ).rstrip()
        for row in rows
    ]


def head(report: Report) -> str:
    gpu = report["gpu"] if report["gpu"] == "CPU" else f"{report['gpus']} x {report['gpu']}"
    shares = sorted({c["multiprocessors"] for c in report["cells"] if c["multiprocessors"]})
    share = f"; {'/'.join(map(str, shares))} multiprocessors a rank" if shares else ""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [
        f"{report['harness']}: all-reduce + residual + (1 + w) RMSNorm; {report['date']}",
        f"{gpu}, driver {report['driver'] or 'unknown'}; {versions}",
        f"{report['placement']}{share}; L2 {report['l2']}; start: {report['start']}",
    ]
    if report["gpu"] == "CPU":
        lines += ["", "THESE TIMES MEAN NOTHING: no GPU; this only shows that the benchmark runs."]
    return "\n".join(lines)


def notes(report: Report) -> list[str]:
    rounds = "rounds of as many as" if report["gpu"] == "CPU" else "replays of graphs of"
    lines = [
        f"us: a call; median, p10, p90 over {rounds} {report['calls']} dependent ones, of the "
        "slowest rank's time.",
        "GB/s: of what a rank's memory must move at least (bench/README.md); of copy: over what "
        "all ranks' copies reach.",
        CHECKS[report["harness"]],
    ]
    if any(not cell["captured"] and cell["us"] is not None for cell in report["cells"]):
        lines.append(
            "* by the host's clock, rounds of calls queued one after the other, whatever the L2 "
            "has: no CUDA graph can hold it, or there is no GPU."
        )
    fewer = sorted({c["replays"] for c in report["cells"] if c.get("replays") and c["captured"]})
    if fewer:
        lines.append(f"slow ones are of {fewer[0]} replays (the JSON says which)")
    if not published(report):
        lines.append(
            "/FlashInfer: of runs with a warm L2 on one H100 alone (bench/published.json)."
        )
    if report["environment"]:
        pairs = (f"{name}={value}" for name, value in report["environment"].items())
        lines.append(f"NVLink multicast: {', '.join(pairs)}")
    for skipped in report["skipped"]:
        lines.append(f"not run: {skipped['algorithm']}{_where(skipped)}: {skipped['reason']}")
    for cell in report["cells"]:
        if cell["wrong"]:
            lines.append(f"WRONG: {name_of(key(cell))}: {cell['wrong']}")
    if not report["complete"]:
        lines.append("NOT COMPLETE: the run ended before all was measured.")
    return lines


def _where(skipped: Mapping[str, Any]) -> str:
    cases = skipped.get("cases") or []
    if not cases:
        return ""
    return f" ({cases[0]}" + (f" and {len(cases) - 1} more)" if len(cases) > 1 else ")")
