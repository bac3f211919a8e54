"""Responses of another distribution than the policy: ratios of probabilities rho = pi(y) / q(y), and what they make.

q is what a response was drawn from: the policy some steps ago (a rollout that is used again), or what an engine computes. For all f,
E_pi[f] = E_q[rho f]: with the ratio of the whole response the gradient of the constraints, E_pi[(c - b) grad log pi], is unbiased again.
The ratios are plain, not divided by their mean: that mean is one factor on all weights of a half-step, which clipping takes out where it
matters, and dividing by it would cost a bias of order 1 / n and tie every weight to the other ranks. They are cut at TRUNCATION, which
bounds what a single response may do (variance) and is the one bias there is: P_q(rho > TRUNCATION) weighs for less than it should.

Baselines are means of the *other* responses, independent of a response and so without bias whatever q is. The mean itself is estimated by
b + rho (r - b), b the mean of the others again: unbiased as rho r is, and without the noise that rho has where r is far from 0.
"""

import torch
from torch import Tensor

from l3m_kernels import reward_sums

TRUNCATION = 2.0  # a response that has become twice as likely weighs no more than that
LEAST_SHARE = 0.5  # of the responses, the effective sample size below which a rollout is not used again


def truncated(log_ratio: Tensor) -> Tensor:
    """(n,) float64 min(exp, TRUNCATION) of (n,) log pi(y) - log q(y)."""
    return log_ratio.double().exp().clamp(max=TRUNCATION)


def power_sums(log_ratio: Tensor) -> Tensor:
    """(3,) float64 of (n,): how many ratios, their sum, the sum of their squares; of ranks these add up."""
    ratio = log_ratio.double().exp()
    return torch.stack([torch.ones_like(ratio).sum(), ratio.sum(), ratio.square().sum()])


def effective_share(sums: Tensor) -> float:
    """(sum rho)^2 / (n sum rho^2), of `power_sums`: of n responses so many count (Kong, Liu and Wong, 1994). Not truncated: it is to warn.

    0 where no ratio is finite, or none is left.
    """
    count, total, squares = sums.tolist()
    share = total * total / (count * squares) if squares > 0 and count else 0.0
    return share if 0 <= share < float("inf") else 0.0


def counted_sums(rewards: Tensor, importance: Tensor, sums: Tensor) -> Tensor:
    """(R, 3) sums of what the mean of the policy is estimated by, of (n, R) rewards, their (n,) ratios and their own sums of all ranks."""
    count, total, _ = sums.unbind(1)
    others = torch.where(count > 1, (total - rewards) / (count - 1).clamp(min=1), 0.0)
    return reward_sums(others + importance[:, None] * (rewards - others))


def check_importance(importance: Tensor, count: int, device: torch.device) -> Tensor:
    """(n,) float64 on the device; ValueError where it is something else than n finite ratios >= 0."""
    if importance.shape != (count,):
        raise ValueError(f"observe: importance must be ({count},), one per response, got {tuple(importance.shape)}")
    importance = importance.detach().to(device, torch.float64)
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise ValueError("observe: importance must be ratios of probabilities, finite and at least 0")
    return importance
