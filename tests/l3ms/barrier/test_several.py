"""Several optimizers as one: the same steps as one optimizer with their groups, and what holds an optimizer can hold them."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from two_modes import TwoModes

import l3ms
from l3ms.barrier.several import SeveralOptimizers

ADAM = {"lr": 0.1, "betas": (0.5, 0.95)}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(3)]


def wrapped(base):
    return l3ms.L3MOptimizer(
        base, [l3ms.Constraint("size", max=0.1, margin=0.0)], mu=l3ms.ExponentialDecay(0.1, 0.1, 1), smoothing="ema"
    )


def train(opt, params, steps, start=0):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for step in range(start, start + steps):
        size: Any = sum((p - step).square().mean() for p in params)
        (opt.barrier_loss({"size": size}) if step % 2 else size).backward()
        opt.step()
        opt.zero_grad()
        scheduler.step()


def split(params, **options):
    return [
        torch.optim.AdamW(params[:1], **ADAM, **options),
        torch.optim.AdamW([{"params": params[1:], "weight_decay": 0.1}], **ADAM, **options),
    ]


def whole(params, **options):
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, **ADAM, **options)


@pytest.mark.parametrize("fused", [False, True])
def test_two_optimizers_step_as_one_with_their_groups(fused):
    one, several = parameters(), parameters()
    train(wrapped(whole(one, fused=fused)), one, 6)
    train(wrapped(split(several, fused=fused)), several, 6)
    for a, b in zip(one, several, strict=True):
        assert torch.equal(a, b)


def test_one_that_folds_the_clipping_and_one_that_does_not_step_alike():
    one, several = parameters(), parameters()
    train(wrapped(whole(one)), one, 6)
    parts = [torch.optim.AdamW(several[:1], **ADAM, fused=True), split(several)[1]]
    train(wrapped(parts), several, 6)
    for a, b in zip(one, several, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_with_a_gradient_that_is_not_finite_moves_no_part():
    params = parameters()
    before = [p.detach().clone() for p in params]
    opt = wrapped(split(params))
    (params[0].sum() + params[2].sum() * float("nan")).backward()
    opt.step()
    assert opt.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_the_state_is_in_torchs_format_and_goes_on_in_another():
    straight, first, second = parameters(), parameters(), parameters()
    train(wrapped(split(straight)), straight, 4)
    opt = wrapped(split(first))
    train(opt, first, 2)
    plain = opt.base.state_dict()
    assert plain.keys() == {"state", "param_groups"}
    assert [group["params"] for group in plain["param_groups"]] == [[0], [1, 2]]
    assert plain["state"].keys() == {0, 1, 2}
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q.detach())
    other: Any = wrapped(split(second))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for group in other.param_groups:  # a new scheduler begins at what it finds
        group["initial_lr"] = group["lr"]
    assert other.param_groups[1] is other.base.parts[1].param_groups[0]
    assert set(other.state) == set(second)
    assert other.state[second[2]] is other.base.parts[1].state[second[2]]
    train(other, second, 2, start=2)
    for a, b in zip(straight, second, strict=True):
        assert torch.equal(a, b)


def test_tools_of_torch_that_keep_a_distributed_state_keep_this_one():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(parameters())

    first, second = Model(), Model()
    opt, other = wrapped(split(list(first.weights))), wrapped(split(list(second.weights)))
    train(opt, list(first.weights), 3)
    kept = get_optimizer_state_dict(first, opt)
    set_optimizer_state_dict(second, other, kept)
    for a, b in zip(first.weights, second.weights, strict=True):
        assert torch.equal(opt.state[a]["exp_avg"], other.state[b]["exp_avg"])
    assert other.metrics()["constraints/size/estimate"] == opt.metrics()["constraints/size/estimate"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_a_copy_has_parts_of_its_own(again):
    params = parameters()
    opt = wrapped(split(params))
    train(opt, params, 2)
    twin = again(opt)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    train(twin, theirs, 1)
    train(opt, params, 1)
    for a, b in zip(params, theirs, strict=True):
        assert a is not b
        assert torch.equal(a, b)


def test_modes_are_passed_on_to_the_parts_that_have_them():
    params = parameters()
    parts: list[Any] = [torch.optim.SGD(params[:1], lr=0.1), TwoModes(params[1:], lr=0.1)]
    opt = wrapped(parts)
    opt.train()
    assert parts[1].mode == "train"
    opt.eval()
    assert parts[1].mode == "eval"


def test_what_cannot_be_one_is_refused():
    a, b, _ = parameters()
    with pytest.raises(ValueError, match=r"base\[1\]: SGD has parameters that an optimizer before it has too"):
        wrapped([torch.optim.AdamW([a]), torch.optim.SGD([a, b])])
    with pytest.raises(ValueError, match=r"base\[1\] must be a torch.optim.Optimizer, got Parameter"):
        wrapped([torch.optim.AdamW([a]), b])
    with pytest.raises(ValueError, match="base must hold an optimizer, got an empty list"):
        wrapped([])
    with pytest.raises(ValueError, match="base must step without a closure, which LBFGS needs"):
        wrapped([torch.optim.AdamW([a]), torch.optim.LBFGS([b])])
    several = SeveralOptimizers([torch.optim.AdamW([a])])
    with pytest.raises(ValueError, match="add_param_group: add the group to one of the optimizers"):
        several.add_param_group({"params": [b]})
    with pytest.raises(ValueError, match="add_param_group: add the group to one of the optimizers"):
        wrapped([torch.optim.AdamW([a])]).add_param_group({"params": [b]})
    with pytest.raises(ValueError, match="the state has 2 groups, the optimizers have 1"):
        several.load_state_dict({"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]})


def test_a_closure_is_called_once_with_gradients_and_its_value_returned():
    params = parameters()
    opt, calls = wrapped(split(params)), []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = params[0].square().sum()
        loss.backward()
        return loss.item()

    wanted = params[0].detach().square().sum().item()
    with torch.no_grad():
        assert opt.step(closure) == wanted
    assert calls == [True]
    assert opt.state[params[0]]["step"] == 1


def test_the_closure_of_lightnings_automatic_optimization_is_refused():
    Closure = type(
        "Closure", (), {"__call__": lambda self: None, "__module__": "lightning.pytorch.loops.optimization.automatic"}
    )
    opt = wrapped(split(parameters()))
    module = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"set self.automatic_optimization = False"):
        opt.step(functools.partial(lambda *args: None, module, opt, Closure()))
    opt.step(functools.partial(lambda *args: None, module, opt, lambda: None))  # of manual optimization
