"""Sentiment and readability, each bounded together with the length: where the certificates put them, and the estimates' way there."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import COLOURS
from experiments.real import columns
from experiments.real.plane import plane
from experiments.results import Result

CELLS = {"sft": "SFT", "sentiment": "L3M, sentiment and length", "readability": "L3M, readability and length"}
SHADES = {"sft": COLOURS["none"], "sentiment": COLOURS["barrier"], "readability": COLOURS["dual_ascent"]}
TONES = {"sentiment": "compound score", "readability": "Flesch reading ease"}


def table(results: Sequence[Result]) -> str:
    return f"{columns.table(results, _name)}\n{columns.responses(results, _name)}"


def figure(results: Sequence[Result]) -> Figure:
    """A column per tone: the estimates above, the certificates of tone and length below."""
    drawn, axes = presenting.new_figure(2, len(TONES), height=3.2)
    constrained = [result for result in results if result.solver != "none"]
    for column, (tone, unit) in enumerate(TONES.items()):
        above, below = axes[:, column]
        presenting.trajectories(above, constrained, tone, _name, f"{tone}: estimate, 95% band", unit, _colour)
        plane(below, results, "length", tone, _name, _colour)
        for panel in (above, below):
            presenting.legend(panel)
    return drawn


def _name(result: Result) -> str:
    return CELLS.get(result.name, result.name)


def _colour(result: Result) -> str:
    return SHADES.get(result.name, COLOURS["barrier"])
