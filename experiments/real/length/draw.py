"""SFT, bounds on the mean alone, with chance constraints beside it, and the paper's settings: in a range below the task and one above."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import COLOURS
from experiments.real import columns
from experiments.results import Result

METHODS = {
    "sft": "SFT",
    "mean": "L3M, mean alone",
    "ema": "mean alone, moving average",
    "chance": "L3M, mean and shares",
    "paper": "mean alone, paper's settings",
}
SHADES = {
    "mean": COLOURS["barrier"],
    "ema": COLOURS["penalty"],
    "chance": COLOURS["dual_ascent"],
    "paper": COLOURS["augmented_lagrangian"],
}


def table(results: Sequence[Result]) -> str:
    return f"{columns.table(results, _name)}\n{columns.responses(results, _name)}"


def figure(results: Sequence[Result]) -> Figure:
    """A column per range: histograms above, estimates below."""
    plain = [result for result in results if result.labels[0] == "sft"]
    ranges = list(dict.fromkeys(result.bound() for result in results if result.labels[0] != "sft"))
    drawn, axes = presenting.new_figure(2, max(1, len(ranges)), width=5.5 * max(1, len(ranges)))
    for column, bounds in enumerate(ranges):
        runs = [result for result in results if result.labels[0] != "sft" and result.bound() == bounds]
        groups = [("SFT", COLOURS["none"], plain)]
        groups += [
            (METHODS[label], colour, [run for run in runs if run.labels[0] == label])
            for label, colour in SHADES.items()
        ]
        title = f"Wanted mean {presenting.wanted(runs[0])}"
        presenting.histogram(axes[0, column], [group for group in groups if group[2]], bounds, title)
        presenting.trajectories(axes[1, column], runs, "length", _method, "Estimate, 95% band", "tokens", _colour)
        for panel in axes[:, column]:
            presenting.legend(panel)
    return drawn


def _method(result: Result) -> str:
    return METHODS.get(result.labels[0], result.labels[0])


def _colour(result: Result) -> str:
    return SHADES.get(result.labels[0], COLOURS["none"])


def _name(result: Result) -> str:
    return ", ".join((_method(result), *result.labels[1:]))
