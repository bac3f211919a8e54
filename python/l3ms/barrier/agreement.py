"""Whether the ranks of one run still have the same multipliers, mu and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l3ms.barrier.optimizer import L3MOptimizer
from l3ms.model.sharding import in_shards
from l3ms.ranks.agreement import same_tensors


def agree(
    optimizer: L3MOptimizer | torch.optim.Optimizer, *, named: Mapping[str, Tensor] | None = None, what: str = "agree"
) -> None:
    """Compare multipliers, mu and whole weights of all ranks, bit for bit; call it on all of them, after a step, now and then.

    Each rank reads its weights once and sends 8 bytes per parameter tensor. Weights in shards (DTensors, FSDP) are left out: what a rank
    has of them nobody else has.

    Args:
        named: the weights, by the names that an error says; by default those that the optimizer steps on, by number.
        what: the beginning of an error.

    Raises:
        RuntimeError: on every rank, naming those that differ and in what.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # of what accelerate has prepared
    ours = inner if isinstance(inner, L3MOptimizer) else None
    if named is None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        named = {f"parameter {number}": p for number, p in enumerate(parameters)}
    tensors: dict[str, Any] = {}
    if ours is not None:
        tensors["mu"] = ours.mu
        if ours.estimates.last is not None:
            tensors["the multipliers"] = ours.estimates.last.multiplier
    tensors |= {name: p for name, p in named.items() if not in_shards(p)}
    group = ours.estimates.process_group if ours is not None else None
    same_tensors(tensors, what, None if not dist.is_available() or group is dist.group.WORLD else group)
