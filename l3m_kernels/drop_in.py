"""Functions with the signatures that people already call, over `log_likelihood` and `weighted_log_likelihood`: no (T, V) logits in any.

    liger_fused_linear_cross_entropy     liger_kernel 0.8.5, and its module LigerFusedLinearCrossEntropyLoss
    linear_cross_entropy                 torch.nn.functional of torch 2.13
    selective_log_softmax                trl 1.16, of hidden states and the head's matrix in the place of logits

An argument is honoured, or refused in one line that names it; nothing falls back to something slower. What is different: results are fp32
(fp64 for fp64 inputs) where the originals round those of 16-bit inputs; there is no second derivative. What is wrong with a dtype or device
is told by the op below, which calls the arguments `hidden`, `weight`, `targets` and `bias`.

Letters: T tokens, D hidden size, V vocabulary, K columns of an index.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from l3m_kernels.ops import log_likelihood, weighted_log_likelihood

# No token has this id, so a function whose original ignores none ignores none.
NO_TOKEN = torch.iinfo(torch.int64).min
# Fields of torch's LinearCrossEntropyOptions that hold whatever they are: a second backward is always possible.
HELD = {"allow_retain_graph"}


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor:
    """Cross-entropy of softcap(input @ weight.T + bias), as `liger_kernel.transformers.functional` has it.

    Args:
        input: (T, D) hidden states.
        weight: (V, D), the head's matrix.
        target: (T,) int64, already shifted.
        bias: (V,).
        ignore_index: targets of this value have loss 0 and do not count in the mean; where all have it the mean is 0.
        reduction: "mean", "sum", or "none" for the loss of each token (T,), to be weighed by any upstream gradient.
        softcap: logits become softcap * tanh(logits / softcap).
        accum_dtype: the weight's gradient is summed in fp32 (fp64 for fp64 inputs), so this or None.
        ce_weight, lse_square_scale, label_smoothing, return_z_loss, use_token_scaling, return_token_accuracy, return_predicted_tokens,
            chunk_mem_const: at their defaults.

    Raises:
        ValueError: one of the last is not at its default, or a shape, dtype or `reduction` is wrong.
    """
    op = "liger_fused_linear_cross_entropy"
    _refuse(op, "ce_weight", ce_weight, None)
    _refuse(op, "lse_square_scale", lse_square_scale, 0.0)
    _refuse(op, "label_smoothing", label_smoothing, 0.0)
    _refuse(op, "return_z_loss", return_z_loss, False)
    _refuse(op, "use_token_scaling", use_token_scaling, False)
    _refuse(op, "return_token_accuracy", return_token_accuracy, False)
    _refuse(op, "return_predicted_tokens", return_predicted_tokens, False)
    _refuse(op, "chunk_mem_const", chunk_mem_const, 1, "l3m_kernels.set_workspace bounds the memory of logits")
    _check_sums(op, "accum_dtype", accum_dtype, input)
    _refuse_nested(op, input=input, target=target)
    if input.ndim != 2 or target.shape != input.shape[:1]:
        raise ValueError(
            f"{op}: input must be (T, D) and target (T,), got shapes {tuple(input.shape)} and {tuple(target.shape)}; flatten both"
        )
    return _cross_entropy(op, input, weight, target, bias, ignore_index, reduction, softcap, least=1)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """`liger_fused_linear_cross_entropy` as the module of that name: its options at construction, `(lin_weight, _input, target, bias)`."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        self.options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return liger_fused_linear_cross_entropy(_input, lin_weight, target, bias, **self.options)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Cross-entropy of input @ linear_weight.T + linear_bias, as `torch.nn.functional.linear_cross_entropy` has it.

    Args:
        input: (T, D), or (D,) for one sample.
        linear_weight: (V, D); the K-dimensional loss is refused.
        target: (T,) or () class indices; class probabilities are refused.
        linear_bias: (V,).
        weight: of the classes: None.
        reduction: "mean" (NaN where all targets are ignored), "sum", or "none" for the loss of each sample.
        ignore_index: None is -100.
        label_smoothing: 0.
        options: None, or torch's `LinearCrossEntropyOptions`, which change the sums and the memory of its own kernel: `allow_retain_graph`
            holds either way and `acc_dtype` may be what sums are made in here (fp32, fp64 for fp64 inputs); the others at their defaults.

    Raises:
        ValueError: what is refused, or a shape, dtype or `reduction` is wrong.
    """
    op = "linear_cross_entropy"
    _refuse(op, "weight", weight, None)
    _refuse(op, "label_smoothing", label_smoothing, 0.0)
    _check_options(op, options, input)
    _refuse_nested(op, input=input, target=target)
    if linear_weight.ndim != 2:
        raise ValueError(
            f"{op}: linear_weight must be (V, D), got shape {tuple(linear_weight.shape)}; torch has the K-dimensional loss"
        )
    if target.is_floating_point():
        raise ValueError(
            f"{op}: target must be class indices, got {target.dtype}; torch has that of class probabilities"
        )
    if input.ndim not in (1, 2) or target.shape != input.shape[:-1]:
        raise ValueError(
            f"{op}: input must be (T, D) and target (T,), or (D,) and (); got shapes {tuple(input.shape)} and {tuple(target.shape)}"
        )
    ignored = -100 if ignore_index is None else ignore_index
    rows, targets = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    loss = _cross_entropy(op, rows, linear_weight, targets, linear_bias, ignored, reduction, None, least=0)
    return loss.view(target.shape) if reduction == "none" else loss


def selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """log_softmax(softcap(hidden @ weight.T + bias) / temperature) at `index`: `trl.trainer.utils.selective_log_softmax` without logits.

    Args:
        hidden: (..., D), what the head is given.
        weight: (V, D), the head's matrix.
        index: (...) token ids, or (..., K), K of them per position: each column is a pass of its own and costs as much as one alone.
        bias: (V,).
        temperature: divides the logits.
        softcap: of a model that has one (`final_logit_softcapping`).
        row_mask: like index; where it is 0 nothing is computed and the result is 0.

    Returns:
        like index: log-probabilities, to be differentiated with any upstream gradient.

    Raises:
        ValueError: a shape, dtype or option is wrong.
        IndexError: an index outside [0, V), -100 as well; what a GPU does: `l3m_kernels.log_likelihood`.
    """
    op = "selective_log_softmax"
    _refuse_nested(op, hidden=hidden, index=index)
    positions, columns = hidden.shape[:-1], index.ndim == hidden.ndim
    if index.shape != positions and not (columns and index.shape[:-1] == positions and index.shape[-1]):
        raise ValueError(
            f"{op}: index must be {tuple(positions)} like hidden, or that and K >= 1 columns, got shape {tuple(index.shape)}"
        )
    if row_mask is not None:
        if row_mask.shape != index.shape:
            raise ValueError(f"{op}: row_mask must be {tuple(index.shape)} like index, got {tuple(row_mask.shape)}")
        index = index.long().masked_fill(row_mask == 0, NO_TOKEN)
    rows = hidden.reshape(-1, hidden.shape[-1])
    options = {"bias": bias, "temperature": temperature, "softcap": softcap, "ignore_index": NO_TOKEN}
    of_column = [
        log_likelihood(rows, weight, ids.reshape(-1), _one_sequence(rows), **options).token.view(ids.shape)
        for ids in (index.unbind(-1) if columns else (index,))
    ]
    return torch.stack(of_column, -1) if columns else of_column[0]


def _cross_entropy(
    op: str,
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (T,)
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    softcap: float | None,
    least: int,  # what the mean divides by at least
) -> Tensor:
    options = {"bias": bias, "softcap": softcap, "ignore_index": ignore_index}
    offsets = _one_sequence(hidden)
    if reduction == "none":
        return -log_likelihood(hidden, weight, targets, offsets, **options).token
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    each = torch.ones(1, dtype=dtype, device=hidden.device)
    if reduction == "mean":
        each = each / (targets != ignore_index).sum().clamp(min=least)
    return weighted_log_likelihood(hidden, weight, targets, each, offsets, **options)[0]


def _one_sequence(hidden: Tensor) -> Tensor:
    """cu_seqlens (2,) of rows that are one sequence."""
    return torch.arange(2, device=hidden.device) * hidden.shape[0]


def _refuse(op: str, name: str, value: object, default: object, way_out: str = "") -> None:
    if value is default or (default is not None and not isinstance(value, Tensor) and value == default):
        return
    given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"{op}: {name} must be {default}, got {given}; {way_out or 'the fused head does not compute it'}")


def _refuse_nested(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.is_nested:
            raise ValueError(f"{op}: {name} must not be nested; pass .values() of a jagged one")


def _check_sums(op: str, name: str, dtype: torch.dtype | None, hidden: Tensor) -> None:
    made_in = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if dtype not in (None, made_in):
        raise ValueError(f"{op}: {name} must be None or {made_in}, what gradients are summed in here, got {dtype}")


def _check_options(op: str, options: Any, hidden: Tensor) -> None:
    if options is None:
        return
    if not dataclasses.is_dataclass(options) or type(options).__name__ != "LinearCrossEntropyOptions":
        raise ValueError(f"{op}: options must be None or a torch.nn.LinearCrossEntropyOptions, got {options!r}")
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "acc_dtype":
            _check_sums(op, "options.acc_dtype", value, hidden)
        elif field.name not in HELD:
            way_out = "it is of torch's own kernel; l3m_kernels.set_workspace bounds the memory here"
            _refuse(op, f"options.{field.name}", value, field.default, way_out)
