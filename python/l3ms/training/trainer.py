"""`L3MTrainer`: transformers' Trainer with a constraint half-step after each task half-step.

One training step of the Trainer is one iteration: its own forward, backward and `optimizer.step()` on a task batch, then (in the callback
between that step and the learning-rate scheduler's) responses to fresh prompts, rewards, backward, and a second `optimizer.step()`. The
scheduler ticks once. Callbacks, trackers, PEFT, accelerate come with the Trainer. `solver="none"` leaves the constraints out: plain SFT.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import has_length

from l3ms.barrier.optimizer import L3MOptimizer
from l3ms.barrier.schedules import ExponentialDecay, NoiseFloorDecay
from l3ms.constraints.constraint import Constraint, check_constraints
from l3ms.constraints.data_nll import DataNLL
from l3ms.constraints.trl_arguments import RewardLog
from l3ms.model.batches import Collator, CountingCollator, separate
from l3ms.model.columns import check_names
from l3ms.model.heads import fuse_head
from l3ms.model.losses import scored_lengths, shift, task_weights
from l3ms.model.orders import PromptOrder
from l3ms.model.split_heads import uncast
from l3ms.rollouts.engines import as_engine
from l3ms.rollouts.rollout import Rollout
from l3ms.training.arguments import L3MConfig
from l3ms.training.averaging import AveragingTrainer
from l3ms.training.constraint_step import constraint_backward
from l3ms.training.fewer_samples import FewerSamples
from l3ms.training.half_steps import HalfSteps
from l3ms.training.honoured import (
    check_options,
    check_parallelism,
    check_rollout,
    check_rows,
    check_sampling,
    needs_responses,
)
from l3ms.training.resuming import load_progress, save_progress
from l3ms.training.state_trees import load_tree, save_tree
from l3ms.watching.watch import Watch


class L3MTrainer(AveragingTrainer):
    """Fine-tunes a causal LM on rows {"input_ids", "labels" (-100 on the prompt), "prompt"} while it is required to meet constraints.

    Arguments as transformers.Trainer (`processing_class` is the tokenizer), and
        constraints: what the model's responses to the rows' prompts must satisfy, or its loss on other data (`DataNLL`). Of a
            `Constraint` the function is needed.
        prompts: rows whose prompts are answered in the constraint half-steps; by default the training rows.
        engine: what samples the responses, an `Engine` or a function like its `sample`; by default the model itself.

    Attributes:
        l3m_optimizer: the `L3MOptimizer` in use, None before training and for solver="none".
        last_rollout, last_rewards: the responses that were sampled last, and their rewards by constraint; None and empty before.
        fewer_samples: which iterations sample, and what is kept of a rollout.
        last_extra: what reward functions gave to TRL's `log_extra` in it, by column; what they give to `log_metric` is in the log, as
            `rewards/<name>`, the mean over the calls since the last line.
        constraint_data: of each data constraint the batches, in the order in which they are taken.
        watched: what callbacks add to the next line of the log.
        phases: the clock of the iteration.
        average: of the weights, with how many they are; None before `average_from`.
        prompts: the rows to be answered, in the order in which they are taken.

    Raises:
        ValueError: a constraint without a function, an engine that is none, a model whose head cannot be fused, or a column of the rows
            with a name that reward functions know as something else.
    """

    def __init__(
        self,
        model: Any,
        args: L3MConfig,
        *,
        constraints: Sequence[Constraint] = (),
        prompts: Sequence[dict[str, Any]] | None = None,
        engine: Any = None,
        **kwargs: Any,
    ):
        self.constraints = check_constraints(constraints)
        check_options(args, kwargs)
        self.engine = None if engine is None else as_engine(engine)
        if args.solver != "none":
            if all(constraint.monitor for constraint in self.constraints):
                what = "all are monitors" if self.constraints else "none given"
                raise ValueError(f'constraints: {what}; use solver="none" to fine-tune without')
            for constraint in self.constraints:
                if not constraint.samples and not constraint.data:
                    raise ValueError(f"constraint {constraint.name!r} has no function: the trainer cannot evaluate it")
        check_rollout(args, self.constraints)
        tokenizer, rows = kwargs.get("processing_class"), kwargs.get("train_dataset") if prompts is None else prompts
        if rows is not None and needs_responses(args, self.constraints):
            check_sampling(self.constraints, tokenizer, rows)
        self._own_collator = kwargs.get("data_collator") is None
        if self._own_collator:
            check_rows("train_dataset", kwargs.get("train_dataset"))
            check_rows("eval_dataset", kwargs.get("eval_dataset"))
            kwargs["data_collator"] = self._collator(args, tokenizer, kwargs.get("train_dataset"))
        fuse_head(model)
        super().__init__(model, args, **kwargs)
        check_parallelism(self)
        # Our loss is a mean over sequences: the Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.l3m_optimizer: L3MOptimizer | None = None
        self.last_rollout: Rollout | None = None
        self.last_rewards: dict[str, list[float | None]] = {}
        self.reward_log = RewardLog()
        self.watched: dict[str, float] = {}
        self.fewer_samples = FewerSamples(args.rollout_every, args.rollout_reuse)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order = {"seed": seed, "rank": self.args.process_index, "world": self.args.world_size}
        self.prompts = PromptOrder(rows, **order) if hasattr(rows, "__len__") else None
        if self.prompts is not None and any(constraint.samples for constraint in self.constraints):
            check_names("train_dataset" if prompts is None else "prompts", self.prompts.rows[0])
        for constraint in self.constraints:
            constraint.prepare(self.policy)
        self.constraint_data = {c.name: c.batches(**order) for c in self.constraints if isinstance(c, DataNLL)}
        self._watched_before: list[dict[str, Any]] = []  # of a checkpoint, by watch
        self.add_callback(HalfSteps(self))

    @property
    def sampled(self) -> bool:
        """Whether the responses are of this iteration."""
        return self.fewer_samples.sampled

    # ---- the task half-step ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = self._rows_apart(inputs)
        lengths = scored_lengths(shift(inputs["labels"]))
        sequences = None if self.evaluating else num_items_in_batch
        seq_weight = task_weights(lengths, sequences=sequences)
        if isinstance(model, nn.DataParallel):  # would give the count of the whole batch to each of its parts
            inputs = {name: value for name, value in inputs.items() if name != "scored"}
        outputs: Any = model(**inputs, seq_weight=uncast(model, seq_weight), use_cache=False)
        loss = outputs.loss.sum()  # nn.DataParallel gives that of each part
        if sequences is not None:  # of all micro-batches and processes, over which the Trainer and DDP take means
            loss = loss * self._parts
        self._outputs = outputs if return_outputs else None
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: Any) -> Any:
        """The sequences of an optimizer step with something scored, where a micro-batch or process may have more of them than another."""
        if self.evaluating or (len(batch_samples) == 1 and self._averaged_over == 1) or not batch_samples:
            return None
        counts = [(scored_lengths(shift(self._rows_apart(part)["labels"])) > 0).sum() for part in batch_samples]
        total = torch.stack([count.to(device) for count in counts]).sum()
        everywhere: Any = total if self._averaged_over == 1 else self.accelerator.gather(total)
        return everywhere.sum()

    @property
    def _averaged_over(self) -> int:
        """Processes whose sequences count alike."""
        return self.args.world_size if self.args.average_tokens_across_devices else 1

    @property
    def _parts(self) -> int:
        return self.current_gradient_accumulation_steps * self._averaged_over

    def _rows_apart(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs if self._own_collator else separate(inputs)

    @staticmethod
    def _collator(args: L3MConfig, tokenizer: Any, rows: Any) -> Collator:
        """With the count of scored tokens, unless a process may be given a part of the batch that it is of."""
        pad = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
        dispatched = getattr(args.accelerator_config, "dispatch_batches", None) or not hasattr(rows, "__getitem__")
        parts = args.world_size > 1 and dispatched
        return Collator(pad) if parts else CountingCollator(pad)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        found = super().train(*args, **kwargs)
        if not found.global_step:
            raise ValueError("train_dataset gave no batch: nothing was trained")
        return found

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if has_length(loader) and not len(loader):
            raise ValueError(
                f"train_dataset: {len(self.train_dataset)} rows are fewer than one batch of per_device_train_batch_size="  # type: ignore[arg-type]
                f"{self.args.per_device_train_batch_size} on each of {self.args.world_size} processes; lower it, or set "
                "dataloader_drop_last=False"
            )
        return loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        args: Any = self.args
        base = super().create_optimizer() if model is None else super().create_optimizer(model)
        if args.solver != "none" and self.l3m_optimizer is None:  # a second train() goes on with the first one's
            schedule = (NoiseFloorDecay if args.mu == "auto" else ExponentialDecay)(
                1.0, args.mu_end, max(self._iterations(), 1)
            )
            self.optimizer = L3MOptimizer(
                base,
                self.constraints,
                mu=schedule,
                smoothing=args.smoothing,
                max_grad_norm=args.max_grad_norm or None,
                solver=args.solver_object(),
                clipping=args.clipping,
                length_norm=args.length_norm,
                nonfinite=args.nonfinite,
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
        return max([self.args.constraint_batch_size, *data])  # type: ignore[attr-defined]

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
        average = None if self.average is None else self.average.whole()  # gathered by all ranks
        if self.args.should_save:
            averaged, counts = 0 if self.average is None else self.average.n_averaged, self.fewer_samples.counts()
            save_progress(Path(output_dir), self.prompts, averaged, average, self.constraint_data, counts)
        self.fewer_samples.save_rollout(Path(output_dir), self.rank_suffix)
        if self.watches:
            save_tree(Path(output_dir), f"watch{self.rank_suffix}", [watch.state() for watch in self.watches])

    def _load_states(self, checkpoint: str | None) -> None:
        super()._load_states(checkpoint)
        if checkpoint is not None:
            model = self.policy
            self.average, counts = load_progress(Path(checkpoint), self.prompts, model, self.constraint_data)
            self.fewer_samples.restore_counts(counts)
            temperature: float = self.args.temperature  # type: ignore[attr-defined]
            self.fewer_samples.load_rollout(Path(checkpoint), self.rank_suffix, temperature, model)
            if (Path(checkpoint) / f"watch{self.rank_suffix}.json").exists():
                self._watched_before = load_tree(Path(checkpoint), f"watch{self.rank_suffix}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.l3m_optimizer is not None and "loss" in logs:
            metrics = self.l3m_optimizer.metrics()
            own = "task" if self.args.half_steps == "alternating" else "constraint"  # type: ignore[attr-defined]
            logs.update({"grad_norm": metrics[f"l3m/grad_norm/{own}"], **metrics})
            logs.update(self.fewer_samples.metrics())
            if self.last_rollout is not None and self.fewer_samples.sampled:
                logs["l3m/truncated"] = float((~self.last_rollout.ended).float().mean())
            means = self.reward_log.means(self.args.world_size)
            logs.update({f"rewards/{name}": value for name, value in means.items()})
            logs.update(self.watched)
            self.watched.clear()
        super().log(logs, start_time)
