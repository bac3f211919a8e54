"""Going back: the same bits, the same counters, an average without what came after."""

import types

import pytest
import torch
from training_runs import assert_moved

from l3ms.watching.snapshots import Snapshot, Snapshots, halve_learning_rate

ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "constant"}


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_restored_state_is_the_snapshots_bit_for_bit_and_survives_further_training(make_model, train):
    trainer, _ = train(make_model(), average_fraction=1.0, **ADAM)
    opt = trainer.l3m_optimizer
    assert opt is not None
    snapshot, start = Snapshot.of(trainer), weights(trainer.model)
    moments = {k: v.clone() for k, v in opt.state[opt.param_groups[0]["params"][0]].items()}
    estimate, mu, average = opt.estimates.state.clone(), opt.mu.clone(), clones(trainer.average.weights)
    for _ in range(2):  # the second time: what was restored was a copy
        for _ in range(2):
            trainer.constraint_half_step()
            trainer.average_weights()
        assert_moved(trainer.model, make_model())
        assert not equal(start, weights(trainer.model))
        applied = opt.constraint_steps
        snapshot.restore(trainer)
        assert equal(start, weights(trainer.model))
        now = opt.state[opt.param_groups[0]["params"][0]]
        assert all(torch.equal(moments[key], now[key]) for key in moments)
        assert torch.equal(opt.estimates.state, estimate)
        assert torch.equal(opt.mu, mu)
        assert opt.constraint_steps == applied, "the schedule of mu lost its place"
        assert trainer.average is not None
        assert trainer.average.n_averaged == 3
        assert equal(average, clones(trainer.average.weights))


def test_an_average_that_had_not_begun_is_dropped(make_model, train):
    trainer, _ = train(make_model(), average_fraction=0.0)
    snapshot = Snapshot.of(trainer)
    trainer.args.average_fraction = 1.0
    trainer.average_weights()
    assert trainer.average is not None
    snapshot.restore(trainer)
    assert trainer.average is None


def test_two_are_kept_and_the_newest_before_the_trip_is_taken(make_model, train):
    trainer, _ = train(make_model())
    taken = Snapshots()
    for iteration in (0, 10, 20, 30):
        trainer.state.global_step = iteration
        taken.take(trainer, iteration)
    assert taken.iterations == [20, 30]
    assert taken.restore(trainer, before=29) == 20
    assert taken.iterations == [20], "a snapshot from after the trip was kept"
    assert taken.restore(trainer, before=5) == 20  # the oldest there is


def test_one_from_before_what_is_looked_at_is_kept_until_the_next_is_that(make_model, train):
    """A window of iterations that sampled may be longer than two snapshots are apart."""
    trainer, _ = train(make_model())
    taken = Snapshots()
    for iteration, before in ((0, 0), (10, 0), (20, 5), (30, 9), (40, 10), (50, 20)):
        trainer.state.global_step = iteration
        taken.take(trainer, before)
        assert taken.iterations[0] <= before
    assert taken.iterations == [10, 40]
    assert taken.restore(trainer, before=20) == 10


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 12}),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4}),
        ("SequentialLR", None),
        ("ChainedScheduler", None),
        ("CosineAnnealingLR", {"T_max": 9}),
    ],
)
def test_half_of_the_rate_is_half_for_the_rest_of_the_schedule(kind, options):
    """Of every kind that torch has: what a schedule keeps, in itself, in its parts and in the groups."""
    schedules = torch.optim.lr_scheduler

    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.05, momentum=0.9)
        if options is not None:
            return optimizer, getattr(schedules, kind)(optimizer, **options)
        parts = [schedules.LambdaLR(optimizer, lambda step: (step + 1) / 3), schedules.ExponentialLR(optimizer, 0.9)]
        return optimizer, schedules.SequentialLR(
            optimizer, parts, [3]
        ) if kind == "SequentialLR" else schedules.ChainedScheduler(parts)

    (whole, schedule), (halved, other) = made(), made()
    for step in range(9):
        if step == 4:
            halve_learning_rate(types.SimpleNamespace(l3m_optimizer=halved, lr_scheduler=other))  # type: ignore[arg-type]
        share = 0.5 if step >= 4 else 1.0
        assert halved.param_groups[0]["lr"] == pytest.approx(share * whole.param_groups[0]["lr"], rel=1e-12), step
        for optimizer, its in ((whole, schedule), (halved, other)):
            optimizer.step()
            its.step()


def test_half_the_learning_rate_and_the_schedule_goes_on(make_model, train):
    trainer, _ = train(make_model(), **ADAM)
    halve_learning_rate(trainer)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.005
    assert trainer.lr_scheduler.get_last_lr() == [0.005] * len(trainer.optimizer.param_groups)
    trainer.lr_scheduler.step()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.005
