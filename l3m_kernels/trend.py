"""The estimate of a moving mean: an interacting-multiple-model filter of level and trend, in plain torch.

A moving average of batch means is behind a policy that moves: by 9 iterations at a smoothing of 0.1, and its standard error does not know.
Three models explain the batch means instead, each a Kalman filter whose noise is the batch's own (variance / n, pooled over the last
batches): the mean is at rest; it moves in a line; it changes its speed. Which one is right is learnt from what each had foretold, as in
Blom and Bar-Shalom, IEEE Trans. Automatic Control 33, 1988. The estimate is the mean of the three, and its variance has what they disagree
by: a policy that may be moving has a wide band until the batches have said.

Everything is relative to the noise of a batch, so units do not matter. Variances are in units of the variance within a batch. The numbers
below were chosen on simulated means (`python bench/estimates.py`): after 60 steps at rest the
band is no wider than that of the moving average (before that by a tenth, since it might be moving), and a mean that moves from the start
by a tenth of a batch's standard error or more at each step is inside it for nine steps in ten.

Only sums, products and quotients in a fixed order: other backends match the bits.
"""

import torch
from torch import Tensor

# Columns of the state of a model: its probability, level, trend (native units a step), and the covariance of the two.
MODEL = ("probability", "level", "trend", "level_variance", "covariance", "trend_variance")
MODELS = 3  # at rest, in a line, changing its speed

PRIOR = (0.85, 0.12, 0.03)  # probabilities before the first batch
TREND_PRIOR = (0.0, 0.02, 1.5)  # variance of the first trend, in units of a batch mean's variance, as the next two
LEVEL_NOISE = (1e-4, 0.0, 0.0)  # what is added to a variance at each step
TREND_NOISE = (0.0, 0.001, 0.08)
# CHANGE[i][j]: the probability that what model i explained so far is explained by model j from now on.
CHANGE = ((0.9937, 0.0035, 0.0028), (0.005, 0.991, 0.004), (0.001, 0.004, 0.995))
POOLING = 0.1  # weight of a new batch in the pooled variance
FREEDOM = 31.0  # degrees of freedom of Student's t, nearly a normal: (FREEDOM + 1) / 2 = 16 is squaring four times
SMALLEST = torch.finfo(torch.float64).tiny
LEAST = 2.0**-40  # of a squared distance: a variance is taken to be so much at least
MOST = 2.0**50  # of what a likelihood falls by: its 16th power is finite


def advance(state: Tensor, sums: Tensor) -> Tensor:
    """One step of the filter: (R, 23) and (R, 3) -> (R, 23); rewards without a sample keep their state.

    The first five columns are those of a moving average, so that all that is made of them is the same: weight (1 once observed), estimate,
    pooled squares and degrees of freedom within a batch, and spread, the estimate's variance in units of theirs.
    """
    count, total, total_squares = sums.unbind(1)
    n = count.clamp(min=1.0)
    mean = total / n
    advanced = torch.where(
        state[:, :1] > 0.0,
        _next(state, count, n, mean, total, total_squares),
        _first(count, n, mean, total, total_squares),
    )
    return torch.where((count > 0.0)[:, None], advanced, state)


def unobserved(state: Tensor, count: Tensor) -> Tensor:
    """One step in which nothing was observed, (R, 23) -> (R, 23): each model foretells, and no batch corrects it.

    The level goes on along its trend, the band widens by what the models allow in a step and by what they disagree about, probabilities
    change as models take over from each other; the variance within a batch stays. `count` (R,) is the size of the batches, whose mean's
    variance is the unit of the steps. A reward that was never observed keeps its state. Plain torch on every device: no kernel has it.
    """
    noise = torch.ones_like(count) / count.clamp(min=1.0)
    _, _, squares, dof, _ = state[:, :5].unbind(1)
    pooled = squares / dof.clamp(min=SMALLEST)
    models = [model.unbind(1) for model in state[:, 5:].reshape(len(state), MODELS, len(MODEL)).unbind(1)]
    foretold = [_foretell(models, model, pooled, noise) for model in range(MODELS)]
    estimate, spread = _mixed(foretold, [model[0] for model in foretold], pooled)
    columns = [torch.ones_like(estimate), estimate, squares, dof, spread]
    for model in foretold:
        columns += model
    return torch.where(state[:, :1] > 0.0, torch.stack(columns, 1), state)


