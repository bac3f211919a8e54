"""The task loss on the fused head."""

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_kernels import weighted_log_likelihood


def shift(labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Hugging Face labels (aligned with the inputs) -> targets: targets[t] is the label of position t + 1 of the same sequence."""
    targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if cu_seqlens is not None:
        starts = torch.zeros(len(targets) + 1, dtype=torch.bool, device=targets.device)
        starts[cu_seqlens.long().to(targets.device)] = True
        targets = targets.masked_fill(starts[1:], ignore_index)  # what follows a sequence is not its own
    return targets


def scored_lengths(targets: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """(N,) int64, the scored tokens of each sequence of shifted targets."""
    scored = targets != ignore_index
    if cu_seqlens is None:
        return scored.sum(-1)
    counts = F.pad(scored.cumsum(0), (1, 0))
    return counts[cu_seqlens[1:].long()] - counts[cu_seqlens[:-1].long()]


def task_weights(lengths: Tensor, dtype: torch.dtype = torch.float32, *, sequences: Tensor | None = None) -> Tensor:
    """(N,) 1 / (N |y_n|), with N the sequences that have something scored, or `sequences` () of several batches; 0 for the others."""
    sequences = ((lengths > 0).sum() if sequences is None else sequences.to(lengths.device)).clamp(min=1)
    return torch.where(lengths > 0, 1.0 / (sequences * lengths.clamp(min=1)).to(torch.float64), 0.0).to(dtype)


def task_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    scored: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """L = mean over sequences of -(1/|y|) log pi(y|x), the length-normalised task loss (arXiv 2410.21533); exp(L) is the task perplexity.

    Args:
        labels: (N, L) or (T,), Hugging Face convention: aligned with the inputs, not shifted; `ignore_index` on prompt and padding.
        scored: number of labels that are not `ignore_index`, but for the first of each sequence, which nothing predicts; where it is known
            on the host (padded labels before they are moved: `int((labels[:, 1:] != -100).sum())`) a GPU need not be waited for.
        hidden, weight, cu_seqlens, bias, softcap, temperature, ignore_index, backend: as in `l3m_kernels.log_likelihood`.

    Returns:
        () loss, nats per token; sequences with nothing scored do not count.

    Raises:
        as `l3m_kernels.weighted_log_likelihood`.
    """
    targets = shift(labels, cu_seqlens, ignore_index)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    seq_weight = task_weights(scored_lengths(targets, cu_seqlens, ignore_index), dtype).to(hidden.device)
    head = {"bias": bias, "softcap": softcap, "temperature": temperature}
    options = {"ignore_index": ignore_index, "scored": scored, "backend": backend}
    loss, _ = weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, **head, **options)
    return loss
