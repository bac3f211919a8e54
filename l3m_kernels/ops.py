"""The head's ops: hidden states, vocabulary matrix and targets to log-likelihoods and gradients, without the (T, V) logits.

Letters: T tokens of a packed batch, N sequences, L padded length, D hidden size, V vocabulary.

Each op is defined once with torch.library: what runs is chosen by `backends.select` when it runs, so that `torch.compile`, autocast
and autograd see one opaque op whatever the backend. The public functions check arguments and bring batches into the packed layout.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from l3m_kernels import parallel
from l3m_kernels.backends import head_of, name_of, scale_in_place, select
from l3m_kernels.checks import check_seq_weight, check_values, offsets_on, packed_batch
from l3m_kernels.chunked import NEEDS, gradient_dtype
from l3m_kernels.likelihoods import LogLikelihood, refuse_double
from l3m_kernels.transforms import is_batched, wants_gradient
from l3m_kernels.vocabulary_shards import is_dtensor


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
) -> LogLikelihood:
    """Log-likelihoods of the target tokens under softmax(softcap(hidden @ weight.T + bias) / temperature).

    Differentiable in `hidden`, `weight` and `bias`, with any upstream gradient on `.sequence` and `.token`; the backward recomputes
    the logits of the rows that have one (2 n D V FLOPs forward, 6 n D V backward for n scored rows).
    Use `weighted_log_likelihood` where the gradient of each sequence is known in advance: it needs 6 n D V in all.

    Args:
        hidden: (T, D) packed, with `cu_seqlens`, or (N, L, D) padded; fp32, bf16, fp16 or fp64.
        weight: (V, D), the head's matrix, in hidden's dtype. A DTensor whose rows are sharded is computed with where they are, see
            `l3m_kernels.parallel`.
        targets: (T,) or (N, L) integers: targets[t] is the token that hidden[t] predicts (already shifted).
        cu_seqlens: (N + 1,) int32 or int64, starts of the sequences and T.
        bias: (V,), in weight's dtype.
        softcap: logits become softcap * tanh(logits / softcap), before the temperature. A constant, as the temperature is.
        temperature: divides the logits; log pi is that of the distribution sampled at this temperature.
        ignore_index: targets of this value are not scored; their rows are dropped before the first product.
        scored: how many targets are not `ignore_index`, where the caller knows without asking the device, e.g. from the labels before they
            were moved. With it a GPU drops rows without making the host wait, here and in the backward, whose rows without a gradient
            then cost as much as the others. None: counted, one wait on a GPU each; elsewhere it makes no difference.
        backend: "reference", "cpp", "triton" or "cuda"; None takes the fastest that is available.

    Raises:
        ValueError: a shape, dtype, device, option or `scored` is wrong (named), or cu_seqlens does not start at 0, end at T and never
            decrease.
        IndexError: a target outside [0, V) that is not `ignore_index`. On a GPU nothing waits to see: its row is NaN, a later call or
            `check_targets` raises; so for a wrong `scored`, which makes all results NaN, and for wrong cu_seqlens on the GPU, which make
            the sequences and all gradients NaN.
        RuntimeError: the named backend is not available here, a second derivative is asked for, or one in forward mode or by `torch.func`
            (`torch.vmap` makes one call after the other), or the first call on a GPU is made while a CUDA graph is captured.
    """
    if is_dtensor(weight):
        options = {"softcap": softcap, "temperature": temperature, "ignore_index": ignore_index}
        options |= {"bias": bias, "scored": scored, "backend": backend}
        return parallel.log_likelihood(hidden, weight, targets, cu_seqlens, **options)
    batch = packed_batch("log_likelihood", hidden, weight, targets, cu_seqlens, bias, softcap, temperature)
    sequence, length, token, _ = _log_likelihood(*batch, softcap, temperature, ignore_index, scored, name_of(backend))
    return LogLikelihood(sequence, length, token.view(targets.shape))


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
) -> tuple[Tensor, LogLikelihood]:
    """loss = -sum_n seq_weight[n] * log pi(sequence n), gradients formed in the forward pass; arguments as in `log_likelihood`.

    `seq_weight` (N,) holds constants of either sign: 1 / (N |y_n|) is the length-normalised task loss, `barrier_weights` gives those
    of constraints, advantages those of policy gradients. `.backward()` on the loss only scales what the forward found (6 n D V FLOPs
    in all). Rows of weight 0 cost the forward alone; on a GPU that is given `scored`, as much as the others. Frozen inputs
    (`requires_grad=False`) skip their product.

    Returns:
        loss: () fp32, or fp64 for fp64 inputs. A sequence of weight 0 contributes 0, whatever its likelihood.
        LogLikelihood: detached.

    Raises:
        as `log_likelihood`; ValueError also where seq_weight requires a gradient: it is a constant.
    """
    if is_dtensor(weight):
        options = {"softcap": softcap, "temperature": temperature, "ignore_index": ignore_index}
        options |= {"bias": bias, "scored": scored, "backend": backend}
        return parallel.weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, **options)
    op = "weighted_log_likelihood"
    batch = packed_batch(op, hidden, weight, targets, cu_seqlens, bias, softcap, temperature)
    check_seq_weight(op, seq_weight, batch)
    needs = [torch.is_grad_enabled() and wants_gradient(each) for each in (batch.hidden, batch.weight, batch.bias)]
    tensors = (batch.hidden, batch.weight, batch.targets, seq_weight, batch.cu_seqlens, batch.bias)
    options = (softcap, temperature, ignore_index, scored, name_of(backend))
    loss, sequence, length, token, *_ = _weighted_log_likelihood(*tensors, *options, *needs)
    return loss, LogLikelihood(sequence, length, token.view(targets.shape))


# ---- log_likelihood --------------------------------------------------------------------------------------------------


def _statistics(hidden: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fake sequence (N,), length (N,) and token (T,)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sequences = cu_seqlens.shape[0] - 1
    return (
        hidden.new_empty(sequences, dtype=dtype),
        hidden.new_empty(sequences, dtype=torch.int64),
        hidden.new_empty(hidden.shape[0], dtype=dtype),
    )


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: NEEDS, unscaled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake gradients, empty where not needed."""
    like = (hidden, weight, weight.new_empty(0) if bias is None else bias)
    dtype = gradient_dtype(hidden.dtype, unscaled)
    d_hidden, d_weight, d_bias = (
        t.new_empty(t.shape if n else (0,), dtype=dtype) for t, n in zip(like, needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


@torch.library.custom_op("l3m_kernels::log_likelihood", mutates_args=())
def _log_likelihood(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    scored: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_values("log_likelihood", targets, cu_seqlens, len(weight), ignore_index, scored)
    run = select("log_likelihood", backend, hidden.device.type, hidden.dtype, hidden.device.index)
    head = head_of(weight, bias, softcap, temperature)
    offsets, fault = offsets_on(hidden.device, cu_seqlens, len(hidden))
    sequence, *rest = run(hidden, targets, offsets, head, ignore_index, scored)
    return sequence if fault is None else sequence + fault, *rest


@_log_likelihood.register_fake
def _(hidden, weight, targets, cu_seqlens, *_):
    sequence, length, token = _statistics(hidden, cu_seqlens)
    return sequence, length, token, torch.empty_like(token)


@torch.library.custom_op("l3m_kernels::log_likelihood_backward", mutates_args=())
def _log_likelihood_backward(
    grad_sequence: Tensor,
    grad_token: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    scored: int | None,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("log_likelihood_backward", backend, hidden.device.type, hidden.dtype, hidden.device.index)
    head = head_of(weight, bias, softcap, temperature)
    needs = (need_hidden, need_weight, need_bias)
    offsets, fault = offsets_on(hidden.device, cu_seqlens, len(hidden))
    grad_sequence = grad_sequence if fault is None else grad_sequence + fault
    return run(grad_sequence, grad_token, hidden, targets, offsets, lse, head, ignore_index, needs, scored)


@_log_likelihood_backward.register_fake
def _(grad_sequence, grad_token, hidden, weight, targets, cu_seqlens, bias, *rest):
    return _gradients(hidden, weight, bias, rest[-3:])


_log_likelihood_backward.register_autograd(refuse_double)


def _setup(ctx, inputs, output):
    hidden, weight, targets, cu_seqlens, bias, *ctx.options = inputs
    _, length, token, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(length, lse)
    ctx.sequences, ctx.tokens = length.shape[0], token.shape[0]  # len() would fix them in compiled code
    ctx.save_for_backward(hidden, weight, targets, cu_seqlens, bias, lse)


def _backward(ctx, grad_sequence, grad_length, grad_token, grad_lse):
    hidden, weight, targets, cu_seqlens, bias, lse = ctx.saved_tensors
    grad_sequence = lse.new_zeros(ctx.sequences) if grad_sequence is None else grad_sequence
    grad_token = lse.new_zeros(ctx.tokens) if grad_token is None else grad_token
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[4])
    arguments = (grad_sequence, grad_token, hidden, weight, targets, cu_seqlens, bias, lse)
    gradients = _log_likelihood_backward(*arguments, *ctx.options, *needs)
    d_hidden, d_weight, d_bias = (grad if need else None for grad, need in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, None, None, d_bias, *[None] * 5


_log_likelihood.register_autograd(_backward, setup_context=_setup)


# ---- weighted_log_likelihood -----------------------------------------------------------------------------------------


@torch.library.custom_op("l3m_kernels::weighted_log_likelihood", mutates_args=())
def _weighted_log_likelihood(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_weight: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    scored: int | None,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_values("weighted_log_likelihood", targets, cu_seqlens, len(weight), ignore_index, scored)
    run = select("weighted_log_likelihood", backend, hidden.device.type, hidden.dtype, hidden.device.index)
    head = head_of(weight, bias, softcap, temperature)
    needs = (need_hidden, need_weight, need_bias)
    offsets, fault = offsets_on(hidden.device, cu_seqlens, len(hidden))
    if fault is None:
        return run(hidden, targets, seq_weight, offsets, head, ignore_index, needs, scored)
    loss, sequence, *rest = run(hidden, targets, seq_weight + fault, offsets, head, ignore_index, needs, scored)
    return loss + fault, sequence + fault, *rest


@_weighted_log_likelihood.register_fake
def _(hidden, weight, targets, seq_weight, cu_seqlens, bias, *rest):
    sequence, length, token = _statistics(hidden, cu_seqlens)
    return sequence.new_empty(()), sequence, length, token, *_gradients(hidden, weight, bias, rest[-3:], unscaled=True)


def _weighted_setup(ctx, inputs, output):
    hidden, weight, *_ = inputs
    ctx.backend, ctx.needs = inputs[-4], inputs[-3:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, inputs[5], *output[4:])


def _weighted_backward(ctx, grad_loss, *_):
    hidden, weight, bias, *gradients = ctx.saved_tensors  # read once: each read unpacks, and a checkpoint allows one
    inputs = (hidden, weight, bias)
    scaled: list[Tensor | None] = [None] * 3
    if grad_loss is not None:
        for i, need in enumerate(ctx.needs):
            if need:
                gradient = _once_differentiable(gradients[i], *inputs) if torch.is_grad_enabled() else gradients[i]
                scaled[i] = _scaled(gradient, grad_loss, hidden.dtype, ctx.backend)
    return scaled[0], scaled[1], None, None, None, scaled[2], *[None] * 8


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """gradient * upstream in `dtype`, rounded once: without a pass over it (V x D for a weight) where the loss itself is differentiated.

    On a CPU that can be seen; on a GPU a kernel sees it. A graph that is kept needs a copy: who holds the first gradient may change it in
    place. So does a CUDA graph, whose replays may find a gradient that an earlier one has scaled.
    """
    traced = type(upstream) is not Tensor or torch.compiler.is_compiling() or get_proxy_mode() is not None  # or fake
    if traced or torch.is_grad_enabled() or is_batched(upstream):
        return (gradient * upstream).to(dtype)  # 0-dim fp32: a loss scale of 65536 is no fp16 number
    last = not _get_current_graph_task_keep_graph()
    if upstream.device.type == "cpu" and upstream.item() == 1 and (last or gradient.dtype != dtype):
        return gradient.to(dtype)
    if gradient.dtype == dtype and last and (scale := _kernel_for(gradient, upstream, backend)) is not None:
        scale(gradient, upstream)
        return gradient
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))


def _kernel_for(gradient: Tensor, upstream: Tensor, backend: str) -> Callable[[Tensor, Tensor], None] | None:
    if not upstream.is_cuda or upstream.dtype != torch.float32 or not gradient.is_contiguous():
        return None
    return (
        None
        if torch.cuda.is_current_stream_capturing()
        else scale_in_place("weighted_log_likelihood", backend, upstream.device)
    )


_weighted_log_likelihood.register_autograd(_weighted_backward, setup_context=_weighted_setup)


@torch.library.custom_op("l3m_kernels::once_differentiable", mutates_args=())
def _once_differentiable(gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A gradient that the forward formed, tied to all it depends on: differentiating it again is refused and not silently 0."""
    return gradient.clone()


_once_differentiable.register_fake(lambda gradient, hidden, weight, bias: torch.empty_like(gradient))
_once_differentiable.register_autograd(refuse_double)
