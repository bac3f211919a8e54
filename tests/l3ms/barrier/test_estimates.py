"""From rewards to estimates, through `L3MOptimizer.observe`, against the formulas written out here."""

import math

import pytest
import torch
from observing import make, observe, step

import l3ms
from l3m_kernels import barrier_weights, initial_state

# ---- estimates ----


@pytest.mark.parametrize("smoothing", [0.1, 0.013, 0.5, 1.0])
def test_the_first_estimate_is_the_first_batch_mean(smoothing):
    opt = make(l3ms.Constraint("r", max=9.0), smoothing=smoothing)
    observe(opt, {"r": [1.0, 2.0, 4.0]})
    assert opt.metrics()["constraints/r/estimate"] == 7 / 3


def test_the_estimate_is_the_bias_corrected_average_of_batch_means():
    opt = make(l3ms.Constraint("r", max=9.0), smoothing="ema")
    batches = [[1.0, 3.0], [5.0, 6.0, 7.0, 10.0], [0.0, 0.0], [2.0, 4.0, 6.0]]
    weights, means = [], []
    for batch in batches:
        observe(opt, {"r": batch})
        weights = [w * 0.9 for w in weights] + [0.1]
        means.append(sum(batch) / len(batch))  # a batch is one vote, whatever its size
        expected = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
        assert opt.metrics()["constraints/r/estimate"] == pytest.approx(expected, rel=1e-14)


def test_the_estimate_is_the_filters_unless_told():
    opt, state = make(l3ms.Constraint("r", max=9.0), l3ms.Length(max=30)), initial_state(2, smoothing="trend")
    bounds, mu = opt.estimates.bounds, torch.tensor(0.1).double()
    for step_ in range(6):
        batch = {"r": [1.0 + step_, 3.0 + step_], "length": [40.0 - 4 * step_, 50.0 - 2 * step_]}
        expected = barrier_weights(torch.tensor(list(batch.values())).double().T, state, bounds, mu, smoothing="trend")
        state = expected.state
        observe(opt, batch)
        found = opt.metrics()
        for i, name in enumerate(("r", "length")):
            assert found[f"constraints/{name}/estimate"] == pytest.approx(float(expected.estimate[i]), rel=1e-14)
            assert found[f"constraints/{name}/stderr"] == pytest.approx(float(expected.stderr[i]), rel=1e-14)


def test_the_state_of_an_average_is_no_state_of_a_filter():
    average, trend = (make(l3ms.Constraint("r", max=9.0), smoothing=kind) for kind in ("ema", "trend"))
    for opt in (average, trend):
        observe(opt, {"r": [1.0, 2.0, 4.0]})
    with pytest.raises(
        ValueError, match=r"smoothing is 'trend', but the state is that of an average; .*of 0.1.0: .ema."
    ):
        trend.load_state_dict(average.state_dict())
    with pytest.raises(ValueError, match=r'smoothing is 0\.1, but the state is that of "trend"'):
        average.load_state_dict(trend.state_dict())


def test_the_mean_of_the_batch_is_beside_the_estimate():
    constraints = [
        l3ms.Constraint("r", max=9.0),
        l3ms.Constraint("seen", monitor=True),
        l3ms.Constraint("nll", max=1.0),
    ]
    opt = make(*constraints, nonfinite="drop")
    opt.observe({"r": [1.0, None, 4.0], "seen": [1.0, math.nan, 2.0]})
    opt.observe({"r": [7.0, 8.0], "seen": [None, 6.0]})  # of the same step
    opt.barrier_loss({"nll": torch.tensor([0.5, 1.0, 3.0])})
    step(opt)
    found = opt.metrics()
    assert {name: found[f"constraints/{name}/batch_mean"] for name in ("r", "seen", "nll")} == {
        "r": 5,
        "seen": 3,
        "nll": 1.5,
    }
    observe(opt, {"r": [2.0, 4.0]})
    found = opt.metrics()
    assert found["constraints/r/batch_mean"] == 3
    assert 3 < found["constraints/r/estimate"] < 5
    assert "constraints/seen/batch_mean" not in found  # nothing in this batch
    assert found["constraints/seen/estimate"] == 3


def test_a_step_that_was_skipped_leaves_the_mean_of_the_batch():
    opt = make(l3ms.Constraint("r", max=9.0))
    observe(opt, {"r": [1.0, 3.0]})
    opt.observe({"r": [5.0, 7.0]})
    for group in opt.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, math.nan)
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.metrics()["constraints/r/batch_mean"] == 2


