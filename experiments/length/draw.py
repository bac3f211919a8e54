"""Mean length, task perplexity and certificate of each solver and range; histograms and the estimates' way into the range."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import presenting
from experiments.presenting import COLOURS, by_cell, solver_name
from experiments.results import Result


def table(results: Sequence[Result]) -> str:
    header = (
        "solver", "wanted mean", "mean length (95%)", "seeds", "ended", "task perplexity", "of SFT's", "certificate", "λ at the end",
    )  # fmt: skip
    rows = []
    for runs in by_cell(sorted(results, key=_order)).values():
        first = runs[0]
        rows.append((
            solver_name(first.solver), presenting.wanted(first) or "-", presenting.interval(runs), presenting.seeds(runs),
            f"{100 * presenting.mean(runs, lambda run: run.summary['ended']):.1f}%",
            presenting.number(presenting.mean(runs, lambda run: run.summary.get("perplexity"))),
            presenting.number(presenting.mean(runs, lambda run: run.ratio), ".3f"),
            presenting.verdict(runs), presenting.multiplier(runs, "length"),
        ))  # fmt: skip
    samples = results[0].summary["samples"]
    note = f"Lengths in tokens, the closing one included; {samples} fresh samples on held-out prompts per seed, of the averaged weights."
    return f"{presenting.markdown(header, rows)}\n{note}\n"


def figure(results: Sequence[Result]) -> Figure:
    """A column per range: histograms above, estimates below."""
    plain = [result for result in results if result.solver == "none"]
    ranges = sorted({result.bound() for result in results if result.solver != "none"}, key=_middle)
    drawn, axes = presenting.new_figure(2, max(1, len(ranges)), width=3.4 * max(1, len(ranges)))
    for column, bounds in enumerate(ranges):
        runs = [result for result in results if result.solver != "none" and result.bound() == bounds]
        ours = [run for run in runs if run.solver == "barrier"]
        groups = [("SFT", COLOURS["none"], plain), ("L3M", COLOURS["barrier"], ours)]
        title = f"Wanted mean {presenting.wanted(runs[0])}"
        presenting.histogram(axes[0, column], groups, bounds, title)
        presenting.trajectories(
            axes[1, column], runs, "length", lambda run: solver_name(run.solver), "Estimate, 95% band", "tokens"
        )
        axes[0, column].legend(fontsize=7, loc="upper right", framealpha=0.8, edgecolor="none")
        axes[1, column].legend(fontsize=7, loc="upper right", framealpha=0.8, edgecolor="none")
    return drawn


def _order(result: Result) -> tuple[float, bool, str, int]:
    return _middle(result.bound()), result.solver != "barrier", result.solver, result.seed


def _middle(bounds: tuple[float | None, float | None]) -> float:
    given = [side for side in bounds if side is not None]
    return sum(given) / len(given) if given else 0.0
