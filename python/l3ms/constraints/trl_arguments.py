"""What reward functions of TRL may ask of the training beside prompts, completions and columns: `trainer_state`, `log_extra`, `log_metric`.

In a training they get the trainer's own. Elsewhere (a trial call, an evaluation, a certificate, a loop of one's own) the state is a
`TrainerState` that says how far the training is, and what is logged is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = ("trainer_state", "log_extra", "log_metric")


def trl_arguments(*, iteration: int = 0, iterations: int = 0) -> dict[str, Any]:
    """Where no training asks: the state is that after `iteration` of `iterations`, and nothing is kept of what is logged."""
    try:
        from transformers import TrainerState as State
    except ImportError:  # a loop of one's own needs torch alone
        from types import SimpleNamespace as State
    state = State(global_step=iteration, max_steps=iterations)
    log = RewardLog()
    return {"trainer_state": state, "log_extra": log.log_extra, "log_metric": log.log_metric}


class RewardLog:
    """What reward functions log in a training: metrics until the next line of the log, columns of the last responses."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Values of a column beside the responses; another call adds to them."""
        if isinstance(values, (str, bytes)):
            raise ValueError(f"log_extra({column!r}, ...): wanted a list, one value per response, got {values!r}")
        self.columns.setdefault(column, []).extend(values)

    def log_metric(self, name: str, value: Any) -> None:
        """A number of this batch; the log has the mean of those since its last line."""
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"log_metric({name!r}, ...): wanted a number, got {value!r}") from None
        self._metrics.setdefault(name, []).append(number)

    def means(self, ranks: int) -> dict[str, float]:
        """Of each metric since the last time, over all ranks: all of them call this."""
        own, self._metrics = self._metrics, {}
        parts = [own]
        if ranks > 1:
            from accelerate.utils import gather_object

            parts = gather_object(parts)
        together: dict[str, list[float]] = {}
        for part in parts:
            for name, values in part.items():
                together.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in sorted(together.items())}
