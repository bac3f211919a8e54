"""The head in plain torch without the (T, V) logits: what the `reference` backend runs, on any device.

Letters: T tokens of a packed batch, n scored rows of a chunk, N sequences, D hidden size, V vocabulary.

Scored rows are gathered and pushed through the vocabulary a chunk at a time, in one buffer of bounded size that is then
overwritten by its own gradient. `reference.eager_log_likelihood` is the same mathematics with the logits held.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEEDS = tuple[bool, bool, bool]  # gradients wanted for hidden, weight, bias


class Head(NamedTuple):
    """The last layer of the model, as the chunked functions see it."""

    weight: Tensor  # (V, D) fp32 | bf16 | fp16 | fp64
    bias: Tensor | None  # (V,)
    softcap: float | None
    temperature: float
    workspace: int  # bytes that may be held beyond inputs, outputs and the accumulators of the gradients
    low_memory: bool = False  # compute logits again sooner than hold anything of their size, or an accumulator (`cpp`)

    @property
    def compute(self) -> torch.dtype:
        """Logits, statistics and accumulators: float32, or float64 for float64 inputs."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype, unscaled: bool) -> torch.dtype:
    """Of the gradients that an op returns for inputs of `dtype`.

    fp16 gradients still to be multiplied by a loss scale (`unscaled`) stay fp32: rounded first, the small ones would be 0.
    """
    return torch.float32 if unscaled and dtype == torch.float16 else dtype


def sequence_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(T,) int64, the sequence that each packed token belongs to."""
    positions = torch.arange(tokens, device=cu_seqlens.device)
    return torch.bucketize(positions, cu_seqlens[1:].long().contiguous(), right=True)


def sequence_sums(token: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) float64 sums of the tokens of each sequence: no atomics, and a NaN stays in its own sequence."""
    offsets = cu_seqlens.long()
    if not len(token):  # segment_reduce refuses empty data
        return token.new_zeros(len(offsets) - 1, dtype=torch.float64)
    return torch.segment_reduce(token.double(), "sum", offsets=offsets, initial=0.0, unsafe=True)


