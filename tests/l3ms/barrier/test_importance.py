"""Responses of another distribution, on a policy over four answers: what their weights come to in expectation, summed over all batches."""

import itertools

import pytest
import torch
from observing import make, step

import l3ms
from l3ms.barrier.importance import TRUNCATION, effective_share, power_sums, truncated

REWARDS = torch.tensor([1.0, 2.0, 5.0, 3.0], dtype=torch.float64)
POLICY = torch.tensor([0.4, -0.2, 0.3, 0.0], dtype=torch.float64)  # logits
NEAR = torch.tensor([0.1, 0.2, -0.2, 0.0], dtype=torch.float64)  # of another distribution; ratios up to 1.47
FAR = torch.tensor(
    [0.6, 0.1, -0.7, 0.0], dtype=torch.float64
)  # the third answer is 2.6 times as likely under the policy
N = 3  # responses in a batch


def answers(logits):
    """(4, 4) gradients of log pi(y) by the logits, and (4,) probabilities."""
    probabilities = logits.softmax(0)
    return torch.eye(4, dtype=torch.float64) - probabilities, probabilities


def exact(logits):
    """E[r], and its gradient by the logits."""
    score, probabilities = answers(logits)
    return probabilities @ REWARDS, (probabilities * REWARDS) @ score


def expected(drawn_from, ratio=None, fresh=True, policy=POLICY):
    """Of all batches of N responses of `drawn_from`: what the weights make of the gradient of E[r], and the mean that is estimated."""
    score, _ = answers(policy)
    _, likely = answers(drawn_from)
    gradient, mean = torch.zeros(4, dtype=torch.float64), 0.0
    for batch in itertools.product(range(4), repeat=N):
        drawn = list(batch)
        # beyond its bound whatever the batch: a fixed multiplier, and the gradient of E[r] times 1 / scale
        opt = make(l3ms.Constraint("r", max=-100.0, scale=1.0, margin=0.0), solver=l3ms.Penalty(1.0))
        if not fresh:
            opt.observe({"r": REWARDS[[0, 1, 3]]})
            step(opt)
        importance = None if ratio is None else ratio[drawn]
        weights = opt.observe({"r": REWARDS[drawn]}, importance=importance, fresh=fresh)
        step(opt)
        chance = likely[drawn].prod()
        gradient -= chance * (weights.double() @ score[drawn])
        mean += float(chance) * opt.metrics().get("constraints/r/batch_mean", 0.0)
    return gradient, mean


def ratio_to(drawn_from, policy=POLICY):
    return (policy.log_softmax(0) - drawn_from.log_softmax(0)).exp()


def test_without_weights_both_are_those_of_the_other_distribution():
    mean, gradient = exact(POLICY)
    plain, estimated = expected(NEAR)
    assert (plain - gradient).abs().max() > 0.1 * gradient.abs().max(), "biased"
    assert abs(estimated - mean) > 0.1
    ours, mean_of_ours = expected(POLICY)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-6)
    assert mean_of_ours == pytest.approx(float(mean), abs=1e-12)


@pytest.mark.parametrize("drawn_from", [NEAR, FAR], ids=["near", "far"])
def test_weights_that_are_not_cut_make_both_exact(drawn_from):
    mean, gradient = exact(POLICY)
    weighted, estimated = expected(drawn_from, ratio_to(drawn_from))
    torch.testing.assert_close(weighted, gradient, rtol=0, atol=1e-6)
    assert estimated == pytest.approx(float(mean), abs=1e-12)


def test_the_level_leaves_near_distributions_alone_and_takes_most_of_the_bias_of_far_ones():
    mean, gradient = exact(POLICY)
    logs = (POLICY.log_softmax(0) - NEAR.log_softmax(0), POLICY.log_softmax(0) - FAR.log_softmax(0))
    torch.testing.assert_close(truncated(logs[0]), ratio_to(NEAR), rtol=1e-12, atol=0)
    cut = truncated(logs[1])
    assert cut.max() == TRUNCATION < ratio_to(FAR).max()
    plain, plain_mean = expected(FAR)
    weighted, weighted_mean = expected(FAR, cut)
    score, likely = answers(POLICY)[0], answers(FAR)[1]
    baseline = likely @ REWARDS
    torch.testing.assert_close(weighted, (likely * cut * (REWARDS - baseline)) @ score, rtol=0, atol=1e-6)
    assert weighted_mean == pytest.approx(float(baseline + likely @ (cut * (REWARDS - baseline))), abs=1e-12)
    assert 0.1 < (weighted - gradient).norm() < 0.5 * (plain - gradient).norm()
    assert 0.1 < mean - weighted_mean < 0.5 * (mean - plain_mean), "what is cut is the one bias left"


