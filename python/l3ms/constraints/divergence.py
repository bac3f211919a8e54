"""A constraint on the divergence of the policy from a frozen reference."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l3ms.constraints.constraint import Constraint
from l3ms.constraints.reference_model import Reference
from l3ms.constraints.shares import PER_TOKEN_SHARE
from l3ms.model.heads import fuse_head
from l3ms.model.modes import evaluating
from l3ms.model.sharding import most, reshard
from l3ms.model.split_heads import uncast
from l3ms.rollouts.rollout import Rollout


def per_token(constraints: Iterable[Constraint]) -> set[str]:
    """Names of those whose values are divided by the mean length of the responses that were measured together."""
    return {item.name for item in constraints if getattr(item, "per_token", False)}


def scaled(
    rewards: Mapping[str, list[float | None]], names: Collection[str], factor: float
) -> dict[str, list[float | None]]:
    """`rewards`, of which those by `names` times `factor`."""
    return {
        name: [None if value is None else value * factor for value in values] if name in names else values
        for name, values in rewards.items()
    }


class KL(Constraint):
    """Bounds on the divergence of the policy from a frozen reference, `E_y~pi[log pi(y|x) - log pi_ref(y|x)] <= max`, nats per response.

    The reward of a response is its log-likelihood ratio, at the temperature of the sampling, from the fused head. The reward depends on
    the policy itself, which changes nothing: the gradient of E[r] is `E[(r - b) grad log pi] + E[grad r]`, and
    `E[grad r] = E[grad log pi] = 0`.

    Args:
        max, min: nats per response, or per token; the divergence is never negative.
        name: of the constraint.
        reference: a transformers causal LM, or a folder or hub id of one; None is the model as it is when the training starts: with PEFT
            the model with its adapters as they are then, otherwise a copy. The trainer takes care of that; in a loop of one's own call
            `prepare(model)` first.
        per_token: divide by the mean length of the responses: of all ranks in the trainers, of those that are given in a loop of one's
            own. Lengths are constants in the gradient, so that the divergence per token is not lowered by longer responses. Not with a
            threshold or quantile.
        batch_size: responses scored at a time.
        scale, margin, threshold, quantile, monitor: as in `Constraint`.
        trust_remote_code: run code that comes with a reference that is loaded.

    Raises:
        ValueError: as `Constraint`; when it is measured without a model or a reference, or a reference cannot be loaded or has another
            vocabulary.
    """

    def __init__(
        self,
        max: float | None = None,
        *,
        min: float | None = None,
        name: str = "kl",
        reference: Any = None,
        per_token: bool = False,
        batch_size: int = 16,
        scale: float | None = None,
        margin: float | None = None,
        threshold: float | None = None,
        quantile: float | None = None,
        monitor: bool = False,
        trust_remote_code: bool = False,
    ):
        super().__init__(
            name, min=min, max=max, scale=scale, margin=margin, threshold=threshold, quantile=quantile, monitor=monitor
        )  # fmt: skip
        if per_token and self.event is not None:
            raise ValueError(f"constraint {name!r}: {PER_TOKEN_SHARE}")
        if batch_size < 1:
            raise ValueError(f"constraint {name!r}: batch_size must be at least 1, got {batch_size}")
        object.__setattr__(self, "per_token", per_token)
        object.__setattr__(self, "batch_size", batch_size)
        object.__setattr__(self, "_reference", Reference(f"constraint {name!r}", reference, trust_remote_code))

    per_token: bool
    batch_size: int
    _reference: Reference

    @property
    def samples(self) -> bool:
        return True

    @property
    def reference_model(self) -> Any:
        """What it is measured from; None before `prepare`, and where that is the policy without its adapters."""
        return self._reference.model

    def prepare(self, model: Any) -> None:
        self._reference.prepare(model)

    def call(self, prompts: Sequence[Any], completions: Sequence[Any], lengths: Sequence[int], **columns: Any) -> Any:
        raise ValueError(f"{self.where} needs the model: measure it with rollout.rewards(constraints, model)")

    @torch.no_grad()
    def ask(self, rollout: Rollout, model: Any = None) -> list[float]:
        if model is None:
            raise ValueError(f"{self.where} needs the model: rollout.rewards(constraints, model)")
        policy = self._log_likelihood(model, rollout)
        reference, block = self._reference.of(model)
        with block:
            ratio = policy - self._log_likelihood(reference, rollout)
        return (ratio / (rollout.lengths.double().mean().to(ratio) if self.per_token else 1.0)).tolist()

    def _log_likelihood(self, model: Any, rollout: Rollout) -> Tensor:
        """(N,) float64, of the responses, in eval mode: as they were sampled."""
        fuse_head(model)
        parts = []
        starts = list(range(0, len(rollout), self.batch_size))
        with evaluating(model):
            for number in range(most(model, len(starts))):  # ranks with parts of a model make as many forwards
                start = starts[min(number, len(starts) - 1)]
                inputs = rollout.inputs(slice(start, start + self.batch_size))
                seq_weight = torch.zeros(len(inputs["labels"]), dtype=torch.float32, device=rollout.input_ids.device)
                seq_weight = uncast(model, seq_weight)
                out = model(**inputs, seq_weight=seq_weight, temperature=rollout.temperature)
                parts.append(out.sequence.double())
            reshard(model)
        return torch.cat(parts[: len(starts)])
