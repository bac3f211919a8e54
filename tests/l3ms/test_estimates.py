"""From rewards to estimates, multipliers and weights, through `L3MOptimizer.observe`, against the formulas written out here."""

import math

import pytest
import torch

import l3ms

MU = l3ms.ExponentialDecay(0.1, 0.1, 1)  # constant


def make(*constraints, **options):
    x = torch.nn.Parameter(torch.zeros(1))
    return l3ms.L3MOptimizer(torch.optim.SGD([x], lr=0.0), constraints, **{"mu": MU, **options})


def step(opt):
    """Any gradient will do: what is tested is what was observed."""
    for group in opt.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    opt.step()


def observe(opt, values, lengths=None):
    weights = opt.observe(values, lengths)
    step(opt)
    return weights


def scaled_multiplier(violation, mu, s):
    """B' of the paper."""
    return mu / -violation if violation <= -s else mu / s * ((violation + 2 * s) / s)


# ---- estimates ----


@pytest.mark.parametrize("smoothing", [0.1, 0.013, 0.5, 1.0])
def test_the_first_estimate_is_the_first_batch_mean(smoothing):
    opt = make(l3ms.Constraint("r", max=9.0), smoothing=smoothing)
    observe(opt, {"r": [1.0, 2.0, 4.0]})
    assert opt.metrics()["constraints/r/estimate"] == 7 / 3


def test_the_estimate_is_the_bias_corrected_average_of_batch_means():
    opt = make(l3ms.Constraint("r", max=9.0))
    batches = [[1.0, 3.0], [5.0, 6.0, 7.0, 10.0], [0.0, 0.0], [2.0, 4.0, 6.0]]
    weights, means = [], []
    for batch in batches:
        observe(opt, {"r": batch})
        weights = [w * 0.9 for w in weights] + [0.1]  # smoothing 0.1 unless told
        means.append(sum(batch) / len(batch))  # a batch is one vote, whatever its size
        expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
        assert opt.metrics()["constraints/r/estimate"] == pytest.approx(expected, rel=1e-14)


def test_standard_error_of_one_batch_is_the_textbooks():
    opt = make(l3ms.Constraint("r", max=9.0))
    batch = torch.tensor([1.0, 3.0, 4.0, 8.0], dtype=torch.float64)
    observe(opt, {"r": batch})
    assert opt.metrics()["constraints/r/stderr"] == pytest.approx((batch.std() / 2).item(), rel=1e-14)


def test_standard_error_is_the_spread_of_the_estimate_over_replicates():
    """300 independent copies of a constraint: the standard deviation of their estimates is the standard error they state."""
    copies = 300
    opt = make(*[l3ms.Constraint(f"r{i}", max=9.0, margin=0.0) for i in range(copies)], smoothing=0.2)
    generator = torch.Generator().manual_seed(1)
    for size in (6, 3, 12, 5, 8, 4):
        draws = 3.0 * torch.rand(size, copies, generator=generator, dtype=torch.float64)
        opt.observe({f"r{i}": draws[:, i] for i in range(copies)})
        step(opt)
    last = opt.estimates.last
    assert last is not None
    # The relative error of a standard deviation from 300 draws is 4%.
    assert last.estimate.std().item() == pytest.approx(last.stderr.square().mean().sqrt().item(), rel=0.12)
    assert last.estimate.mean().item() == pytest.approx(1.5, abs=4 * last.stderr.mean().item() / math.sqrt(copies))


def test_several_observations_before_one_step_are_one_batch():
    values, lengths = torch.tensor([1.0, 5.0, 2.0, 9.0, 4.0, 4.5, 7.0]), torch.arange(1, 8)
    once, parts = (make(l3ms.Constraint("r", max=3.0), l3ms.Length(max=3)) for _ in range(2))
    for _ in range(3):
        observe(once, {"r": values, "length": lengths}, lengths)
        for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
            parts.observe({"r": values[part], "length": lengths[part]}, lengths[part])
        step(parts)
        values = values + 1
    assert torch.equal(parts.estimates.state, once.estimates.state)
    assert parts.metrics() == once.metrics()


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


def test_none_is_excluded_from_that_constraint_only():
    opt = make(l3ms.Constraint("r", max=1.0, margin=0.0), l3ms.Constraint("q", max=1.0, margin=0.0))
    weights = observe(opt, {"r": [1.0, None, 3.0, None], "q": [2.0, 2.0, 2.0, 2.0]})
    values = opt.metrics()
    assert values["constraints/r/estimate"] == 2.0
    assert values["constraints/q/estimate"] == 2.0
    assert values["constraints/r/stderr"] == pytest.approx(1.0)  # of two
    assert weights[1] == weights[3] == 0
    assert weights[0] > 0 > weights[2]


def test_a_constraint_without_a_sample_keeps_its_estimate_and_counts():
    opt = make(l3ms.Constraint("r", max=9.0), l3ms.Constraint("q", max=9.0))
    observe(opt, {"r": [1.0, 2.0], "q": [1.0, 3.0]})
    before = opt.metrics()
    observe(opt, {"r": [None, None], "q": [5.0, 5.0]})
    observe(opt, {"q": [5.0, 5.0]})  # not given at all
    after = opt.metrics()
    for key in ("estimate", "stderr"):
        assert after[f"constraints/r/{key}"] == before[f"constraints/r/{key}"]
    assert after["constraints/r/missing"] == 2
    assert "constraints/q/missing" not in after
    assert after["constraints/q/estimate"] > before["constraints/q/estimate"]


