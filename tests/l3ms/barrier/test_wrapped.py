"""What `L3MOptimizer` can wrap, and what it passes on."""

import copy

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


def test_what_accelerate_has_prepared_is_refused():
    """Its step() does nothing but in the last of several micro-batches, and the barrier would count each."""
    from accelerate import Accelerator

    x = torch.nn.Parameter(torch.ones(1))
    prepared = Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD([x], lr=0.1))
    with pytest.raises(ValueError, match=r"base is prepared by accelerate, .*: wrap it first"):
        l3ms.L3MOptimizer(prepared, CONSTRAINTS)


@pytest.mark.parametrize("several", [False, True])
def test_a_state_that_the_base_loads_by_itself_leaves_it_wrapped(several):
    """That of plain fine-tuning, which has no barrier: torch gives the base other groups, and a schedule goes on with them."""
    x, y = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    parts = [torch.optim.AdamW([p], lr=0.1) for p in (x, y)] if several else [torch.optim.AdamW([x, y], lr=0.1)]
    for part in parts:
        (x + y).sum().backward()
        part.step()
    kept = [copy.deepcopy(part.state_dict()) for part in parts]
    opt = l3ms.L3MOptimizer(parts if several else parts[0], CONSTRAINTS)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=2)
    for part, state in zip(parts, kept, strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        opt.step()
        schedule.step()
    assert [group["lr"] for part in parts for group in part.param_groups] == pytest.approx([0.01] * len(parts))
    assert set(opt.state) == {x, y}
    assert opt.state[x] is parts[0].state[x]
