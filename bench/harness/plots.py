"""Latency against rows, and the roofline view, as PNG files. No torch; needs matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import report as reports

Cells = list[dict[str, Any]]
MOST_LINES = 10  # of a panel; of more shapes in streams the best of each algorithm are drawn


def problem() -> str | None:
    """Why there can be no plots."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "--plot: matplotlib is required; got none; pip install '.[bench]'"
    return None


def draw(report: reports.Report, prefix: str) -> list[Path]:
    """PREFIX_latency.png and PREFIX_roofline.png; a panel for each ranks, hidden, dtype, form."""
    timed = [cell for cell in report["cells"] if cell["us"] is not None]
    names = {cell["algorithm"] for cell in timed}
    if report["harness"] == "streams" and len(names) > MOST_LINES:
        timed = best_shapes(timed)
    panels: dict[tuple[Any, ...], dict[str, Cells]] = {}
    for cell in timed:
        panel = (cell["ranks"], cell["hidden"], cell["dtype"], cell["form"])
        panels.setdefault(panel, {}).setdefault(cell["algorithm"], []).append(cell)
    if not panels:
        raise ValueError("--plot: a measured cell is required; got none; see the table")
    drawn = []
    for name, draw_panel in (("latency", _latency), ("roofline", _roofline)):
        path = Path(f"{prefix}_{name}.png")
        _figure(report, panels, draw_panel, path)
        drawn.append(path)
    return drawn


def best_shapes(cells: Cells) -> Cells:
    """Of an algorithm's shapes ("one-shot/2/full") the fastest at each size, and all others."""
    best: dict[Any, dict[str, Any]] = {}
    for cell in cells:
        algorithm, is_shape, _ = cell["algorithm"].partition("/")
        one = {**cell, "algorithm": f"{algorithm}, best shape" if is_shape else algorithm}
        old = best.setdefault(reports.key(one), one)
        if one["us"] < old["us"]:
            best[reports.key(one)] = one
    return list(best.values())


def _figure(
    report: reports.Report,
    panels: Mapping[tuple[Any, ...], dict[str, Cells]],
    draw_panel: Callable[[Any, str, Cells, Any], None],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    across = math.ceil(math.sqrt(len(panels)))
    down = math.ceil(len(panels) / across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(6.5 * across, 4.5 * down), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(name for by_algorithm in panels.values() for name in by_algorithm))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: ("-", "--", ":")[i // 10 % 3] for i, name in enumerate(names)}
    for axis, (panel, by_algorithm) in zip(axes.flat, panels.items(), strict=False):
        # First: a scale brings its own way to write the numbers.
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        for algorithm, cells in by_algorithm.items():
            cells = sorted(cells, key=lambda cell: cell["rows"])
            draw_panel(axis, algorithm, cells, (colours[algorithm], styles[algorithm]))
        copy = max(c["copy_gb_s"] or 0 for cells in by_algorithm.values() for c in cells)
        if draw_panel is _roofline and copy:
            axis.axhline(copy, color="black", linewidth=1, label=f"copy, {copy:.0f} GB/s")
        ranks, hidden, dtype, form = panel
        axis.set_title(f"{ranks} ranks, hidden {hidden}, {dtype}, {form}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    where = f"{report['gpu']}, {report['placement']}, L2 {report['l2']}, {report['date']}"
    if report["gpu"] == "CPU":
        where = f"THESE TIMES MEAN NOTHING (no GPU). {where}"
    figure.suptitle("\n".join(textwrap.wrap(where, 85 * across)), fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _latency(axis: Any, algorithm: str, cells: Cells, look: tuple[str, str]) -> None:
    rows = [cell["rows"] for cell in cells]
    colour, style = look
    axis.plot(rows, [c["us"] for c in cells], style, marker=".", color=colour, label=algorithm)
    low, high = [cell["p10"] for cell in cells], [cell["p90"] for cell in cells]
    axis.fill_between(rows, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("rows")
    axis.set_ylabel("us a call; band: p10 to p90")


def _roofline(axis: Any, algorithm: str, cells: Cells, look: tuple[str, str]) -> None:
    colour, style = look
    axis.plot(
        [reports.bytes_of(cell) for cell in cells],
        [reports.gb_s(cell) for cell in cells],
        style,
        marker=".",
        color=colour,
        label=algorithm,
    )
    axis.set_xlabel("bytes that a rank's memory must move at least")
    axis.set_ylabel("GB/s of them")
