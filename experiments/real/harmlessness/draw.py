"""Harmlessness, length and what the monitors say. The data's prompts are not printed; replies are, with their profanity masked."""

from collections.abc import Sequence

from experiments.harmlessness.draw import figure
from experiments.real import columns
from experiments.real.harmlessness.lexicon import masked
from experiments.results import Result

CELLS = {
    "sft": "SFT",
    "barrier_harmlessness": "L3M, harmlessness alone",
    "barrier_short": "L3M, harmlessness and length",
}

__all__ = ["figure", "table"]


def table(results: Sequence[Result]) -> str:
    return f"{columns.table(results, _name)}\n{columns.responses(results, _name, show=masked, prompts=False)}"


def _name(result: Result) -> str:
    return CELLS.get(result.name, result.name)
