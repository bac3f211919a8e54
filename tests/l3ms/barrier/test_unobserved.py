"""Constraints that nobody looks after are said to have no part in the training; a step that is made again knows what it needs."""

import copy
import logging

import pytest
import torch

import l3ms
from l3ms.barrier.step_reports import UNOBSERVED


def made(**options):
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    base = torch.optim.SGD([parameter], lr=1.0)
    return parameter, l3ms.L3MOptimizer(base, [l3ms.Constraint("polite", max=1.0, margin=0.0)], **options)


def steps(parameter, opt, count, gradient=1e-3):
    for _ in range(count):
        parameter.grad = torch.full_like(parameter, gradient)
        opt.step()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="l3ms")
    return lambda: [record.getMessage() for record in caplog.records if "nothing was observed" in record.getMessage()]


def test_twenty_steps_without_an_observation(said):
    parameter, opt = made()
    steps(parameter, opt, UNOBSERVED - 1)
    assert not said()
    steps(parameter, opt, 2 * UNOBSERVED)
    [line] = said()
    assert "20 steps, and nothing was observed: the constraints (polite) have no part" in line
    assert "l3ms.constrained(TrainerClass)" in line


@pytest.mark.parametrize("heard", ["observed", "left out", "loaded"])
def test_who_observes_is_not_told(heard, said):
    parameter, opt = made()
    if heard == "left out":
        opt.leave_out()
    else:
        opt.observe({"polite": [1.0, 2.0]})
        steps(parameter, opt, 1)
    if heard == "loaded":
        state = copy.deepcopy(opt.state_dict())
        parameter, opt = made()
        opt.load_state_dict(state)
    steps(parameter, opt, 2 * UNOBSERVED)
    assert not said()


def test_a_state_of_one_that_never_observed_is_counted_anew(said):
    parameter, opt = made()
    steps(parameter, opt, UNOBSERVED - 1)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(parameter, opt, UNOBSERVED - 1)
    assert not said()
    steps(parameter, opt, 1)
    assert said()


def test_a_step_that_is_made_again_is_clipped_with_its_s():
    """On g' = g / S it moves by S g' where that is short, by max_grad_norm where it is not; the estimates and mu do not move."""
    parameter, opt = made(max_grad_norm=1.0)
    opt.observe({"polite": [9.0, 9.5]})
    total = opt.estimates.total
    assert total is not None
    assert total > 10
    steps(parameter, opt, 1)
    before = opt.metrics()
    for gradient, moved in ((0.1 / float(total), 0.1), (1.0, 0.5**0.5), (0.1, 0.5**0.5)):
        start = parameter.detach().clone()
        opt.step_again(total)
        steps(parameter, opt, 1, gradient)
        torch.testing.assert_close(start - parameter.detach(), torch.full_like(start, moved))
    after = opt.metrics()
    assert {name: after[name] for name in before if "grad_norm" not in name} == {
        name: before[name] for name in before if "grad_norm" not in name
    }
    start = parameter.detach().clone()
    steps(parameter, opt, 1, 0.1)  # S was for one step
    torch.testing.assert_close(start - parameter.detach(), torch.full_like(start, 0.1))
    opt.observe({"polite": [9.0, 9.5]})
    with pytest.raises(ValueError, match="step_again: something was observed since the last step"):
        opt.step_again(total)
