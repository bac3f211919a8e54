"""The barrier's ops: the relaxed logarithmic barrier, its derivative, and the step from rewards to sequence weights.

Letters: N sequences, R rewards, K one-sided constraints. All scalars are float64; mu is a 0-dim tensor or a number, never part of a schema.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from l3m_kernels import reference, trend
from l3m_kernels.backends import name_of, select
from l3m_kernels.reference import BOUNDS, STATE, BarrierWeights
from l3m_kernels.transforms import refuse_transforms, wants_gradient


def relaxed_log_barrier(z: Tensor | float, mu: Tensor | float, s: Tensor | float | None = None) -> Tensor:
    """B(z) = -mu log(-z) if -z >= s, else mu/2 (((z + 2s)/s)^2 - 1) - mu log(s); s defaults to mu^2 (arXiv 2410.21533).

    For display and for convex problems: a loss must not contain B, whose size drowns everything else once violated; backpropagate
    `barrier_multiplier` as a weight instead.

    Args:
        z: any shape, the constraint's value; feasible is z <= 0.
        mu: 0-dim, positive; s: 0-dim, positive.

    Returns:
        float64, z's shape; differentiable (twice) in z.

    Raises:
        ValueError: mu or s is not 0-dim, not positive (seen on a CPU), or requires a gradient.
        RuntimeError: it is differentiated in forward mode or by `torch.func`, or a third time.
    """
    return _relaxed_log_barrier(*_barrier_arguments("relaxed_log_barrier", z, mu, s))


def barrier_multiplier(z: Tensor | float, mu: Tensor | float, s: Tensor | float | None = None) -> Tensor:
    """lambda = B'(z) = mu / -z if -z >= s, else (mu/s) ((z + 2s)/s): arguments, result and errors as `relaxed_log_barrier`."""
    return _barrier_multiplier(*_barrier_arguments("barrier_multiplier", z, mu, s))


class Bounds(NamedTuple):
    """K one-sided constraints on R rewards, as tensors. Built by `Bounds.of`."""

    reward_index: Tensor  # (K,) int64
    table: Tensor  # (K, 6) float64, columns reference.BOUNDS

    @classmethod
    def of(
        cls, rows: Sequence[tuple[int, float, float, float, float, float, float]], device: torch.device | str = "cpu"
    ) -> "Bounds":
        """rows: (reward, sign, bound, scale, margin, margin_stderrs, margin_max); sign +1 is an upper bound, -1 a lower one.

        C = (sign * (estimate - bound) + min(margin + margin_stderrs * stderr, margin_max)) / scale, bound and margins in native units.

        Raises:
            ValueError: a reward that is no index, a sign that is not +-1, a scale that is not positive, a bound that is not finite, a
                negative margin.
        """
        for row in rows:
            reward, sign, bound, scale, *margins = row
            right = (
                isinstance(reward, Integral)
                and reward >= 0
                and sign in (-1, 1)
                and math.isfinite(bound)
                and 0 < scale < math.inf
            )
            if not right or not all(margin >= 0 for margin in margins):
                raise ValueError(
                    f"Bounds.of: wanted reward >= 0, sign +-1, finite bound, 0 < scale < inf, margins >= 0, got {row}"
                )
        index = torch.tensor([row[0] for row in rows], dtype=torch.int64, device=device)
        table = torch.tensor([row[1:] for row in rows], dtype=torch.float64, device=device).reshape(-1, len(BOUNDS))
        return cls(index, table)


Smoothing = float | Literal["trend"]


def initial_state(rewards: int, device: torch.device | str = "cpu", smoothing: Smoothing = 0.1) -> Tensor:
    """(R, 5) float64, the state of moving averages that have seen nothing; (R, 23) of filters where `smoothing` is "trend".

    Raises:
        ValueError: smoothing is neither "trend" nor in (0, 1].
    """
    _check_smoothing("", smoothing)
    return torch.zeros(rewards, _width(smoothing), dtype=torch.float64, device=device)


def _width(smoothing: Smoothing) -> int:
    return len(STATE) + (trend.MODELS * len(trend.MODEL) if smoothing == "trend" else 0)


