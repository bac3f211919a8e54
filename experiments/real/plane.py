"""Two constraints against each other: a point per run with the bounds of its certificate, and the region that was wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from experiments.real.columns import interval
from experiments.results import Result
from l3ms.runs.figure import shade, style


def plane(
    axes: Axes,
    results: Sequence[Result],
    across: str,
    up: str,
    name: Callable[[Result], str],
    colour: Callable[[Result], str],
) -> None:
    """`across` and `up` are names of constraints or monitors; the runs without a certificate are left out."""
    shown: set[str] = set()
    for result in results:
        x, y = interval(result, across), interval(result, up)
        if x is None or y is None:
            continue
        axes.errorbar(
            [x[0]], [y[0]], [[y[0] - y[1]], [y[2] - y[0]]], [[x[0] - x[1]], [x[2] - x[0]]], linestyle="none", marker="o",
            capsize=2, color=colour(result), label=None if name(result) in shown else name(result),
        )  # fmt: skip
        shown.add(name(result))
    bounds = [
        next((run.bound(item) for run in results if run.bound(item) != (None, None)), (None, None))
        for item in (across, up)
    ]
    axes.update_datalim([(x, y) for x, y in zip(*map(_ends, bounds), strict=False) if x is not None and y is not None])
    axes.margins(0.15)
    axes.autoscale_view()
    limits = axes.get_xlim(), axes.get_ylim()
    shade(axes.axvspan, axes.axvline, *bounds[0], limits[0])
    shade(axes.axhspan, axes.axhline, *bounds[1], limits[1], label=None)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])
    style(axes, "Certificates: mean and bounds", up.replace("_", " "), across.replace("_", " "))


def _ends(bounds: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    """Both ends of the range, or twice the one that there is."""
    low, high = bounds
    return (low if low is not None else high), (high if high is not None else low)
