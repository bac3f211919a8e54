"""The loss on what is to be kept, before and after, against what the new task has gained."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import COLOURS, by_cell, solver_name
from experiments.results import Result
from l3ms.runs.figure import iterations, series, shade, smooth, style


def table(results: Sequence[Result]) -> str:
    name = _name(results)
    header = (
        "solver", "loss allowed", "kept task, before (95%)", "after (95%)", "seeds", "certificate", "new task's perplexity", "of SFT's",
        "λ at the end",
    )  # fmt: skip
    rows = [
        (
            solver_name(runs[0].solver), presenting.wanted(runs[0], name), presenting.interval([run.before for run in runs], name, ".3f"),
            presenting.interval(runs, name, ".3f"), presenting.seeds(runs, name, ".3f"), presenting.verdict(runs, name),
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity"))),
            presenting.number(presenting.mean(runs, lambda run: run.ratio), ".3f"), presenting.multiplier(runs, name),
        )
        for runs in by_cell(results).values()
    ]  # fmt: skip
    return (
        f"{presenting.markdown(header, rows)}\nLosses in nats per token, on held-out rows, of the averaged weights.\n"
    )


def figure(results: Sequence[Result]) -> Figure:
    """Left the running estimates, in the middle what held-out rows say, right the new task's loss."""
    name = _name(results)
    drawn, axes = presenting.new_figure(1, 3, height=3.3)
    left, middle, right = axes[0]
    presenting.trajectories(
        left, results, name, lambda run: solver_name(run.solver), "Kept task: estimate, 95% band", "nats per token"
    )
    groups = list(by_cell(results).values())
    for place, runs in enumerate(groups):
        spread = np.linspace(-0.15, 0.15, len(runs)) if len(runs) > 1 else [0.0]
        for shift, run in zip(spread, runs, strict=True):
            centre, low, high = run.measured(name)
            options = {"fmt": "o", "markersize": 4.5, "capsize": 3, "color": COLOURS[run.solver]}
            middle.errorbar(place + shift, centre, yerr=[[centre - low], [high - centre]], **options)
    before = presenting.pooled([run.before for runs in groups for run in runs], name)[0]
    middle.axhline(before, color="#8a8f98", linestyle="--", linewidth=1.0, label="before")
    middle.update_datalim([(0.0, side) for side in results[0].bound(name) if side is not None])
    middle.margins(x=0.2, y=0.15)
    middle.autoscale_view()
    limits = middle.get_ylim()
    shade(middle.axhspan, middle.axhline, *results[0].bound(name), limits, label="bound")
    middle.set_ylim(limits)
    style(middle, "Kept task: held-out rows", "nats per token", "")
    middle.set_xticks(range(len(groups)), [solver_name(runs[0].solver) for runs in groups])
    for runs in groups:
        loss = series(runs[0].metrics, "loss")
        right.plot(
            iterations(runs[0].metrics),
            smooth(loss),
            color=COLOURS[runs[0].solver],
            linewidth=1.5,
            label=solver_name(runs[0].solver),
        )
    style(right, "New task: training loss", "nats per token")
    for panel in (left, middle, right):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, framealpha=0.8, edgecolor="none")
    return drawn


def _name(results: Sequence[Result]) -> str:
    return results[0].bounds[0]["name"]
