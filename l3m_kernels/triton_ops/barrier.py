"""Rewards -> estimates -> multipliers -> one signed weight per sequence, in one launch of one program; the state stays on the device.

Letters: N sequences, R rewards, K one-sided constraints. Every sum and product is float64, in the order of the plain-torch implementation
and none fused, so the bits are those, but for the square root: correctly rounded here, while torch's vectorised one on a CPU is an ulp
off now and then. Rewards are added up row after row; that is the time it takes, some nanoseconds a response.
"""

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3m_kernels.triton_ops import trend
from l3m_kernels.triton_ops.configs import FILTERED, RESPONSES

EPSILON = tl.constexpr(2.0**-52)
SMALLEST = tl.constexpr(2.0**-1022)


@triton.jit
def barrier_multiplier(z, mu, s):
    """lambda = B'(z): mu / slack while the slack -z is at least s, linear in the violation beyond. 1 / s^2 overflows first."""
    return tl.where(z <= -s, mu / -z, (mu / s) * ((z + 2.0 * s) / s))


@triton.jit
def _at_least(x, low):
    """torch's clamp(min=): a NaN stays NaN."""
    return tl.where(x < low, low, x)


@triton.jit
def _pick(values, here, AXIS: tl.constexpr):
    """The one value along AXIS where `here` is true, bit for bit; 0 where none is."""
    bits = tl.where(here, values.to(tl.int64, bitcast=True), 0)
    return tl.sum(bits, AXIS).to(tl.float64, bitcast=True)


@triton.jit
def _average(weight, estimate, squares, dof, spread, count, mean, n, total, total_squares, smoothing_bits):
    """One step of the bias-corrected moving averages."""
    smoothing = tl.full((), smoothing_bits, tl.int64).to(tl.float64, bitcast=True)
    keep = 1.0 - smoothing
    new_weight = keep * weight + smoothing
    rate = smoothing / new_weight
    step = mean - estimate
    single = (count == 1.0) & (weight > 0.0)
    within = tl.where(count > 1.0, _at_least(total_squares - total * mean, 0.0), 0.0)
    within = tl.where(single, step * step * (1.0 - rate), within)
    within_dof = tl.where(single, 1.0, _at_least(count - 1.0, 0.0))
    any_sample = count > 0.0
    return (
        tl.where(any_sample, new_weight, weight),
        tl.where(any_sample, estimate + rate * step, estimate),
        tl.where(any_sample, keep * squares + smoothing * within, squares),
        tl.where(any_sample, keep * dof + smoothing * within_dof, dof),
        tl.where(any_sample, keep * keep * spread + smoothing * smoothing / n, spread),
    )


