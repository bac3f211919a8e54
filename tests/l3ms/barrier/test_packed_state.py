"""The barrier's state goes through tools that keep `state` and `param_groups` alone."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import l3ms

CONSTRAINTS = [l3ms.Constraint("c", max=1.0), l3ms.Length(min=2, max=3)]


class Run:
    def __init__(self, empty_group=False, constraints=CONSTRAINTS):
        torch.manual_seed(0)
        self.model = nn.Linear(2, 2)
        groups = [{"params": []}] if empty_group else []
        groups += [{"params": [self.model.weight]}, {"params": [self.model.bias], "weight_decay": 0.0}]
        self.opt = l3ms.L3MOptimizer(torch.optim.AdamW(groups, lr=0.1), constraints)

    def iterate(self, count):
        for step in range(count):
            self.opt.observe({"c": [1.1, 2.3 + step], "length": [3.0, 5.0]})
            self.model(torch.ones(1, 2)).sum().backward()
            self.opt.step()
            self.opt.zero_grad()
        # torch's tools make a step of their own where there is no state yet: its norm is that of no gradient
        return {name: value for name, value in self.opt.metrics().items() if name != "l3m/grad_norm/task"}


OPTIONS = [{}, {"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}]


@pytest.mark.parametrize("options", [*OPTIONS, {"flatten_optimizer_state_dict": True}], ids="-".join)
@pytest.mark.parametrize("empty_group", [False, True])
@pytest.mark.parametrize("file", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_keeps_the_barrier(tmp_path, options, empty_group, file):
    if empty_group and "full_state_dict" not in options:
        pytest.skip("torch loses the options of an empty group, and cannot flatten it (2.13)")
    whole = Run(empty_group)
    whole.iterate(3)
    settings = StateDictOptions(**options)
    kept = copy.deepcopy(get_optimizer_state_dict(whole.model, whole.opt, options=settings))
    other = Run(empty_group)
    other.model.load_state_dict(whole.model.state_dict())
    if file:
        save({"optimizer": kept}, checkpoint_id=tmp_path)
        read = {"optimizer": get_optimizer_state_dict(other.model, other.opt, options=settings)}
        load(read, checkpoint_id=tmp_path)
        kept = read["optimizer"]
    set_optimizer_state_dict(other.model, other.opt, kept, options=settings)
    assert other.iterate(4) == whole.iterate(4)
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), whole.model.parameters(), strict=True))


def test_the_state_of_a_plain_optimizer_and_of_other_constraints_are_still_refused():
    run = Run()
    plain = torch.optim.AdamW(run.model.parameters())
    with pytest.raises(ValueError, match='the state has no "l3m"'):
        set_optimizer_state_dict(run.model, run.opt, get_optimizer_state_dict(run.model, plain))
    other = Run(constraints=[l3ms.Length(max=3)])
    with pytest.raises(ValueError, match=r"that of constraints \['length'\], this optimizer has \['c', 'length'\]"):
        set_optimizer_state_dict(run.model, run.opt, get_optimizer_state_dict(other.model, other.opt))


def test_a_state_without_the_text_in_its_groups_is_loaded():
    """As version 0.1.0 kept it."""
    whole, other = Run(), Run()
    whole.iterate(3)
    state = whole.opt.state_dict()
    for group in state["param_groups"]:
        del group["l3m"]
    other.model.load_state_dict(whole.model.state_dict())
    other.opt.load_state_dict(state)
    assert other.iterate(2) == whole.iterate(2)