def test_a_state_of_0_1_0_has_no_mean_of_a_batch():
    opt, other = make(l3ms.Constraint("r", max=9.0)), make(l3ms.Constraint("r", max=9.0))
    observe(opt, {"r": [1.0, 3.0]})
    state = opt.state_dict()
    del state["l3m"]["batch_mean"]
    other.load_state_dict(state)
    expected = {key: value for key, value in opt.metrics().items() if "constraints" in key and "batch_mean" not in key}
    assert {key: value for key, value in other.metrics().items() if "constraints" in key} == expected


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


def test_constraints_observed_one_after_the_other_weigh_as_much_as_alone():
    """Each call's weights are a mean over its own responses; S is that of the first call, here 1."""
    opt = make(l3ms.Constraint("q", max=9.0), l3ms.Constraint("r", max=0.1, margin=0.0, scale=1.0))
    opt.observe({"q": [1.0, 2.0, 3.0]})
    weights = opt.observe({"r": [3.0, 4.0]})
    assert opt.estimates.pending is not None
    multiplier = opt.estimates.pending.multiplier[1].item()
    assert multiplier > 1
    assert weights.tolist() == pytest.approx([multiplier / 2, -multiplier / 2])  # lambda (r_other - r_n) / n


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


def test_what_is_used_again_is_not_counted_again():
    opt = make(l3ms.Constraint("r", max=1.0), nonfinite="drop")
    ratios = torch.ones(3, dtype=torch.float64)
    for again in (False, True, True):
        options = {"importance": ratios, "fresh": False} if again else {}
        opt.observe({"r": [0.5, math.nan, 0.1]}, **options)
        opt.step()
    assert opt.metrics()["constraints/r/dropped"] == 1


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


@pytest.mark.parametrize(("lengths", "found"), [([4, -3], -3), ([2.0, math.nan], "nan"), (torch.tensor([1, -1]), -1)])
def test_lengths_that_are_no_numbers_of_tokens_are_refused(lengths, found):
    with pytest.raises(ValueError, match=rf"^observe: lengths\[1\] must be a number of tokens, got {found}"):
        make(l3ms.Constraint("r", max=1.0)).observe({"r": [1.0, 2.0]}, lengths)


def test_barrier_loss_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"among \['r'\], got \['q'\]"):
        make(l3ms.Constraint("r", max=1.0)).barrier_loss({"q": torch.tensor(1.0)})


# ---- what the optimizer refuses ----


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_are_divided_by_the_mean_length_or_by_each_response_s(count):
    """Whatever the number of constraints and of values: three responses of 2, 4 and 9 tokens, one of them without a value."""
    lengths = torch.tensor([2, 4, 9])
    constraints = [l3ms.Constraint(f"r{i}", max=1.0) for i in range(count)]
    values = {f"r{i}": [1.0 + i, 3.0, 5.0 if i else None] for i in range(count)}
    found = {
        norm: observe(make(*constraints, length_norm=norm), values, lengths) for norm in ("none", "mean", "sequence")
    }
    assert found["none"].abs().min() > 0 or count == 1
    torch.testing.assert_close(found["mean"], found["none"] / 5, rtol=1e-6, atol=0)
    torch.testing.assert_close(found["sequence"], found["none"] / lengths, rtol=1e-6, atol=0)


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
        ({"mu": l3ms.ExponentialDecay}, r"mu must be .* such as l3ms.ExponentialDecay\(steps=500\), got <class"),
        ({"mu": lambda step, mu, noise: mu}, "mu must be"),
        ({"solver": l3ms.DualAscent}, r"solver must be one of .*DualAscent\(rate=0.1\), got <class"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be positive or None, got '1'"),
        ({"max_skipped": 0}, "max_skipped must be a whole number of at least 1, got 0"),
        ({"max_skipped": None}, "max_skipped must be"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        make(l3ms.Constraint("r", max=1.0), **options)


def test_the_base_must_be_an_optimizer():
    with pytest.raises(ValueError, match=r"base must be a torch\.optim\.Optimizer, got Tensor"):
        l3ms.L3MOptimizer(torch.zeros(1), [])  # type: ignore[arg-type]
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match="base is an L3MOptimizer already"):
        l3ms.L3MOptimizer(l3ms.L3MOptimizer(plain, []), [])
    climbing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, maximize=True)
    for base in (climbing, [plain, climbing]):
        with pytest.raises(ValueError, match="base must minimise: with maximize=True it would climb"):
            l3ms.L3MOptimizer(base, [])
