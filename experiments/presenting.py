"""What the tables and pictures of the experiments share. A row of a table is a cell, pooled over its seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.results import Result
from l3ms.runs.figure import Z95, iterations, series, shade, style
from l3ms.runs.labels import bounds_text

COLOURS = {
    "none": "#8a8f98", "barrier": "#1f5fbf", "dual_ascent": "#b5651d", "augmented_lagrangian": "#6b4fa3", "penalty": "#c2452d",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")  # of labels that share a colour
NAMES = {"none": "SFT", "barrier": "L3M (barrier)"}  # of solvers


def solver_name(solver: str) -> str:
    return NAMES.get(solver, solver.replace("_", " "))


def by_cell(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The seeds of each cell, in the order of the grid."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    return groups


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def machine_letters(machines: Iterable[str]) -> dict[str, str]:
    """A letter for each."""
    return {place: chr(ord("a") + index) for index, place in enumerate(sorted(set(machines)))}


def mean(results: Sequence[Result], value: Callable[[Result], float | None]) -> float:
    found = [item for item in map(value, results) if item is not None]
    return math.fsum(found) / len(found) if found else math.nan


def pooled(results: Sequence[Result], name: str = "length") -> tuple[float, float, float]:
    """(mean, low, high) over the seeds of what fresh held-out samples say: each seed counts as much, sampling is the only error."""
    found = [result.measured(name) for result in results]
    centre = math.fsum(value[0] for value in found) / len(found)
    half = math.sqrt(math.fsum(((high - low) / 2) ** 2 for _, low, high in found)) / len(found)
    return centre, centre - half, centre + half


def interval(results: Sequence[Result], name: str = "length", form: str = ".2f") -> str:
    """`14.02 (13.81 to 14.23)`"""
    centre, low, high = pooled(results, name)
    return f"{number(centre, form)} ({number(low, form)} to {number(high, form)})"


def seeds(results: Sequence[Result], name: str = "length", form: str = ".1f") -> str:
    """The means of the seeds one by one, `13.9, 14.1, 14.0`."""
    return ", ".join(number(result.measured(name)[0], form) for result in results)


def verdict(results: Sequence[Result], name: str | None = None) -> str:
    """`SATISFIED 3 of 3`, or how many of each; of one constraint, or of all of them together (the worst)."""
    found = [_worst(result.verdicts if name is None else {name: result.verdicts.get(name, "-")}) for result in results]
    counts = Counter(found)
    if set(counts) == {"-"}:
        return "-"
    return ", ".join(f"{word} {count} of {len(results)}" for word, count in counts.most_common())


def _worst(verdicts: dict[str, str]) -> str:
    ranks = ("VIOLATED", "INCONCLUSIVE", "SATISFIED")
    return min(verdicts.values(), key=lambda word: ranks.index(word) if word in ranks else len(ranks), default="-")


def multiplier(results: Sequence[Result], name: str | None = None) -> str:
    """The multipliers at the end, averaged over the seeds: `min 0.11, max 0.32`, or `0.32` where there is one."""
    keys = sorted({key for result in results for key in result.multipliers if name is None or key.startswith(name)})
    values = [(key, mean(results, lambda result, key=key: result.multipliers.get(key))) for key in keys]
    if len(values) == 1:
        return f"{values[0][1]:.2g}"
    return (
        ", ".join(f"{key if name is None else key.removeprefix(name).strip('_')} {value:.2g}" for key, value in values)
        or "-"
    )


def wanted(result: Result, name: str = "length") -> str:
    """`[12, 16]`, `<= 2.1`; empty where there is no bound."""
    return bounds_text(*result.bound(name)).removeprefix("in ")


def new_figure(rows: int, columns: int, width: float = 11.0, height: float = 2.9) -> tuple[Figure, Any]:
    """A figure and its grid of axes, rows x columns."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend(axes: Axes) -> None:
    """Of what is drawn there, if anything is."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, framealpha=0.8, edgecolor="none")


def trajectories(
    axes: Axes,
    results: Sequence[Result],
    name: str,
    label: Callable[[Result], str],
    title: str,
    unit: str,
    colour_of: Callable[[Result], str] | None = None,
) -> None:
    """Running estimates over the iterations, a line per run; the first run of a label carries it, and its 95% band. `colour_of` a run: by
    default its solver's.

    What the first quarter of a run does outside of the rest's range is cut off: before fine-tuning nothing ends, and lengths are the limit.
    """
    shown: dict[str, str] = {}  # label -> its colour
    late: list[float] = []
    for result in results:
        x, y = iterations(result.metrics), series(result.metrics, f"constraints/{name}/estimate")
        if np.isnan(y).all():
            continue
        text = label(result)
        colour = COLOURS.get(result.solver, COLOURS["barrier"]) if colour_of is None else colour_of(result)
        late += [float(value) for value in y[len(y) // 4 :] if not np.isnan(value)]
        first = text not in shown
        shown.setdefault(text, colour)
        alike = [other for other, its in shown.items() if its == colour]
        axes.plot(
            x,
            y,
            LINES[alike.index(text) % len(LINES)],
            color=colour,
            linewidth=1.5 if first else 0.8,
            alpha=1.0 if first else 0.6,
            label=text if first else None,
        )
        if first:
            band = Z95 * np.nan_to_num(series(result.metrics, f"constraints/{name}/stderr"))
            axes.fill_between(x, y - band, y + band, color=colour, alpha=0.15, linewidth=0)
    bounds = next((result.bound(name) for result in results if result.bound(name) != (None, None)), (None, None))
    late += [side for side in bounds if side is not None]
    if late:
        pad = 0.15 * (max(late) - min(late)) or 1.0
        axes.set_ylim(min(late) - pad, max(late) + pad)
    shade(axes.axhspan, axes.axhline, *bounds, axes.get_ylim())
    style(axes, title, unit)


def histogram(
    axes: Axes,
    groups: Sequence[tuple[str, str, Sequence[Result]]],
    bounds: tuple[float | None, float | None],
    title: str,
) -> None:
    """Shares of response lengths, one outline per (label, colour, runs), the wanted range of the mean shaded."""
    counts = [(label, colour, _total(runs)) for label, colour, runs in groups]
    longest = max(
        (int(np.searchsorted(np.cumsum(count), 0.99 * count.sum())) for *_, count in counts if count.sum()), default=1
    )
    edge = max(longest + 1, *(1.2 * side for side in bounds if side is not None), 2)
    width = max(1, round(edge / 30))
    edges = np.arange(0, edge + width, width)
    shade(axes.axvspan, axes.axvline, *bounds, (0.0, float(edges[-1])), label=None)
    for label, colour, count in counts:
        if count.sum():
            tokens = np.arange(len(count))
            share = np.histogram(np.minimum(tokens, edges[-1] - 0.5), bins=edges, weights=100 * count / count.sum())[0]
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.2)
            axes.stairs(
                share,
                edges,
                color=colour,
                linewidth=1.3,
                label=f"{label}, mean {(tokens * count).sum() / count.sum():.1f}",
            )
    axes.set_xlim(0, edges[-1])
    style(axes, title, "% of responses", "tokens")


def _total(results: Sequence[Result]) -> np.ndarray:
    found = [np.array(result.summary["length"].get("histogram") or [0], dtype=float) for result in results]
    total = np.zeros(max((len(count) for count in found), default=1))
    for count in found:
        total[: len(count)] += count
    return total
