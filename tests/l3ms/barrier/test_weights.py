"""From estimates to multipliers and weights, through `L3MOptimizer.observe`, against the formulas written out here."""

import math

import pytest
import torch
from observing import make, observe, step

import l3ms


def scaled_multiplier(violation, mu, s):
    """B' of the paper."""
    return mu / -violation if violation <= -s else mu / s * ((violation + 2 * s) / s)


# ---- multipliers ----


@pytest.mark.parametrize(
    ("sign", "options"), [(1, {"max": 40.0}), (-1, {"min": 40.0}), (1, {"max": 40.0, "scale": 8.0})]
)
@pytest.mark.parametrize("margin", [0.0, 1.5, None])
@pytest.mark.parametrize("mean", [30.0, 39.9, 40.0, 40.3, 60.0])
def test_violation_and_multiplier_by_hand(sign, options, margin, mean):
    constraint = l3ms.Constraint("r", margin=margin, **options)
    opt = make(constraint)
    batch = torch.tensor([mean - 2.0, mean + 2.0], dtype=torch.float64)
    observe(opt, {"r": batch})
    inside = 2 * batch.std().item() / math.sqrt(2) if margin is None else margin
    violation = (sign * (mean - 40.0) + inside) / options.get("scale", 40.0)
    values = opt.metrics()
    assert values["constraints/r/slack"] == pytest.approx(-violation, rel=1e-12, abs=1e-14)
    assert values["constraints/r/lambda"] == pytest.approx(scaled_multiplier(violation, 0.1, 0.01), rel=1e-10)


@pytest.mark.parametrize("mean", [10.0, 14.0, 19.0])
def test_two_sided_metrics(mean):
    """One estimate, two multipliers: lambda is their sum, the slack that of the nearer bound; inside, lambda slack = mu."""
    opt = make(l3ms.Constraint("r", min=8.0, max=20.0, margin=0.0, scale=1.0))
    observe(opt, {"r": [mean, mean]})
    low, high = mean - 8.0, 20.0 - mean
    values = opt.metrics()
    assert values["constraints/r/slack"] == pytest.approx(min(low, high), rel=1e-14)
    assert values["constraints/r/lambda"] == pytest.approx(0.1 / low + 0.1 / high, rel=1e-14)
    last = opt.estimates.last
    assert last is not None
    assert (last.multiplier * -last.violation).tolist() == pytest.approx([0.1, 0.1], rel=1e-14)


def test_the_default_margin_is_at_most_a_quarter_of_the_range():
    opt = make(l3ms.Constraint("r", min=0.0, max=10.0))
    observe(opt, {"r": [-95.0, 105.0]})  # standard error 100
    assert opt.metrics()["constraints/r/slack"] == pytest.approx((5.0 - 2.5) / 5.0)


# ---- weights ----


@pytest.mark.parametrize("length_norm", ["mean", "sequence", "none"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "estimate"])
def test_weights_by_hand(length_norm, baseline):
    """weight_n = (1/N) sum_i (lambda_i / S) (b_i - c_i(y_n)) / norm_n; None of a constraint: its own N."""
    opt = make(
        l3ms.Constraint("r", max=2.0, margin=0.0),
        l3ms.Length(min=6, max=8, margin=0.0),
        length_norm=length_norm,
        baseline=baseline,
        smoothing="ema",
    )
    observe(opt, {"r": [0.0, 1.0], "length": [4.0, 9.0]})
    rewards = [[1.0, 2.0, None, 6.0, 4.0], [3.0, 5.0, 9.0, 12.0, 1.0]]
    lengths = torch.tensor([3, 5, 9, 12, 1])
    weights = opt.observe({"r": rewards[0], "length": rewards[1]}, lengths)
    step(opt)

    first, estimates = [0.5, 6.5], []
    for values, start in zip(rewards, first, strict=True):
        given = [v for v in values if v is not None]
        estimates.append((0.09 * start + 0.1 * sum(given) / len(given)) / 0.19)
    # one-sided constraints: (reward, sign, bound, scale)
    sides = [(0, 1.0, 2.0, 2.0), (1, -1.0, 6.0, 7.0), (1, 1.0, 8.0, 7.0)]
    multipliers = [
        scaled_multiplier(sign * (estimates[i] - bound) / scale, 0.1, 0.01) for i, sign, bound, scale in sides
    ]
    total = max(1.0, sum(multipliers))
    norm = {"mean": [6.0] * 5, "sequence": [3.0, 5.0, 9.0, 12.0, 1.0], "none": [1.0] * 5}[length_norm]
    for n in range(5):
        expected = 0.0
        for (i, sign, _, scale), multiplier in zip(sides, multipliers, strict=True):
            value = rewards[i][n]
            if value is None:
                continue
            given = [v for v in rewards[i] if v is not None]
            others = (sum(given) - value) / (len(given) - 1)
            base = others if baseline == "leave_one_out" else estimates[i]
            expected += multiplier / total * sign * (base - value) / scale / (len(given) * norm[n])
        assert weights[n].item() == pytest.approx(expected, rel=1e-5)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad


