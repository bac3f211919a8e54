"""The running mean of weights against the mean in float64."""

from typing import Any

import pytest
import torch
from torch import nn

from l3ms.model.averaging import WeightAverage


def walked(dtype, steps=100):
    """Iterates of a slow walk, in float64, and their average."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8).to(dtype)
    model.bias.requires_grad_(False)
    average, seen = WeightAverage(), []
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(0.01 * torch.randn(8, 8).abs())
        average.update(model)
        seen.append(model.weight.detach().double().clone())
    return model, average, torch.stack(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_average_is_the_mean_whatever_the_dtype_of_the_weights(dtype):
    model, average, seen = walked(dtype)
    mean = seen.mean(0)
    way = (seen[-1] - seen[0]).norm()
    error = (average.weights["weight"].double() - mean).norm() / way
    assert error < (1e-12 if dtype == torch.float64 else 1e-6)
    assert average.weights.keys() == {"weight"}  # the frozen ones are what they are
    copied: Any = average.copied(model)
    torch.testing.assert_close(copied.weight, mean.to(dtype))
    assert torch.equal(model.weight.double(), seen[-1])
    assert torch.equal(copied.bias, model.bias)


def test_one_that_was_kept_goes_on_also_from_a_bfloat16_file():
    """Version 0.1.0 kept the averages of bfloat16 weights in bfloat16."""
    model, average, _ = walked(torch.bfloat16, steps=4)
    again = WeightAverage.of(4, dict(average.weights), model)
    old = WeightAverage.of(4, {"weight": average.weights["weight"].bfloat16()}, model)
    for one in (average, again, old):
        one.update(model)
        assert one.n_averaged == 5
        assert one.weights["weight"].dtype == torch.float32
    assert torch.equal(again.weights["weight"], average.weights["weight"])
    assert (old.weights["weight"] - average.weights["weight"]).abs().max() < 0.01


def test_what_is_frozen_meanwhile_stays_in_it_and_what_is_trained_later_is_refused():
    model = nn.Linear(2, 2)
    average, seen = WeightAverage(), []
    for step in range(3):
        model.weight.requires_grad_(step == 0)
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(average.weights["weight"], torch.stack(seen).mean(0))
    kept = WeightAverage.of(3, dict(average.weights), model)
    assert torch.equal(kept.weights["weight"], average.weights["weight"])

    model.weight.requires_grad_(True)
    model.bias.requires_grad_(False)
    average = WeightAverage()
    average.update(model)
    model.bias.requires_grad_(True)
    for call in (lambda: average.update(model), lambda: WeightAverage.of(1, dict(average.weights), model)):
        with pytest.raises(ValueError, match="bias is trained, and was not when the average of the weights began"):
            call()
