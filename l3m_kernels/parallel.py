"""The head with its vocabulary shared out: each of p ranks holds some rows of the matrix, and the logits of those rows only.

Letters: T tokens of a packed batch, n scored ones, N sequences, D hidden size, V vocabulary, V_r rows on rank r, p ranks of the group.

Hidden states, targets and options are the same on all ranks of the group; the rows are its own on each, in the order of the ranks, as many
as it has, which may be none. With z the logits after cap and temperature, rank r finds of its own columns, by any backend,

    lse_r = log sum_(v in r) exp z_v,        token_r = z_t - lse_r where the target t is one of them

and all ranks make of these, gathered, the same bits:

    lse = log sum_r exp lse_r,               log pi(t) = token_o - log(1 + sum_(r != o) exp(lse_r - lse_o)), o the rank of t

Then each rank has its share of the gradients, for u the upstream gradient of a row, by the backend's `part_backward`:

    d z_v = u ([v = t] - exp(z_v - lse)),    d weight, d bias of its own rows;    d hidden = sum_r d z_r @ weight_r

What is sent, beyond one small collective for the first call with a weight (`vocabulary_shards`):
    forward   1 all-gather of 2 n + 1 numbers (fp32; fp64 for fp64 inputs): 4 (2 n + 1) (p - 1) bytes received per rank. The maximum, the
              sum and the target's logit need not three all-reduces, nor two, of a maximum first and then of sums: a log-sum-exp is its
              own maximum. The last number tells whether the targets are the same.
    backward  1 all-reduce of (n, D) in fp32 (fp64): 8 n D (p - 1) / p bytes per rank in a ring; none where hidden needs no gradient.
No logits are sent, no rows of the weight, no gradient of it; none of these is ever held whole.

FLOPs per rank: 2 n D V_r forward and 6 n D V_r backward, for both functions. On one process `weighted_log_likelihood` needs 6 n D V, for it
makes gradients of logits while they are at hand; here that would need the log-sum-exp of other ranks first. So its gradients are formed in
the backward, 8 n D V_r in all, and not held between the two.

A DTensor whose rows are sharded, Shard(0) over one dimension of its mesh, brings its group with it: the ordinary functions compute it here.
Other dimensions may replicate the weight: who gives them other hidden states reduces the gradients too. Or they shard it, as FSDP does:
there it is gathered first, hidden states are each rank's own, and the gradient is the mean over them, scattered, as in FSDP.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from l3m_kernels import device_flags
from l3m_kernels.backends import head_of, name_of, select
from l3m_kernels.checks import check_seq_weight, check_values, offsets_on, packed_batch
from l3m_kernels.chunked import sequence_index, sequence_lengths, sequence_sums, weighted_loss
from l3m_kernels.likelihoods import LogLikelihood, refuse_double
from l3m_kernels.row_order import Rows, ordered
from l3m_kernels.transforms import is_batched, refuse_transforms
from l3m_kernels.vocabulary_shards import Place, agree, fingerprint, group_of, replicated, shard_of

_IGNORED, _ELSEWHERE = -100, -1  # targets as a rank's part of the vocabulary has them
_NOT_MINE = 1.0  # in place of a log-likelihood, which is never positive


def log_likelihood(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    scored: int | None = None,
    backend: str | None = None,
    group: Any = None,
) -> LogLikelihood:
    """`l3m_kernels.log_likelihood` of a vocabulary that the ranks of `group` share: called on all of them.

    Results, and d_hidden, are the same bits on every rank; upstream gradients must be the same on all.

    Args:
        hidden: as there, the same on all ranks; plain, or a DTensor that is replicated.
        weight: (V_r, D), this rank's rows, V = sum of V_r, in the order of the ranks; or a DTensor, see the module.
        targets: in [0, V), the same on all ranks.
        bias: (V_r,), of this rank's rows; a DTensor with weight's placements where that is one.
        group: a process group; None is the default one, or the one that a DTensor's mesh says.
        The others are as there.

    Raises:
        as there, and ValueError where ranks were not given what belongs together. On the first call with a weight all ranks raise what one
        of them refuses, and compare dtype, shapes, targets, options and what needs a gradient. Later calls compare the targets: where these
        differ all ranks raise, on a GPU all results are NaN. What else is wrong on one rank alone then leaves the others waiting, until the
        group's timeout, or ends them.
    """
    op = "log_likelihood"
    options = (softcap, temperature, ignore_index, scored, name_of(backend))
    sequence, length, token = _shared(op, hidden, weight, targets, cu_seqlens, bias, options, None, group)
    return LogLikelihood(sequence.to(token.dtype), length, token.view(targets.shape))


def weighted_log_likelihood(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_weight: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    scored: int | None = None,
    backend: str | None = None,
    group: Any = None,
) -> tuple[Tensor, LogLikelihood]:
    """`l3m_kernels.weighted_log_likelihood` of a vocabulary that the ranks of `group` share; arguments as in `log_likelihood`.

    `seq_weight` (N,) is the same on all ranks. Gradients are formed in the backward: 8 n D V / p FLOPs on each of p ranks with equal parts,
    not the 6 n D V of one process.

    Returns:
        loss: () fp32, or fp64 for fp64 inputs.
        LogLikelihood: detached.

    Raises:
        as `log_likelihood`; ValueError also where seq_weight requires a gradient: it is a constant.
    """
    op = "weighted_log_likelihood"
    options = (softcap, temperature, ignore_index, scored, name_of(backend))
    sequence, length, token = _shared(op, hidden, weight, targets, cu_seqlens, bias, options, seq_weight, group)
    loss = weighted_loss(replicated(op, "seq_weight", seq_weight), sequence).to(token.dtype)
    return loss, LogLikelihood(sequence.detach().to(token.dtype), length, token.detach().view(targets.shape))


@_disable_dynamo  # compiled code is left for what waits for other ranks, once
def _shared(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    options: tuple,
    seq_weight: Tensor | None,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments checked, here and against those of the other ranks. -> sequence (N,) fp64, length (N,), token (T,)."""
    softcap, temperature, ignore_index, scored, backend = options
    group = group_of(op, weight, group)
    problem, batch, shard, same = None, None, None, {}
    try:
        refuse_transforms(op, hidden, weight, bias, seq_weight)
        if any(tensor is not None and is_batched(tensor) for tensor in (hidden, weight, targets, bias, seq_weight)):
            raise RuntimeError(f"{op}: torch.vmap cannot map a vocabulary that ranks share; call it once for each")
        shard = shard_of(op, weight, bias, group)
        hidden, targets = replicated(op, "hidden", hidden), replicated(op, "targets", targets)
        plain = None if cu_seqlens is None else replicated(op, "cu_seqlens", cu_seqlens)
        batch = packed_batch(op, hidden, shard.weight, targets, plain, shard.bias, softcap, temperature, part=True)
        packed = batch.targets
        if seq_weight is not None:
            check_seq_weight(op, replicated(op, "seq_weight", seq_weight), batch)
        for name in ("log_likelihood", "part_backward"):
            select(name, backend, hidden.device.type, batch.hidden.dtype, hidden.device.index)
        same = {
            "the dtype of hidden": hidden.dtype,
            "the shape of hidden": tuple(hidden.shape),
            "the number of sequences": batch.cu_seqlens.shape[0],
            "each of softcap, temperature, ignore_index and scored": options[:4],
            "targets": lambda: int(fingerprint(packed)),
            "bias or none": bias is not None,
            "whether hidden needs a gradient": torch.is_grad_enabled() and hidden.requires_grad,
        }
    except (ValueError, RuntimeError) as error:
        problem = error
    place = agree(op, weight, shard, same, group, problem)
    assert batch is not None
    check_values(op, batch.targets, batch.cu_seqlens, place.vocabulary, ignore_index, scored)
    with torch.autocast(batch.hidden.device.type, enabled=False):
        found = _LogLikelihood.apply(*batch, place, group, options)
    assert found is not None
    return found


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V_r, D)
        targets: Tensor,  # (T,)
        cu_seqlens: Tensor,  # (N + 1,)
        bias: Tensor | None,  # (V_r,)
        place: Place,
        group: Any,
        options: tuple,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, _, ignore_index, scored, _ = options
        device = hidden.device
        offsets, fault = offsets_on(device, cu_seqlens, len(hidden))
        kept = targets != ignore_index
        rows = ordered(kept, None, scored if device.type == "cuda" else None)
        outside = kept & ((targets < 0) | (targets >= place.vocabulary))  # on a GPU alone: a CPU has looked
        if device.type == "cuda":
            device_flags.flag(device, "targets").masked_fill_(outside.any(), 1)
            device_flags.copy_later(device)
        inside = kept & (targets >= place.first) & (targets < place.first + len(weight))
        local = torch.where(inside, targets - place.first, _IGNORED)
        forwarded = torch.where(inside, local, torch.where(kept, 0, _IGNORED))  # any will do where only lse is wanted
        mine = _own_statistics(hidden, weight, forwarded, bias, inside, rows, options)
        token, lse = _whole_statistics(mine, fingerprint(targets), group)
        token, lse = (_scattered(found, rows, kept, outside) for found in (token, lse))
        sequence, length = sequence_sums(token, offsets), sequence_lengths(targets, offsets, ignore_index)
        token = token.to(mine.dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(length)
        ctx.rows, ctx.group, ctx.options, ctx.sequences = rows, group, options, len(length)
        elsewhere = torch.where(inside, local, torch.where(kept, _ELSEWHERE, _IGNORED))
        ctx.save_for_backward(hidden, weight, bias, elsewhere, offsets, lse.to(mine.dtype), token, fault)
        return sequence if fault is None else sequence + fault, length, token

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_sequence, _, grad_token = grads
        if any(grad is not None and is_batched(grad) for grad in grads):
            raise RuntimeError(
                "log_likelihood and weighted_log_likelihood of a vocabulary that ranks share have no gradients of several losses at once "
                "(is_grads_batched, vectorize=True); differentiate one after the other"
            )
        hidden, weight, bias, targets, offsets, lse, token, fault = ctx.saved_tensors
        softcap, temperature, _, scored, backend = ctx.options
        upstream = torch.zeros_like(token) if grad_token is None else grad_token
        if grad_sequence is not None:
            grad_sequence = grad_sequence if fault is None else grad_sequence + fault
            upstream = upstream + grad_sequence[sequence_index(offsets, len(hidden))].to(token.dtype)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[4])
        with torch.no_grad():
            if len(weight):
                run = select("part_backward", backend, hidden.device.type, hidden.dtype, hidden.device.index)
                head = head_of(weight, bias, softcap, temperature)
                known = (hidden, targets, lse, token)
                d_hidden, d_weight, d_bias = run(upstream, *known, head, _IGNORED, needs, scored)
            else:
                d_hidden = token.new_zeros(hidden.shape)  # not in hidden's strides: what is added up is memory
                d_weight, d_bias = (None if tensor is None else torch.zeros_like(tensor) for tensor in (weight, bias))
            found = [_summed(d_hidden, ctx.rows, ctx.group).to(hidden.dtype) if needs[0] else None, d_weight, d_bias]
        found = [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
        if torch.is_grad_enabled():
            tied = (hidden, weight, bias, grad_sequence, grad_token)
            found = [None if gradient is None else _OnceDifferentiable.apply(gradient, *tied) for gradient in found]
        return found[0], found[1], None, None, found[2], None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient, tied to all that it depends on: differentiating it again is refused and not silently 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *tied: Tensor | None) -> Tensor:
        return gradient.clone()

    backward = staticmethod(refuse_double)


