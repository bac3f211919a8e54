"""Where the constraints come into transformers' training loop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from l3ms.barrier.agreement import agree
from l3ms.model.heads import fuse_head
from l3ms.training.weight_checks import WeightChecks


class HalfSteps(TrainerCallback):
    """The constraints of an `L3MTrainer`: after the optimizer's step on the task and before the scheduler's, or in the same step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.sharded:
            fuse_head(
                self.trainer.policy
            )  # the Trainer has changed its configuration; a refusal now, not after the last iteration
        self.trainer.begin_average()
        self.trainer.begin_watching()
        optimizer = self.trainer.l3m_optimizer
        self._checks = WeightChecks(self.trainer.policy, None if optimizer is None else optimizer.base)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.l3m_optimizer is not None and self.trainer.l3m.half_steps == "joint":
            self.trainer.add_constraint_gradient()
        groups: list[dict[str, Any]] = self.trainer.optimizer.param_groups  # type: ignore[union-attr]
        self._checks.before_step(max(float(group["lr"]) for group in groups))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._checks.after_step()
        self._checks.finite(state.global_step + 1, "task")
        self.trainer.average_weights()
        if self.trainer.l3m_optimizer is not None and self.trainer.l3m.half_steps == "alternating":
            if self.trainer.fewer_samples.leaves_out(self.trainer, state.global_step + 1):
                self.trainer.l3m_optimizer.leave_out()
                return
            self.trainer.constraint_half_step()
            self._checks.finite(state.global_step + 1, "constraint")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ranks that have drifted apart go on as if they had not: each with a model of its own."""
        trainer, every = self.trainer, self.trainer.l3m.agree_every
        if args.world_size > 1 and every and state.global_step % every == 0:
            named = {} if trainer.sharded else dict(trainer.policy.named_parameters())
            agree(trainer.l3m_optimizer or trainer.optimizer, named=named, what=f"iteration {state.global_step}")
