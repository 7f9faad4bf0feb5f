"""Latency against rows, and the roofline view, as PNG files. No torch; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import report as reports

Cells = list[dict[str, Any]]


def problem() -> str | None:
    """Why there can be no plots."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "--plot: matplotlib is required; got none; pip install '.[bench]'"
    return None


def draw(report: reports.Report, prefix: str) -> list[Path]:
    """PREFIX_latency.png and PREFIX_roofline.png; a panel for each ranks, hidden, dtype, form."""
    panels: dict[tuple[Any, ...], dict[str, Cells]] = {}
    for cell in report["cells"]:
        if cell["us"] is not None:
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


def _figure(
    report: reports.Report,
    panels: Mapping[tuple[Any, ...], dict[str, Cells]],
    draw_panel: Callable[[Any, str, Cells, Any], None],
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = math.ceil(math.sqrt(len(panels)))
    down = math.ceil(len(panels) / across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(6.5 * across, 4.5 * down), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(cell["algorithm"] for cell in report["cells"]))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: ("-", "--", ":")[i // 10 % 3] for i, name in enumerate(names)}
    for axis, (panel, by_algorithm) in zip(axes.flat, panels.items(), strict=False):
        for algorithm, cells in by_algorithm.items():
            cells = sorted(cells, key=lambda cell: cell["rows"])
            draw_panel(axis, algorithm, cells, (colours[algorithm], styles[algorithm]))
        copy = max(c["copy_gb_s"] or 0 for cells in by_algorithm.values() for c in cells)
        if draw_panel is _roofline and copy:
            axis.axhline(copy, color="black", linewidth=1, label=f"copy, {copy:.0f} GB/s")
        ranks, hidden, dtype, form = panel
        axis.set_title(f"{ranks} ranks, hidden {hidden}, {dtype}, {form}", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    where = f"{report['gpu']}, {report['placement']}, L2 {report['l2']}, {report['date']}"
    if report["gpu"] == "CPU":
        where = f"THESE TIMES MEAN NOTHING (no GPU). {where}"
    figure.suptitle(where, fontsize=9)
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
