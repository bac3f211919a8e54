"""What a watch asks of the training that it looks at."""

from __future__ import annotations

from typing import Any, Protocol

from l3ms.barrier.optimizer import L3MOptimizer
from l3ms.constraints.constraint import Constraint
from l3ms.model.averaging import WeightAverage
from l3ms.rollouts.rollout import Rollout


class Watched(Protocol):
    """A training under constraints: `L3MTrainer` is one."""

    args: Any  # seed, process_index, world_size, per_device_train_batch_size
    l3m: Any  # max_new_tokens, temperature
    state: Any  # global_step, the iteration
    lr_scheduler: Any
    processing_class: Any  # the tokenizer
    constraints: tuple[Constraint, ...]
    l3m_optimizer: L3MOptimizer | None  # None where the constraints are left out
    last_rollout: Rollout | None
    last_rewards: dict[str, list[float | None]]
    watched: dict[str, float]  # what is added to the next line of the log
    average: WeightAverage | None  # of the weights, from the iteration on where it begins

    @property
    def sampled(self) -> bool:
        """Whether `last_rollout` is of this iteration; another one may have left sampling out."""
        ...

    @property
    def policy(self) -> Any:
        """The model without what wraps it for several processes."""
        ...

    @property
    def sharded(self) -> bool:
        """Whether a process holds a part of the weights only."""
        ...
