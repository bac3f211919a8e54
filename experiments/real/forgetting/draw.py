"""The loss on the instructions before and after, and its change row by row, against what the docstrings have gained."""

from collections.abc import Sequence

from experiments.forgetting.draw import figure
from experiments.presenting import number, solver_name
from experiments.real import columns
from experiments.results import Result

NAME = "instructions"

__all__ = ["figure", "table"]


def table(results: Sequence[Result]) -> str:
    further = {
        "instructions' loss, before": lambda run: number(run.before.measured(NAME)[0], ".3f"),
        "after": lambda run: number(run.measured(NAME)[0], ".3f"),
        "change [95%]": _change,
    }
    note = (
        "Losses in nats per token. The change is the mean of the differences on the same held-out instructions: the certificate "
        "is of the loss itself, whose rows differ much more, and needs more of them.\n"
    )
    return f"{columns.table(results, _name, further=further)}\n{note}\n{columns.responses(results, _name)}"


def _change(result: Result) -> str:
    found = result.measurements
    return f"{found['change']:+.3f} [{found['ci95'][0]:+.3f}, {found['ci95'][1]:+.3f}]" if found else "-"


def _name(result: Result) -> str:
    return solver_name(result.solver)