def barrier_weights(
    rewards: Tensor,
    state: Tensor,
    bounds: Bounds,
    mu: Tensor | float,
    *,
    s: Tensor | float | None = None,
    smoothing: Smoothing = 0.1,
    norm: Tensor | None = None,
    sums: Tensor | None = None,
    leave_one_out: bool = True,
    backend: str | None = None,
) -> BarrierWeights:
    """Rewards -> moving averages -> multipliers -> one signed weight per sequence. No host sync; the state is not modified.

    Args:
        rewards: (N, R) float64, native units, NaN where a response is excluded from a constraint. An infinite one would stay in the
            averages for good: it is refused, on a CPU; on a GPU nothing waits to see.
        state: (R, 5) float64, or (R, 23) with smoothing="trend", from `initial_state` or the previous step.
        bounds: the K constraints.
        mu: 0-dim float64 tensor or number, positive; s: relaxation, default mu^2.
        smoothing: weight of the new batch mean in the moving average, in (0, 1]; or "trend", a filter of level and trend whose estimate is
            one of now and whose standard error has the drift (`l3m_kernels.trend`).
        norm: (N,) length normalisation that divides each weight, 0 gives a weight of 0 (an empty response); None is 1.
        sums: (R, 3) count, sum and sum of squares over all ranks and micro-batches, finite; None: those of `rewards`.
        leave_one_out: baseline is the mean of the other responses; else the moving average.
        backend: "reference", "cpp", ...; None takes the fastest that is available.

    Returns:
        `BarrierWeights`. seq_weight_n = sum_k (lambda_k / S) (b_k - c_k(y_n)) / (n norm_n); 0 for n = 1, for rewards without variance,
        and for excluded responses. A reward with no sample in the batch keeps its state.

    Raises:
        ValueError: a shape or dtype is wrong (named), smoothing, mu or s is out of range, or on a CPU a reward is infinite.
        IndexError: a bound is of a reward that there is not (on a CPU).
        RuntimeError: it is differentiated: the weights are constants.
    """
    op = "barrier_weights"
    refuse_transforms(op, rewards, state, norm, sums, bounds.table)
    mu, s = _constants(op, rewards.device, mu, s)
    tensors = _checked(op, rewards, norm, sums, state, bounds, smoothing)
    return BarrierWeights(*_barrier_weights(*tensors, mu, s, _number(smoothing), leave_one_out, name_of(backend)))


def multiplier_weights(
    rewards: Tensor,
    state: Tensor,
    bounds: Bounds,
    rule: Callable[[Tensor], Tensor],
    *,
    smoothing: Smoothing = 0.1,
    norm: Tensor | None = None,
    sums: Tensor | None = None,
    leave_one_out: bool = True,
) -> BarrierWeights:
    """`barrier_weights` with the multipliers of another method, in plain torch: for solvers to compare the barrier with.

    Args:
        rule: violations C (K,) float64, positive where violated, NaN where nothing has been observed -> multipliers (K,) float64 >= 0.
        rewards, state, bounds, smoothing, norm, sums, leave_one_out: as `barrier_weights`.

    Raises:
        ValueError: a shape or dtype is wrong (named), smoothing is out of range, or on a CPU a reward is infinite.
        IndexError: a bound is of a reward that there is not (on a CPU).
    """
    op = "multiplier_weights"
    tensors = _checked(op, rewards, norm, sums, state, bounds, smoothing)
    _check_values(op, rewards, sums, bounds.reward_index)
    return BarrierWeights(*reference.multiplier_weights(*tensors, rule, _number(smoothing), leave_one_out))


def unobserved(state: Tensor, count: Tensor) -> Tensor:
    """The state of a filter one step later, where the step had no sample and time has passed: its band is wider, see `trend.unobserved`.

    `barrier_weights` leaves the state of a reward without a sample as it is: there a batch of other rewards was observed in its place. A
    moving average knows no time between its batches, and has no such step.

    Args:
        state: (R, 23) float64, of smoothing="trend".
        count: (R,) float64, values in a batch as it is when there is one.

    Raises:
        ValueError: a shape or dtype is wrong (named).
    """
    wanted = {"state": (state, (len(count), _width("trend"))), "count": (count, (len(count),))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.dtype != torch.float64:
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f'unobserved: {name} must be {shape} float64 (of smoothing="trend"), got {got}')
    return trend.unobserved(state, count)


def _check_smoothing(op: str, smoothing: Smoothing) -> None:
    """ValueError where it is neither "trend" nor in (0, 1]."""
    if smoothing != "trend" and (isinstance(smoothing, str) or not 0 < smoothing <= 1):
        raise ValueError(f'{op}smoothing must be in (0, 1], got {smoothing!r}; or "trend"')


def _number(smoothing: Smoothing) -> float | None:
    """As the ops take it."""
    return None if isinstance(smoothing, str) else float(smoothing)


