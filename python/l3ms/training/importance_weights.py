"""Log-likelihoods of responses under the policy of now, and the importance weights that are made of them on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l3ms.barrier.importance import effective_share, power_sums
from l3ms.rollouts.rollout import Rollout
from l3ms.training.response_forwards import forward_of, parts_of


@torch.no_grad()
def policy_log_likelihood(trainer: Any, responses: Rollout) -> Tensor:
    """(N,) log pi of whole responses at the temperature of the sampling, without dropout, as they are sampled. As many forwards on each
    rank as on the others."""
    model: Any = trainer.model_wrapped
    found = responses.lengths.new_empty(len(responses), dtype=torch.float64)
    model.eval()
    for part in parts_of(responses, range(len(responses)), trainer.args.per_device_train_batch_size):
        seq_weight = torch.zeros(len(part), device=found.device, dtype=torch.float32)
        sequence: Any = forward_of(trainer, responses, part, seq_weight).sequence
        found[part] = sequence.to(found)
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
