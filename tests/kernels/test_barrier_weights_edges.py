"""`barrier_weights` where there is nothing to learn from, in parts, with wrong arguments, and traced."""

import math

import pytest
import torch
from head_cases import backends_of
from weight_cases import Run, column, nan

from l3m_kernels import Bounds, barrier_weights, initial_state, multiplier_weights, reference
from l3m_kernels.barrier import _barrier_weights

BACKENDS = backends_of("barrier_weights")
UPPER = Bounds.of([(0, 1.0, 1.0, 1.0, 0.0, 0.0, math.inf)])  # mean reward at most 1
each_backend = pytest.mark.parametrize("backend", BACKENDS)


# ---- nothing to learn from: weight 0, not 0/0 and not a rounding error times 1e17


@each_backend
@pytest.mark.parametrize("count", [1, 2, 3, 7, 32, 100, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.7, 1e6 + 0.1, 1e-30])
def test_constant_rewards(value, count, backend):
    bounds = Bounds.of([(0, -1.0, value + 1, 1.0, 0.0, 2.0, math.inf)])
    out = barrier_weights(
        torch.full((count, 1), value, dtype=torch.float64), initial_state(1), bounds, 1e-6, backend=backend
    )
    assert out.multiplier.item() > 1e17
    assert out.seq_weight.tolist() == [0.0] * count
    assert out.estimate.item() == pytest.approx(value, rel=1e-13)


@each_backend
def test_small_differences_are_not_constant(backend):
    rewards = column(1000.0, 1000.0 + 1e-9, 1000.0)
    out = barrier_weights(rewards, initial_state(1), UPPER, 1e-6, backend=backend)
    step = rewards[1].item() - 1000
    assert out.seq_weight.tolist() == pytest.approx([step / 6, -step / 3, step / 6], rel=1e-3)


@each_backend
def test_single_response_with_leave_one_out(backend):
    state = barrier_weights(column(3, 5), initial_state(1), UPPER, 1e-6, backend=backend).state
    out = barrier_weights(column(9), state, UPPER, 1e-6, backend=backend)
    assert out.seq_weight.tolist() == [0.0]
    assert out.estimate.item() != 4


@each_backend
def test_single_response_with_the_average_as_baseline(backend):
    state = barrier_weights(column(3, 5), initial_state(1), UPPER, 1e-6, backend=backend).state
    out = barrier_weights(column(9), state, UPPER, 1e-6, leave_one_out=False, backend=backend)
    assert out.seq_weight.item() == pytest.approx(out.estimate.item() - 9, rel=1e-6)


@each_backend
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_all_missing_keeps_the_state(rows, backend):
    before = barrier_weights(column(3, 5), initial_state(1), UPPER, 0.1, backend=backend)
    out = barrier_weights(torch.full((rows, 1), nan, dtype=torch.float64), before.state, UPPER, 0.1, backend=backend)
    for field in ("state", "estimate", "stderr", "violation", "multiplier", "total"):
        assert torch.equal(getattr(out, field), getattr(before, field)), field
    assert out.seq_weight.tolist() == [0.0] * rows


@each_backend
def test_never_seen(backend):
    out = barrier_weights(column(nan, nan), initial_state(1), UPPER, 0.1, backend=backend)
    assert out.violation.isnan().all()
    assert out.stderr.item() == math.inf
    assert out.multiplier.tolist() == [0.0]
    assert out.total.item() == 1.0
    assert out.seq_weight.tolist() == [0.0, 0.0]
    assert not out.state.any()


@each_backend
def test_missing_rewards_are_left_out(backend):
    """Of one constraint, not of the other."""
    bounds = Bounds.of([(0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0), (1, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)])
    rewards = torch.tensor([[1.0, 5.0], [nan, 7.0], [2.0, nan]], dtype=torch.float64)
    out = barrier_weights(rewards, initial_state(2), bounds, 1.0, backend=backend)
    assert out.estimate.tolist() == [1.5, 6.0]
    a, b = (out.multiplier / out.total).tolist()
    assert out.seq_weight.tolist() == pytest.approx([a / 2 + b, -b, -a / 2], rel=1e-6)


@each_backend
def test_no_constraints(backend):
    out = barrier_weights(column(1, 2), initial_state(1), Bounds.of([]), 0.1, backend=backend)
    assert out.multiplier.shape == (0,)
    assert out.total.item() == 1
    assert out.seq_weight.tolist() == [0, 0]


@each_backend
def test_a_response_of_norm_0_has_no_weight(backend):
    """An empty response under length_norm="sequence": 0/0 would be NaN, and anything else over 0 infinite."""
    rewards, norm = column(3, 5, 9, 4, 3), torch.tensor([2.0, 0.0, 0.0, -0.0, 1.0], dtype=torch.float64)
    empty = norm == 0
    out = barrier_weights(rewards, initial_state(1), UPPER, 0.1, norm=norm, backend=backend)
    plain = barrier_weights(rewards, initial_state(1), UPPER, 0.1, norm=norm.where(~empty, 1.0), backend=backend)
    assert torch.equal(out.seq_weight, plain.seq_weight.where(~empty, 0.0))
    assert out.seq_weight[0] > 0
    none = barrier_weights(column(nan, 7, 7), initial_state(1), UPPER, 0.1, norm=norm[1:4], backend=backend)
    assert none.seq_weight.tolist() == [0.0] * 3


