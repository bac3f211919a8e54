"""The filter of level and trend, as `l3m_kernels.trend` has it, on vectors of rewards: every sum and product in its order, none fused.

A model is a tuple of its probability, level, trend, level variance, covariance and trend variance, each (R,) float64.
"""

import triton
import triton.language as tl

# Of the models at rest, in a line, and changing its speed, as in the reference.
PRIOR, TREND_PRIOR = tl.constexpr((0.85, 0.12, 0.03)), tl.constexpr((0.0, 0.02, 1.5))
LEVEL_NOISE, TREND_NOISE = tl.constexpr((1e-4, 0.0, 0.0)), tl.constexpr((0.0, 0.001, 0.08))
CHANGE_0 = tl.constexpr((0.9937, 0.0035, 0.0028))
CHANGE_1 = tl.constexpr((0.005, 0.991, 0.004))
CHANGE_2 = tl.constexpr((0.001, 0.004, 0.995))
POOLING, FREEDOM = tl.constexpr(0.1), tl.constexpr(31.0)
LEAST, MOST, SMALLEST = tl.constexpr(2.0**-40), tl.constexpr(2.0**50), tl.constexpr(2.0**-1022)


@triton.jit
def _double(x: tl.constexpr):
    """Not rounded to fp32 on the way."""
    return tl.full((), x, tl.float64)


