"""The responses of a rollout through the model that is trained, in micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from l3ms.model.head_output import HeadOutput
from l3ms.model.split_heads import uncast
from l3ms.rollouts.rollout import Rollout
from l3ms.training import beginnings


def parts_of(responses: Rollout, rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows of like widths together, `size` at a time, the widest first."""
    ordered = sorted(rows, key=lambda row: -responses.host_widths[row])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def forward_of(trainer: Any, responses: Rollout, rows: Sequence[int], seq_weight: Tensor) -> HeadOutput:
    """What the model says of some rows, at the temperature of their sampling; `seq_weight` (len(rows),) is theirs."""
    model: Any = trainer.model_wrapped
    inputs = responses.inputs(rows)
    if isinstance(model, nn.DataParallel):  # gives each replica some of the rows, and the whole count
        inputs["scored"] = None
    with trainer.compute_loss_context_manager():
        # auxiliary: of the task, once per task half-step
        options = {"seq_weight": uncast(model, seq_weight), "temperature": responses.temperature, "auxiliary": False}
        return beginnings.forward(model, inputs, **options)
