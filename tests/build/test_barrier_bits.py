"""The first native op proves the build: barrier_weights in C++ gives the reference's bits."""

import pytest
import torch
from barrier_problems import bits, fresh_state, random_problem

from l3m_kernels import _native, reference

native = _native.load()
pytestmark = pytest.mark.skipif(native.module is None, reason=native.reason)


@pytest.mark.parametrize("seed", range(100))
def test_bit_equal_to_the_reference_over_steps(seed):
    rewards, norm, sums, *rest = random_problem(seed)
    state = fresh_state(rewards, rest[-2])
    for _ in range(3):
        expected = reference.barrier_weights(rewards, norm, sums, state, *rest)
        actual = torch.ops.l3m_kernels.cpp_barrier_weights(rewards, norm, sums, state, *rest)
        for field, a, e in zip(reference.BarrierWeights._fields, actual, expected, strict=True):
            assert a.shape == e.shape, field
            assert a.dtype == e.dtype, field
            assert torch.equal(bits(a), bits(e)), field
        state, rewards = expected[-1], rewards.flip(0) * 1.1


def test_views_are_read_right():
    rewards, norm, _, *rest = random_problem(1)
    state = fresh_state(rewards, rest[-2])
    op = torch.ops.l3m_kernels.cpp_barrier_weights
    expected = op(rewards, norm, None, state, *rest)
    strided = (
        rewards.t().contiguous().t(),
        torch.stack([norm, norm], 1)[:, 0],
        None,
        state.repeat(2, 2)[::2, : state.shape[1]],
    )
    for a, e in zip(op(*strided[:3], state, *rest), expected, strict=True):
        assert torch.equal(bits(a), bits(e))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(4), ValueError, r"rewards must have shape \(N, R\)"),
        (0, torch.zeros(4, 1), TypeError, "rewards must be Double"),
        (1, torch.ones(3, dtype=torch.float64), ValueError, r"norm must have shape \[4\], got \[3\]"),
        (2, torch.zeros(2, 3, dtype=torch.float64), ValueError, "sums must have shape"),
        (3, torch.zeros(1, 4, dtype=torch.float64), ValueError, "state must have shape"),
        (4, torch.tensor([1]), IndexError, r"reward_index\[0\] must be in \[0, 1\), got 1"),
        (4, torch.tensor([-1]), IndexError, r"got -1"),
        (5, torch.zeros(1, 5, dtype=torch.float64), ValueError, "bounds must have shape"),
        (6, torch.ones(1, dtype=torch.float64), ValueError, "mu must have shape"),
    ],
)
def test_memory_is_guarded(position, value, error, message):
    mu = torch.tensor(0.1).double()
    arguments = [torch.zeros(4, 1).double(), torch.ones(4).double(), None, torch.zeros(1, 5).double()]
    arguments += [torch.tensor([0]), torch.ones(1, 6).double(), mu, mu * mu, 0.1, True]
    arguments[position] = value
    with pytest.raises(error, match=message):
        torch.ops.l3m_kernels.cpp_barrier_weights(*arguments)
