"""What `L3MOptimizer` can wrap, and what it passes on."""

import pytest
import torch
from two_modes import TwoModes

import l3ms

CONSTRAINTS = [l3ms.Constraint("c", max=1.0)]


def test_an_optimizer_whose_first_group_is_empty_is_wrapped():
    x = torch.nn.Parameter(torch.ones(1))
    opt = l3ms.L3MOptimizer(torch.optim.SGD([{"params": []}, {"params": [x]}], lr=0.1), CONSTRAINTS)
    opt.observe({"c": [2.0, 3.0]})
    x.sum().backward()
    opt.step()
    assert x.item() < 1


def test_nothing_to_train_and_a_step_with_a_closure_are_refused():
    with pytest.raises(ValueError, match="base has no parameters: is anything trainable"):
        l3ms.L3MOptimizer(torch.optim.SGD([{"params": []}], lr=0.1), CONSTRAINTS)
    x = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="base must step without a closure, which LBFGS needs"):
        l3ms.L3MOptimizer(torch.optim.LBFGS([x]), CONSTRAINTS)


def test_train_and_eval_are_passed_on_where_there_are_two_modes():
    x = torch.nn.Parameter(torch.ones(1))
    base = TwoModes([x], lr=0.1)
    opt = l3ms.L3MOptimizer(base, CONSTRAINTS)
    opt.train()
    assert base.mode == "train"
    x.sum().backward()
    opt.step()
    opt.eval()
    assert base.mode == "eval"
    plain = l3ms.L3MOptimizer(torch.optim.SGD([x], lr=0.1), CONSTRAINTS)
    plain.train()
    plain.eval()


def test_a_group_that_is_added_is_stepped_by_the_wrapped_one_with_its_defaults():
    x, y = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    base = torch.optim.SGD([x], lr=0.1)
    opt = l3ms.L3MOptimizer(base, CONSTRAINTS)
    opt.add_param_group({"params": [y]})
    assert base.param_groups[1] is opt.param_groups[1]
    assert opt.param_groups[1]["lr"] == 0.1
    (x + y).sum().backward()
    opt.step()
    assert y.item() < 1
