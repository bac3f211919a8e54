"""How much worse the model's own answers have become, against what the docstrings have gained."""

from collections.abc import Sequence

from experiments.forgetting.draw import figure
from experiments.presenting import solver_name
from experiments.real import columns
from experiments.results import Result

__all__ = ["figure", "table"]


def table(results: Sequence[Result]) -> str:
    note = (
        "`own answers` and `instructions`: the loss less that of the start on the same rows, nats per token; answers that the start has "
        "sampled itself, and people's answers to the same instructions.\n"
    )
    return f"{columns.table(results, _name)}\n{note}\n{columns.responses(results, _name)}"


def _name(result: Result) -> str:
    return solver_name(result.solver)
