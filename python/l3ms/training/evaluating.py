"""Evaluation as transformers' users know it, on a head that forms no logits: the loss of every row, and logits where they are asked for.

`eval_loss` is the mean over all rows with something scored, however they fall into batches and processes; the Trainer's own is a mean of
the batches' means. Logits (`compute_metrics`, `preprocess_logits_for_metrics`, `predict`) come from a second, plain forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l3ms.training.checkpointing import CheckpointingTrainer


class EvaluatingTrainer(CheckpointingTrainer):
    """`compute_loss(..., return_outputs=True)` gives a `HeadOutput`, from which the losses of the rows are; else all have the mean."""

    _losses: list[Tensor] | None = (
        None  # (n, 2) of each batch while it is evaluated: loss, and 1 where something is scored
    )

    _outputs: Any = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._all_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._all_rows():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _all_rows(self) -> Iterator[None]:
        """`dataloader_drop_last` is for training, where batches should be equal."""
        before, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = before

    @property
    def evaluating(self) -> bool:
        return self._losses is not None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._losses, metrics = [], self.compute_metrics
        told: set[str] = set()

        def telling(*args: Any, **kwargs: Any) -> Any:
            found = metrics(*args, **kwargs)  # type: ignore[misc]
            told.update(found or ())  # a "loss" of theirs is eval_loss, as in the Trainer
            return found

        self.compute_metrics = metrics and telling
        try:
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            name = f"{metric_key_prefix}_loss"
            if self._losses and found.metrics is not None and name in found.metrics and "loss" not in told:
                found.metrics[name] = self._mean_loss()
            return found
        finally:
            self._losses, self.compute_metrics = None, metrics

    def _mean_loss(self) -> float:
        assert self._losses
        loss, scored = torch.cat([part.cpu() for part in self._losses]).unbind(1)
        loss = loss[scored > 0]
        finite = loss.isfinite()
        if self.args.logging_nan_inf_filter and bool(finite.any()):  # as the Trainer does with batches
            loss = loss[finite]
        return float(loss.mean())

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        loss, outputs, labels = super().prediction_step(model, dict(inputs), False, ignore_keys)
        if loss is not None and self._losses is not None:
            rows: Any = self._row_losses(loss, len(next(each for each in inputs.values() if isinstance(each, Tensor))))
            self._losses.append(rows if self.args.world_size == 1 else self.accelerator.gather_for_metrics(rows))  # type: ignore[arg-type]
        if prediction_loss_only:
            return loss, None, None
        if loss is not None:
            plain = {name: value for name, value in inputs.items() if name not in (*self.label_names, "scored")}
            _, outputs, _ = super().prediction_step(model, plain, False, ignore_keys)
        return loss, outputs, labels

    def _row_losses(self, loss: Tensor, count: int) -> Tensor:
        """(n, 2) float64, of the batch whose outputs `compute_loss` kept. What `loss` has beside the rows' mean all of them share; all
        of it, `count` rows, where another `compute_loss` keeps none."""
        outputs, self._outputs = self._outputs, None
        if outputs is None:
            return torch.stack([loss.double().expand(count), loss.new_ones(count, dtype=torch.float64)], dim=1)
        length = outputs.length.double()
        scored = length > 0
        nll = torch.where(scored, -outputs.sequence.double() / length.clamp(min=1), 0.0)
        further = loss.double() - nll.sum() / scored.sum().clamp(min=1)
        return torch.stack([nll + further, scored.double()], dim=1)
