"""The picture of a run: estimates against their bounds, multipliers, mu, task loss, and the lengths that came out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from l3ms.runs.labels import model_label, solver_label

BLUE, GREY, GREEN, RED = "#1f5fbf", "#8a8f98", "#2f9e5b", "#c2452d"
CURVES = (BLUE, "#b5651d", "#6b4fa3", RED)
LEGEND: dict[str, Any] = {"framealpha": 0.8, "edgecolor": "none"}
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
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    if xlabel == "iteration":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _estimate(axes: Axes, metrics: Rows, item: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Running estimate with its 95% band, the bounds, and what fresh samples said afterwards."""
    name, low, high = item["name"], item.get("min"), item.get("max")
    x, y = iterations(metrics), series(metrics, f"constraints/{name}/estimate")
    band = Z95 * np.nan_to_num(series(metrics, f"constraints/{name}/stderr"))
    found = [(label, colour, _measured(report, key, name)) for key, label, colour in _models(report)]
    points = [(label, colour, *measured) for label, colour, measured in found if measured is not None]
    half = np.minimum(band, np.nanmax(np.abs(y)))
    shown = [value for point in points for value in point[3:]]
    bottom, top = min([*shown, np.nanmin(y - half)]), max([*shown, np.nanmax(y + half)])
    # A bound far from everything measured (a constraint that only watches) would flatten the curve
    near = 4 * (top - bottom) or math.inf
    shown += [value for value in (low, high) if value is not None and bottom - near <= value <= top + near]
    bottom, top = min([*shown, bottom]), max([*shown, top])
    pad = 0.06 * (top - bottom) or 1.0
    axes.set_ylim(bottom - pad, top + pad)
    shade(axes.axhspan, axes.axhline, low, high, axes.get_ylim())
    axes.fill_between(x, y - band, y + band, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(x, y, color=BLUE, linewidth=1.8, label="running estimate, 95% band")
    start = report.get("average_from")
    if start is not None:
        axes.axvline(start, color=GREY, linewidth=0.9, linestyle=":")
        axes.annotate(
            "weights averaged", (start, 1), xycoords=("data", "axes fraction"), xytext=(4, -11),
            textcoords="offset points", fontsize=7.5, color=GREY,
        )  # fmt: skip
    span = max(x[-1] - x[0], 1.0)
    for index, (label, colour, mean, below, above) in enumerate(points):
        axes.errorbar(
            x[-1] + span * 0.03 * (index + 1), mean, yerr=[[mean - below], [above - mean]],
            fmt="o", markersize=4.5, capsize=3, color=colour, label=f"{label}: fresh samples",
        )  # fmt: skip
    style(axes, *_words(item))
    axes.legend(fontsize=8, **LEGEND, loc="best")


def _words(item: Mapping[str, Any]) -> tuple[str, str]:
    """(title, unit) of a constraint's panel."""
    name, kind = item["name"], item.get("type", "length" if item["name"] == "length" else None)
    if item.get("threshold") is not None:
        return f"{name} ≥ {item['threshold']:g}", "share of responses"
    if kind == "length":
        return "Mean response length" if name == "length" else f"Mean response length ({name})", "tokens"
    if kind == "data_nll":
        return f"Loss on {name}", "nats per token"
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
            label = " ".join(part for part in (item["name"], suffix) if part)
            dashes = "--" if side else "-"
            axes.plot(x, values, dashes, color=CURVES[index % len(CURVES)], linewidth=1.4, label=label)
    _log_scale(axes)
    style(axes, "Multiplier λ", "λ (log scale)")
    if len(axes.lines) > 1:
        axes.legend(fontsize=8, **LEGEND)


def _mu(axes: Axes, metrics: Rows) -> None:
    x = iterations(metrics)
    axes.plot(x, series(metrics, "l3m/mu"), color=BLUE, linewidth=1.6, label="μ")
    for key, label in (("l3m/noise_floor", "noise floor"), ("l3m/task_share", "share of the task's step")):
        values = series(metrics, key)
        values[values <= 0] = math.nan
        if not np.isnan(values).all():
            axes.plot(
                x, values, color=GREY, linewidth=1.1, linestyle="--" if key == "l3m/noise_floor" else ":", label=label
            )
    _log_scale(axes)
    style(axes, "Barrier strength μ", "μ (log scale)")
    if len(axes.lines) > 1:
        axes.legend(fontsize=8, **LEGEND)


def _gradient_norms(axes: Axes, metrics: Rows) -> None:
    """Instead of mu, which the other solvers do not have."""
    x = iterations(metrics)
    for key, label, colour in (("task", "task", GREY), ("constraint", "constraints", BLUE)):
        values = series(metrics, f"l3m/grad_norm/{key}" if key == "constraint" else "grad_norm")
        values[values <= 0] = math.nan
        if not np.isnan(values).all():
            axes.plot(x, values, color=colour, linewidth=1.2, label=label)
    _log_scale(axes)
    style(axes, "Gradient norms before clipping", "norm (log scale)")
    if len(axes.lines) > 1:
        axes.legend(fontsize=8, **LEGEND)


def _log_scale(axes: Axes) -> None:
    """Logarithmic, labelled 0.3 and 4 where less than two decades are shown."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PlainLog())
    axes.yaxis.set_minor_formatter(_PlainLog(minor_thresholds=(1.5, 0.5)))


class _PlainLog(LogFormatter):
    """Labels the ticks that matplotlib's formatter would, as 0.1 instead of 1e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _loss(axes: Axes, metrics: Rows, baseline: Rows, report: Mapping[str, Any]) -> None:
    for rows, colour, label in ((baseline, GREY, "SFT"), (metrics, BLUE, solver_label(report))):
        if rows:
            loss = series(rows, "loss")
            axes.plot(iterations(rows), loss, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(iterations(rows), smooth(loss), color=colour, linewidth=1.6, label=label)
    style(axes, "Task loss", "nats per token")
    if baseline:
        axes.legend(fontsize=8, **LEGEND)


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
        axes.text(0.5, 0.5, "no samples yet", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    edge = max(_quantile(value, 0.99) for value in counts.values()) + 1
    edge = max(edge, 1.1 * (high or low or 0))
    width = max(1, round(edge / 30))
    edges = np.arange(0, edge + width, width)
    shade(axes.axvspan, axes.axvline, low, high, (0.0, float(edges[-1])), label="bounds on the mean")
    for key, label, colour in _models(report):
        if key in counts:
            value = np.array(counts[key], dtype=float)
            tokens = np.arange(len(value))
            share = np.histogram(np.minimum(tokens, edges[-1] - 0.5), bins=edges, weights=100 * value / value.sum())[0]
            mean = float((tokens * value).sum() / value.sum())
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.22)
            axes.stairs(share, edges, color=colour, linewidth=1.4, label=f"{label}, mean {mean:.1f}")
            axes.axvline(mean, color=colour, linewidth=1.2, linestyle="--")
    axes.set_xlim(0, edges[-1])
    axes.legend(fontsize=8, **LEGEND)


def _quantile(counts: Sequence[int], share: float) -> int:
    return int(np.searchsorted(np.cumsum(counts), share * sum(counts)))
