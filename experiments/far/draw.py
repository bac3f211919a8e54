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
            presenting.interval(runs),
            presenting.interval(runs, "period", ".3f") if _has(first, "period") else "-",
            f"{100 * presenting.mean(runs, lambda run: run.summary['ended']):.1f}%",
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity"))),
            presenting.number(presenting.mean(runs, lambda run: run.ratio), ".3f"),
            presenting.verdict(runs),
        ))  # fmt: skip
    return presenting.markdown(header, rows)


def figure(results: Sequence[Result]) -> Figure:
    """A row per problem and a panel per constraint of it, the estimates of all methods in each."""
    problems = list(dict.fromkeys(result.labels[-1] for result in results if result.labels[0] != "sft"))
    drawn, axes = presenting.new_figure(max(1, len(problems)), 2, width=9.0, height=2.4)
    for row, problem in enumerate(problems):
        runs = [result for result in results if result.labels[-1] == problem]
        for column, name in enumerate(NAMES):
            panel = axes[row, column]
            if not _has(runs[0], name):
                panel.set_axis_off()
                continue
            for method in dict.fromkeys(run.labels[0] for run in runs):
                chosen = [run for run in runs if run.labels[0] == method]
                title = f"{name} {presenting.wanted(runs[0], name)}"
                unit = "tokens" if name == "length" else "share"
                presenting.trajectories(panel, chosen, name, lambda run: METHODS[run.labels[0]], title, unit)
            for line, colour in zip(panel.get_lines(), ("#1f5fbf", "#b5651d", "#c2452d"), strict=False):
                line.set_color(colour)
            panel.legend(fontsize=7, framealpha=0.8, edgecolor="none")
    return drawn


def _has(result: Result, name: str) -> bool:
    return result.bound(name) != (None, None)
