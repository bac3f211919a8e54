"""Fused kernels for constrained fine-tuning of language models (L3Ms): tensors in, tensors out.

`python -m l3m_kernels` says what runs on this machine.
"""

from l3m_kernels import parallel
from l3m_kernels.backends import backends, release_workspace, set_workspace
from l3m_kernels.barrier import (
    Bounds,
    barrier_multiplier,
    barrier_weights,
    initial_state,
    multiplier_weights,
    relaxed_log_barrier,
    unobserved,
)
from l3m_kernels.device_flags import check_targets
from l3m_kernels.ops import LogLikelihood, log_likelihood, weighted_log_likelihood
from l3m_kernels.reference import BarrierWeights, reward_sums

__version__ = "0.2.0.dev0"

__all__ = [
    "BarrierWeights",
    "Bounds",
    "LogLikelihood",
    "backends",
    "barrier_multiplier",
    "barrier_weights",
    "check_targets",
    "initial_state",
    "log_likelihood",
    "multiplier_weights",
    "parallel",
    "relaxed_log_barrier",
    "release_workspace",
    "reward_sums",
    "set_workspace",
    "unobserved",
    "weighted_log_likelihood",
]
