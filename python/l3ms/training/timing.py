"""The clock in the Trainer: which of its calls are which phase, and the line that the log gets."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from l3ms.training.evaluating import EvaluatingTrainer
from l3ms.training.phases import Phases


class TimingTrainer(EvaluatingTrainer):
    """Each line of the log with a loss says `time/<phase>` and `memory/peak_mib` of this rank, see `phases`.

    An iteration ends when its callbacks have been called: what then is logged, evaluated and saved counts to the next one. Of a training
    that is resumed the clock begins anew, and the lines before are in the log.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.phases = Phases(self.args.device)
        self.add_callback(_Boundaries(self))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.inside("task"):
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        with self.phases.inside("optimizer"):
            return super()._clip_grad_norm(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.inside("evaluation"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.phases.inside("saving"):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.phases.line())
        super().log(logs, start_time)


class _Boundaries(TrainerCallback):
    """Where an iteration ends, and the step on the task."""

    def __init__(self, trainer: TimingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.phases.stop()  # of an attempt that was given up

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.phases.running:
            self.trainer.phases.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.phases.switch("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.phases.switch("other")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.phases.iterate()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.phases.stop()