# ---- micro-batches and ranks


@each_backend
def test_micro_batches_equal_one_batch(backend):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 50, (8, 2), generator=generator).double()  # whole numbers: sums are exact in any order
    rewards[3, 1] = nan
    bounds = Bounds.of([(0, 1.0, 20.0, 10.0, 0.0, 2.0, 5.0), (1, -1.0, 30.0, 10.0, 0.0, 2.0, 5.0)])
    state = barrier_weights(rewards + 1, initial_state(2), bounds, 0.1, backend=backend).state
    norm = torch.arange(1, 9, dtype=torch.float64)
    whole = barrier_weights(rewards, state, bounds, 0.1, norm=norm, backend=backend)
    for size in (1, 2, 4):
        parts = rewards.split(size)
        sums = torch.stack([reference.reward_sums(part) for part in parts]).sum(0)
        outs = [
            barrier_weights(part, state, bounds, 0.1, norm=n, sums=sums, backend=backend)
            for part, n in zip(parts, norm.split(size), strict=True)
        ]
        assert torch.equal(torch.cat([out.seq_weight for out in outs]), whole.seq_weight)
        for out in outs:
            assert all(map(torch.equal, out[1:], whole[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.bool])
def test_sums_are_float64_whatever_the_rewards_are(dtype):
    """Lengths of 310 have squares beyond float16."""
    rewards = (torch.arange(64)[:, None] % 50 + 290).to(dtype)
    sums = reference.reward_sums(rewards)
    assert sums.dtype == torch.float64
    assert torch.equal(sums, reference.reward_sums(rewards.double()))


# ---- wrong arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.zeros(2, 1)}, r"rewards must be \(N, R\) float64, got \(2, 1\) torch.float32"),
        ({"rewards": torch.zeros(2, dtype=torch.float64)}, r"rewards must be \(N, R\) float64, got \(2,\)"),
        ({"state": torch.zeros(2, 5, dtype=torch.float64)}, r"state must be \(1, 5\) float64 on cpu, got \(2, 5\)"),
        ({"state": torch.zeros(1, 4, dtype=torch.float64)}, r"state must be \(1, 5\)"),
        ({"state": torch.zeros(1, 5)}, r"state must be \(1, 5\) float64 on cpu, got \(1, 5\) torch.float32"),
        ({"state": torch.zeros(1, 5, dtype=torch.float64, device="meta")}, "state must be .* on cpu, got .* on meta"),
        ({"norm": torch.ones(3)}, r"norm must be \(2,\) float64 on cpu, got \(3,\)"),
        ({"sums": torch.ones(1, 2, dtype=torch.float64)}, r"sums must be \(1, 3\) float64"),
        ({"sums": torch.ones(1, 3)}, r"sums must be \(1, 3\) float64 on cpu, got \(1, 3\) torch.float32"),
        (
            {"sums": torch.full((1, 3), math.inf, dtype=torch.float64)},
            r"sums must be finite, got \[\[inf, inf, inf\]\]",
        ),
        ({"sums": torch.full((1, 3), nan, dtype=torch.float64)}, "sums must be finite, got"),
        ({"rewards": column(1, math.inf)}, r"rewards\[1, 0\] must be finite, or NaN where it is missing, got inf"),
        ({"rewards": column(-math.inf, nan)}, r"rewards\[0, 0\] must be finite, .* got -inf"),
        ({"bounds": UPPER._replace(table=UPPER.table.float())}, r"bounds.table must be \(1, 6\) float64 on cpu, got"),
        ({"bounds": UPPER._replace(table=UPPER.table[:, :5])}, r"bounds.table must be \(1, 6\) float64 on cpu, got"),
        (
            {"bounds": UPPER._replace(reward_index=torch.tensor([0.0]))},
            r"bounds.reward_index must be \(K,\) int64 on cpu",
        ),
        ({"bounds": UPPER._replace(reward_index=torch.tensor(0))}, r"bounds.reward_index must be \(K,\) int64 on cpu"),
        ({"bounds": Bounds(*(t.to("meta") for t in UPPER))}, r"bounds.reward_index must be .* on cpu, got .* on meta"),
        ({"smoothing": 0.0}, r"smoothing must be in \(0, 1\], got 0.0"),
        ({"smoothing": 1.1}, r"smoothing must be in \(0, 1\], got 1.1"),
        ({"smoothing": nan}, r"smoothing must be in \(0, 1\], got nan"),
        ({"mu": 0.0}, "mu must be positive and finite, got 0.0"),
        ({"mu": -1.0}, "mu must be positive and finite, got -1.0"),
        ({"mu": nan}, "mu must be positive and finite, got nan"),
        ({"mu": torch.ones(1, dtype=torch.float64)}, "mu must be a 0-dim constant"),
        ({"s": 0.0}, "s must be positive and finite, got 0.0"),
    ],
)
def test_wrong_argument_is_named(change, message):
    good = {"rewards": column(1, 2), "state": initial_state(1), "bounds": UPPER, "mu": 0.1}
    barrier_weights(**good)
    with pytest.raises(ValueError, match=f"^barrier_weights: {message}"):
        barrier_weights(**good | change)


