"""`L3MTrainer`: transformers' Trainer with a constraint half-step after each task half-step.

One training step of the Trainer is one iteration: its own forward, backward and `optimizer.step()` on a task batch, then (in the callback
between that step and the learning-rate scheduler's) responses to fresh prompts, rewards, backward, and a second `optimizer.step()`. The
scheduler ticks once. Callbacks, trackers, PEFT, accelerate come with the Trainer. `solver="none"` leaves the constraints out: plain SFT.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from l3ms.constraints.constraint import Constraint, check_constraints
from l3ms.model.batches import OURS, Collator, CountingCollator, separate
from l3ms.model.heads import fuse_head
from l3ms.model.losses import scored_lengths, shift, task_weights
from l3ms.model.split_heads import uncast
from l3ms.rollouts.engines import as_engine
from l3ms.rollouts.sampling import check_padding
from l3ms.training import beginnings
from l3ms.training.arguments import L3MConfig
from l3ms.training.constraining import Constraining
from l3ms.training.honoured import (
    check_functions,
    check_options,
    check_parallelism,
    check_processing_class,
    check_rollout,
    check_rows,
    check_sampling,
    needs_responses,
)
from l3ms.training.timing import TimingTrainer


class L3MTrainer(Constraining, TimingTrainer):
    """Fine-tunes a causal LM on rows {"input_ids", "labels" (-100 on the prompt), "prompt"} while it is required to meet constraints.

    Arguments as transformers.Trainer (`processing_class` is the tokenizer), and
        constraints: what the model's responses to the rows' prompts must satisfy, or its loss on other data (`DataNLL`). Of a
            `Constraint` the function is needed.
        prompts: rows whose prompts are answered in the constraint half-steps; by default the training rows.
        engine: what samples the responses, an `Engine` or a function like its `sample`; by default the model itself.

    Attributes: those of `Constraining`, and
        phases: the clock of the iteration.

    Raises:
        ValueError: a constraint without a function, an engine that is none, a model whose head cannot be fused, or a column of the rows
            with a name that reward functions know as something else.
    """

    _labels: tuple[Any, int] | None = None  # of the batch that was prepared last, as they were

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
        self.l3m = args
        self.engine = None if engine is None else as_engine(engine)
        check_functions(args, self.constraints)
        check_rollout(args, self.constraints, self.engine)
        tokenizer, rows = kwargs.get("processing_class"), kwargs.get("train_dataset") if prompts is None else prompts
        own_collator, samples = kwargs.get("data_collator") is None, needs_responses(args, self.constraints)
        if own_collator or samples:
            check_processing_class(tokenizer)
        if rows is not None and samples:
            check_sampling(self.constraints, tokenizer, rows)
        if own_collator:
            check_rows("train_dataset", kwargs.get("train_dataset"))
            check_rows("eval_dataset", kwargs.get("eval_dataset"))
            kwargs["data_collator"] = self._collator(args, tokenizer, kwargs.get("train_dataset"))
        fuse_head(model)
        if own_collator and tokenizer is not None:
            check_padding("processing_class", model, tokenizer)
        super().__init__(model, args, **kwargs)
        check_parallelism(self)
        # Our loss is a mean over sequences: the Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.set_up(rows, "train_dataset" if prompts is None else "prompts")

    def prompts_of(self, rows: Any) -> Any:
        if needs_responses(self.l3m, self.constraints):
            check_sampling(self.constraints, self.processing_class, rows)
        return rows

    # ---- the task half-step ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = self._rows_apart(inputs)
        if "scored" in inputs and not self._are_as_collated(inputs["labels"]):
            inputs = {name: value for name, value in inputs.items() if name != "scored"}
        lengths = scored_lengths(shift(inputs["labels"]))
        sequences = None if self.evaluating else num_items_in_batch
        seq_weight = task_weights(lengths, sequences=sequences)
        if isinstance(model, nn.DataParallel):  # would give the count of the whole batch to each of its parts
            inputs = {name: value for name, value in inputs.items() if name != "scored"}
        outputs: Any = beginnings.forward(model, inputs, seq_weight=uncast(model, seq_weight))
        loss = outputs.loss.sum()  # nn.DataParallel gives that of each part
        if sequences is not None:  # of all micro-batches and processes, over which the Trainer and DDP take means
            loss = loss * self._parts
        self._outputs = outputs if return_outputs else None
        return (loss, outputs) if return_outputs else loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        labels = prepared.get("labels")
        self._labels = None if labels is None else (labels, labels._version)
        return prepared

    def _are_as_collated(self, labels: Any) -> bool:
        """Not those that a `compute_loss` over this one has changed, whose count is another."""
        return self._labels is not None and self._labels[0] is labels and self._labels[1] == labels._version

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
        """A batch of our own collator holds no packed rows: a GPU is not waited for. `data_collator` and loaders may be others by now."""
        return inputs if inputs.keys() == OURS else separate(inputs)

    @staticmethod
    def _collator(args: L3MConfig, tokenizer: Any, rows: Any) -> Collator:
        """With the count of scored tokens, unless a process may be given a part of the batch that it is of."""
        pad = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
        stream = isinstance(rows, IterableDataset) or not hasattr(rows, "__getitem__")
        dispatched = getattr(args.accelerator_config, "dispatch_batches", None) or stream
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

    def _load_states(self, checkpoint: str | None) -> None:
        super()._load_states(checkpoint)
        if checkpoint is not None:
            self.load_constraints(Path(checkpoint))
