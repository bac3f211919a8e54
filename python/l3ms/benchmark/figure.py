"""The picture of a benchmark: for every op, shape and dtype the times and the memory of the contestants, as horizontal bars."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from l3ms.benchmark.results import CaseResult, Measurement, Results
from l3ms.benchmark.tables import bytes_text, machine, seconds_text
from l3ms.runs.whole_files import write_whole

OURS, PEER, LIMIT = "#1f5fbf", "#9aa0a8", "#2f9e5b"
COLOURS = {"ours": OURS, "peer": PEER, "limit": LIMIT}
LONGEST = 6.0  # times ours: bars beyond are cut, and marked; their number is written all the same
TIMES = "\N{MULTIPLICATION SIGN}"
Key = tuple[str, Any, str]


def groups(results: Results) -> dict[Key, list[CaseResult]]:
    """Cases that differ in the unscored share alone share a panel."""
    found: dict[Key, list[CaseResult]] = {}
    for case in results.cases:
        found.setdefault((case.op, case.case.shape, case.dtype), []).append(case)
    return {key: sorted(cases, key=lambda case: case.masked) for key, cases in found.items()}


def draw(results: Results) -> Figure:
    """A row per op and shape, a column per dtype; each panel has times to the left and memory to the right."""
    found = groups(results)
    rows = list(dict.fromkeys(key[:2] for key in found))
    columns = list(dict.fromkeys(key[2] for key in found))
    bars = [max(_bars(found.get((*row, dtype), [])) for dtype in columns) for row in rows]
    heights = [0.9 + 0.19 * count for count in bars]
    figure = Figure(figsize=(10.5 * len(columns), sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), 2 * len(columns), height_ratios=heights, width_ratios=[3, 2] * len(columns))
    for key, cases in found.items():
        row, column = rows.index(key[:2]), 2 * columns.index(key[2])
        times = figure.add_subplot(grid[row, column])
        _times(times, cases)
        times.set_title(f"{key[0]}, {str(key[1]).replace('-', ', ')}, {key[2]}", loc="left", fontsize=10, weight="bold")
        _memory(figure.add_subplot(grid[row, column + 1]), cases)
    figure.suptitle(machine(results), fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def save(results: Results, path: Path) -> Path:
    """A reader sees the old picture or the new one, never half."""
    picture = io.BytesIO()
    draw(results).savefig(picture, dpi=110, format="png")
    write_whole(path, picture.getvalue())
    return path


def _ran(cases: Sequence[CaseResult]) -> list[Measurement]:
    """A contestant of a panel is one that ran in any of its cases."""
    names = dict.fromkeys(item.contestant for case in cases for item in case.measurements if item.seconds)
    return [next(found for case in cases if (found := case.find(name))) for name in names]


def _bars(cases: Sequence[CaseResult]) -> int:
    return len(_ran(cases)) * len(cases)


def _times(axes: Axes, cases: Sequence[CaseResult]) -> None:
    ran = _ran(cases)
    ours = [found.median for case in cases if (found := case.find(case.ours)) and found.median]
    every = [item.median for case in cases for item in case.measurements if item.median]
    edge = max((value for value in every if not ours or value <= LONGEST * max(ours)), default=1.0)
    factor, unit = (1.0, "seconds") if edge >= 0.5 else (1e3, "milliseconds")
    for offset, case in enumerate(cases):
        values, labels = [], []
        for found in (case.find(item.contestant) for item in ran):
            value, ratio = (found.median, case.ratio(found)) if found else (None, None)
            cut = " »" if value and value > edge else ""
            times = f"  {ratio:.2f}{TIMES}" if found and ratio and found.contestant != case.ours else ""
            labels.append(f"{cut} {seconds_text(value)}{times}")
            values.append(min(value or 0.0, edge) * factor)
        _draw_bars(axes, ran, values, labels, offset, len(cases))
    axes.set_xlim(0, 1.32 * edge * factor)
    _style(axes, ran, f"{unit}; {TIMES} is time / ours")


def _memory(axes: Axes, cases: Sequence[CaseResult]) -> None:
    ran = _ran(cases)
    every = [item.memory / 2**20 for case in cases for item in case.measurements if item.memory is not None]
    edge = max([*every, 1.0])
    for offset, case in enumerate(cases):
        values = [found.memory if (found := case.find(item.contestant)) else None for item in ran]
        labels = [
            "" if item.kind == "limit" else f" {bytes_text(value)}" for item, value in zip(ran, values, strict=True)
        ]
        sizes = [(value or 0) / 2**20 for value in values]
        _draw_bars(axes, ran, sizes, labels, offset, len(cases))
    axes.set_xlim(0, 1.3 * edge)
    _style(axes, ran, "MiB beyond inputs and what is returned")
    axes.set_yticklabels([])
    if len(cases) > 1:
        shades = [f"{shade}: {case.masked:.0%} unscored" for shade, case in zip(("dark", "light"), cases, strict=False)]
        axes.text(
            1, 1.02, ", ".join(shades), transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color="#555555"
        )


def _draw_bars(
    axes: Axes, ran: Sequence[Measurement], values: Sequence[float], labels: Sequence[str], offset: int, count: int
) -> None:
    height = 0.8 / count
    places = [index - 0.4 + height * (offset + 0.5) for index in range(len(ran))]
    colours = [COLOURS[item.kind] for item in ran]
    axes.barh(places, values, height=0.92 * height, color=colours, alpha=1.0 if not offset else 0.5)
    for place, value, label in zip(places, values, labels, strict=True):
        axes.text(value, place, label, va="center", ha="left", fontsize=7.5)


def _style(axes: Axes, ran: Sequence[Measurement], xlabel: str) -> None:
    axes.set_yticks(range(len(ran)), [f"{item.title}{' *' if item.uniform else ''}" for item in ran], fontsize=8)
    axes.set_ylim(len(ran) - 0.4, -0.6)
    axes.set_xlabel(xlabel, fontsize=8)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
