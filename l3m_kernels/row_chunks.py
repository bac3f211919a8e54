"""The head on a GPU, for any backend that has the row kernel: large chunks of rows, cuBLAS products, one fused pass between them.

Letters: T tokens of a packed batch, n scored rows (of a chunk), N sequences, D hidden size, V vocabulary.

Scored rows are brought into the order [gradient | log-likelihood only], unscored ones dropped (`row_order`). A chunk of rows is multiplied
into one fp32 buffer of logits, the row kernel turns these in place into the gradient of the logits, in the inputs' dtype, and two products
carry it on: to the hidden states, and into one fp32 accumulator of the weight's gradient. Chunks are as large as the workspace allows,
since each reads and writes the whole accumulator. Where the gradients of all rows fit into its place in 16 bits, they are gathered there
and the weight's product is one. With `low_memory` there is none: statistics first, then the vocabulary in blocks, whose
logits are computed again (8 n D V FLOPs instead of 6), and each block of the weight's gradient is written once.

Counting the rows makes the host wait for the device, once a call; where the caller gives their number (`scored_rows`) nothing waits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3m_kernels import device_flags
from l3m_kernels.chunk_sizes import chunk_rows, gathered_rows, row_stride
from l3m_kernels.chunked import NEEDS, Head, sequence_index, sequence_lengths, weighted_loss
from l3m_kernels.chunked import sequence_sums as segment_sums
from l3m_kernels.gradient_sums import GradientSums, multiprocessors
from l3m_kernels.products import Product, matmul
from l3m_kernels.row_order import Rows, ordered

COLUMN_MULTIPLE = 32  # of a block of the vocabulary: 128 bytes of logits, so that the next one is aligned
LEAST_COLUMNS = 2048  # of a block of the vocabulary: shorter ones make slow products, and long chains of sums


def sequence_sums(token: Tensor, targets: Tensor, cu_seqlens: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """-> (N,) float64 sums of token (T,), (N,) int64 scored tokens: in torch, for backends without a kernel."""
    return segment_sums(token, cu_seqlens), sequence_lengths(targets, cu_seqlens, ignore_index)


class RowKernels(NamedTuple):
    """What a backend supplies. All tensors are on one device; nothing here may make the host wait.

    softmax_gradient(logits, targets, upstream, bias, softcap, inverse_temperature, grad_dtype, token, lse, flag, known_lse, gradient)
        logits (n, V) fp32, row stride ld >= V; all n * ld elements may be read and written. Products only, before bias, softcap and
            temperature. Overwritten where upstream is given: the gradient of the products, upstream * (onehot - p) *
            inverse_temperature * softcap'(.), in `grad_dtype` (bf16, fp16 or fp32) from the beginning of each row, so with a row stride
            of ld * 4 / itemsize elements.
        targets (n,) int64; upstream (n,) fp32 or None; bias (V,) in the inputs' dtype, contiguous, or None; softcap: float, 0 is none.
        token (n,) fp32: written, log-likelihoods. lse (n,) fp32: written, of softcap(logits + bias) * inverse_temperature.
        flag (1,) int32: set to 1 where a target is outside [0, V), whose row is NaN (token, lse and gradient) and never an access there.
        known_lse: lse is read instead; the columns may be a part of the vocabulary, targets outside them are in another part and not
            wrong: their rows are -upstream * p * ... throughout. token may be None and flag is not touched.
        gradient (n, V) in `grad_dtype`, or None: where it is written instead, the logits' rows are then left or spoilt. Its rows are
            contiguous, and apart by at least the row stride of the logits in elements: all of a row may be written.
        upstream 0 gives a row of zeros, also where p is NaN. 1 - p of a target is the sum of the others' p (with known_lse 1 - p will do).
        A -inf logit has p = 0 (no gradient); a row of -inf, a +inf and a NaN give a NaN row.
    sequence_sums: as the function above, which is the default.
    product(a, b, out, accumulate) -> None
        out (m, n) fp32 = a (m, k) fp32 @ b (k, n) fp32, or += it, of any strides, in fp32 whatever the program allows its own products.
        None: torch's, where TF32 is not a question.
    """

    softmax_gradient: Callable[..., None]
    sequence_sums: Callable[..., tuple[Tensor, Tensor]] = sequence_sums
    product: Product | None = None


@contextmanager
def _launching(hidden: Tensor) -> Iterator[None]:
    """On hidden's device; then what was wrong with the values is sent to the host."""
    if not hidden.is_cuda:
        yield
        return
    with torch.cuda.device(hidden.device):
        yield
        device_flags.copy_later(hidden.device)


