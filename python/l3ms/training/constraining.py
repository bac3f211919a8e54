"""What makes a trainer of transformers' a constrained one, whatever its task: the optimizer with the constraints, the constraint half-step,
weights that are averaged, checkpoints and lines of the log. `L3MTrainer` is one, `constrained` makes others.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from l3ms.barrier.optimizer import L3MOptimizer
from l3ms.barrier.schedules import ExponentialDecay, NoiseFloorDecay, flat_across, scale_to_set
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.data_nll import DataNLL
from l3ms.constraints.trl_arguments import RewardLog
from l3ms.model.autocasting import wrapped
from l3ms.model.columns import check_names
from l3ms.model.orders import PromptOrder
from l3ms.ranks.group import gather
from l3ms.rollouts.rollout import Rollout
from l3ms.training.averaging import AveragingTrainer
from l3ms.training.checkpoints import rank_suffix
from l3ms.training.constraint_step import constraint_backward
from l3ms.training.fewer_samples import FewerSamples
from l3ms.training.half_steps import HalfSteps
from l3ms.training.resuming import load_progress, save_progress
from l3ms.training.state_trees import load_tree, save_tree
from l3ms.watching.watch import Watch

logger = logging.getLogger(__name__)


class Constraining(AveragingTrainer):
    """Mixed in before a trainer; `set_up` is called when that is made.

    Attributes:
        l3m: the settings.
        l3m_optimizer: the `L3MOptimizer` in use, None before training and for solver="none".
        last_rollout, last_rewards: the responses that were sampled last, and their rewards by constraint; None and empty before.
        fewer_samples: which iterations sample, and what is kept of a rollout.
        last_extra: what reward functions gave to TRL's `log_extra` in it, by column; what they give to `log_metric` is in the log, as
            `rewards/<name>`, the mean over the calls since the last line.
        constraint_data: of each data constraint the batches, in the order in which they are taken.
        watched: what callbacks add to the next line of the log.
        average: of the weights, with how many they are; None before `average_from`.
        prompts: the rows to be answered, in the order in which they are taken.
    """

    constraints: tuple[Constraint, ...]
    engine: Any
    phases: Any
    reading: Any  # a context: what goes wrong in it is a checkpoint's

    def set_up(self, rows: Any, where: str) -> None:
        """`rows`: whose prompts are answered, the argument `where`."""
        self._check_precision()
        self.l3m_optimizer: L3MOptimizer | None = None
        self.last_rollout: Rollout | None = None
        self.last_rewards: dict[str, list[float | None]] = {}
        self.reward_log = RewardLog()
        self.watched: dict[str, float] = {}
        self.fewer_samples = FewerSamples(self.l3m.rollout_every, self.l3m.rollout_reuse)
        self._answers_own_rows, self._answered = where == "train_dataset", self.train_dataset
        self.take_prompts(rows, where)
        for constraint in self.constraints:
            constraint.prepare(self.policy)
        self.constraint_data = {c.name: c.batches(**self._order) for c in self.constraints if isinstance(c, DataNLL)}
        self._watched_before: list[dict[str, Any]] = []  # of a checkpoint, by watch
        self._flat_told = False
        self.add_callback(HalfSteps(self))

    def _check_precision(self) -> None:
        """accelerate leaves the forward of a model that it has prepared in mixed precision under autocast, for whoever is next."""
        if self.accelerator.mixed_precision == "no" and wrapped(self.policy):
            raise ValueError(
                "the model's forward computes in the mixed precision of an earlier trainer, and this one has none: give it "
                "accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)"
            )

    def take_prompts(self, rows: Any, where: str) -> None:
        """`rows` are answered from now on, from the beginning of an order of theirs."""
        self.prompts = PromptOrder(rows, **self._order) if hasattr(rows, "__len__") else None
        if self.prompts is not None and any(constraint.samples for constraint in self.constraints):
            check_names(where, self.prompts.rows[0])

    def prompts_of(self, rows: Any) -> Any:
        """Those of a train_dataset that was given, checked; of one that is set later too."""
        raise NotImplementedError

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self._answers_own_rows and self._answered is not self.train_dataset:
            self._answered = self.train_dataset
            self.take_prompts(self.prompts_of(self._answered), "train_dataset")
        return super().train(*args, **kwargs)

    @property
    def _order(self) -> dict[str, int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return {"seed": seed, "rank": self.args.process_index, "world": self.args.world_size}

    @property
    def sampled(self) -> bool:
        """Whether the responses are of this iteration."""
        return self.fewer_samples.sampled

    # ---- the optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        l3m: Any = self.l3m
        base = super().create_optimizer() if model is None else super().create_optimizer(model)
        if l3m.solver != "none" and self.l3m_optimizer is None:  # a second train() goes on with the first one's
            schedule = (NoiseFloorDecay if l3m.mu == "auto" else ExponentialDecay)(
                1.0, l3m.mu_end, max(self._iterations(), 1)
            )
            self.optimizer = L3MOptimizer(
                base,
                self.constraints,
                mu=schedule,
                smoothing=l3m.smoothing,
                max_grad_norm=norm if (norm := self.args.max_grad_norm) and norm > 0 else None,
                solver=l3m.solver_object(),
                clipping=l3m.clipping,
                length_norm=l3m.length_norm,
                nonfinite=l3m.nonfinite,
            )
            self.l3m_optimizer = self.optimizer
        return self.optimizer  # type: ignore[return-value]

    def _iterations(self) -> int:
        if self.state.max_steps > 0:  # train() has counted them
            return self.state.max_steps
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(self.args.num_train_epochs * len(self.train_dataset) / per_step)  # type: ignore[arg-type]

    def _clip_grad_norm(self, model: Any) -> Any:
        """Ours clips inside its step; clipping before it would hide an infinite norm behind a zero gradient."""
        return super()._clip_grad_norm(model) if self.l3m_optimizer is None else None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called before the step, which computes the norm: `log` takes it from there."""
        return super()._get_grad_norm(model, grad_norm) if self.l3m_optimizer is None else None

    # ---- the constraint half-step ----

    @property
    def last_extra(self) -> dict[str, list[Any]]:
        return self.reward_log.columns

    def reward_arguments(self) -> dict[str, Any]:
        """For the reward functions of a half-step, as in TRL."""
        self.reward_log.columns = {}
        log = self.reward_log
        return {"trainer_state": self.state, "log_extra": log.log_extra, "log_metric": log.log_metric}

    def constraint_half_step(self) -> None:
        """Sample responses, weigh them by their rewards, take the batches of the data constraints, backpropagate, step."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self._backpropagate_constraints()
        with self.phases.inside("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _backpropagate_constraints(self) -> None:
        with self.phases.inside("constraint"):
            responses = constraint_backward(self)
        self.last_rollout = self.last_rollout if responses is None else responses

    def add_constraint_gradient(self) -> None:
        """For a joint step: the task's gradient in `.grad` becomes that of (task + barrier) / S. Holds a second gradient meanwhile."""
        optimizer: Any = self.l3m_optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        task = [(p, p.grad) for p in parameters if p.grad is not None]
        for p, _ in task:
            p.grad = None
        self._backpropagate_constraints()
        weight = optimizer.task_weight
        for p, grad in task:
            grad = grad * weight.to(grad)
            p.grad = grad if p.grad is None else p.grad.add_(grad)

    # ---- weights, checkpoints and logs ----

    @property
    def taken_at_once(self) -> int:
        data = [c.batch_size for c in self.constraints if isinstance(c, DataNLL)]
        return max([self.l3m.constraint_batch_size, *data])  # type: ignore[attr-defined]

    @property
    def watches(self) -> list[Watch]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Watch)]

    def begin_watching(self) -> None:
        before, self._watched_before = self._watched_before, []
        for watch in self.watches:
            watch.begin(self)
        for watch, state in zip(self.watches, before, strict=False):
            with self.reading():
                watch.restore(state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder, suffix = Path(output_dir), rank_suffix(self.args)
        average = None if self.average is None else self.average.whole()  # gathered by all ranks
        if self.args.should_save:
            averaged, counts = 0 if self.average is None else self.average.n_averaged, self.fewer_samples.counts()
            save_progress(folder, self.prompts, averaged, average, self.constraint_data, counts)
        self.fewer_samples.save_rollout(folder, suffix)
        if self.watches:
            save_tree(folder, f"watch{suffix}", [watch.state() for watch in self.watches])

    def load_constraints(self, folder: Path) -> None:
        """Where the run was, from a checkpoint: all but what the optimizer has."""
        model, suffix = self.policy, rank_suffix(self.args)
        self.average, counts = load_progress(folder, self.prompts, model, self.constraint_data)
        self.fewer_samples.restore_counts(counts)
        self.fewer_samples.load_rollout(folder, suffix, self.l3m.temperature, model)
        if (folder / f"watch{suffix}.json").exists():
            self._watched_before = load_tree(folder, f"watch{suffix}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.l3m_optimizer is not None and "loss" in logs:
            metrics = self.l3m_optimizer.metrics()
            self._tell_of_flat_barriers(metrics)
            own = "task" if self.l3m.half_steps == "alternating" else "constraint"  # type: ignore[attr-defined]
            logs.update({"grad_norm": metrics[f"l3m/grad_norm/{own}"], **metrics})
            logs.update(self.fewer_samples.metrics())
            if self.last_rollout is not None and self.fewer_samples.sampled:
                ended = [each for of_rank in gather(self.last_rollout.ended.tolist()) for each in of_rank]
                logs["l3m/truncated"] = ended.count(False) / len(ended)
            means = self.reward_log.means(self.args.world_size)
            logs.update({f"rewards/{name}": value for name, value in means.items()})
            logs.update(self.watched)
            self.watched.clear()
        super().log(logs, start_time)

    def _tell_of_flat_barriers(self, metrics: dict[str, float]) -> None:
        """Once, half way, when the noise is that of the run: nothing else tells why a narrow range is not kept to."""
        step = self.state.global_step
        if self._flat_told or step < max(10, self.state.max_steps / 2) or "l3m/noise_floor" not in metrics:
            return
        self._flat_told = True
        floor = min(1.0, metrics["l3m/noise_floor"])
        for constraint in self.constraints:
            if flat_across(constraint, floor) and self.is_world_process_zero():
                text = (
                    "iteration %d: constraint %r: the noise of its estimate leaves mu at about %.2f, and a barrier %s"
                )
                logger.warning(text, step, constraint.name, floor, scale_to_set(constraint))
