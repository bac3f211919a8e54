"""What the head's ops return, and what they refuse to be differentiated twice with."""

from typing import NamedTuple

from torch import Tensor


class LogLikelihood(NamedTuple):
    """log pi of each sequence and token; fp32, or fp64 for fp64 inputs."""

    sequence: Tensor  # (N,) sum over the sequence's scored tokens of log pi(token)
    length: Tensor  # (N,) int64, scored tokens
    token: Tensor  # (T,) or (N, L), log pi(token); 0 where not scored


def refuse_double(ctx, *grads):
    """The backward of a gradient."""
    raise RuntimeError(
        "l3m_kernels: log_likelihood and weighted_log_likelihood have no second derivative (double backward); "
        "l3m_kernels.reference.eager_log_likelihood has one, and holds the logits"
    )
