"""When the constraints are comfortably met, and what is known while nothing is observed."""

import pytest
import torch
from observing import make, step

import l3ms
from l3ms.barrier.leaving_out import COMFORT

BATCH = torch.tensor([9.0, 10.0, 11.0, 10.0, 10.0, 8.0, 12.0, 10.0], dtype=torch.float64)


def after(*constraints, batches=30, shift=0.0, **options):
    opt = make(*constraints, **options)
    for _ in range(batches):
        opt.observe({constraint.name: BATCH + shift for constraint in constraints})
        step(opt)
    return opt


def length(**bounds):
    return l3ms.Constraint("length", scale=1.0, **bounds)


def test_far_inside_is_comfortable_and_near_or_beyond_a_bound_is_not():
    assert after(length(max=20.0)).comfortable()
    assert not after(length(max=10.1)).comfortable(), "met, and within the noise"
    assert not after(length(max=9.0)).comfortable()
    assert not after(length(min=9.9, max=30.0)).comfortable()
    assert after(length(min=0.0, max=30.0)).comfortable()
    assert not make(length(max=20.0)).comfortable(), "nothing is known yet"


@pytest.mark.parametrize(("errors", "comfortable"), [(COMFORT - 0.5, False), (COMFORT + 1.0, True)])
@pytest.mark.parametrize("margin", [0.0, None])
def test_the_margin_is_of_so_many_standard_errors(errors, comfortable, margin):
    seen = after(length(max=20.0)).metrics()
    bound = seen["constraints/length/estimate"] + errors * seen["constraints/length/stderr"]
    assert after(length(max=bound, margin=margin)).comfortable() == comfortable


def test_a_margin_of_ones_own_is_kept_too():
    assert after(length(max=12.0)).comfortable()
    assert not after(length(max=12.0, margin=2.5)).comfortable()


def test_all_constraints_count_and_monitors_do_not():
    both = [length(max=20.0), l3ms.Constraint("other", max=10.1, scale=1.0)]
    assert not after(*both).comfortable()
    assert after(both[0], l3ms.Constraint("other", monitor=True)).comfortable()


def test_asking_changes_nothing():
    asked, plain = after(length(max=20.0)), after(length(max=20.0))
    asked.comfortable()
    assert asked.metrics() == plain.metrics()
    assert torch.equal(asked.estimates.state, plain.estimates.state)


def test_the_band_widens_until_it_is_comfortable_no_more():
    opt = after(length(max=10.8))
    errors = [opt.metrics()["constraints/length/stderr"]]
    assert opt.comfortable()
    while opt.comfortable() and len(errors) < 100:
        opt.leave_out()
        errors.append(opt.metrics()["constraints/length/stderr"])
    assert errors == sorted(errors)
    assert len(set(errors)) == len(errors)
    assert 2 < len(errors) < 100
    opt.observe({"length": BATCH})
    step(opt)
    assert opt.metrics()["constraints/length/stderr"] < errors[-1]
    assert opt.comfortable()


def test_mu_goes_on_with_time():
    opt = after(length(max=20.0), batches=4, mu=l3ms.ExponentialDecay(1.0, 1e-4, steps=10))
    for _ in range(5):
        opt.leave_out()
    opt.observe({"length": BATCH})
    step(opt)
    assert float(opt.mu) == pytest.approx(1e-4)
    assert (opt.constraint_steps, opt.left_out) == (5, 5)


def test_the_noise_floor_is_of_what_is_known():
    opt = after(length(max=20.0), mu="auto")
    before = opt.metrics()["l3m/noise_floor"]
    opt.leave_out()
    assert opt.metrics()["l3m/noise_floor"] > before


def test_the_shifts_rest_while_nothing_pushes():
    opt = after(length(max=10.0), mu="auto")
    before = opt.estimates.integral.shift.clone()
    opt.leave_out()
    assert torch.equal(opt.estimates.integral.shift, before)


def test_a_state_that_was_kept_goes_on_to_the_bit_and_one_of_before_is_read():
    whole, kept = after(length(max=20.0), mu="auto"), after(length(max=20.0), mu="auto")
    for opt in (whole, kept):
        opt.leave_out()
    resumed = make(length(max=20.0), mu="auto")
    resumed.load_state_dict(kept.state_dict())
    for opt in (whole, resumed):
        opt.leave_out()
        opt.observe({"length": BATCH + 1})
        step(opt)
    assert resumed.metrics() == whole.metrics()
    assert torch.equal(resumed.mu, whole.mu)
    assert resumed.left_out == whole.left_out == 2
    old = kept.state_dict()
    for group in old["param_groups"]:
        group["l3m"] = None
    for name in ("counts", "left_out"):
        del old["l3m"][name]
    resumed.load_state_dict(old)
    assert resumed.left_out == 0
    resumed.leave_out()


def test_what_cannot_be_foretold_is_refused():
    with pytest.raises(ValueError, match=r'smoothing must be "trend" where time passes .*, got 0.1'):
        after(length(max=20.0), smoothing="ema").comfortable()
    opt = after(length(max=20.0))
    opt.observe({"length": BATCH})
    with pytest.raises(ValueError, match="something was observed since the last step"):
        opt.leave_out()
