"""What each choice is worth: where the averaged weights and the last iterate end, and how far the estimate swings on the way."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import by_cell
from experiments.results import Result
from l3ms.runs.figure import series

COLUMNS = {
    "mu-paper": "mu to 1e-6", "smoothing-0.1": "smoothing 0.1", "smoothing-1": "no smoothing",
    "momentum-0.9": "momentum 0.9", "norm-sequence": "length_norm sequence",
    "norm-none": "length_norm none", "joint": "joint half-steps", "separate": "clipping separate", "default": "default", "sft": "SFT",
}  # fmt: skip


def table(results: Sequence[Result]) -> str:
    header = (
        "changed", "wanted mean", "averaged weights (95%)", "last iterate", "swing", "p5 to p95", "ended", "task perplexity", "of SFT's",
        "certificate",
    )  # fmt: skip
    rows = []
    for runs in by_cell(results).values():
        first = runs[0]
        rows.append((
            COLUMNS.get(first.labels[0], first.labels[0]), presenting.wanted(first) or "-", presenting.interval(runs),
            presenting.number(presenting.mean(runs, lambda run: run.last["length"]["mean"])),
            presenting.number(presenting.mean(runs, swing), ".1f"),
            " to ".join(f"{presenting.mean(runs, lambda run, p=p: run.summary['length'][p]):.0f}" for p in ("p5", "p95")),
            f"{100 * presenting.mean(runs, lambda run: run.summary['ended']):.1f}%",
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity"))),
            presenting.number(presenting.mean(runs, lambda run: run.ratio), ".3f"), presenting.verdict(runs),
        ))  # fmt: skip
    note = "Lengths in tokens; swing: largest minus smallest running estimate over the last half of the run."
    return f"{presenting.markdown(header, rows)}\n{note}\n"


def figure(results: Sequence[Result]) -> Figure:
    """A row per range, a panel per choice, the default behind each in grey."""
    ranges = list(dict.fromkeys(result.bound() for result in results if result.labels[0] != "sft"))
    changes = list(dict.fromkeys(result.labels[0] for result in results if result.labels[0] not in ("sft", "default")))
    drawn, axes = presenting.new_figure(
        max(1, len(ranges)), max(1, len(changes)), width=2.3 * max(2, len(changes)), height=2.5
    )
    for row, bounds in enumerate(ranges):
        default = [result for result in results if result.labels[0] == "default" and result.bound() == bounds]
        for column, change in enumerate(changes):
            panel = axes[row, column]
            runs = [result for result in results if result.labels[0] == change and result.bound() == bounds]
            if not runs:
                panel.set_axis_off()
                continue
            for run in default:
                panel.plot(
                    series(run.metrics, "constraints/length/estimate"), color=presenting.COLOURS["none"], linewidth=1.0
                )
            presenting.trajectories(
                panel, runs, "length", lambda run: "", COLUMNS.get(change, change), "tokens" if column == 0 else ""
            )
            panel.title.set_fontsize(8.5)
    return drawn


def swing(result: Result) -> float:
    values = series(result.metrics, "constraints/length/estimate")
    late = values[len(values) // 2 :]
    return math.nan if np.isnan(late).all() else float(np.nanmax(late) - np.nanmin(late))
