"""A constraint on the model's loss on other data: "do not forget"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from l3ms.constraints.constraint import NO_REFERENCE, Constraint
from l3ms.model.batches import Collator, separate
from l3ms.model.losses import scored_lengths, shift, task_weights
from l3ms.model.modes import evaluating
from l3ms.model.orders import BatchOrder, PromptOrder
from l3ms.model.sharding import reshard
from l3ms.model.split_heads import uncast

if TYPE_CHECKING:
    from l3ms.constraints.reference_model import Reference

Batch = dict[str, Tensor]
Data = Sequence[dict[str, Any]] | Iterable[Batch]


class Batches(Protocol):
    """The batches of a `DataNLL` in the order of a run, and where in it the run is."""

    def take(self) -> Batch: ...

    def state(self) -> dict[str, int]: ...

    def restore(self, state: dict[str, int]) -> None: ...


class DataNLL(Constraint):
    """Bounds on the mean loss on a second data set, `min <= E[-(1/|y|) log pi(y|x)] <= max`, nats per token: no sampling.

    "Do not forget" is `DataNLL("general", rows, relative=True, max=0.05)`: at most 0.05 nats per token above the loss of the
    model that one starts from, on the same rows. Rows differ much more from each other than a training changes each of them, so the
    estimate of a difference and its certificate are much narrower than those of the loss. `L3MTrainer` takes the next batch in each
    constraint half-step; in a loop of one's own give `losses(model, batch)` to `barrier_loss`.

    Args:
        name: of the constraint.
        loader: a list of rows {"input_ids", "labels"} (labels not shifted, -100 where not scored), taken `batch_size` at a time in a new
            random order each time around; or an iterable of batches {"input_ids", "labels", "attention_mask"}, each (N, L), in its own
            order, gone through again and again.
        batch_size: rows per constraint half-step.
        pad_token_id: fills up shorter rows of a batch; masked.
        held_out: data of the same form that `evaluate` measures; by default that of `loader`.
        relative: bound `E[(1/|y|) (log pi_ref(y|x) - log pi(y|x))]`, the loss less that of a frozen reference; one more forward a batch.
        reference: of `relative`: a transformers causal LM, a folder or hub id of one, or None, the model as it is when the training
            starts; `prepare(model)` and the rest as in `KL`.
        min, max, scale, margin, monitor: as in `Constraint`, nats per token.
        trust_remote_code: run code that comes with a reference that is loaded.

    Raises:
        ValueError: no rows, a row without a scored token, an iterable that can be gone through only once, a reference and not
            `relative`; or as `Constraint`, and of a reference as `KL`.
    """

    def __init__(
        self,
        name: str,
        loader: Data,
        *,
        min: float | None = None,
        max: float | None = None,
        scale: float | None = None,
        margin: float | None = None,
        monitor: bool = False,
        batch_size: int = 8,
        pad_token_id: int = 0,
        held_out: Data | None = None,
        relative: bool = False,
        reference: Any = None,
        trust_remote_code: bool = False,
    ):
        super().__init__(name, min=min, max=max, scale=scale, margin=margin, monitor=monitor)
        if batch_size < 1:
            raise ValueError(f"constraint {name!r}: batch_size must be at least 1, got {batch_size}")
        for argument, data in (("loader", loader), ("held_out", held_out)):
            if data is not None:
                _check_data(f"constraint {name!r}: {argument}", data)
        if reference is not None and not relative:
            raise ValueError(f"constraint {name!r}: {NO_REFERENCE}")
        own: dict[str, Any] = {"loader": loader, "held_out": loader if held_out is None else held_out}
        own["_reference"] = _reference(f"constraint {name!r}", reference, trust_remote_code) if relative else None
        for attribute, value in (own | {"batch_size": batch_size, "pad_token_id": pad_token_id}).items():
            object.__setattr__(self, attribute, value)

    loader: Data
    held_out: Data
    batch_size: int
    pad_token_id: int
    _reference: Reference | None

    def __deepcopy__(self, memo: dict[int, Any]) -> DataNLL:
        return self  # nothing in it changes, and the data may be large

    @property
    def samples(self) -> bool:
        return False

    @property
    def data(self) -> bool:
        return True

    @property
    def reference_model(self) -> Any:
        """What a relative loss is measured from; None where it is not relative, before `prepare`, and where that is the policy without
        its adapters."""
        return None if self._reference is None else self._reference.model

    def prepare(self, model: Any) -> None:
        if self._reference is not None:
            self._reference.prepare(model)

    def losses(self, model: Any, batch: Batch, policy: Any = None) -> Tensor:
        """(n,) fp32, nats per token, with the gradient of their mean: `sequence_nll`, less the reference's where the loss is relative.

        Args:
            policy: the model itself, where `model` is what a trainer has wrapped around it.
        """
        if self._reference is None:
            return sequence_nll(model, batch)
        # First: the reference may be the policy with other values, and what a forward keeps for its backward is to be the policy's
        start = _nll_of(self._reference, model if policy is None else policy, batch)
        return sequence_nll(model, batch) - start

    def batches(self, *, seed: int = 0, rank: int = 0, world: int = 1) -> Batches:
        """The batches of a run, from the beginning. Rows are shared among ranks; a loader's batches are taken to be this rank's."""
        if not _is_rows(self.loader):
            return BatchOrder(self.loader)
        rows = PromptOrder(self.loader, seed=seed, rank=rank, world=world)
        return _RowBatches(rows, self.batch_size, Collator(self.pad_token_id))

    @torch.no_grad()
    def evaluate(self, model: Any) -> list[float]:
        """The mean nll of each held-out sequence, nats per token, in eval mode; above the reference's where it is relative."""
        data, size = self.held_out, self.batch_size
        collate = Collator(self.pad_token_id)
        parts: Any = data
        if _is_rows(data):
            rows: Any = data
            parts = (
                collate([rows[i] for i in range(start, min(start + size, len(rows)))])
                for start in range(0, len(rows), size)
            )
        with evaluating(model):
            return [value for batch in parts for value in self.losses(model, batch).tolist()]