def sequence_lengths(targets: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """(N,) int64, the scored tokens of each sequence."""
    counts = F.pad((targets != ignore_index).cumsum(0), (1, 0))
    return counts[cu_seqlens[1:].long()] - counts[cu_seqlens[:-1].long()]


def weighted_loss(seq_weight: Tensor, sequence: Tensor) -> Tensor:
    """() float64, -sum_n seq_weight[n] * sequence[n] of two (N,); a sequence of weight 0 is dropped, also at -inf."""
    return -(seq_weight.double() * sequence).where(seq_weight != 0, 0.0).sum()


def log_likelihood(
    hidden: Tensor,  # (T, D)
    targets: Tensor,  # (T,) int64
    cu_seqlens: Tensor,  # (N + 1,)
    head: Head,
    ignore_index: int,
    scored_rows: int | None = None,  # how many targets are not ignore_index, where known; here they are counted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> sequence (N,), length (N,) int64, token (T,), lse (T,): the forward pass alone, 2 n D V FLOPs for n scored rows."""
    token = torch.zeros(len(hidden), dtype=head.compute, device=hidden.device)
    lse = torch.zeros_like(token)
    _forward(hidden, targets, head, (targets != ignore_index).nonzero()[:, 0], token, lse)
    sequence = sequence_sums(token, cu_seqlens).to(head.compute)
    return sequence, sequence_lengths(targets, cu_seqlens, ignore_index), token, lse


def log_likelihood_backward(
    grad_sequence: Tensor,  # (N,)
    grad_token: Tensor,  # (T,)
    hidden: Tensor,  # (T, D)
    targets: Tensor,  # (T,) int64
    cu_seqlens: Tensor,  # (N + 1,)
    lse: Tensor,  # (T,)
    head: Head,
    ignore_index: int,
    needs: NEEDS,
    scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_hidden, d_weight, d_bias (empty where not needed): recomputes the logits of the rows with a gradient, 6 n D V."""
    upstream = (grad_token + grad_sequence[sequence_index(cu_seqlens, len(hidden))]).to(head.compute)
    rows = ((targets != ignore_index) & (upstream != 0)).nonzero()[:, 0]
    gradients = _Gradients(hidden, head, needs)
    for chunk in _chunks(rows, head, gradients=True):
        logits, slope, inputs, target = _logits(hidden, targets, head, chunk, gradients=True)
        probabilities = logits.sub_(lse[chunk, None]).exp_()
        gradients.accumulate(chunk, inputs, probabilities, slope, target, upstream[chunk])
        del logits, probabilities, slope  # or the next chunk's would be held beside them
    return gradients.finish()


def part_backward(
    upstream: Tensor,  # (T,)
    hidden: Tensor,  # (T, D)
    targets: Tensor,  # (T,) int64, of the rows of `head`; one outside them is in another part of the vocabulary
    lse: Tensor,  # (T,) over the whole vocabulary
    token: Tensor,  # (T,) log pi(target), likewise
    head: Head,  # a part of the vocabulary
    ignore_index: int,
    needs: NEEDS,
    scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_hidden (T, D) fp32 (fp64), this part's share of the sum over all of them; d_weight, d_bias of the part."""
    upstream = upstream.to(head.compute)
    rows = ((targets != ignore_index) & (upstream != 0)).nonzero()[:, 0]
    gradients = _Gradients(hidden, head, needs, part=True)
    for chunk in _chunks(rows, head, gradients=True):
        logits, slope, inputs, target = _logits(hidden, targets, head, chunk, gradients=True, part=True)
        probabilities = logits.sub_(lse[chunk, None]).exp_()
        mine = target == targets[chunk]
        gradients.accumulate(
            chunk, inputs, probabilities, slope, target, upstream[chunk], mine, -torch.expm1(token[chunk])
        )
        del logits, probabilities, slope  # or the next chunk's would be held beside them
    return gradients.finish()


def weighted_log_likelihood(
    hidden: Tensor,  # (T, D)
    targets: Tensor,  # (T,) int64
    seq_weight: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (N + 1,)
    head: Head,
    ignore_index: int,
    needs: NEEDS,
    scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), sequence (N,), length (N,), token (T,), d_hidden, d_weight, d_bias: one pass, 6 n D V FLOPs.

    The weights of the sequences are known, so each chunk of logits becomes its own gradient while it is at hand. Rows of
    weight 0 get the forward only.
    """
    token = torch.zeros(len(hidden), dtype=head.compute, device=hidden.device)
    scored = targets != ignore_index
    upstream = -seq_weight.to(head.compute)[sequence_index(cu_seqlens, len(hidden))]
    with_gradient = (upstream != 0) if any(needs) else torch.zeros_like(scored)
    _forward(hidden, targets, head, (scored & ~with_gradient).nonzero()[:, 0], token, None)

    gradients = _Gradients(hidden, head, needs, unscaled=True)
    for chunk in _chunks((scored & with_gradient).nonzero()[:, 0], head, gradients=True):
        logits, slope, inputs, target = _logits(hidden, targets, head, chunk, gradients=True)
        token[chunk], _, total = _softmax_(logits, target)
        logits.div_(total)
        gradients.accumulate(chunk, inputs, logits, slope, target, upstream[chunk])
        del logits, slope  # or the next chunk's would be held beside them

    sequence = sequence_sums(token, cu_seqlens)
    loss = weighted_loss(seq_weight, sequence).to(head.compute)
    length = sequence_lengths(targets, cu_seqlens, ignore_index)
    return loss, sequence.to(head.compute), length, token, *gradients.finish()


def _forward(hidden: Tensor, targets: Tensor, head: Head, rows: Tensor, token: Tensor, lse: Tensor | None) -> None:
    """Write the log-likelihoods (and log-sum-exps) of `rows`."""
    for chunk in _chunks(rows, head, gradients=False):
        logits, _, _, target = _logits(hidden, targets, head, chunk, gradients=False)
        token[chunk], maximum, total = _softmax_(logits, target)
        if lse is not None:
            lse[chunk] = (maximum + total.log())[:, 0]
        del logits  # or the next chunk's would be held beside them


def _vocabulary_block(head: Head) -> int:
    """Rows of a 16-bit weight that are widened to fp32 at a time, out of a quarter of the workspace."""
    vocabulary, width = head.weight.shape
    if head.weight.dtype == head.compute:
        return max(vocabulary, 1)
    return min(max(head.workspace // 4 // max(4 * width, 1), 1), max(vocabulary, 1))


def _chunks(rows: Tensor, head: Head, gradients: bool) -> tuple[Tensor, ...]:
    """Equal chunks of rows whose buffers (logits, tanh slope, widened inputs and their gradient) fit the workspace."""
    if not len(rows):
        return ()
    vocabulary, width = head.weight.shape
    buffers = 2 if gradients and head.softcap is not None else 1
    row_bytes = head.compute.itemsize * (buffers * vocabulary + 2 * width)
    widened = 0 if head.weight.dtype == head.compute else 4 * width * _vocabulary_block(head)
    limit = max((head.workspace - widened) // row_bytes, 1)
    return rows.chunk(-(-len(rows) // limit))


def _logits(hidden: Tensor, targets: Tensor, head: Head, chunk: Tensor, gradients: bool, part: bool = False):
    """-> logits (n, V), slope of the softcap (n, V) or None, inputs (n, D), target (n,), for the rows of one chunk.

    Targets outside the vocabulary become 0; their logits NaN, unless this is a `part` of the vocabulary.
    16-bit inputs are widened before the product: rounding logits of size 20 to bf16 costs 0.06 in a log-likelihood.
    """
    inputs = hidden[chunk].to(head.compute)
    logits = torch.empty(len(chunk), len(head.weight), dtype=head.compute, device=hidden.device)
    block = _vocabulary_block(head)
    for start in range(0, len(head.weight), block):
        widened = head.weight[start : start + block].to(head.compute)
        torch.mm(inputs, widened.t(), out=logits[:, start : start + block])
    if head.bias is not None:
        logits += head.bias
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        if gradients:
            slope = logits.square().neg_().add_(1)
        logits.mul_(head.softcap)
    if head.temperature != 1:
        logits.div_(head.temperature)
    target = targets[chunk]
    invalid = (target < 0) | (target >= len(head.weight))  # refused before on a CPU; elsewhere the row is NaN
    logits = logits if part else logits.masked_fill_(invalid[:, None], torch.nan)
    return logits, slope, inputs, target.masked_fill(invalid, 0)


def _softmax_(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite the logits by exp(z - max) -> log-likelihood (n,), max (n, 1), sum (n, 1)."""
    maximum = logits.amax(1, keepdim=True)
    logits.sub_(maximum)
    picked = logits.gather(1, target[:, None])
    total = logits.exp_().sum(1, keepdim=True)
    return (picked - total.log())[:, 0], maximum, total


class _Gradients:
    """Accumulators of the head's gradients, fp32 (fp64 for fp64) until `finish` rounds them."""

    def __init__(self, hidden: Tensor, head: Head, needs: NEEDS, unscaled: bool = False, part: bool = False):
        self.head, self.needs = head, needs
        self.dtype = gradient_dtype(hidden.dtype, unscaled)
        # contiguous, whatever hidden's strides; of a part of the vocabulary not rounded yet
        self.hidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=head.compute if part else self.dtype)
        options = {"dtype": head.compute, "device": hidden.device}
        self.weight = torch.zeros(head.weight.shape if needs[1] else 0, **options)
        self.bias = torch.zeros(len(head.weight) if needs[2] else 0, **options)

    def accumulate(self, chunk, inputs, probabilities, slope, target, upstream, mine=None, rest=None) -> None:
        """Turn probabilities (n, V) into d logits = upstream * (onehot - p), in place, and multiply it out.

        Of a part of the vocabulary: `mine` (n,), whether a row's target is in it, and `rest` (n,), 1 - p of the target.
        """
        column = target[:, None]
        rest = 1 - probabilities.gather(1, column) if rest is None else rest[:, None]
        grad = probabilities.mul_(-upstream[:, None])
        onehot = upstream[:, None] * rest
        grad.scatter_(1, column, onehot if mine is None else torch.where(mine[:, None], onehot, grad.gather(1, column)))
        if self.head.temperature != 1:
            grad.div_(self.head.temperature)
        if slope is not None:
            grad.mul_(slope)
        if self.needs[2]:
            self.bias += grad.sum(0)
        inputs_grad = torch.zeros_like(inputs) if self.needs[0] else None
        block = _vocabulary_block(self.head)
        for start in range(0, grad.shape[1], block):
            part = grad[:, start : start + block]
            if inputs_grad is not None:
                inputs_grad.addmm_(part, self.head.weight[start : start + block].to(self.head.compute))
            if self.needs[1]:
                self.weight[start : start + block].addmm_(part.t(), inputs)
        if inputs_grad is not None:
            self.hidden[chunk] = inputs_grad.to(self.hidden.dtype)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight.to(self.dtype), self.bias.to(self.dtype)
