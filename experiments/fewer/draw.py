"""Tokens that a run samples on its way to its certificate, and what fewer of them cost: the estimate, the task, the verdict."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import by_cell
from experiments.results import Result
from l3ms.runs.figure import series, shade

FULL = "every-1"
NAMES = {
    "every-1": "every: 1, reuse: 1", "every-auto": "every: auto", "reuse-2": "reuse: 2", "reuse-4": "reuse: 4",
    "both": "every: auto, reuse: 2",
}  # fmt: skip


def table(results: Sequence[Result]) -> str:
    header = (
        "rollout", "wanted mean", "mean length (95%)", "seeds", "task perplexity", "of 1/1's", "certificate", "sampled tokens", "saved",
        "half-steps taken", "effective share",
    )  # fmt: skip
    full = {(run.bound(), run.seed): run for run in results if run.labels[0] == FULL}
    rows = []
    for runs in by_cell(sorted(results, key=lambda run: run.bound() != results[0].bound())).values():
        pairs = [(run, full[run.bound(), run.seed]) for run in runs if (run.bound(), run.seed) in full]
        rows.append((
            NAMES.get(runs[0].labels[0], runs[0].labels[0]), presenting.wanted(runs[0]), presenting.interval(runs), presenting.seeds(runs),
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity"))),
            presenting.number(_mean([run.summary["perplexity"] / other.summary["perplexity"] for run, other in pairs]), ".3f"),
            presenting.verdict(runs), presenting.number(presenting.mean(runs, lambda run: run.sampled_tokens), ",.0f"),
            presenting.number(_mean([100 - 100 * _tokens(run) / _tokens(other) for run, other in pairs]), ".0f") + "%",
            presenting.number(presenting.mean(runs, lambda run: _logged(run, "l3m/constraint_step")), ".2f"),
            presenting.number(presenting.mean(runs, lambda run: _logged(run, "l3m/ess")), ".2f"),
        ))  # fmt: skip
    note = (
        "Sampled tokens and those saved: of the training, against every: 1, reuse: 1 of the same seed, as the perplexity is. Half-steps: "
        "share of the iterations with one. Effective share: of the responses when they are used again."
    )
    return f"{presenting.markdown(header, rows)}\n{note}\n"


def figure(results: Sequence[Result]) -> Figure:
    """A row per bound, a panel per way of sampling: the estimate over the tokens sampled so far, a line per seed, 1/1's in grey."""
    bounds = list(dict.fromkeys(run.bound() for run in results))
    ways = list(dict.fromkeys(run.labels[0] for run in results))
    drawn, axes = presenting.new_figure(len(bounds), len(ways), width=2.6 * max(2, len(ways)), height=2.6)
    for row, (low, high) in enumerate(bounds):
        for column, way in enumerate(ways):
            panel = axes[row, column]
            for run in results:
                if run.bound() == (low, high) and run.labels[0] in (FULL, way):
                    _line(panel, run, presenting.COLOURS["barrier" if run.labels[0] == way else "none"])
            panel.set_ylim(4, 24)
            shade(panel.axhspan, panel.axhline, low, high, panel.get_ylim())
            panel.set_title(NAMES.get(way, way), fontsize=8.5)
            panel.locator_params(axis="x", nbins=4)
            panel.set_xlabel("sampled tokens", fontsize=8)
            if column == 0:
                panel.set_ylabel("estimated mean length", fontsize=8)
    return drawn


def _line(panel: Any, run: Result, colour: str) -> None:
    tokens, estimates = (series(run.metrics, key) for key in ("l3m/sampled_tokens", "constraints/length/estimate"))
    panel.plot(tokens, estimates, color=colour, linewidth=1.0)


def _tokens(run: Result) -> float:
    tokens = run.sampled_tokens
    return tokens if tokens else math.nan


def _logged(run: Result, key: str) -> float | None:
    values = series(run.metrics, key)
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
