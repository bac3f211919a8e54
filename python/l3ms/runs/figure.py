"""The picture of a run: estimates against their bounds, multipliers, mu, task loss, the lengths that came out, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from l3ms.constraints.shares import bounds_of, event_of, quantile_text
from l3ms.runs.labels import bounds_text, is_mean_length, model_label, solver_label
from l3ms.training.phase_summary import in_words, summary

BLUE, GREY, GREEN, RED = "#1f5fbf", "#8a8f98", "#2f9e5b", "#c2452d"
CURVES = (BLUE, "#b5651d", "#6b4fa3", RED, "#1f8a8a", "#8a7a1f", "#c05a94", "#555b66")
LEGEND: dict[str, Any] = {
    "loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "fontsize": 7.5, "borderpad": 0.2, "borderaxespad": 0,
    "handlelength": 1.6, "handletextpad": 0.5, "columnspacing": 1.2, "labelspacing": 0.25,
}  # fmt: skip
LONGEST_IN_LEGEND, LONGEST_IN_TITLE = 32, 48  # names
Z95 = 1.959964

Rows = Sequence[Mapping[str, Any]]


def draw(metrics: Rows, report: Mapping[str, Any], baseline: Rows = ()) -> Figure:
    """A figure of two rows (one more per further constraint); its size suits a README's column."""
    constraints = _constraints(metrics, report)
    panels = max(1, len(constraints))
    figure = Figure(figsize=(11, 2.9 * (panels + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(panels + 1, 6)
    for index, item in enumerate(constraints):
        axes = figure.add_subplot(grid[index, :4] if index == 0 else grid[index, :])
        _estimate(axes, metrics, item, report)
    _lengths(figure.add_subplot(grid[0, 4:] if constraints else grid[0, :]), report)
    _multipliers(figure.add_subplot(grid[panels, :2]), metrics, constraints)
    strength = _mu if any(row.get("l3m/mu") is not None for row in metrics) else _gradient_norms
    strength(figure.add_subplot(grid[panels, 2:4]), metrics)
    _loss(figure.add_subplot(grid[panels, 4:]), metrics, baseline, report)
    if (time := summary(metrics)) is not None:
        figure.supxlabel(in_words(time), x=0.008, ha="left", fontsize=8, color=GREY)
    return figure


def _constraints(metrics: Rows, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{name, min, max, ...}` of every constraint that was measured, the report's order first."""
    known = {item["name"]: dict(item) for item in report.get("constraints") or []}
    if not known and report.get("bounds"):
        known = {"length": {"name": "length", **report["bounds"]}}
    for row in metrics:
        for key in row:
            if key.startswith("constraints/") and key.endswith("/estimate"):
                name = key.removeprefix("constraints/").removesuffix("/estimate")
                known.setdefault(name, {"name": name})
    measured = {name: series(metrics, f"constraints/{name}/estimate") for name in known}
    return [item for name, item in known.items() if not np.isnan(measured[name]).all()]


def series(metrics: Rows, key: str) -> np.ndarray:
    """The values of one key over the iterations, NaN where it is missing."""
    values = [row.get(key) for row in metrics]
    return np.array([math.nan if value is None else float(value) for value in values], dtype=float)


def iterations(metrics: Rows) -> np.ndarray:
    return np.array([row.get("iteration", index) for index, row in enumerate(metrics, 1)], dtype=float)


def style(axes: Axes, title: str, ylabel: str, xlabel: str = "iteration") -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    if xlabel == "iteration":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def legend(axes: Axes) -> None:
    """Between the title and the axes, where no data is, in as few lines as have room."""
    count = len(axes.get_legend_handles_labels()[1])
    renderer = axes.figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    room = 1.12 * axes.get_window_extent(renderer).width  # the layout makes axes wider than they are before it
    for columns in range(count, 0, -1):
        made = axes.legend(**LEGEND, ncols=columns)
        for text in made.get_texts():
            text.set_parse_math(False)  # a name with $ is no formula
        extent = made.get_window_extent(renderer)
        if extent.width <= room:
            break
    title = axes.get_title(loc="left")
    axes.set_title(
        title, loc="left", pad=3 + extent.height * 72 / axes.figure.dpi, fontsize=10, fontweight="bold", parse_math=False
    )  # fmt: skip


def empty(axes: Axes, text: str) -> None:
    """Says why nothing is drawn."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, **options: Any) -> None:
    """A line; values without a neighbour, which a line does not show, are dots."""
    axes.plot(x, y, **options)
    known = ~np.isnan(y)
    alone = known & ~np.concatenate([[False], known[:-1]]) & ~np.concatenate([known[1:], [False]])
    options = {**options, "label": None, "linestyle": "none"}
    axes.plot(x[alone], y[alone], marker="o", markersize=3, **options)
    if len(x) == 1:
        axes.set_xlim(x[0] - 1, x[0] + 1)


def clipped(name: str, longest: int) -> str:
    half = longest // 2
    return name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"


def _estimate(axes: Axes, metrics: Rows, item: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Running estimate with its 95% band, the bounds, what fresh samples said afterwards, and behind a mean length the single responses."""
    name, (low, high) = item["name"], bounds_of(item)
    x, y = iterations(metrics), series(metrics, f"constraints/{name}/estimate")
    band = Z95 * np.nan_to_num(series(metrics, f"constraints/{name}/stderr"))
    found = [(label, colour, _measured(report, key, name)) for key, label, colour in _models(report)]
    points = [(label, colour, *measured) for label, colour, measured in found if measured is not None]
    half = np.minimum(band, np.nanmax(np.abs(y)))
    shown = [value for point in points for value in point[3:]]
    bottom, top = min([*shown, np.nanmin(y - half)]), max([*shown, np.nanmax(y + half)])
    # A bound far from everything measured (a constraint that only watches) would flatten the curve
    near = 4 * (top - bottom) or math.inf
    least, most = (smooth(series(metrics, f"watch/length/{key}")) for key in ("p5", "p95"))
    single = is_mean_length(item) and not np.isnan(most).all()
    if single:
        shown += [np.nanmin(least), np.nanmax(most)]
    shown += [value for value in (low, high) if value is not None and bottom - near <= value <= top + near]
    bottom, top = min([*shown, bottom]), max([*shown, top])
    pad = 0.06 * (top - bottom) or 1.0
    axes.set_ylim(bottom - pad, top + pad)
    shade(axes.axhspan, axes.axhline, low, high, axes.get_ylim(), label=f"bounds: {bounds_text(low, high)}")
    if single:
        axes.fill_between(x, least, most, color=GREY, alpha=0.16, linewidth=0, label="single responses, 5% to 95%")
    axes.fill_between(x, y - band, y + band, color=BLUE, alpha=0.18, linewidth=0)
    curve(axes, x, y, color=BLUE, linewidth=1.8, label="running estimate, 95% band")
    start = report.get("average_from")
    if start is not None:
        axes.axvline(start, color=GREY, linewidth=0.9, linestyle=":", label="weights averaged from here")
    step = 0.03 * (x[-1] - x[0]) or 0.3
    left, right = float(x[0]), float(x[-1])
    for label, colour, mean, below, above in points:
        if label == model_label("initial"):  # where it was measured: before the first iteration
            at = left = left - step
        else:
            at = right = right + step
        axes.errorbar(
            at, mean, yerr=[[mean - below], [above - mean]], fmt="o", markersize=4.5, capsize=3, color=colour,
            label=f"{label}: fresh samples",
        )  # fmt: skip
    if len(x) > 1:
        axes.set_xlim(left - step, right + step)
    else:
        axes.errorbar(x, y, yerr=band, color=BLUE, capsize=3)
    style(axes, *_words(item))
    legend(axes)


def _words(item: Mapping[str, Any]) -> tuple[str, str]:
    """(title, unit) of a constraint's panel."""
    name = clipped(item["name"], LONGEST_IN_TITLE)
    kind = item.get("type", "length" if name == "length" else None)
    if (event := event_of(item)) is not None:
        quantile = f" ({quantile_text(item).partition(' ')[0]} quantile)" if quantile_text(item) else ""
        return f"{name} {'≤' if event.at_most else '≥'} {event.value:g}{quantile}", "share of responses"
    if kind == "length":
        return "Mean response length" if name == "length" else f"Mean response length ({name})", "tokens"
    if kind == "data_nll":
        return f"Loss on {name}{', above the reference' if item.get('relative') else ''}", "nats per token"
    if kind == "kl":
        return "Divergence from the reference" if name == "kl" else f"Divergence ({name})", "nats"
    return f"Mean {name}", "reward"


def _models(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, label, colour) of the models that are drawn."""
    colours = {"sft": GREY, "initial": GREY, "average": BLUE}
    return [(key, model_label(key, report), colour) for key, colour in colours.items()]


def _measured(report: Mapping[str, Any], key: str, name: str) -> tuple[float, float, float] | None:
    """(mean, low, high) of a constraint on fresh samples, if the report has it."""
    summary = report.get(key) or {}
    found = (summary.get("constraints") or {}).get(name) or (summary.get("length") if name == "length" else None)
    if not found or found.get("mean") is None or not found.get("ci95"):
        return None
    low, high = found["ci95"]
    return found["mean"], min(low, found["mean"]), max(high, found["mean"])


def shade(
    span: Any,
    line: Any,
    low: float | None,
    high: float | None,
    limits: tuple[float, float],
    label: str | None = "bounds",
) -> None:
    """The allowed range in green, a line at each bound."""
    if low is None and high is None:
        return
    span(limits[0] if low is None else low, limits[1] if high is None else high, color=GREEN, alpha=0.13, linewidth=0)
    for index, bound in enumerate(value for value in (low, high) if value is not None):
        line(bound, color=GREEN, linewidth=1.1, label=label if index == 0 else None)


def _multipliers(axes: Axes, metrics: Rows, constraints: Sequence[Mapping[str, Any]]) -> None:
    x = iterations(metrics)
    for index, item in enumerate(constraints):
        prefix = f"constraints/{item['name']}/lambda"
        keys = sorted({key for row in metrics for key in row if key == prefix or key.startswith(f"{prefix}_")})
        for side, key in enumerate(keys):
            values = series(metrics, key)
            values[values <= 0] = math.nan
            suffix = key.removeprefix(prefix).strip("_")
            label = " ".join(part for part in (clipped(item["name"], LONGEST_IN_LEGEND), suffix) if part)
            looks: dict[str, Any] = {"linestyle": "--" if side else "-", "color": CURVES[index % len(CURVES)]}
            if not np.isnan(values).all():
                curve(axes, x, values, **looks, linewidth=1.4, label=label)
    _finished(axes, "Multiplier λ", "λ (log scale)", "nothing is constrained")


def _mu(axes: Axes, metrics: Rows) -> None:
    x = iterations(metrics)
    curve(axes, x, series(metrics, "l3m/mu"), color=BLUE, linewidth=1.6, label="μ")
    for key, label in (("l3m/noise_floor", "noise floor"), ("l3m/task_share", "share of the task's step")):
        values = series(metrics, key)
        values[values <= 0] = math.nan
        if not np.isnan(values).all():
            dashes = "--" if key == "l3m/noise_floor" else ":"
            curve(axes, x, values, color=GREY, linewidth=1.1, linestyle=dashes, label=label)
    _finished(axes, "Barrier strength μ", "μ (log scale)", "not logged")


def _gradient_norms(axes: Axes, metrics: Rows) -> None:
    """Instead of mu, which the other solvers do not have."""
    x = iterations(metrics)
    for key, label, colour in (("task", "task", GREY), ("constraint", "constraints", BLUE)):
        values = series(metrics, f"l3m/grad_norm/{key}" if key == "constraint" else "grad_norm")
        values[values <= 0] = math.nan
        if not np.isnan(values).all():
            curve(axes, x, values, color=colour, linewidth=1.2, label=label)
    _finished(axes, "Gradient norms before clipping", "norm (log scale)", "not logged")


def _finished(axes: Axes, title: str, ylabel: str, nothing: str) -> None:
    """On a logarithmic scale, labelled 0.3 and 4 where less than two decades are shown; a legend where there are several curves."""
    style(axes, title, ylabel)
    curves = len(axes.get_legend_handles_labels()[1])
    if not curves:
        empty(axes, nothing)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PlainLog())
    axes.yaxis.set_minor_formatter(_PlainLog(minor_thresholds=(1.5, 0.5)))
    if curves > 1:
        legend(axes)


class _PlainLog(LogFormatter):
    """Labels the ticks that matplotlib's formatter would, as 0.1 instead of 1e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _loss(axes: Axes, metrics: Rows, baseline: Rows, report: Mapping[str, Any]) -> None:
    for rows, colour, label in ((baseline, GREY, "SFT"), (metrics, BLUE, solver_label(report))):
        if rows:
            loss = series(rows, "loss")
            axes.plot(iterations(rows), loss, color=colour, linewidth=0.7, alpha=0.35)
            curve(axes, iterations(rows), smooth(loss), color=colour, linewidth=1.6, label=label)
    style(axes, "Task loss", "nats per token")
    if baseline:
        legend(axes)


def smooth(values: np.ndarray) -> np.ndarray:
    """Bias-corrected exponential average over about a tenth of the run; missing values leave it as it was."""
    weight = min(0.5, max(0.05, 10 / len(values)))
    total = mass = 0.0
    smooth = np.full_like(values, math.nan)
    for index, value in enumerate(values):
        if not math.isnan(value):
            total, mass = (1 - weight) * total + weight * value, (1 - weight) * mass + weight
        if mass:
            smooth[index] = total / mass
    return smooth


def _lengths(axes: Axes, report: Mapping[str, Any]) -> None:
    """Histogram of the sampled lengths before and after, the wanted range of the mean shaded."""
    counts = {key: (report.get(key) or {}).get("length", {}).get("histogram") for key, _, _ in _models(report)}
    counts = {key: value for key, value in counts.items() if value and sum(value)}
    low, high = ((report.get("bounds") or {}).get(side) for side in ("min", "max"))
    style(axes, "Length of responses", "% of responses", "tokens")
    if not counts:
        empty(axes, "no samples yet")
        return
    cut = _cut_at(report, counts)
    edge = max(_quantile(value, 0.99) for value in counts.values()) + 1
    edge = max(edge, 1.1 * (high or low or 0))
    width = max(1, round(edge / 30))
    edges = np.arange(0, edge + width, width)
    if cut is not None and cut < edge:  # the responses that were cut have a bar of their own
        edges = np.concatenate([edges[edges < cut], np.arange(cut, max(edge, cut + 1) + width, width)])
    shade(axes.axvspan, axes.axvline, low, high, (0.0, float(edges[-1])), label="bounds on the mean")
    marked = False
    for key, label, colour in _models(report):
        if key in counts:
            value = np.array(counts[key], dtype=float)
            tokens = np.arange(len(value))
            share = np.histogram(np.minimum(tokens, edges[-1] - 0.5), bins=edges, weights=100 * value / value.sum())[0]
            mean = float((tokens * value).sum() / value.sum())
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.22)
            axes.stairs(share, edges, color=colour, linewidth=1.4, label=f"{label}, mean {mean:.1f}")
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle="--")
            lost = 100 * (1 - (report[key].get("ended") or 0.0))
            if cut is not None and cut in edges and lost > 0:
                bar = {"color": "none", "edgecolor": colour, "hatch": "////", "linewidth": 0}
                axes.bar(cut, lost, width, align="edge", **bar, label=None if marked else f"cut at {cut}")
                marked = True
    axes.set_xlim(0, edges[-1])
    legend(axes)


def _cut_at(report: Mapping[str, Any], counts: Mapping[str, Sequence[int]]) -> int | None:
    """The most tokens that a response may have, where one was cut there: then it is the longest of its model."""
    cut = [len(value) - 1 for key, value in counts.items() if (report[key].get("ended") or 0.0) < 1]
    return max(cut, default=None)


def _quantile(counts: Sequence[int], share: float) -> int:
    return int(np.searchsorted(np.cumsum(counts), share * sum(counts)))
