"""`barrier_weights`: rewards to moving averages, multipliers and one signed weight per sequence, against loops over Python floats."""

import math

import pytest
import torch
from head_cases import backends_of
from weight_cases import Run, average, column, multiplier, nan, seq_weights, violation

from l3m_kernels import BarrierWeights, Bounds, barrier_weights, initial_state

BACKENDS = backends_of("barrier_weights")
UPPER = Bounds.of([(0, 1.0, 1.0, 1.0, 0.0, 0.0, math.inf)])  # mean reward at most 1
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def play(run: Run, backend: str) -> BarrierWeights:
    state = initial_state(len(run.batches[0][0]))
    for step in range(len(run.batches) - 1):
        before = state.clone()
        state_after = barrier_weights(
            run.tensors(step), state, run.table, run.mu, smoothing=run.smoothing, backend=backend
        ).state
        assert torch.equal(state, before)
        state = state_after
    norm = torch.tensor(run.norm, dtype=torch.float64)
    options = {"smoothing": run.smoothing, "norm": norm, "leave_one_out": run.leave_one_out, "backend": backend}
    return barrier_weights(run.tensors(), state, run.table, run.mu, **options)


def check(run: Run, out: BarrierWeights) -> None:
    """Each stage from the stage before as the op gave it, so that a tolerance is not amplified by a steep barrier."""
    for reward, (estimate, error) in enumerate(zip(out.estimate.tolist(), out.stderr.tolist(), strict=True)):
        wanted = average(run, reward)
        assert estimate == pytest.approx(wanted[0], rel=1e-12, abs=1e-12)
        assert error == pytest.approx(wanted[1], rel=1e-6, abs=1e-6 if math.isfinite(wanted[1]) else None)
    seen = [out.state[row[0], 0].item() > 0 for row in run.bounds]
    for k, row in enumerate(run.bounds):
        z = violation(row, out.estimate[row[0]].item(), out.stderr[row[0]].item()) if seen[k] else nan
        assert out.violation[k].item() == pytest.approx(z, rel=1e-13, abs=1e-13, nan_ok=True)
        lambda_ = multiplier(out.violation[k].item(), run.mu) if seen[k] else 0.0
        assert out.multiplier[k].item() == pytest.approx(lambda_, rel=1e-15)
    assert out.total.item() == pytest.approx(max(1.0, math.fsum(out.multiplier.tolist())), rel=1e-14)
    wanted = seq_weights(run, out.multiplier.tolist(), out.estimate.tolist())
    assert out.seq_weight.dtype == torch.float32
    size = max(map(abs, wanted), default=0.0)
    assert out.seq_weight.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9 * size)


@each_backend
@pytest.mark.parametrize("seed", [*range(300), *(pytest.param(s, marks=pytest.mark.slow) for s in range(1000, 3000))])
def test_against_loops(seed, backend):
    run = Run.random(seed)
    check(run, play(run, backend))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_same_bits_as_the_reference(backend):
    for seed in range(300):
        run = Run.random(seed)
        for field, found, wanted in zip(
            BarrierWeights._fields, play(run, backend), play(run, "reference"), strict=True
        ):
            assert torch.equal(found.nan_to_num(12345.0), wanted.nan_to_num(12345.0)), (seed, field)


# ---- the moving average


@each_backend
@pytest.mark.parametrize("smoothing", [*(i / 100 for i in range(1, 101)), 0.001, 0.013, 1 / 3])
def test_first_estimate_is_the_first_batch_mean(smoothing, backend):
    """Bit for bit: the bias correction is 1, not nearly 1."""
    rewards = column(3, 7, 11, 22, 5, 101, 4)  # sums of whole numbers are exact in any order
    out = barrier_weights(rewards, initial_state(1), UPPER, 0.5, smoothing=smoothing, backend=backend)
    assert out.estimate.item() == 153 / 7
    error = rewards.std().item() / math.sqrt(7)
    assert out.stderr.item() == pytest.approx(error, rel=1e-13)


@each_backend
def test_second_estimate_is_corrected_for_bias(backend):
    state = barrier_weights(column(2, 4), initial_state(1), UPPER, 0.5, smoothing=0.25, backend=backend).state
    out = barrier_weights(column(10, 12, 14), state, UPPER, 0.5, smoothing=0.25, backend=backend)
    assert out.estimate.item() == pytest.approx((0.75 * 0.25 * 3 + 0.25 * 12) / (0.75 * 0.25 + 0.25), rel=1e-15)


@each_backend
def test_smoothing_one_keeps_the_last_batch(backend):
    state = barrier_weights(column(2, 4), initial_state(1), UPPER, 0.5, smoothing=1.0, backend=backend).state
    out = barrier_weights(column(10, 15), state, UPPER, 0.5, smoothing=1.0, backend=backend)
    assert out.estimate.item() == 12.5
    assert out.stderr.item() == pytest.approx(2.5, rel=1e-14)