def _within(count: Tensor, mean: Tensor, total: Tensor, total_squares: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares about the batch's mean, and its degrees of freedom."""
    squares = (total_squares - total * mean).clamp(min=0.0)
    return squares.where(count > 1.0, 0.0), (count - 1.0).clamp(min=0.0)


def _first(count: Tensor, n: Tensor, mean: Tensor, total: Tensor, total_squares: Tensor) -> Tensor:
    squares, dof = _within(count, mean, total, total_squares)
    one, zero, noise = torch.ones_like(mean), torch.zeros_like(mean), torch.ones_like(mean) / n
    columns = [one, mean, POOLING * squares, POOLING * dof, noise]
    for model in range(MODELS):
        columns += [one * PRIOR[model], mean, zero, noise, zero, TREND_PRIOR[model] * noise]
    return torch.stack(columns, 1)


def _next(state: Tensor, count: Tensor, n: Tensor, mean: Tensor, total: Tensor, total_squares: Tensor) -> Tensor:
    _, _, squares, dof, _ = state[:, :5].unbind(1)
    models = [model.unbind(1) for model in state[:, 5:].reshape(len(state), MODELS, len(MODEL)).unbind(1)]
    noise = torch.ones_like(n) / n
    foretold = [_foretell(models, model, squares / dof.clamp(min=SMALLEST), noise) for model in range(MODELS)]
    surprise = [mean - level for _, level, *_ in foretold]

    # A batch of one has no spread of its own; how far it is from what was foretold stands in for it.
    within, within_dof = _within(count, mean, total, total_squares)
    single = torch.zeros_like(mean)
    for (probability, _, _, variance, _, _), e in zip(foretold, surprise, strict=True):
        single = single + probability * (e * e / (variance + noise)) * noise
    squares = (1.0 - POOLING) * squares + POOLING * torch.where(count == 1.0, single, within)
    dof = (1.0 - POOLING) * dof + POOLING * torch.where(count == 1.0, 1.0, within_dof)
    pooled = squares / dof.clamp(min=SMALLEST)

    updated = [_update(model, e, pooled, noise) for model, e in zip(foretold, surprise, strict=True)]
    likelihood = updated[0][0] + updated[1][0] + updated[2][0]
    probabilities = [model[0] / likelihood for model in updated]
    estimate, spread = _mixed(updated, probabilities, pooled)
    columns = [torch.ones_like(mean), estimate, squares, dof, spread]
    for probability, (_, *rest) in zip(probabilities, updated, strict=True):
        columns += [probability, *rest]
    return torch.stack(columns, 1)


def _mixed(models: list[tuple[Tensor, ...]], probabilities: list[Tensor], pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Level of all models together, and its variance, in which is what they disagree by."""
    first = models[0][1]
    estimate = first
    for probability, (_, level, *_) in zip(probabilities[1:], models[1:], strict=True):
        estimate = estimate + probability * (level - first)
    spread = torch.zeros_like(first)
    for probability, (_, level, _, variance, _, _) in zip(probabilities, models, strict=True):
        distance = level - estimate
        spread = spread + probability * (variance + _relative(distance * distance, pooled))
    return estimate, spread


def _relative(square: Tensor, variance: Tensor) -> Tensor:
    """square / variance, finite also where a reward is the same in all responses of a batch and yet moves."""
    return square / torch.maximum(variance, LEAST * square).clamp(min=SMALLEST)


def _foretell(models: list[tuple[Tensor, ...]], to: int, pooled: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """What model `to` says of the next batch: the three of now, mixed by how likely each is to have gone over to it, a step on."""
    flows = [CHANGE[origin][to] * models[origin][0] for origin in range(MODELS)]
    probability = flows[0] + flows[1] + flows[2]
    shares = [flow / probability for flow in flows]
    own_level, own_trend = models[to][1], models[to][2]
    level, trend = own_level, own_trend  # moved by differences: where all three agree, they stay what they are
    for share, (_, other_level, other_trend, *_) in zip(shares, models, strict=True):
        level = level + share * (other_level - own_level)
        trend = trend + share * (other_trend - own_trend)
    level_variance = covariance = trend_variance = torch.zeros_like(level)
    for share, (_, other_level, other_trend, *other) in zip(shares, models, strict=True):
        dl, dt = other_level - level, other_trend - trend
        scale = torch.maximum(pooled, LEAST * torch.maximum(dl * dl, dt * dt)).clamp(min=SMALLEST)
        level_variance = level_variance + share * (other[0] + dl * dl / scale)
        covariance = covariance + share * (other[1] + dl * dt / scale)
        trend_variance = trend_variance + share * (other[2] + dt * dt / scale)
    if to == 0:  # at rest
        zero = torch.zeros_like(level)
        return probability, level, zero, level_variance + LEVEL_NOISE[0] * noise, zero, zero
    return (
        probability,
        level + trend,
        trend,
        level_variance + 2.0 * covariance + trend_variance + LEVEL_NOISE[to] * noise,
        covariance + trend_variance,
        trend_variance + TREND_NOISE[to] * noise,
    )


def _update(foretold: tuple[Tensor, ...], e: Tensor, pooled: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """A model after the batch mean was `e` away from what it had foretold; its probability is not normalised yet."""
    probability, level, trend, level_variance, covariance, trend_variance = foretold
    total = level_variance + noise
    gain, trend_gain = level_variance / total, covariance / total
    power = 1.0 + (_relative(e * e, pooled) / (FREEDOM * total)).clamp(max=MOST)
    for _ in range(4):
        power = power * power
    return (
        probability / (_root(total / noise) * power),
        level + gain * e,
        trend + trend_gain * e,
        level_variance - gain * level_variance,
        covariance - gain * covariance,
        trend_variance - trend_gain * covariance,
    )


def _root(x: Tensor) -> Tensor:
    """The square root of x >= 1 by Heron's rule, the same bits everywhere, which those of library functions are not; right up to 1e4."""
    root = 0.5 * (1.0 + x)
    for _ in range(10):
        root = 0.5 * (root + x / root)
    return root
