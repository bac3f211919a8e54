"""What a fused head needs where fully_shard has split the model.

fully_shard gathers a module's weights again for its backward when the gradient of its *output* is about to be computed. The output of a
fused head is no part of its loss: `Linked` makes it one, so that the weights are there when the loss's backward reads them.

Its mixed precision casts the numbers of a call on the way in and out. Weights of sequences and log-likelihoods are not activations:
rounded to bfloat16 a multiplier is off by up to 0.4%. `as_bits` takes the weights in, `HeadOutput.exact` the results out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Linked:
    """A loss, and what its head returns in place of logits."""

    def __init__(self, loss: Tensor, logits: Tensor, box: list[Tensor] | None):
        self._loss, self.logits, self._box = loss, logits, box

    @classmethod
    def of(cls, module: nn.Module, loss: Tensor, logits: Tensor) -> Linked:
        """The backward of the loss goes through the `logits` of `module` where it was split on its own."""
        if not (hasattr(module, "unshard") and loss.requires_grad):
            return cls(loss, logits, None)
        box: list[Tensor] = []
        through: Any = _Through.apply(logits, loss, box)
        return cls(loss.detach(), through, box)

    def loss(self) -> Tensor:
        return self._loss if self._box is None else _Behind.apply(self.logits, self._loss, self._box)  # type: ignore[return-value]


class _Through(torch.autograd.Function):
    """The logits; the gradient of the loss is in the box by the time that theirs is asked for."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], ctx.box[-1] if ctx.box else None, None


class _Behind(torch.autograd.Function):
    """The loss, whose gradient goes into the box, and zeros to the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box, ctx.like = box, (logits.shape, logits.dtype, logits.device)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.box[:] = grads
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), None, None


def as_bits(seq_weight: Tensor) -> Tensor:
    """(N,) fp32 as (N, 4) bytes, which nothing casts; of another dtype as it is."""
    return seq_weight.contiguous()[:, None].view(torch.uint8) if seq_weight.dtype == torch.float32 else seq_weight


def uncast(model: nn.Module, seq_weight: Tensor) -> Tensor:
    """As a call of `model` takes it: of bits where fully_shard stands around it."""
    return as_bits(seq_weight) if hasattr(model, "unshard") else seq_weight


def exact_numbers(seq_weight: Tensor, name: str) -> Tensor:
    """The weights, of bytes or as they are.

    Raises:
        ValueError: 16-bit numbers.
    """
    if seq_weight.dtype == torch.uint8 and seq_weight.ndim == 2:
        return seq_weight.view(torch.float32)[:, 0]
    if seq_weight.dtype in (torch.bfloat16, torch.float16):
        kind = str(seq_weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name}: seq_weight is {kind}, which rounds multipliers; give float32 (where fully_shard's MixedPrecisionPolicy casts it: "
            "cast_forward_inputs=False, since tokens need no cast, or fully_shard on the model inside of its adapters)"
        )
    return seq_weight