def test_a_constraint_never_observed_has_no_weight():
    opt = make(l3ms.Constraint("r", max=0.5, margin=0.0), l3ms.Constraint("q", max=9.0))
    weights = observe(opt, {"r": [1.0, 2.0]})
    values = opt.metrics()
    assert values["constraints/q/lambda"] == 0
    assert weights.isfinite().all()
    assert weights.abs().sum() > 0
    assert math.isfinite(values["l3m/mu"])


def test_constant_rewards_weigh_exactly_nothing():
    opt = make(l3ms.Constraint("r", max=0.05, margin=0.0), mu=l3ms.ExponentialDecay(1e-6, 1e-6, 1))
    weights = observe(opt, {"r": [0.1] * 7})  # 0.1 * 7 / 7 is not 0.1: at lambda 1e16 the rounding would be a step
    assert opt.metrics()["constraints/r/lambda"] > 1e15
    assert torch.equal(weights, torch.zeros(7))


# ---- bad values ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_nan_or_inf_is_an_error_naming_constraint_and_row(bad, as_tensor):
    opt = make(l3ms.Constraint("fine", max=1.0), l3ms.Constraint("polite", max=1.0))
    values = [0.0, 1.0, bad]
    with pytest.raises(ValueError, match=r"constraint 'polite': row 2 is (nan|inf|-inf)"):
        opt.observe({"fine": [0.0] * 3, "polite": torch.tensor(values) if as_tensor else values})
    with pytest.raises(ValueError, match=r"constraint 'polite': row 0 is (nan|inf|-inf)"):
        opt.barrier_loss({"polite": torch.tensor(bad)})


def test_nan_and_inf_are_dropped_and_counted_where_asked():
    opt = make(l3ms.Constraint("r", max=1.0, margin=0.0), nonfinite="drop")
    clean = make(l3ms.Constraint("r", max=1.0, margin=0.0))
    weights = observe(opt, {"r": [1.0, math.nan, 3.0, math.inf, None]})
    expected = observe(clean, {"r": [1.0, None, 3.0, None, None]})
    assert torch.equal(weights, expected)
    assert opt.metrics() == {**clean.metrics(), "constraints/r/dropped": 2.0}
    observe(opt, {"r": torch.tensor([math.nan, 2.0, 2.0])})
    assert opt.metrics()["constraints/r/dropped"] == 3


def test_everything_dropped_leaves_the_estimate():
    opt = make(l3ms.Constraint("r", max=1.0), nonfinite="drop")
    observe(opt, {"r": [2.0, 4.0]})
    weights = observe(opt, {"r": [math.nan, math.nan]})
    assert torch.equal(weights, torch.zeros(2))
    assert opt.metrics()["constraints/r/estimate"] == 3.0
    assert opt.metrics()["constraints/r/missing"] == 1


def test_a_single_response_is_refused_under_leave_one_out_and_leaves_nothing_behind():
    opt, clean = make(l3ms.Constraint("r", max=1.0)), make(l3ms.Constraint("r", max=1.0))
    with pytest.raises(ValueError, match=r'at least 2 responses.*baseline="estimate"'):
        opt.observe({"r": [50.0]})
    step(opt)  # the task's: nothing is pending
    assert opt.constraint_steps == 0
    weights = observe(opt, {"r": [1.0, 3.0]})
    assert torch.equal(weights, observe(clean, {"r": [1.0, 3.0]}))
    assert torch.equal(opt.estimates.state, clean.estimates.state)
    assert make(l3ms.Constraint("r", max=1.0), baseline="estimate").observe({"r": [1.0]}).shape == (1,)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"r": [1.0, 2.0], "q": [1.0]}, "{'r': 2, 'q': 1}"),
        ({"rr": [1.0, 2.0]}, r"['rr']"),
        ({}, "none"),
        ({"r": torch.zeros(2, 2)}, "(2, 2)"),
        ({"r": torch.tensor(1.0)}, "()"),
    ],
)
def test_wrong_names_and_shapes_are_named(values, named):
    with pytest.raises(ValueError, match="observe: ") as error:
        make(l3ms.Constraint("r", max=1.0), l3ms.Constraint("q", max=1.0)).observe(values)
    assert named in str(error.value)


def test_lengths_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"lengths must be \(2,\), one per response, got \(3,\)"):
        make(l3ms.Constraint("r", max=1.0)).observe({"r": [1.0, 2.0]}, torch.ones(3))


def test_barrier_loss_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"among \['r'\], got \['q'\]"):
        make(l3ms.Constraint("r", max=1.0)).barrier_loss({"q": torch.tensor(1.0)})


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


# ---- what the optimizer refuses ----


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"smoothing": 0.0}, "smoothing must be in"),
        ({"smoothing": 1.1}, "smoothing must be in"),
        ({"smoothing": math.nan}, "smoothing must be in"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be positive"),
        ({"length_norm": "token"}, "length_norm must be one of mean, sequence, none, got 'token'"),
        ({"baseline": "value"}, "baseline must be one of"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"mu": 0.5}, "mu must be"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        make(l3ms.Constraint("r", max=1.0), **options)


def test_the_base_must_be_an_optimizer():
    with pytest.raises(ValueError, match=r"base must be a torch\.optim\.Optimizer, got list"):
        l3ms.L3MOptimizer([torch.zeros(1)], [])  # type: ignore[arg-type]
