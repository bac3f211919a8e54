"""Log-likelihoods of responses under the policy of now, and the importance weights that are made of them on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l3ms.barrier.importance import effective_share, power_sums
from l3ms.rollouts.rollout import Rollout


def parts_of(widths: Sequence[int], rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows of like widths together, `size` at a time, the widest first."""
    ordered = sorted(rows, key=lambda row: -widths[row])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@torch.no_grad()
def policy_log_likelihood(trainer: Any, responses: Rollout) -> Tensor:
    """(N,) log pi of whole responses at the temperature of the sampling, without dropout, as they are sampled. As many forwards on each
    rank as on the others."""
    model: Any = trainer.model_wrapped
    widths = responses.attention_mask.sum(1).tolist()
    found = responses.lengths.new_empty(len(responses), dtype=torch.float64)
    model.eval()
    for part in parts_of(widths, range(len(responses)), trainer.args.per_device_train_batch_size):
        width = widths[part[0]]
        with trainer.compute_loss_context_manager():
            found[part] = model(
                input_ids=responses.input_ids[part, :width],
                attention_mask=responses.attention_mask[part, :width],
                labels=responses.labels[part, :width],
                seq_weight=torch.zeros(len(part), device=found.device),
                temperature=responses.temperature,
                auxiliary=False,
                scored=None if isinstance(model, nn.DataParallel) else sum(responses.host_lengths[row] for row in part),
                use_cache=False,
            ).sequence.to(found)
    return found


def engine_log_likelihood(responses: Rollout) -> Tensor:
    """(N,) log q of whole responses, by what their sampling engine has said of each token.

    Raises:
        ValueError: it has said nothing, or not of each token.
    """
    said = responses.engine_log_likelihood
    if said is None:
        raise ValueError(
            "rollout_importance (rollout.importance): 'truncate' weighs responses by the log-likelihoods of the engine that drew them, and "
            "this one gives none; take 'none', or an engine that does"
        )
    for row, (values, length) in enumerate(zip(said, responses.host_lengths, strict=True)):
        if len(values) != length:
            raise ValueError(
                f"rollout_importance: the engine gave {len(values)} log-likelihoods for the {length} tokens of response {row}"
            )
    sums = [sum(map(float, values)) for values in said]
    return torch.tensor(sums, dtype=torch.float64, device=responses.lengths.device)


def share_of_all_ranks(trainer: Any, log_ratio: Tensor) -> float:
    """The effective sample size of the responses of all ranks, as a share."""
    sums: Any = power_sums(log_ratio)
    if trainer.args.world_size > 1:
        # float32 travels everywhere; what a sum of ratios loses is far below what is decided by it, and the ranks agree
        sums = trainer.accelerator.reduce(sums.float(), reduction="sum")
    return effective_share(sums.double())
