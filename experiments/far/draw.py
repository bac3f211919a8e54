"""Whether bounds far from the task, and two unlike constraints, are met: where each constraint ends, by how the steps are clipped."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import by_cell
from experiments.results import Result

METHODS = {
    "sft": "SFT",
    "default": "default",
    "separate": "clipping separate",
    "paper": "mu to 1e-6, clipping separate",
}
NAMES = ("length", "period")  # of the constraints


def table(results: Sequence[Result]) -> str:
    header = (
        "method",
        "wanted",
        "iterations",
        "length (95%)",
        "ends with a period (95%)",
        "ended",
        "task perplexity",
        "of SFT's",
        "certificate",
    )
    rows = []
    for runs in by_cell(results).values():
        first = runs[0]
        bounds = {name: presenting.wanted(first, name) for name in NAMES if name == "length" or _has(first, name)}
        rows.append((
            METHODS.get(first.labels[0], first.labels[0]),
            ", ".join(f"{name} {text}" for name, text in bounds.items() if text) or "-",
            str(len(first.metrics)),
            presenting.interval(runs),
            presenting.interval(runs, "period", ".3f") if _has(first, "period") else "-",
            f"{100 * presenting.mean(runs, lambda run: run.summary['ended']):.1f}%",
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity"))),
            presenting.number(presenting.mean(runs, lambda run: run.ratio), ".3f"),
            presenting.verdict(runs),
        ))  # fmt: skip
    return presenting.markdown(header, rows)


def figure(results: Sequence[Result]) -> Figure:
    """A panel per constraint of each problem, the estimates of all methods in each."""
    constrained = [result for result in results if result.labels[0] != "sft"]
    groups: dict[str, list[Result]] = {}
    for result in constrained:
        groups.setdefault(result.labels[-1], []).append(result)
    wanted = [(runs, name) for runs in groups.values() for name in NAMES if _has(runs[0], name)]
    drawn, axes = presenting.new_figure(1, max(1, len(wanted)), width=3.2 * max(1, len(wanted)), height=3.2)
    for panel, (runs, name) in zip(axes[0], wanted, strict=False):
        title, unit = f"{name} {presenting.wanted(runs[0], name)}", "tokens" if name == "length" else "share"
        presenting.trajectories(panel, runs, name, lambda run: METHODS[run.labels[0]], title, unit)
        panel.legend(fontsize=7, framealpha=0.8, edgecolor="none")
    return drawn


def _has(result: Result, name: str) -> bool:
    return result.bound(name) != (None, None)