def test_the_sign_of_the_weights_moves_the_reward_into_its_range():
    low, high = make(l3ms.Length(min=50)), make(l3ms.Length(max=5))
    lengths = torch.tensor([10, 20, 30])
    for opt, sign in ((low, 1.0), (high, -1.0)):
        weights = sign * opt.observe({"length": lengths}, lengths)
        assert weights[2] > 0 > weights[0]


def test_a_slack_constraint_takes_a_small_step_and_not_a_full_one():
    """lambda / S with S = max(1, sum): far inside, the weights are lambda times those far outside."""
    opt = make(l3ms.Constraint("r", max=1.0, scale=1.0, margin=0.0), mu=l3ms.ExponentialDecay(1e-6, 1e-6, 1))
    weights = opt.observe({"r": [-100.0, -98.0]})
    assert opt.estimates.total == 1.0
    assert weights.abs().max().item() == pytest.approx(1e-6 / 100 * 2 / 2, rel=1e-5)


def test_length_normalisation_needs_lengths():
    opt, plain = (make(l3ms.Constraint("r", max=1.0), length_norm=norm) for norm in ("mean", "none"))
    assert torch.equal(opt.observe({"r": [1.0, 5.0]}), plain.observe({"r": [1.0, 5.0]}))
    empty = opt.observe({"r": [1.0, 5.0]}, torch.zeros(2))  # no response has a token: no division by 0
    assert empty.isfinite().all()


def test_each_part_is_a_mean_over_its_own_responses_in_units_of_the_first_parts_s():
    """step() multiplies by one S, that of the first part: the weights of a later one are lambda / S of the first, with its own lambda."""
    options = {"length_norm": "none", "baseline": "estimate", "smoothing": 1.0}
    opt = make(l3ms.Constraint("r", max=1.0, margin=0.0), **options)
    first, second = [2.0, 4.0], [6.0, 8.0, 10.0]
    opt.observe({"r": first})
    weights = opt.observe({"r": second})
    total = scaled_multiplier(3.0 - 1.0, 0.1, 0.01)
    assert opt.estimates.total is not None
    assert opt.estimates.total.item() == pytest.approx(total, rel=1e-12)
    multiplier = scaled_multiplier(6.0 - 1.0, 0.1, 0.01)  # of the mean of all five
    expected = [multiplier / total * (6.0 - value) / 3 for value in second]
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)


def test_of_each_constraint_a_part_is_a_mean_over_its_own_values():
    """The second part has none of `b`: its weights by `a` are those of a part that was told nothing of `b`."""
    first = {"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 2.0, 0.5, 1.0]}
    constraints = [l3ms.Constraint(name, max=1.0, scale=1.0) for name in "ab"]
    missing, untold = make(*constraints), make(*constraints)
    assert torch.equal(missing.observe(first), untold.observe(first))
    found = missing.observe({"a": first["a"], "b": [None] * 4})
    torch.testing.assert_close(found, untold.observe({"a": first["a"]}), rtol=1e-6, atol=0)
    # by hand: lambda / S of a, over 4 values of its own
    last = missing.estimates.pending
    share = float(last.multiplier[0] / missing.estimates.total)  # type: ignore[union-attr]
    expected = [-share * (r - 2.5) * 8 / 7 / 4 for r in first["a"]]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
