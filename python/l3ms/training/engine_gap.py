"""How far the numbers of the engine that sampled are from those of the model that is trained.

Gradients are of the training model's log-likelihoods alone. Those of the engine are of its own kernels, its own precision, and its copy of
the weights: the mean of |difference| over tokens is small (1e-5 nats in float32, 0.01 in bfloat16), whatever the policy, where the copy is
the policy's, and grows with the distance where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from l3ms.model.losses import shift
from l3ms.rollouts.rollout import Rollout


class EngineGap:
    """|log pi_engine(token) - log pi(token)| over the response tokens of a rollout that a forward has scored. Reads nothing back before
    `log`."""

    def __init__(self, responses: Rollout):
        self.responses = responses
        self._parts: list[Tensor] = []

    def add(self, rows: Sequence[int], token: Tensor) -> None:
        """`token`: (len(rows), L) log-likelihoods of the shifted labels, detached, from the forward of these rows, behind
        those of tokens that an adapter puts before them."""
        known = self.responses.engine_log_likelihood
        if known is None:
            return
        width = max(self.responses.host_widths[row] for row in rows)
        scored = shift(self.responses.labels[list(rows), :width]) != -100
        token = token[:, -width:]
        engine = torch.tensor([value for row in rows for value in known[row]], dtype=torch.float32)
        self._parts.append((token.detach()[scored].float() - engine.to(token.device)).abs())

    def log(self) -> dict[str, float]:
        """Of this process; empty where the engine gave no numbers."""
        if not self._parts:
            return {}
        ordered = torch.cat(self._parts).double().cpu().sort().values
        p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return {"l3m/engine_gap": float(ordered.mean()), "l3m/engine_gap_p99": float(p99)}
