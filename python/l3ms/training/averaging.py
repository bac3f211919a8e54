"""The average of a training's weights, and its model whole."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn
from transformers import Trainer

from l3ms.model.averaging import WeightAverage
from l3ms.training.settings import L3MSettings

logger = logging.getLogger(__name__)


class AveragingTrainer(Trainer):
    """`average_weights` in each iteration; `l3m` has the `average_fraction`."""

    l3m: L3MSettings
    average: WeightAverage | None = None

    @property
    def policy(self) -> Any:
        """The model without what wraps it for several processes."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def average_from(self) -> int:
        """The first iteration whose weights are in the average; one past the last where none are."""
        return math.floor(1e-6 + self.state.max_steps * (1 - self.l3m.average_fraction)) + 1

    def begin_average(self) -> None:
        """When a training begins or is resumed: an average with iterations before `average_from`, of an earlier training or of one that was
        to end sooner, is begun anew."""
        found = 0 if self.average is None else self.average.n_averaged
        due = max(0, self.state.global_step - self.average_from + 1)
        if found > due:
            self.average = None
        if self.state.global_step and found != due:
            text = (
                "the checkpoint has the average of %d iterations, and this run that of those from iteration %d on: %s"
            )
            how = "it begins anew" if found > due else "it goes on with what is there"
            logger.warning(text, found, self.average_from, how)

    def average_weights(self) -> None:
        """In an iteration, between its half-steps: from `average_from` on, add the weights to the average.

        They are those that the estimates are of. A half-step later the mean is another: with lengths in [33, 40] and a momentum of 0.5 the
        average was 2 tokens longer than the estimates (`python experiments/run.py length`).
        """
        if self.state.global_step + 1 >= self.average_from:
            self.average = self.average or WeightAverage()
            self.average.update(self.policy)

    def averaged_model(self) -> nn.Module:
        """A copy of the model with the average of the last fifth's weights; of the last iterate where nothing was averaged.

        Of a sharded model every rank gets all of it, on the CPU; the ranks make it together.
        """
        return (self.average or WeightAverage()).copied(self.policy)

    def whole_model(self) -> nn.Module:
        """The model as it is; of a sharded one a copy on each rank, whole, on the CPU."""
        return WeightAverage().copied(self.policy) if self.sharded else self.policy

    def take_average(self) -> nn.Module:
        """The model itself, whose weights are the average from now on."""
        (self.average or WeightAverage()).put_into(self.policy)
        return self.policy