class _RowBatches:
    """Batches of rows in the order of `PromptOrder`."""

    def __init__(self, rows: PromptOrder, size: int, collate: Collator):
        self.rows, self.size, self.collate = rows, size, collate

    def take(self) -> Batch:
        return self.collate(self.rows.take(self.size))

    def state(self) -> dict[str, int]:
        return self.rows.state()

    def restore(self, state: dict[str, int]) -> None:
        self.rows.restore(state)


def sequence_nll(model: Any, batch: Batch) -> Tensor:
    """-(1/|y|) log pi(y|x) of each sequence of a batch that has something scored: (n,) fp32, nats per token, for `barrier_loss`.

    With what the model adds to its own loss, such as a router loss, as the model scales it.

    The fused head forms one gradient, that of the batch's mean, so only the mean of what is returned is differentiable rightly: each
    value is its own, plus a zero that carries the mean's gradient.

    Args:
        model: with a fused head, see `fuse_head`.
        batch: {"input_ids", "labels"} (N, L), labels not shifted, -100 where not scored; "attention_mask", "position_ids" (N, L). One
            that packs several sequences into a row is told by the latter, or what else `separate` knows.

    Raises:
        ValueError: nothing in the batch is scored; or as `separate`.
    """
    batch = separate(batch)
    length = scored_lengths(shift(batch["labels"]))
    scored = int(length.sum())  # before the batch is moved: a GPU is not waited for
    if not scored:
        raise ValueError("sequence_nll: no label of the batch is scored")
    first = next(model.parameters())
    device, dtype = first.device, torch.float64 if first.dtype == torch.float64 else torch.float32
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    inputs = {name: batch[name].to(device) for name in names if name in batch}
    count = None if isinstance(model, torch.nn.DataParallel) else scored
    seq_weight = uncast(model, task_weights(length, dtype).to(device))
    out = model(**inputs, seq_weight=seq_weight, scored=count, auxiliary=True, use_cache=False)
    if not torch.is_grad_enabled():
        reshard(model)
    kept = (length > 0).to(device)
    values = (-out.sequence / length.to(device).clamp(min=1))[kept].detach()
    values = values if out.auxiliary is None else values + out.auxiliary.detach()
    return values if out.loss is None else values + (out.loss - out.loss.detach())


def _reference(where: str, given: Any, trust_remote_code: bool) -> Reference:
    from l3ms.constraints.reference_model import Reference  # which needs transformers

    return Reference(where, given, trust_remote_code)


@torch.no_grad()
def _nll_of(frozen: Reference, policy: Any, batch: Batch) -> Tensor:
    """(n,), of the reference, in eval mode."""
    from l3ms.model.heads import fuse_head  # the same

    reference, block = frozen.of(policy)
    fuse_head(reference)
    training = reference.training
    reference.eval()
    try:
        with block:
            return sequence_nll(reference, batch)
    finally:
        reference.train(training)


def _is_rows(data: Any) -> bool:
    """Rows of token lists, not batches (N, L)."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and getattr(data[0]["labels"], "ndim", 1) == 1


def _check_data(where: str, data: Any) -> None:
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ValueError(f"{where} must be rows or an iterable of batches, got {type(data).__name__}")
    if isinstance(data, Iterator):
        raise ValueError(f"{where} must be something that can be gone through again, got {type(data).__name__}")
    if hasattr(data, "__len__") and not len(data):  # type: ignore[arg-type]
        raise ValueError(f"{where} is empty")
    if not hasattr(data, "__getitem__"):
        return
    for number, row in enumerate(data):
        if not isinstance(row, dict) or not {"input_ids", "labels"} <= row.keys():
            raise ValueError(f"{where}: row {number} must hold input_ids and labels")
        if getattr(row["labels"], "ndim", 1) > 1:
            return  # batches
        if len(row["input_ids"]) != len(row["labels"]):
            sizes = f"{len(row['input_ids'])} input_ids and {len(row['labels'])} labels"
            raise ValueError(f"{where}: row {number} must have one label per token, got {sizes}")
        if not any(label != -100 for label in row["labels"][1:]):
            raise ValueError(f"{where}: row {number} has no scored token")
