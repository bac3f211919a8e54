"""The head's native ops by the signatures of the table of backends: a `chunked.Head` spread out, as a torch schema wants it."""

from torch import Tensor, ops


def log_likelihood(
    hidden: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    head: tuple,
    ignore_index: int,
    scored_rows: int | None = None,  # not needed here: rows are counted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ops.l3m_kernels.cpp_log_likelihood(hidden, targets, cu_seqlens, *head, ignore_index)


def log_likelihood_backward(
    grad_sequence: Tensor,
    grad_token: Tensor,
    hidden: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    lse: Tensor,
    head: tuple,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
    scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    run = ops.l3m_kernels.cpp_log_likelihood_backward
    return run(grad_sequence, grad_token, hidden, targets, cu_seqlens, lse, *head, ignore_index, *needs)


def weighted_log_likelihood(
    hidden: Tensor,
    targets: Tensor,
    seq_weight: Tensor,
    cu_seqlens: Tensor,
    head: tuple,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
    scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = ops.l3m_kernels.cpp_weighted_log_likelihood
    return run(hidden, targets, seq_weight, cu_seqlens, *head, ignore_index, *needs)
