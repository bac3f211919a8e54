"""Rewards to sequence weights, four one-sided constraints: every backend that has it on this machine, bits compared first."""

import pytest
import torch

from l3m_kernels import Bounds, backends, barrier_weights, initial_state
from l3ms.benchmark.shapes import RESPONSES

BOUNDS = [(k, 1.0 - 2 * (k % 2), 0.1 * k, 1.0, 0.0, 2.0, float("inf")) for k in range(4)]
NAMES = [row.name for row in backends().backends if row.problem("barrier_weights", "cpu") is None]


@pytest.mark.parametrize("responses", RESPONSES)
@pytest.mark.parametrize("backend", NAMES)
def test_barrier_weights(benchmark, backend: str, responses: int) -> None:
    rewards = torch.randn(responses, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bounds, mu, state = Bounds.of(BOUNDS), torch.tensor(0.1, dtype=torch.float64), initial_state(4)
    found = barrier_weights(rewards, state, bounds, mu, backend=backend)
    for ours, reference in zip(found, barrier_weights(rewards, state, bounds, mu, backend="reference"), strict=True):
        assert torch.equal(ours, reference)
    benchmark.group = f"barrier_weights N{responses} K4"
    benchmark(barrier_weights, rewards, state, bounds, mu, backend=backend)
