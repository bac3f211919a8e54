"""Further columns of the data, on their way to reward functions: which names are taken."""

from __future__ import annotations

from collections.abc import Iterable

# What every reward function gets of the responses, and of the training that asks, as in TRL; and the arguments of our own on the way.
TAKEN = frozenset(
    ("prompts", "completions", "completion_ids", "raw_completions", "ended")
    + ("trainer_state", "log_extra", "log_metric", "lengths", "self")
)
# Of a row: what is no further column.
ROW = frozenset(("input_ids", "labels", "attention_mask", "prompt", "completion"))


def check_names(where: str, names: Iterable[object]) -> None:
    """ValueError, which begins with `where`, for a column that a reward function could not tell from what else it gets."""
    for name in names:
        if name in TAKEN:
            raise ValueError(
                f"{where}: a column cannot be named {name!r}, since reward functions are given something else by that name: rename it"
            )
        if not isinstance(name, str):
            raise ValueError(f"{where}: a column's name must be a text, got {name!r}")
