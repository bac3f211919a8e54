"""Tokens that a run samples on its way to its certificate, and what fewer of them cost: the estimate, the task, the verdict."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import by_cell
from experiments.results import Result
from l3ms.runs.figure import series, shade

NAMES = {
    "every-1": "every: 1, reuse: 1", "every-auto": "every: auto", "reuse-2": "reuse: 2", "reuse-4": "reuse: 4",
    "both": "every: auto, reuse: 2",
}  # fmt: skip


def table(results: Sequence[Result]) -> str:
    header = (
        "rollout", "mean length (95%)", "seeds", "task perplexity", "of 1/1's", "certificate", "sampled tokens", "saved",
        "half-steps taken", "effective share",
    )  # fmt: skip
    full = {run.seed: run.sampled_tokens for run in results if run.name == "every-1"}
    rows = []
    for runs in by_cell(results).values():
        saved = presenting.mean(runs, lambda run: _saved(run, full.get(run.seed)))
        rows.append((
            NAMES.get(runs[0].name, runs[0].name), presenting.interval(runs), presenting.seeds(runs),
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity"))),
            presenting.number(presenting.mean(runs, lambda run: run.ratio), ".3f"), presenting.verdict(runs),
            presenting.number(presenting.mean(runs, lambda run: run.sampled_tokens), ",.0f"), presenting.number(100 * saved, ".0f") + "%",
            presenting.number(presenting.mean(runs, lambda run: _mean(run, "l3m/constraint_step")), ".2f"),
            presenting.number(presenting.mean(runs, lambda run: _mean(run, "l3m/ess")), ".2f"),
        ))  # fmt: skip
    note = (
        f"Wanted mean {presenting.wanted(results[0])} tokens. Sampled tokens and those saved: of the training, against every: 1, reuse: 1 "
        "of the same seed. Half-steps: share of the iterations with one. Effective share: of the responses when they are used again."
    )
    return f"{presenting.markdown(header, rows)}\n{note}\n"


def figure(results: Sequence[Result]) -> Figure:
    """A panel per cell: the estimate over the tokens sampled so far, a line per seed, 1/1's in grey."""
    cells = by_cell(results)
    drawn, axes = presenting.new_figure(1, max(1, len(cells)), width=2.6 * max(2, len(cells)), height=2.6)
    for column, (name, runs) in enumerate(cells.items()):
        panel = axes[0, column]
        for run in cells.get("every-1", []):
            _line(panel, run, presenting.COLOURS["none"])
        for run in runs if name != "every-1" else []:
            _line(panel, run, presenting.COLOURS["barrier"])
        low, high = runs[0].bound()
        if low is not None and high is not None:
            panel.set_ylim(low - 4, high + 8)
            shade(panel.axhspan, panel.axhline, low, high, panel.get_ylim())
        panel.set_title(NAMES.get(name, name), fontsize=8.5)
        panel.set_xlabel("sampled tokens", fontsize=8)
        if column == 0:
            panel.set_ylabel("estimated mean length", fontsize=8)
    return drawn


def _line(panel, run: Result, colour: str) -> None:
    tokens, estimates = (series(run.metrics, key) for key in ("l3m/sampled_tokens", "constraints/length/estimate"))
    panel.plot(tokens, estimates, color=colour, linewidth=1.0)


def _saved(run: Result, full: float | None) -> float | None:
    own = run.sampled_tokens
    return None if own is None or not full else 1 - own / full


def _mean(run: Result, key: str) -> float | None:
    values = series(run.metrics, key)
    return None if np.isnan(values).all() else float(np.nanmean(values))
