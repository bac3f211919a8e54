"""The gap between held-out and training rewards: its sign follows the bounds, its size the noise."""

import math

import pytest
import torch

import l3ms
from l3ms.watching.held_out import gap


def values(mean, count=400, seed=0, spread=1.0):
    return (mean + spread * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


@pytest.mark.parametrize(
    ("bounds", "worse"), [({"min": 0.0}, True), ({"max": 0.0}, False), ({"min": -0.1, "max": 2.0}, True)]
)
def test_sign_follows_the_bounds(bounds, worse):
    found = gap(l3ms.Constraint("a", **bounds), values(0.0), [values(1.0, seed=1)])
    assert found is not None
    assert abs(found) == pytest.approx(1.0 / math.sqrt(2 / 400), rel=0.2) or bounds == {"min": -0.1, "max": 2.0}
    assert (found > 4) is worse


def test_movement_inside_a_range_is_not_worse():
    found = gap(l3ms.Constraint("a", min=-2.0, max=2.0), values(0.5), [values(-0.5, seed=1)])
    assert found is not None
    assert abs(found) < 4


def test_of_one_distribution_it_is_a_standard_normal():
    constraint = l3ms.Constraint("a", min=0.0)
    found = [
        gap(constraint, values(0.0, 64, s), [values(0.0, 32, 1000 + 4 * s + i) for i in range(4)]) for s in range(200)
    ]
    kept = torch.tensor([g for g in found if g is not None])
    assert abs(kept.mean()) < 0.25
    assert kept.std() < 1.1
    assert kept.max() < 4


def test_weights_that_move_widen_the_error():
    drifting = [values(float(i), 32, i, spread=0.1) for i in range(4)]
    still = [values(1.5, 32, i, spread=0.1) for i in range(4)]
    constraint = l3ms.Constraint("a", min=0.0)
    held_out = values(0.5, 64, 9, spread=0.1)
    moved, stood = gap(constraint, held_out, drifting), gap(constraint, held_out, still)
    assert moved is not None
    assert stood is not None
    assert moved < 4 < stood


def test_too_little_to_compare_is_none():
    constraint = l3ms.Constraint("a", min=0.0)
    assert gap(constraint, [1.0], [[1.0, 2.0]]) is None
    assert gap(constraint, [1.0, 2.0], [[], []]) is None
    assert gap(constraint, [1.0, 1.0], [[1.0, 1.0]]) is None