@each_backend
def test_standard_error_tells_how_far_the_estimate_strays(backend):
    """Over 400 runs of 60 batches of 16, the estimate's distance from the truth is its standard error."""
    generator = torch.Generator().manual_seed(0)
    rewards = 5 + 3 * torch.randn(60, 16, 400, dtype=torch.float64, generator=generator)
    state = initial_state(400)
    for batch in rewards:
        out = barrier_weights(batch, state, Bounds.of([]), 0.5, backend=backend)
        state = out.state
    z = (out.estimate - 5) / out.stderr
    assert z.mean().abs() < 4 / math.sqrt(400)
    assert z.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * 400))


@each_backend
def test_batches_of_one_have_a_standard_error_too(backend):
    generator = torch.Generator().manual_seed(0)
    state = initial_state(400)
    errors = []
    for batch in 5 + 3 * torch.randn(200, 1, 400, dtype=torch.float64, generator=generator):
        out = barrier_weights(batch, state, Bounds.of([]), 0.5, backend=backend)
        state = out.state
        errors.append(out.stderr)
    assert errors[0].isinf().all()
    assert errors[1].isfinite().all()
    z = (out.estimate - 5) / out.stderr
    assert z.std().item() == pytest.approx(1, abs=0.25)


# ---- margins and multipliers


@each_backend
@pytest.mark.parametrize(
    ("margins", "wanted"),
    [((0.0, 0.0, math.inf), 0.0), ((0.5, 0.0, math.inf), 0.5), ((0.5, 2.0, math.inf), 2.5), ((0.5, 2.0, 0.75), 0.75)],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_margin(margins, wanted, sign, backend):
    rewards = column(9, 11)  # mean 10, standard error 1
    bounds = Bounds.of([(0, sign, 8.0, 4.0, *margins)])
    out = barrier_weights(rewards, initial_state(1), bounds, 0.5, backend=backend)
    assert out.violation.item() == pytest.approx((sign * 2 + wanted) / 4, rel=1e-14)


@each_backend
def test_unknown_standard_error_adds_no_margin(backend):
    bounds = Bounds.of([(0, 1.0, 8.0, 1.0, 0.5, 2.0, math.inf)])
    out = barrier_weights(column(10), initial_state(1), bounds, 0.5, backend=backend)
    assert out.stderr.item() == math.inf
    assert out.violation.item() == 2.5


@each_backend
def test_two_bounds_share_an_estimate(backend):
    bounds = Bounds.of([(0, -1.0, 12.0, 14.0, 0.0, 0.0, 0.0), (0, 1.0, 16.0, 14.0, 0.0, 0.0, 0.0)])
    out = barrier_weights(column(12, 18), initial_state(1), bounds, 0.1, backend=backend)
    assert out.violation.tolist() == pytest.approx([-3 / 14, -1 / 14], rel=1e-14)
    assert out.multiplier.tolist() == pytest.approx([0.1 * 14 / 3, 1.4], rel=1e-14)
    assert out.total.item() == pytest.approx(1.4 + 1.4 / 3, rel=1e-14)
    # The upper bound is nearer: the longer response becomes unlikelier.
    pull = (1.4 - 1.4 / 3) / (1.4 + 1.4 / 3) / 14 * 6 / 2
    assert out.seq_weight.tolist() == pytest.approx([pull, -pull], rel=1e-6)


@each_backend
@pytest.mark.parametrize(("mu", "size"), [(1e-6, 1e17), (1e-7, 1e20)])
def test_huge_multipliers(mu, size, backend):
    """Nothing overflows: the weights are those of the constraint that matters, of ordinary size."""
    bounds = Bounds.of([(0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0), (1, 1.0, 5.0, 1.0, 0.0, 0.0, 0.0)])
    rewards = torch.tensor([[0.0, 1.0], [0.2, 3.0]], dtype=torch.float64)
    out = barrier_weights(rewards, initial_state(2), bounds, mu, backend=backend)
    assert out.multiplier[0].item() == pytest.approx(size, rel=1e-6)
    assert out.total.item() == pytest.approx(size, rel=1e-6)
    assert out.multiplier[1].item() == pytest.approx(mu / 3, rel=1e-12)
    assert out.seq_weight.tolist() == pytest.approx([0.1, -0.1], rel=1e-6)


@each_backend
@pytest.mark.parametrize("s", [None, 0.5, 1e-3])
def test_relaxation_is_an_argument(s, backend):
    out = barrier_weights(column(1.1, 1.3), initial_state(1), UPPER, 0.1, s=s, backend=backend)
    s_ = 0.01 if s is None else s
    z = out.violation.item()
    assert z == pytest.approx(0.2, rel=1e-14)
    assert out.multiplier.item() == pytest.approx(0.1 / s_ * (z + 2 * s_) / s_, rel=1e-14)