@triton.jit
def barrier_weights_kernel(
    rewards_ptr,  # (N, R) fp64, NaN where missing
    norm_ptr,  # (N,) fp64
    sums_ptr,  # (R, 3) fp64, or None
    state_ptr,  # (R, COLUMNS) fp64
    index_ptr,  # (K,) int64
    bounds_ptr,  # (K, 6) fp64
    mu_ptr,  # () fp64
    s_ptr,  # () fp64
    smoothing_bits,  # int64, of a moving average: an argument that is a float would be rounded to fp32
    seq_weight_ptr,  # (N,) fp32
    multiplier_ptr,  # (K,) fp64
    total_ptr,  # () fp64
    violation_ptr,  # (K,) fp64
    estimate_ptr,  # (R,) fp64
    stderr_ptr,  # (R,) fp64
    new_state_ptr,  # (R, COLUMNS) fp64
    sequences,
    rewards,
    constraints,
    COLUMNS: tl.constexpr,  # of the state: 5 of a moving average, 23 of a filter
    LEAVE_ONE_OUT: tl.constexpr,
    R: tl.constexpr,  # power of two
    K: tl.constexpr,  # power of two
    BLOCK: tl.constexpr,
):
    r = tl.arange(0, R)
    is_reward = r < rewards
    count = tl.zeros((R,), tl.float64)
    total = tl.zeros((R,), tl.float64)
    squares = tl.zeros((R,), tl.float64)
    if sums_ptr is not None:
        count = tl.load(sums_ptr + 3 * r, mask=is_reward, other=0.0)
        total = tl.load(sums_ptr + 3 * r + 1, mask=is_reward, other=0.0)
        squares = tl.load(sums_ptr + 3 * r + 2, mask=is_reward, other=0.0)
    else:
        row_ptr = rewards_ptr + r
        for _ in tl.range(0, sequences, loop_unroll_factor=8):  # eight loads in flight, added up one after the other
            reward = tl.load(row_ptr, mask=is_reward, other=float("nan"))
            row_ptr += rewards
            present = reward == reward
            reward = tl.where(present, reward, 0.0)
            count += present.to(tl.float64)
            total += reward
            squares += reward * reward

    # The moving averages, or the filters.
    state_ptr += COLUMNS * r
    new_state_ptr += COLUMNS * r
    weight = tl.load(state_ptr, mask=is_reward, other=0.0)
    estimate = tl.load(state_ptr + 1, mask=is_reward, other=0.0)
    spread_squares = tl.load(state_ptr + 2, mask=is_reward, other=0.0)
    dof = tl.load(state_ptr + 3, mask=is_reward, other=0.0)
    spread = tl.load(state_ptr + 4, mask=is_reward, other=0.0)
    n = _at_least(count, 1.0)
    mean = total / n
    if COLUMNS == 5:
        averaged = _average(
            weight, estimate, spread_squares, dof, spread, count, mean, n, total, squares, smoothing_bits
        )
    else:
        averaged = trend.advance(
            state_ptr, new_state_ptr, is_reward, weight, estimate, spread_squares, dof, spread, count, total, squares
        )
    weight, estimate, spread_squares, dof, spread = averaged
    observed = weight > 0.0
    variance = spread_squares / _at_least(dof, tl.full((), SMALLEST, tl.float64))
    stderr = tl.where(observed & (dof > 0.0), tl.sqrt(variance * spread) / weight, float("inf"))
    tl.store(new_state_ptr, weight, mask=is_reward)
    tl.store(new_state_ptr + 1, estimate, mask=is_reward)
    tl.store(new_state_ptr + 2, spread_squares, mask=is_reward)
    tl.store(new_state_ptr + 3, dof, mask=is_reward)
    tl.store(new_state_ptr + 4, spread, mask=is_reward)
    tl.store(estimate_ptr + r, estimate, mask=is_reward)
    tl.store(stderr_ptr + r, stderr, mask=is_reward)

    # The multipliers.
    k = tl.arange(0, K)
    is_constraint = k < constraints
    index = tl.load(index_ptr + k, mask=is_constraint, other=-1)
    sign = tl.load(bounds_ptr + 6 * k, mask=is_constraint, other=1.0)
    bound = tl.load(bounds_ptr + 6 * k + 1, mask=is_constraint, other=0.0)
    scale = tl.load(bounds_ptr + 6 * k + 2, mask=is_constraint, other=1.0)
    margin = tl.load(bounds_ptr + 6 * k + 3, mask=is_constraint, other=0.0)
    margin_stderrs = tl.load(bounds_ptr + 6 * k + 4, mask=is_constraint, other=0.0)
    margin_max = tl.load(bounds_ptr + 6 * k + 5, mask=is_constraint, other=0.0)
    of_reward = index[:, None] == r[None, :]
    noise = _pick(stderr[None, :], of_reward, 1)
    noise = tl.where(tl.abs(noise) == float("inf"), 0.0, noise)
    margin = margin + margin_stderrs * noise
    margin = tl.where((margin != margin) | (margin < margin_max), margin, margin_max)
    seen = _pick(weight[None, :], of_reward, 1) > 0.0
    violation = (sign * (_pick(estimate[None, :], of_reward, 1) - bound) + margin) / scale
    violation = tl.where(seen, violation, float("nan"))
    multiplier = tl.where(seen, barrier_multiplier(violation, tl.load(mu_ptr), tl.load(s_ptr)), 0.0)
    share = tl.full((), 0.0, tl.float64)
    for i in range(constraints):
        share += _pick(multiplier, k == i, 0)
    share = _at_least(share, 1.0)
    tl.store(multiplier_ptr + k, multiplier, mask=is_constraint)
    tl.store(violation_ptr + k, violation, mask=is_constraint)
    tl.store(total_ptr, share)

    # The weights.
    if LEAVE_ONE_OUT:  # r - mean of the others = (r - mean) n / (n - 1)
        baseline = mean
        correction = tl.where(count > 1.0, count / _at_least(count - 1.0, 1.0), 0.0)
    else:
        baseline = estimate
        correction = tl.full((R,), 1.0, tl.float64)
    rounding = count * EPSILON * tl.sqrt(squares / n)
    factor = -(multiplier / share) * sign / scale
    for start in range(0, sequences, BLOCK):
        row = start + tl.arange(0, BLOCK)
        is_row = row < sequences
        seq_weight = tl.zeros((BLOCK,), tl.float64)
        for i in range(constraints):
            column = tl.load(index_ptr + i)
            here = r == column
            is_there = is_row & (column >= 0) & (column < rewards)
            offset = row.to(tl.int64) * rewards + column
            difference = tl.load(rewards_ptr + offset, mask=is_there, other=0.0) - _pick(baseline, here, 0)
            difference = tl.where(tl.abs(difference) > _pick(rounding, here, 0), difference, 0.0)
            advantage = difference * _pick(correction, here, 0) / _at_least(_pick(count, here, 0), 1.0)
            seq_weight += _pick(factor, k == i, 0) * advantage
        norm = tl.load(norm_ptr + row, mask=is_row, other=1.0)
        seq_weight = tl.where(norm == 0.0, 0.0, seq_weight / norm)
        tl.store(seq_weight_ptr + row, seq_weight.to(tl.float32), mask=is_row)


