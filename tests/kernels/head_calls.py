"""Either head op called the same way, and a small batch to call it with."""

import pytest
import torch
from head_cases import BOTH
from torch import Tensor

from l3m_kernels import LogLikelihood, log_likelihood, weighted_log_likelihood

both = pytest.mark.parametrize(("op", "backend"), BOTH)


def call(op, hidden, weight, targets, cu_seqlens=None, seq_weight=None, **options) -> LogLikelihood:
    if op == "log_likelihood":
        return log_likelihood(hidden, weight, targets, cu_seqlens, **options)
    if seq_weight is None:
        seq_weight = torch.ones(len(targets) if cu_seqlens is None else len(cu_seqlens) - 1)
    return weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, **options)[1]


def loss_of(op, hidden, weight, targets, cu_seqlens, seq_weight, **options) -> Tensor:
    """-sum of seq_weight * log-likelihood by either op."""
    if op == "log_likelihood":
        return -(log_likelihood(hidden, weight, targets, cu_seqlens, **options).sequence * seq_weight).sum()
    return weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, **options)[0]


def batch(tokens=6, width=4, vocabulary=7, dtype=torch.float32) -> dict[str, Tensor]:
    """Arguments for `call`, two sequences."""
    generator = torch.Generator().manual_seed(tokens)
    return {
        "hidden": torch.randn(tokens, width, generator=generator).to(dtype),
        "weight": torch.randn(vocabulary, width, generator=generator).to(dtype),
        "targets": torch.randint(vocabulary, (tokens,), generator=generator),
        "cu_seqlens": torch.tensor([0, tokens // 3, tokens]),
    }