@triton.jit
def _larger(a, b):
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def _at_least(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def _relative(square, variance):
    return square / _at_least(_larger(variance, _double(LEAST) * square), _double(SMALLEST))


@triton.jit
def _heron_root(x):
    root = 0.5 * (1.0 + x)
    for _ in range(10):
        root = 0.5 * (root + x / root)
    return root


@triton.jit
def _spread(share, model, level, trend, pooled, level_variance, covariance, trend_variance):
    """The variances of a mixture with one more model in it."""
    dl, dt = model[1] - level, model[2] - trend
    scale = _at_least(_larger(pooled, _double(LEAST) * _larger(dl * dl, dt * dt)), _double(SMALLEST))
    level_variance = level_variance + share * (model[3] + dl * dl / scale)
    covariance = covariance + share * (model[4] + dl * dt / scale)
    trend_variance = trend_variance + share * (model[5] + dt * dt / scale)
    return level_variance, covariance, trend_variance


@triton.jit
def _foretell(m0, m1, m2, own, pooled, noise, TO: tl.constexpr):
    """What model TO, which is `own`, says of the next batch."""
    f0, f1, f2 = _double(CHANGE_0[TO]) * m0[0], _double(CHANGE_1[TO]) * m1[0], _double(CHANGE_2[TO]) * m2[0]
    probability = f0 + f1 + f2
    s0, s1, s2 = f0 / probability, f1 / probability, f2 / probability
    level = own[1] + s0 * (m0[1] - own[1]) + s1 * (m1[1] - own[1]) + s2 * (m2[1] - own[1])
    trend = own[2] + s0 * (m0[2] - own[2]) + s1 * (m1[2] - own[2]) + s2 * (m2[2] - own[2])
    zero = tl.zeros_like(level)
    variances = _spread(s0, m0, level, trend, pooled, zero, zero, zero)
    variances = _spread(s1, m1, level, trend, pooled, variances[0], variances[1], variances[2])
    variances = _spread(s2, m2, level, trend, pooled, variances[0], variances[1], variances[2])
    level_variance, covariance, trend_variance = variances
    if TO == 0:
        return probability, level, zero, level_variance + _double(LEVEL_NOISE[0]) * noise, zero, zero
    return (
        probability,
        level + trend,
        trend,
        level_variance + 2.0 * covariance + trend_variance + _double(LEVEL_NOISE[TO]) * noise,
        covariance + trend_variance,
        trend_variance + _double(TREND_NOISE[TO]) * noise,
    )


@triton.jit
def _update(model, mean, pooled, noise):
    """A model after the batch's mean; its probability is not normalised yet."""
    probability, level, trend, level_variance, covariance, trend_variance = model
    e = mean - level
    total = level_variance + noise
    gain, trend_gain = level_variance / total, covariance / total
    fall = _relative(e * e, pooled) / (_double(FREEDOM) * total)
    power = 1.0 + tl.where(fall > MOST, _double(MOST), fall)
    for _ in range(4):
        power = power * power
    return (
        probability / (_heron_root(total / noise) * power),
        level + gain * e,
        trend + trend_gain * e,
        level_variance - gain * level_variance,
        covariance - gain * covariance,
        trend_variance - trend_gain * covariance,
    )


@triton.jit
def _single(model, mean, noise):
    e = mean - model[1]
    return model[0] * (e * e / (model[3] + noise)) * noise


@triton.jit
def _load(state_ptr, mask, FIRST: tl.constexpr):
    return (
        tl.load(state_ptr + FIRST, mask=mask, other=0.0),
        tl.load(state_ptr + FIRST + 1, mask=mask, other=0.0),
        tl.load(state_ptr + FIRST + 2, mask=mask, other=0.0),
        tl.load(state_ptr + FIRST + 3, mask=mask, other=0.0),
        tl.load(state_ptr + FIRST + 4, mask=mask, other=0.0),
        tl.load(state_ptr + FIRST + 5, mask=mask, other=0.0),
    )


@triton.jit
def _store(new_state_ptr, mask, old, new, first, seen, sampled, probability, mean, noise, MODEL: tl.constexpr):
    """What model MODEL is after the step, `new` with its probability normalised; after the first batch; or without a sample."""
    zero = tl.zeros_like(mean)
    begun = (zero + _double(PRIOR[MODEL]), mean, zero, noise, zero, _double(TREND_PRIOR[MODEL]) * noise)
    stepped = (probability, new[1], new[2], new[3], new[4], new[5])
    for i in tl.static_range(6):
        value = tl.where(sampled, tl.where(seen, stepped[i], begun[i]), old[i])
        tl.store(new_state_ptr + first + i, value, mask=mask)


@triton.jit
def advance(state_ptr, new_state_ptr, mask, weight, estimate, squares, dof, spread, count, total, total_squares):
    """One step; `state_ptr` (R,) are the rows, their first five columns are given. Stores the models, returns the five."""
    seen, sampled = weight > 0.0, count > 0.0
    n = _at_least(count, 1.0)
    mean = total / n
    noise = 1.0 / n
    within = tl.where(count > 1.0, _at_least(total_squares - total * mean, 0.0), 0.0)
    within_dof = _at_least(count - 1.0, 0.0)
    m0, m1, m2 = _load(state_ptr, mask, 5), _load(state_ptr, mask, 11), _load(state_ptr, mask, 17)

    before = squares / _at_least(dof, _double(SMALLEST))
    a0 = _foretell(m0, m1, m2, m0, before, noise, 0)
    a1 = _foretell(m0, m1, m2, m1, before, noise, 1)
    a2 = _foretell(m0, m1, m2, m2, before, noise, 2)
    single = _single(a0, mean, noise) + _single(a1, mean, noise) + _single(a2, mean, noise)
    alone = seen & (count == 1.0)
    within = tl.where(alone, single, within)
    within_dof = tl.where(alone, 1.0, within_dof)
    kept = tl.where(seen, 1.0 - _double(POOLING), 0.0)
    new_squares = kept * squares + _double(POOLING) * within
    new_dof = kept * dof + _double(POOLING) * within_dof
    pooled = new_squares / _at_least(new_dof, _double(SMALLEST))

    b0, b1, b2 = _update(a0, mean, pooled, noise), _update(a1, mean, pooled, noise), _update(a2, mean, pooled, noise)
    likelihood = b0[0] + b1[0] + b2[0]
    p0, p1, p2 = b0[0] / likelihood, b1[0] / likelihood, b2[0] / likelihood
    level = b0[1] + p1 * (b1[1] - b0[1]) + p2 * (b2[1] - b0[1])
    d0, d1, d2 = b0[1] - level, b1[1] - level, b2[1] - level
    variance = p0 * (b0[3] + _relative(d0 * d0, pooled)) + p1 * (b1[3] + _relative(d1 * d1, pooled))
    variance = variance + p2 * (b2[3] + _relative(d2 * d2, pooled))

    _store(new_state_ptr, mask, m0, b0, 5, seen, sampled, p0, mean, noise, 0)
    _store(new_state_ptr, mask, m1, b1, 11, seen, sampled, p1, mean, noise, 1)
    _store(new_state_ptr, mask, m2, b2, 17, seen, sampled, p2, mean, noise, 2)
    return (
        tl.where(sampled, 1.0, weight),
        tl.where(sampled, tl.where(seen, level, mean), estimate),
        tl.where(sampled, new_squares, squares),
        tl.where(sampled, new_dof, dof),
        tl.where(sampled, tl.where(seen, variance, noise), spread),
    )