def _checked(
    op: str,
    rewards: Tensor,
    norm: Tensor | None,
    sums: Tensor | None,
    state: Tensor,
    bounds: Bounds,
    smoothing: Smoothing,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """-> the tensors that the op begins with, in its order; the norm is 1 where there is none."""
    if rewards.ndim != 2 or rewards.dtype != torch.float64:
        raise ValueError(f"{op}: rewards must be (N, R) float64, got {tuple(rewards.shape)} {rewards.dtype}")
    count, columns = rewards.shape
    norm = rewards.new_ones(count) if norm is None else norm.double()
    _check_smoothing(f"{op}: ", smoothing)
    index, table = bounds
    tensors = [("norm", norm, (count,)), ("state", state, (columns, _width(smoothing)))]
    tensors.append(("bounds.table", table, (index.numel(), len(BOUNDS))))
    if sums is not None:
        tensors.append(("sums", sums, (columns, 3)))
    if index.ndim != 1 or index.dtype != torch.int64 or index.device != rewards.device:
        got = f"{tuple(index.shape)} {index.dtype} on {index.device}"
        raise ValueError(f"{op}: bounds.reward_index must be (K,) int64 on {rewards.device}, got {got}")
    for name, tensor, wanted in tensors:
        if tensor.shape != wanted or tensor.dtype != torch.float64 or tensor.device != rewards.device:
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{op}: {name} must be {wanted} float64 on {rewards.device}, got {got}")
    return rewards, norm, sums, state, index, table


# ---- the ops ---------------------------------------------------------------------------------------------------------


def _constants(op: str, device: torch.device, mu: Tensor | float, s: Tensor | float | None) -> tuple[Tensor, Tensor]:
    mu = torch.as_tensor(mu, dtype=torch.float64, device=device)
    s = mu * mu if s is None else torch.as_tensor(s, dtype=torch.float64, device=device)
    refuse_transforms(op, mu, s)
    for name, value in (("mu", mu), ("s", s)):
        if value.ndim != 0 or wants_gradient(value):
            raise ValueError(
                f"{op}: {name} must be a 0-dim constant, got shape {tuple(value.shape)}, requires_grad={wants_gradient(value)}"
            )
    return mu, s


def _barrier_arguments(
    op: str, z: Tensor | float, mu: Tensor | float, s: Tensor | float | None
) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.as_tensor(z, dtype=torch.float64)
    refuse_transforms(op, z)
    return z, *_constants(op, z.device, mu, s)


def _check_positive(op: str, mu: Tensor, s: Tensor) -> None:
    """On a CPU only: looking at a value on a GPU stops the stream."""
    for name, value in (("mu", mu), ("s", s)):
        if value.device.type == "cpu" and not 0 < value.item() < float("inf"):
            raise ValueError(f"{op}: {name} must be positive and finite, got {value.item()}")


def _check_values(op: str, rewards: Tensor, sums: Tensor | None, reward_index: Tensor) -> None:
    """On a CPU only, as above: what would end in the state and stay there, and indices."""
    if rewards.device.type != "cpu":
        return
    if bool((infinite := rewards.isinf()).any()):
        row, column = infinite.nonzero()[0].tolist()
        value = rewards[row, column].item()
        raise ValueError(f"{op}: rewards[{row}, {column}] must be finite, or NaN where it is missing, got {value}")
    if sums is not None and not bool(sums.isfinite().all()):
        raise ValueError(f"{op}: sums must be finite, got {sums.tolist()}")
    count = rewards.shape[1]
    outside = (reward_index < 0) | (reward_index >= count)
    if bool(outside.any()):
        k = int(outside.nonzero()[0, 0])
        raise IndexError(f"{op}: bounds.reward_index[{k}] must be in [0, {count}), got {int(reward_index[k])}")


@torch.library.custom_op("l3m_kernels::relaxed_log_barrier", mutates_args=())
def _relaxed_log_barrier(z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    _check_positive("relaxed_log_barrier", mu, s)
    return reference.relaxed_log_barrier(z, mu, s)


@torch.library.custom_op("l3m_kernels::barrier_multiplier", mutates_args=())
def _barrier_multiplier(z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    _check_positive("barrier_multiplier", mu, s)
    return reference.barrier_multiplier(z, mu, s)


@torch.library.custom_op("l3m_kernels::barrier_curvature", mutates_args=())
def _barrier_curvature(z: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    return reference.barrier_curvature(z, mu, s)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _refuse(ctx, grad):
    raise RuntimeError("l3m_kernels::barrier_curvature: the barrier has two derivatives (C2), a third is not supported")


_relaxed_log_barrier.register_autograd(
    lambda ctx, grad: (grad * _barrier_multiplier(*ctx.saved_tensors), None, None), setup_context=_save
)
_barrier_multiplier.register_autograd(
    lambda ctx, grad: (grad * _barrier_curvature(*ctx.saved_tensors), None, None), setup_context=_save
)
_barrier_curvature.register_autograd(_refuse)
for _op in (_relaxed_log_barrier, _barrier_multiplier, _barrier_curvature):
    _op.register_fake(lambda z, mu, s: torch.empty_like(z))


@torch.library.custom_op("l3m_kernels::barrier_weights", mutates_args=())
def _barrier_weights(
    rewards: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    state: Tensor,
    reward_index: Tensor,
    bounds: Tensor,
    mu: Tensor,
    s: Tensor,
    smoothing: float | None,
    leave_one_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_positive("barrier_weights", mu, s)
    _check_values("barrier_weights", rewards, sums, reward_index)
    run = select("barrier_weights", backend, rewards.device.type, index=rewards.device.index)
    return run(rewards, norm, sums, state, reward_index, bounds, mu, s, smoothing, leave_one_out)


@_barrier_weights.register_fake
def _(rewards, norm, sums, state, reward_index, bounds, mu, *_):
    seq_weight = norm.new_empty(norm.shape, dtype=torch.float32)
    per_reward, per_bound = state.new_empty(state.shape[0]), state.new_empty(bounds.shape[0])
    multiplier, violation = torch.empty_like(per_bound), torch.empty_like(per_bound)
    return (
        seq_weight,
        multiplier,
        torch.empty_like(mu),
        violation,
        per_reward,
        torch.empty_like(per_reward),
        state.new_empty(state.shape),
    )