class _Batch:
    """The rows of one call, the buffer that their logits go through, and the gradients."""

    def __init__(self, kernels: RowKernels, hidden: Tensor, targets: Tensor, head: Head, ignore_index: int, rows: Rows):
        self.kernels, self.hidden, self.head, self.rows = kernels, hidden, head, rows
        self.bias = None if head.bias is None else head.bias.contiguous()
        self.flag = device_flags.flag(hidden.device, "targets")
        self.targets = targets[rows.index]
        self.scored = None if rows.compact else targets != ignore_index
        if rows.idle:  # unscored rows may be among them, by a wrong count too: not a target outside the vocabulary
            self.targets = self.targets.where(self.targets != ignore_index, 0)
        self.token, self.lse = (hidden.new_empty(rows.scored, dtype=torch.float32) for _ in range(2))
        self.vocabulary, self.width = head.weight.shape
        self.settings = (head.softcap or 0.0, 1 / head.temperature, hidden.dtype)
        self.buffer: Tensor | None = None

    def chunks(self, start: int, end: int, sums: GradientSums | None = None) -> Iterator[slice]:
        """Equal slices of the rows, for the logits alone or with the products of `sums`."""
        size = chunk_rows(
            end - start,
            self.vocabulary,
            self.width,
            d_weight=sums is not None and sums.needs[1],
            **self._limits(sums),
        )
        yield from (slice(first, min(first + size, end)) for first in range(start, end, size or 1))

    def _limits(self, sums: GradientSums | None) -> dict[str, Any]:
        """What decides about chunks, for `chunk_sizes`."""
        return {
            "multiprocessors": multiprocessors(self.hidden.device),
            "workspace_bytes": self.head.workspace,
            "itemsize": self.hidden.itemsize,
            "d_hidden": sums is not None and sums.needs[0],
            "accumulator_bytes": 0 if sums is None else sums.saved_by_one_chunk,
        }

    def inputs(self, chunk: slice) -> Tensor:
        inputs = self.hidden[self.rows.index[chunk]]
        return inputs if self.scored is None else inputs.masked_fill_(~self.scored[chunk, None], 0)

    def logits(self, inputs: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """(n, V), or columns [first, last): in the buffer, whose next content replaces it."""
        weight = self.head.weight[first:last]
        stride = row_stride(len(weight))
        if self.buffer is None or self.buffer.numel() < len(inputs) * stride:
            self.buffer = None  # or both would be held
            self.buffer = inputs.new_empty(len(inputs) * stride, dtype=torch.float32)
        logits = self.buffer[: len(inputs) * stride].view(len(inputs), stride)[:, : len(weight)]
        matmul(inputs, weight.t(), logits, self.kernels.product)
        return logits

    def gradient_of(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient (n, V) that the row kernel left in place of the logits."""
        assert self.buffer is not None
        rows, stride = len(logits), logits.stride(0)
        return self.buffer[: rows * stride].view(rows, stride).view(dtype)[:, : logits.shape[1]]

    def fused(
        self, logits: Tensor, chunk: slice, upstream: Tensor | None = None, gradient: Tensor | None = None
    ) -> None:
        """The row kernel on the whole vocabulary; statistics go to `token` and `lse`."""
        rows = (logits, self.targets[chunk], upstream, self.bias)
        statistics = (self.token[chunk], self.lse[chunk], self.flag, False)
        self.kernels.softmax_gradient(*rows, *self.settings, *statistics, gradient)

    def fused_with_lse(
        self,
        logits: Tensor,
        chunk: slice,
        upstream: Tensor,
        first: int = 0,
        last: int | None = None,
        gradient: Tensor | None = None,
    ) -> None:
        """The row kernel on columns [first, last) of the vocabulary, with the `lse` that is known."""
        bias = None if self.bias is None else self.bias[first:last]
        rows = (logits, self.targets[chunk] - first, upstream, bias)
        self.kernels.softmax_gradient(*rows, *self.settings, None, self.lse[chunk], self.flag, True, gradient)

    def forward(self, start: int, end: int) -> None:
        for chunk in self.chunks(start, end):
            self.fused(self.logits(self.inputs(chunk)), chunk)

    def scattered(self, values: Tensor) -> Tensor:
        """(T,): values (n,) where they belong, 0 where not scored."""
        if self.scored is not None:
            return values.where(self.scored, 0)
        found = values.new_zeros(len(self.hidden)).index_copy_(0, self.rows.index, values)
        return found if self.rows.fault is None else found.add_(self.rows.fault)

    def gradients(
        self, upstream: Tensor, needs: NEEDS, unscaled: bool, known_lse: bool, part: bool = False
    ) -> tuple[Tensor, ...]:
        """-> d_hidden, d_weight, d_bias, empty where not needed; upstream (n,) fp32 of the rows with a gradient.

        Statistics are written unless `known_lse`; `unscaled` as in `chunked.gradient_dtype`; `part` as in `GradientSums`.
        """
        fault = self.rows.fault
        sums = GradientSums(self.hidden, self.head, self.rows, needs, unscaled, self.kernels.product, part)
        upstream = sums.scaled(upstream if fault is None else upstream + fault)
        if self.head.low_memory and any(needs) and len(upstream):
            if not known_lse:
                self.forward(0, len(upstream))
            self._by_vocabulary(sums, upstream)
            return sums.finish()
        every = slice(0, len(upstream))
        chunks = list(self.chunks(0, len(upstream), sums))
        whole: Tensor | None = None
        sizes = (len(upstream), self.vocabulary, self.width)
        if len(chunks) > 1 and needs[1] and (size := gathered_rows(*sizes, **self._limits(sums))):
            chunks = [slice(first, min(first + size, len(upstream))) for first in range(0, len(upstream), size)]
            whole = self.hidden.new_empty(len(upstream), row_stride(self.vocabulary))[:, : self.vocabulary]
        for chunk in chunks:
            inputs = self.inputs(chunk)
            logits = self.logits(inputs)
            place = None if whole is None else whole[chunk]
            self._fused(logits, chunk, upstream, known_lse, place)
            gradient = self.gradient_of(logits, self.hidden.dtype) if place is None else place
            if place is None:
                sums.add_weight(self._without_idle(inputs, upstream[chunk]), gradient, only=chunk == every)
            sums.add_rows(chunk, inputs, gradient)
        if whole is not None:
            self.buffer = None
            sums.add_weight(self._without_idle(self.inputs(every), upstream), whole, only=True)
        return sums.finish()

    def _fused(
        self, logits: Tensor, chunk: slice, upstream: Tensor, known_lse: bool, gradient: Tensor | None = None
    ) -> None:
        fused = self.fused_with_lse if known_lse else self.fused
        fused(logits, chunk, upstream[chunk], gradient=gradient)

    def _by_vocabulary(self, sums: GradientSums, upstream: Tensor) -> None:
        """All rows with a block of the vocabulary at a time: nothing of the weight's size is held but its gradient."""
        rows = slice(0, len(upstream))
        # of the logits too: the gradient is 0 whatever they are
        inputs = self._without_idle(self.inputs(rows), upstream)
        free = self.head.workspace - inputs.numel() * (inputs.itemsize + 4)
        columns = max(free // (4 * len(inputs) + 4 * self.width), LEAST_COLUMNS) // COLUMN_MULTIPLE * COLUMN_MULTIPLE
        d_inputs = torch.zeros_like(inputs, dtype=torch.float32) if sums.needs[0] else None
        for first in range(0, self.vocabulary, columns):
            last = min(first + columns, self.vocabulary)
            logits = self.logits(inputs, first, last)
            self.fused_with_lse(logits, rows, upstream, first, last)
            sums.add_columns(first, last, inputs, self.gradient_of(logits, self.hidden.dtype), d_inputs)
        if d_inputs is not None:
            sums.write_hidden(rows, d_inputs)

    def _without_idle(self, inputs: Tensor, upstream: Tensor) -> Tensor:
        """Rows whose gradient is 0 contribute nothing, whatever they hold: 0 * NaN is NaN."""
        return inputs if not self.rows.idle else inputs.masked_fill_((upstream == 0)[:, None], 0)


# ---- the ops ---------------------------------------------------------------------------------------------------------


# Arguments, results and FLOPs of each are those of its namesake in `chunked`; float64 is not among the dtypes.


def log_likelihood(
    kernels: RowKernels, hidden: Tensor, targets, cu_seqlens, head: Head, ignore_index: int, scored_rows=None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> sequence, length, token, lse."""
    with _launching(hidden):
        rows = ordered(targets != ignore_index, None, scored_rows)
        batch = _Batch(kernels, hidden, targets, head, ignore_index, rows)
        batch.forward(0, rows.scored)
        token = batch.scattered(batch.token)
        sequence, length = kernels.sequence_sums(token, targets, cu_seqlens, ignore_index)
        return sequence.float(), length, token, batch.scattered(batch.lse)


def log_likelihood_backward(
    kernels, grad_sequence, grad_token, hidden, targets, cu_seqlens, lse, head, ignore_index, needs, scored_rows=None
) -> tuple[Tensor, ...]:
    """-> d_hidden, d_weight, d_bias."""
    with _launching(hidden):
        upstream = (grad_token + grad_sequence[sequence_index(cu_seqlens, len(hidden))]).float()
        scored = targets != ignore_index
        upstream = upstream.where(scored, 0)
        kept = scored & (upstream != 0) if scored_rows is None else scored
        rows = ordered(kept, upstream != 0, scored_rows)
        batch = _Batch(kernels, hidden, targets, head, ignore_index, rows)
        outside = (batch.targets < 0) | (batch.targets >= len(head.weight))
        batch.lse = lse[rows.index].masked_fill(outside, torch.nan)
        return batch.gradients(upstream[rows.index], needs, unscaled=False, known_lse=True)


def part_backward(
    kernels, upstream, hidden, targets, lse, token, head, ignore_index, needs, scored_rows=None
) -> tuple[Tensor, ...]:
    """-> d_hidden (T, D) fp32, d_weight, d_bias. 1 - p of a target is of its p here: `token` is not looked at."""
    with _launching(hidden):
        scored = targets != ignore_index
        upstream = upstream.float().where(scored, 0)
        kept = scored & (upstream != 0) if scored_rows is None else scored
        rows = ordered(kept, upstream != 0, scored_rows)
        batch = _Batch(kernels, hidden, targets, head, ignore_index, rows)
        batch.lse = lse[rows.index]
        return batch.gradients(upstream[rows.index], needs, unscaled=False, known_lse=True, part=True)


def weighted_log_likelihood(
    kernels, hidden, targets, seq_weight, cu_seqlens, head, ignore_index, needs, scored_rows=None
) -> tuple[Tensor, ...]:
    """-> loss, sequence, length, token, d_hidden, d_weight, d_bias."""
    with _launching(hidden):
        scored = targets != ignore_index
        upstream = -seq_weight.float()[sequence_index(cu_seqlens, len(hidden))]
        upstream = upstream.where(scored, 0)
        rows = ordered(scored, upstream != 0 if any(needs) else None, scored_rows)
        batch = _Batch(kernels, hidden, targets, head, ignore_index, rows)
        gradients = batch.gradients(upstream[rows.index[: rows.gradient]], needs, unscaled=True, known_lse=False)
        batch.forward(rows.gradient, rows.scored)
        token = batch.scattered(batch.token)
        sequence, length = kernels.sequence_sums(token, targets, cu_seqlens, ignore_index)
        loss = weighted_loss(seq_weight, sequence).float()
        if rows.fault is not None:
            loss = loss + rows.fault
        return loss, sequence.float(), length, token, *gradients


def head_ops(kernels: RowKernels) -> dict[str, Callable]:
    """The head's ops of a backend, for the table of backends."""

    def bound(op: Callable) -> Callable:
        return lambda *arguments: op(kernels, *arguments)

    ops = (log_likelihood, log_likelihood_backward, part_backward, weighted_log_likelihood)
    return {op.__name__: bound(op) for op in ops}