def _own_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, inside: Tensor, rows: Rows, options: tuple
) -> Tensor:
    """(2, n) log-likelihoods among this rank's columns, and their log-sum-exps; targets (T,) of these columns, `inside` where meant."""
    softcap, temperature, _, scored, backend = options
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if not len(weight):
        return torch.tensor([[_NOT_MINE], [-torch.inf]], dtype=dtype, device=hidden.device).repeat(1, len(rows.index))
    run = select("log_likelihood", backend, hidden.device.type, hidden.dtype, hidden.device.index)
    head = head_of(weight, bias, softcap, temperature)
    whole = torch.arange(2, device=hidden.device) * len(hidden)  # one sequence: sums are made later
    _, _, token, lse = run(hidden, targets, whole, head, _IGNORED, scored)
    if bias is not None and softcap is None:  # tokens that are ruled out: no NaN where all of a rank's are
        ruled_out = torch.isneginf(bias).all()
        token, lse = (torch.where(ruled_out, -torch.inf, found) for found in (token, lse))
    return torch.stack([torch.where(inside, token, _NOT_MINE), lse])[:, rows.index]


def _whole_statistics(mine: Tensor, targets: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(2, n) of this rank -> log-likelihoods (n,) and log-sum-exps (n,) of the whole vocabulary, fp64, by one collective.

    `targets`: their fingerprint.

    Raises:
        ValueError: on every rank, where targets are not the same on all; on a GPU all results are NaN instead.
    """
    ranks, rows = dist.get_world_size(group), mine.shape[1]
    sent = torch.cat([mine.reshape(-1), targets.to(mine.dtype)[None]])
    gathered = sent.new_empty(ranks, len(sent))
    dist.all_gather(list(gathered), sent, group=group)
    fault = torch.where((gathered[:, -1] == gathered[0, -1]).all(), 0.0, torch.nan)
    if mine.device.type == "cpu" and bool(fault.isnan()):
        raise ValueError(
            "l3m_kernels.parallel: targets must be the same on all ranks of the group, and are not; only rows of the vocabulary are "
            "shared out (is this group one of data parallelism?)"
        )
    tokens, sums = gathered[:, :-1].view(ranks, 2, rows).double().unbind(1)
    own = tokens != _NOT_MINE
    lse = sums.logsumexp(0)
    others = sums.masked_fill(own, -torch.inf).logsumexp(0) - sums.where(own, 0.0).sum(0)
    token = tokens.where(own, 0.0).sum(0) - torch.logaddexp(others, torch.zeros_like(others))
    unknown = (sums.isnan() | sums.isposinf()).any(0)
    return token.masked_fill(unknown, torch.nan) + fault, lse.masked_fill(unknown, torch.nan) + fault


def _scattered(found: Tensor, rows: Rows, kept: Tensor, outside: Tensor) -> Tensor:
    """(T,) of (n,): 0 where not scored, NaN where the target is no token."""
    whole = found.new_zeros(len(kept)).index_copy_(0, rows.index, found).where(kept, 0.0)
    whole = whole if rows.fault is None else whole + rows.fault
    return whole.masked_fill(outside, torch.nan)


def _summed(d_hidden: Tensor, rows: Rows, group: Any) -> Tensor:
    """(T, D), added up over the ranks: only rows that are scored are sent."""
    if len(rows.index) == len(d_hidden):
        dist.all_reduce(d_hidden, group=group)
        return d_hidden
    sent = d_hidden[rows.index]
    dist.all_reduce(sent, group=group)
    return d_hidden.index_copy_(0, rows.index, sent)
