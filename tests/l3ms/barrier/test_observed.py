"""What `observe` and `barrier_loss` take: monitors, shares, lists, ranks, values that are dropped."""

import math

import pytest
import torch
from observing import make, observe, step

import l3ms


@pytest.mark.parametrize("once", [[1.0, None, None], [2.3]])
def test_a_monitor_with_one_value_leaves_mu_alone(once):
    """Its standard error is infinite, and its weight 0."""
    with_one, without = (
        make(l3ms.Constraint("r", max=9.0), l3ms.Constraint("seen", monitor=True), mu="auto") for _ in range(2)
    )
    for opt in (with_one, without):
        opt.observe({"r": [1.0, 2.0, 4.0]})
        if opt is with_one:
            opt.barrier_loss({"seen": 2.3}) if len(once) == 1 else opt.observe({"seen": once})
        step(opt)
    assert with_one.metrics()["constraints/seen/stderr"] == math.inf
    assert with_one.mu == without.mu


def test_raw_values_of_a_share_are_refused():
    constraint = l3ms.Length(min=4, quantile=0.05, name="not short")
    opt, lengths = make(constraint), [1.0, 5.0, None, 9.0]
    for values in (lengths, torch.tensor([0.0, 5.0])):
        with pytest.raises(
            ValueError, match=r"constraint 'not short': row \d is [15], and a share is of 0 and 1; give constr"
        ):
            opt.observe({"not short": values})
    observe(opt, {"not short": constraint.indicator(lengths)})
    assert opt.metrics()["constraints/not short/estimate"] == 2 / 3
    observe(opt, {"not short": [True, False]})


def test_lengths_may_be_a_list_and_values_of_a_loss_numbers():
    listed, tensors = make(l3ms.Length(max=9)), make(l3ms.Length(max=9))
    assert torch.equal(
        listed.observe({"length": [5.0, 8.0]}, [5, 8]), tensors.observe({"length": [5.0, 8.0]}, torch.tensor([5, 8]))
    )
    assert float(make(l3ms.Constraint("nll", max=1.0)).barrier_loss({"nll": 2.5})) > 0


def test_an_optimizer_that_was_made_before_the_other_ranks_were_known_is_refused(monkeypatch):
    opt = make(l3ms.Length(max=9))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    for call in (lambda: opt.observe({"length": [5.0, 8.0]}), lambda: opt.barrier_loss({"length": 5.0})):
        with pytest.raises(RuntimeError, match=r"made before torch\.distributed was initialised"):
            call()


def test_values_that_are_dropped_are_not_in_the_loss():
    opt = make(l3ms.Constraint("nll", max=1.0), nonfinite="drop")
    value = torch.tensor([2.0, math.inf, 4.0], requires_grad=True)
    loss = opt.barrier_loss({"nll": value})
    loss.backward()
    alone = torch.tensor([2.0, 4.0], requires_grad=True)
    expected = make(l3ms.Constraint("nll", max=1.0)).barrier_loss({"nll": alone})
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert value.grad is not None
    assert alone.grad is not None
    assert value.grad.tolist() == [alone.grad[0], 0.0, alone.grad[1]]