def barrier_weights(
    rewards: Tensor, norm, sums, state, reward_index, bounds, mu, s, smoothing: float | None, leave_one_out: bool
) -> tuple[Tensor, ...]:
    """Arguments and results as in `reference.barrier_weights`; the kernel's signature has their shapes."""
    (sequences, columns), constraints = rewards.shape, len(reward_index)
    inputs = (None if t is None else t.contiguous() for t in (rewards, norm, sums, state, reward_index, bounds))
    results = (
        rewards.new_empty(sequences, dtype=torch.float32),  # seq_weight
        rewards.new_empty(constraints),  # multiplier
        rewards.new_empty(()),  # total
        rewards.new_empty(constraints),  # violation
        rewards.new_empty(columns),  # estimate
        rewards.new_empty(columns),  # stderr
        rewards.new_empty(columns, state.shape[1]),  # state
    )
    smoothing_bits = struct.unpack("q", struct.pack("d", smoothing or 0.0))[0]
    arguments = [*inputs, mu, s, smoothing_bits, *results, sequences, columns, constraints]
    config = RESPONSES if smoothing is not None else FILTERED
    options: dict[str, Any] = {
        "COLUMNS": state.shape[1],
        "LEAVE_ONE_OUT": leave_one_out,
        "R": triton.next_power_of_2(max(columns, 1)),
        "K": triton.next_power_of_2(max(constraints, 1)),
        "BLOCK": config.block,
        "num_warps": config.warps,
        "maxnreg": config.registers,
        "enable_fp_fusion": False,
    }
    with torch.cuda.device_of(rewards):
        barrier_weights_kernel[(1,)](*arguments, **options)
    return results
