"""The method in plain torch, as the paper writes it: the oracle in float64 that every kernel is tested against.

Letters: T tokens, N sequences, D hidden size, V vocabulary, R rewards, K one-sided constraints. Three parts:

* the head, materialised: log pi(y_t | x, y_<t) = z[t, y_t] - logsumexp(z[t]) with z = softcap(hidden @ weight.T + bias) / temperature
  (`chunked.py` has the same without the (T, V) logits);
* the relaxed logarithmic barrier: -mu log(-z) while the slack -z is at least s = mu^2, and beyond it the parabola that
  continues it with the same value, slope and curvature, so that an infeasible iterate still has a finite gradient (arXiv 2410.21533);
* `barrier_weights`: rewards -> estimates -> multipliers -> one signed weight per sequence (REINFORCE), all in float64.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_kernels import trend


def eager_log_likelihood(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (T,) int64
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """(T,) log pi(target), 0 where not scored. Differentiable, holds the (T, V) logits: the baseline, and in float64 the oracle."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = F.log_softmax(logits / temperature, dim=-1)
    scored = targets != ignore_index
    token = log_probabilities.gather(-1, targets.where(scored, 0)[:, None])[:, 0]
    return token.where(scored, 0)


def relaxed_log_barrier(z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    """B(z), float64 in and out."""
    inside = z <= -s
    slack = torch.where(inside, -z, s)  # keeps the branch not taken finite
    beyond = mu / 2 * (((z + 2 * s) / s) ** 2 - 1) - mu * torch.log(s)
    return torch.where(inside, -mu * torch.log(slack), beyond)


def barrier_multiplier(z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    """lambda = B'(z): mu / slack inside, linear in the violation beyond. Products kept apart: 1 / s^2 overflows first."""
    inside = z <= -s
    slack = torch.where(inside, -z, s)
    return torch.where(inside, mu / slack, (mu / s) * ((z + 2 * s) / s))


def barrier_curvature(z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    """B''(z)."""
    inside = z <= -s
    slack = torch.where(inside, -z, s)
    return mu / slack / slack


class BarrierWeights(NamedTuple):
    """What one constraint step needs; everything float64 except the weights, which go to the loss."""

    seq_weight: Tensor  # (N,) fp32, positive: make this response likelier
    multiplier: Tensor  # (K,) lambda_k
    total: Tensor  # () S = max(1, sum_k lambda_k); the gradient is formed with lambda / S
    violation: Tensor  # (K,) C_k, scaled, margin included; <= 0 is feasible, NaN while the reward was never observed
    estimate: Tensor  # (R,) native units
    stderr: Tensor  # (R,) of the estimate, native units; inf while unknown
    state: Tensor  # (R, 5) the moving averages after this batch, (R, 23) the filter


# Columns of the state of a reward's moving average. `estimate` is the bias-corrected mean itself: with rate = smoothing / weight the
# first update is exactly the first batch mean. squares / dof is the variance within a batch; spread is the sum of squared weights over n.
STATE = ("weight", "estimate", "squares", "dof", "spread")

# Columns of the table of one-sided constraints: C = (sign * (estimate - bound) + margin) / scale, where the margin is
# min(margin + margin_stderrs * stderr, margin_max) in native units and sign is +1 for an upper bound, -1 for a lower one.
BOUNDS = ("sign", "bound", "scale", "margin", "margin_stderrs", "margin_max")


EPSILON = torch.finfo(torch.float64).eps


def reward_sums(rewards: Tensor) -> Tensor:
    """rewards (N, R), NaN where missing -> (R, 3) float64: count, sum, sum of squares, added up in the order of the rows.

    Sums over micro-batches and over ranks are sums of these. The order is fixed (cumsum) so that other backends can match the bits.
    """
    rewards = rewards.double()  # sums of 16-bit numbers overflow, and squares of fp32 ones lose the variance
    present = ~rewards.isnan()
    values = rewards.where(present, 0.0)
    if not len(rewards):
        return rewards.new_zeros(rewards.shape[1], 3)
    return torch.stack([present.double(), values, values * values], dim=-1).cumsum(0)[-1]


def _advance(state: Tensor, sums: Tensor, smoothing: float) -> Tensor:
    """One step of the bias-corrected moving averages, (R, 5) and (R, 3) -> (R, 5); rewards without a sample keep their state."""
    weight, estimate, squares, dof, spread = state.unbind(1)
    count, total, total_squares = sums.unbind(1)
    keep = 1.0 - smoothing
    n = count.clamp(min=1.0)
    mean = total / n
    new_weight = keep * weight + smoothing
    # `number / tensor` is reciprocal * number in torch; one true division makes the first rate exactly 1.
    rate = torch.full_like(new_weight, smoothing) / new_weight
    step = mean - estimate
    within = (total_squares - total * mean).clamp(min=0.0)
    within_dof = count - 1.0
    # A batch of one has no spread of its own; the distance to the average so far stands in for it.
    single = (count == 1.0) & (weight > 0.0)
    within = torch.where(single, step * step * (1.0 - rate), within.where(count > 1.0, 0.0))
    within_dof = torch.where(single, 1.0, within_dof.clamp(min=0.0))
    advanced = torch.stack(
        [
            new_weight,
            estimate + rate * step,
            keep * squares + smoothing * within,
            keep * dof + smoothing * within_dof,
            keep * keep * spread + torch.full_like(n, smoothing * smoothing) / n,
        ],
        dim=1,
    )
    return torch.where((count > 0.0)[:, None], advanced, state)


def barrier_weights(rewards, norm, sums, state, reward_index, bounds, mu: Tensor, s: Tensor, smoothing, leave_one_out):
    """`multiplier_weights` with the multipliers of the relaxed barrier; mu and s are () float64."""
    rule = partial(barrier_multiplier, mu=mu, s=s)
    return multiplier_weights(rewards, norm, sums, state, reward_index, bounds, rule, smoothing, leave_one_out)


def multiplier_weights(
    rewards: Tensor,  # (N, R) float64, NaN where a response is excluded from a constraint
    norm: Tensor,  # (N,) float64, length normalisation of each response; 0 gives it the weight 0
    sums: Tensor | None,  # (R, 3) float64 over all ranks and micro-batches; None: those of `rewards`
    state: Tensor,  # (R, 5) float64, see STATE; (R, 23) of the filter, see `trend`
    reward_index: Tensor,  # (K,) int64, the reward that each constraint bounds
    bounds: Tensor,  # (K, 6) float64, see BOUNDS
    rule: Callable[[Tensor], Tensor],  # violations (K,) float64, positive where violated -> multipliers (K,) >= 0
    smoothing: float | None,  # weight of a new batch in the moving average; None: the filter of level and trend
    leave_one_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the fields of `BarrierWeights`, for multipliers of any solver. The only place where rewards become weights.

    grad C_k = E[(c_k(y) - b_k) grad log pi(y)] and c_k is affine in the reward, so with n responses
    seq_weight_n = sum_k (lambda_k / S) * -sign_k / scale_k * (r_n - baseline) / (n * norm_n).
    Products and sums over K are in this order, one at a time: other backends match the bits.
    """
    if sums is None:
        sums = reward_sums(rewards)
    state = trend.advance(state, sums) if smoothing is None else _advance(state, sums, smoothing)
    weight, estimate, squares, dof, spread = state[:, : len(STATE)].unbind(1)
    observed = weight > 0.0
    variance = squares / dof.clamp(min=torch.finfo(torch.float64).tiny)
    stderr = torch.sqrt(variance * spread) / weight
    stderr = torch.where(observed & (dof > 0.0), stderr, torch.inf)

    sign, bound, scale, margin, margin_stderrs, margin_max = bounds.unbind(1)
    noise = stderr[reward_index]
    margin = torch.minimum(margin + margin_stderrs * torch.where(noise.isinf(), 0.0, noise), margin_max)
    violation = (sign * (estimate[reward_index] - bound) + margin) / scale
    seen = observed[reward_index]
    violation = torch.where(seen, violation, torch.nan)
    multiplier = torch.where(seen, rule(violation), 0.0)
    total = multiplier.new_zeros(())
    for k in range(len(bounds)):
        total = total + multiplier[k]
    total = total.clamp(min=1.0)

    count, reward_sum, total_squares = sums.unbind(1)
    mean = reward_sum / count.clamp(min=1.0)
    # r - mean of the others = (r - mean) n / (n - 1); without leave-one-out the moving average is the baseline.
    baseline = mean if leave_one_out else estimate
    correction = (
        torch.where(count > 1.0, count / (count - 1.0).clamp(min=1.0), 0.0) if leave_one_out else torch.ones_like(count)
    )
    difference = rewards - baseline
    # A constant reward teaches nothing. Its rounding error must not: lambda up to 1e17 would make a step of it.
    rounding = count * EPSILON * torch.sqrt(total_squares / count.clamp(min=1.0))
    difference = torch.where(difference.abs() > rounding, difference, 0.0)  # NaN (missing) compares false
    advantage = difference * correction / count.clamp(min=1.0)
    seq_weight = torch.zeros_like(norm)
    for k in range(len(bounds)):
        factor = -(multiplier[k] / total) * sign[k] / scale[k]
        seq_weight = seq_weight + factor * advantage[:, reward_index[k]]
    # An empty response has no token to make likelier.
    seq_weight = torch.where(norm == 0, 0.0, seq_weight / norm).float()
    return seq_weight, multiplier, total, violation, estimate.clone(), stderr, state