@each_backend
@pytest.mark.parametrize("index", [-1, 1])
def test_a_bound_of_a_reward_that_there_is_not(index, backend):
    bounds = UPPER._replace(reward_index=torch.tensor([index]))
    with pytest.raises(IndexError, match=rf"reward_index\[0\] must be in \[0, 1\), got {index}"):
        barrier_weights(column(1, 2), initial_state(1), bounds, 0.1, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": column(1, math.inf)}, ValueError, r"rewards\[1, 0\] must be finite"),
        ({"bounds": UPPER._replace(reward_index=torch.tensor([-1]))}, IndexError, r"bounds.reward_index\[0\]"),
    ],
)
def test_other_solvers_refuse_them_too(change, error, message):
    arguments = {"rewards": column(1, 2), "state": initial_state(1), "bounds": UPPER, "rule": torch.relu} | change
    with pytest.raises(error, match=f"^multiplier_weights: {message}"):
        multiplier_weights(**arguments)


@pytest.mark.parametrize(
    "row",
    [
        (0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0),
        (0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0),
        (0, 1.0, nan, 1.0, 0.0, 0.0, 0.0),
        (0, 1.0, math.inf, 1.0, 0.0, 0.0, 0.0),
        (0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
        (0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0),
        (0, 1.0, 1.0, nan, 0.0, 0.0, 0.0),
        (0, 1.0, 1.0, 1.0, -0.1, 0.0, 0.0),
        (0, 1.0, 1.0, 1.0, 0.0, -2.0, 0.0),
        (0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0),
        (0, 1.0, 1.0, 1.0, nan, 0.0, 0.0),
        (0, 1.0, 1.0, math.inf, 0.0, 0.0, 0.0),
        (0, 1.0, 1.0, 1.0, 0.0, nan, 0.0),
        (0, 1.0, 1.0, 1.0, 0.0, 0.0, nan),
        (-1, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0),
        (0.9, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0),
    ],
)
def test_wrong_bounds_are_refused(row):
    with pytest.raises(ValueError, match=r"^Bounds.of: wanted reward >= 0, sign \+-1, finite bound"):
        Bounds.of([row])


# ---- torch.library


def op_arguments(run: Run, with_sums: bool, backend: str) -> tuple:
    rewards, bounds = run.tensors(), run.table
    sums = reference.reward_sums(rewards) if with_sums else None
    norm, mu = torch.tensor(run.norm, dtype=torch.float64), torch.tensor(run.mu, dtype=torch.float64)
    fixed = (mu, mu * mu, run.smoothing, run.leave_one_out, backend)
    return (rewards, norm, sums, initial_state(rewards.shape[1]), bounds.reward_index, bounds.table, *fixed)


@each_backend
@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(s, marks=pytest.mark.slow) for s in (*range(10, 40), *range(1000, 1500)))]
)
def test_opcheck(seed, backend):
    arguments = op_arguments(Run.random(seed), seed % 2 == 0, backend)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not _barrier_weights(*arguments)[3].isnan().any():  # the traced output is compared with NaN != NaN
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(_barrier_weights, arguments, test_utils=tests)


@each_backend
def test_opcheck_strided(backend):
    rewards, norm, sums, state, *rest = op_arguments(Run.random(0), True, backend)
    strided = (rewards.mT.contiguous().mT, norm.repeat(2)[::2], sums.mT.contiguous().mT, state.mT.contiguous().mT)
    torch.library.opcheck(_barrier_weights, (*strided, *rest))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native part is not built")
def test_opcheck_of_the_native_op():
    """Its schema holds; fakes and autograd are those of the op that calls it."""
    run = Run.random(3)
    bounds, mu = run.table, torch.tensor(run.mu, dtype=torch.float64)
    arguments = (
        run.tensors(),
        torch.tensor(run.norm, dtype=torch.float64),
        None,
        initial_state(len(run.batches[-1][0])),
    )
    settings = (bounds.reward_index, bounds.table, mu, mu * mu, run.smoothing, run.leave_one_out)
    torch.library.opcheck(
        torch.ops.l3m_kernels.cpp_barrier_weights.default, (*arguments, *settings), test_utils=("test_schema",)
    )


def test_compiles():
    """fullgraph: nothing looks at a value on the way."""
    compiled = torch.compile(
        lambda rewards, state, mu: barrier_weights(rewards, state, UPPER, mu), fullgraph=True, backend="aot_eager"
    )
    arguments = (column(0.5, 2.5, 1.0), initial_state(1), torch.tensor(0.1, dtype=torch.float64))
    plain = barrier_weights(arguments[0], arguments[1], UPPER, arguments[2])
    assert all(map(torch.equal, compiled(*arguments), plain))
