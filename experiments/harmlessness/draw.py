"""Harmlessness, length and task perplexity of each solver, with what a second reward model says; the trade between them as a picture."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import COLOURS, by_cell, solver_name
from experiments.results import Result
from l3ms.runs.figure import shade, style

REWARD, SECOND, DISTINCT = "harmlessness", "second_opinion", "distinct_2"


def table(results: Sequence[Result]) -> str:
    header = (
        "", "harmlessness wanted", "harmlessness (95%)", "second reward model (95%)", "length wanted", "length (95%)", "ended",
        "distinct-2", "task perplexity", "of SFT's", "harmlessness", "length",
    )  # fmt: skip
    rows = []
    for runs in by_cell(results).values():
        first = runs[0]
        plain = first.solver == "none"
        rows.append((
            _name(first),
            "-" if plain else presenting.wanted(first, REWARD) or "-",
            presenting.interval(runs, REWARD), presenting.interval(runs, SECOND),
            "-" if plain else presenting.wanted(first) or "-",
            presenting.interval(runs, form=".1f"),
            f"{100 * presenting.mean(runs, lambda run: run.summary['ended']):.1f}%",
            presenting.number(presenting.mean(runs, lambda run: run.measured(DISTINCT)[0]), ".3f"),
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity")), ".1f"),
            presenting.number(presenting.mean(runs, lambda run: run.ratio), ".3f"),
            presenting.verdict(runs, REWARD), presenting.verdict(runs, "length"),
        ))  # fmt: skip
    samples = results[0].summary["samples"]
    return f"""{presenting.markdown(header, rows)}
Harmlessness is the mean tanh of the reward model's score, 0 for an average reply of the data. The second reward model has learned other
pairs and has no part in the training: what it does not confirm, the first one was talked into. Distinct-2 is the share of different
token pairs within a response. The last two columns are the certificates' verdicts; plain fine-tuning is judged by the bounds of the
`short` cells. {samples} fresh samples on held-out prompts per seed, of the averaged weights; lengths in tokens, the closing one included.
"""


def figure(results: Sequence[Result]) -> Figure:
    """Left: harmlessness against length of each run. Middle and right: both reward models' scores over the iterations."""
    drawn, axes = presenting.new_figure(1, 3, width=12.0, height=3.6)
    _plane(axes[0, 0], results)
    constrained = [result for result in results if result.solver != "none"]
    for column, name, title in ((1, REWARD, "Estimate by the constraint's model"), (2, SECOND, "by the second model")):
        presenting.trajectories(axes[0, column], constrained, name, _name, title, "mean tanh score")
        axes[0, column].legend(fontsize=7, framealpha=0.8, edgecolor="none")
    return drawn


def _plane(axes: Any, results: Sequence[Result]) -> None:
    """A point per run with its 95% intervals; filled by the constraint's model, hollow by the second one."""
    shown: set[str] = set()
    for result in results:
        name = _name(result)
        length, low, high = result.measured("length")
        across = [[length - low], [high - length]]
        options: dict[str, Any] = {"color": COLOURS.get(result.solver, COLOURS["barrier"]), "capsize": 2}
        options["marker"] = "s" if "harmlessness" in result.name else "o"
        for source, filled in ((REWARD, True), (SECOND, False)):
            score, below, above = result.measured(source)
            axes.errorbar(
                [length], [score], [[score - below], [above - score]], across, linestyle="none",
                markerfacecolor=None if filled else "white", label=name if filled and name not in shown else None, **options,
            )  # fmt: skip
        shown.add(name)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    both = next((result for result in results if None not in result.bound("length")), results[0])
    shade(axes.axvspan, axes.axvline, *both.bound("length"), axes.get_xlim())
    shade(axes.axhspan, axes.axhline, *both.bound(REWARD), axes.get_ylim(), label=None)
    style(axes, "Held-out prompts (hollow: second model)", "harmlessness", "mean length, tokens")
    axes.legend(fontsize=7, loc="upper right", framealpha=0.8, edgecolor="none")


def _name(result: Result) -> str:
    """`L3M (barrier), harmlessness alone`"""
    if result.solver == "none":
        return "SFT"
    what = "harmlessness alone" if "harmlessness" in result.name else "length too"
    return f"{solver_name(result.solver)}, {what}"