def test_responses_that_are_used_again_have_the_gradient_of_the_policy_of_now():
    """Drawn from NEAR, the policy of before; a step later it is POLICY."""
    _, gradient = exact(POLICY)
    again, _ = expected(NEAR, ratio_to(NEAR), fresh=False)
    torch.testing.assert_close(again, gradient, rtol=0, atol=1e-6)
    unweighted, _ = expected(NEAR, fresh=False)
    assert (unweighted - gradient).abs().max() > 0.1 * gradient.abs().max()


VALUES = torch.tensor([3.0, 5.0, 4.0, 8.0], dtype=torch.float64)


def observed(times, *, fresh):
    """After one batch, `times` more half-steps on it."""
    opt = make(l3ms.Constraint("r", max=1.0, scale=1.0), mu="auto")
    opt.observe({"r": VALUES})
    step(opt)
    for _ in range(times):
        opt.observe({"r": VALUES}, importance=torch.full((4,), 1.3), fresh=fresh)
        step(opt)
    return opt


def test_a_batch_that_is_used_again_tells_the_estimates_nothing():
    once, again, told = observed(0, fresh=True), observed(3, fresh=False), observed(3, fresh=True)
    stderr = {
        name: opt.metrics()["constraints/r/stderr"] for name, opt in (("once", once), ("again", again), ("told", told))
    }
    assert stderr["told"] < stderr["once"] < stderr["again"], "time passes, and the band widens"
    values = again.metrics()
    assert values["constraints/r/estimate"] == once.metrics()["constraints/r/estimate"]
    assert "constraints/r/batch_mean" not in values
    assert "constraints/r/missing" not in values, "its samples are there"
    assert values["l3m/noise_floor"] > once.metrics()["l3m/noise_floor"] > told.metrics()["l3m/noise_floor"]
    assert again.constraint_steps == 4


def test_data_of_the_same_half_step_are_observed():
    opt = make(l3ms.Constraint("r", max=1.0, scale=1.0), l3ms.Constraint("nll", max=1.0))
    for fresh in (True, False):
        opt.observe({"r": VALUES}, fresh=fresh)
        opt.barrier_loss({"nll": torch.tensor([2.0, 3.0]) + fresh})
        step(opt)
    values = opt.metrics()
    assert values["constraints/nll/batch_mean"] == 2.5
    assert "constraints/r/batch_mean" not in values
    assert "constraints/nll/missing" not in values


def test_the_effective_sample_size():
    assert effective_share(power_sums(torch.full((6,), 0.7))) == pytest.approx(1.0)
    assert effective_share(power_sums(torch.tensor([0.0, -900.0, -900.0, -900.0]))) == pytest.approx(0.25)
    halves = [torch.tensor([0.3, -0.2]), torch.tensor([1.0, 0.1, 0.0])]
    together = effective_share(power_sums(torch.cat(halves)))
    assert effective_share(power_sums(halves[0]) + power_sums(halves[1])) == pytest.approx(together)
    assert effective_share(power_sums(torch.tensor([1e4, 0.0]))) == 0.0, "no ratio that is finite"


@pytest.mark.parametrize(
    ("options", "arguments", "line"),
    [
        ({}, {"importance": torch.ones(3)}, r"importance must be \(4,\), one per response, got \(3,\)"),
        ({}, {"importance": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "importance must be ratios of probabilities"),
        ({}, {"importance": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, "importance must be ratios of probabilities"),
        ({"smoothing": 0.3}, {"fresh": False}, 'smoothing must be "trend" where time passes .* got 0.3'),
        ({"baseline": "estimate"}, {"fresh": False}, 'importance and fresh=False need baseline="leave_one_out"'),
    ],
)
def test_what_cannot_be_weighed_is_refused(options, arguments, line):
    with pytest.raises(ValueError, match=line):
        make(l3ms.Constraint("r", max=1.0), **options).observe({"r": VALUES}, **arguments)
