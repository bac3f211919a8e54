"""What a model does to its head's product before it returns logits, and to its loss: found by asking it, not by its architecture's name.

The head is made to return ramps of every size, and what the model makes of them must be `cap tanh(scale x / cap)` of the first `columns`
rows of the vocabulary: Gemma's softcap, Cohere's scale, Granite's divisor, a vocabulary that was padded. Anything else is refused.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l3ms.model.head_products import head_module, head_rows

Call = Callable[..., Any]  # of a model

_SIZES = (1e-3, 1.0, 30.0, 1e3, 1e5, 1e7)  # of the ramps, by position


@dataclass(frozen=True)
class AfterHead:
    """What follows the head's product x: logits = softcap tanh(x / softcap) / divisor."""

    softcap: float | None
    divisor: float
    rows: int  # of the head
    columns: int  # of the logits: the first ones
    # What the model adds to its own loss is found by leaving out the cross-entropy: "added". "normalised": it takes logits, of which
    # their logsumexp stands for all. None: it cannot be told apart.
    own_loss: str | None


def find_after_head(call: Call, model: Any, ids: Tensor) -> AfterHead:
    """Ask `model` through `call`, which is the model itself or what wraps it.

    Args:
        ids: (1, L >= 6) a prompt.

    Raises:
        ValueError: logits that are something else.
    """
    name, head = type(model).__name__, head_module(model)
    given: list[Tensor] = []

    def ramps(module: nn.Module, hidden: Tensor) -> Tensor:
        dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        sizes = torch.tensor(_SIZES, dtype=dtype, device=hidden.device)
        sizes = sizes[torch.arange(hidden.shape[-2], device=hidden.device) % len(_SIZES)]
        ramp = torch.linspace(-1, 1, head_rows(module), dtype=dtype, device=hidden.device)
        given.append((sizes[:, None] * ramp).expand(*hidden.shape[:-1], len(ramp)))
        return given[-1].clone()

    with replaced_forward(head, ramps):
        logits = logits_of(call(input_ids=ids, use_cache=False))
    if len(given) != 1:
        raise ValueError(
            f"fuse_head: {name} calls its head {len(given)} times in a forward, not once; it cannot be used"
        )
    x, y = given[0][0], logits[0]
    rows, columns = x.shape[-1], y.shape[-1]
    if logits.shape[:-1] != given[0].shape[:-1] or not 0 < columns <= rows:
        raise ValueError(
            f"fuse_head: {name} does not return a logit per token and row of its head "
            f"(got {tuple(logits.shape)} of {tuple(given[0].shape)}); it cannot be used"
        )
    tolerance = max(8 * torch.finfo(y.dtype).eps, 1e-6)
    x, y = x[..., :columns].to(torch.float64), y.to(torch.float64)
    small, large = x[:, 0].abs().argmin(), x[:, 0].abs().argmax()
    scale = float(y[small, 0] / x[small, 0])
    cap = float(-y[large, 0])
    if cap < scale * float(-x[large, 0]) * (1 - tolerance):
        scale = float(cap * torch.atanh(y[small, 0] / cap) / x[small, 0])
        expected = cap * torch.tanh(scale * x / cap)
        softcap = cap / scale if scale > 0 else None
    else:
        softcap, expected = None, scale * x
    bound = tolerance * expected.abs().amax(-1, keepdim=True)
    if not scale > 0 or not ((y - expected).abs() <= bound).all():
        raise ValueError(
            f"fuse_head: {name} changes its logits in a way that the fused head does not know "
            "(not a cap, not a scale); it cannot be used"
        )
    return AfterHead(
        None if softcap is None else _short(softcap),
        _short(1 / scale),
        rows,
        columns,
        _own_loss(call, model, head, ids),
    )


def _short(value: float) -> float:
    """Without what float32 logits added: 30.0, not 29.9999986."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 4 * torch.finfo(torch.float32).eps * value else value


def _own_loss(call: Call, model: Any, head: nn.Module, ids: Tensor) -> str | None:
    def nothing(module: nn.Module, hidden: Tensor) -> Tensor:
        return hidden.new_full((*hidden.shape[:-1], 1), torch.nan)

    try:
        with replaced_forward(head, nothing), no_cross_entropy(model) as added_to:
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss
        added = added_to(loss)
    except Exception:  # a loss that is written out in the forward, for the shape of real logits
        return None
    return "normalised" if added is not None and bool(added.isnan()) else "added"


def logits_of(output: Any) -> Tensor:
    """Of a model's output, which is a tuple where its configuration says so."""
    return output.logits if hasattr(output, "logits") else output[0]


@contextmanager
def replaced_forward(module: Any, run: Any) -> Iterator[None]:
    """`module`'s forward is `run(module, x)` inside the block. Hooks around its call stay, also accelerate's, which stand in `forward`."""
    name = "_old_forward" if "_hf_hook" in vars(module) and "_old_forward" in vars(module) else "forward"
    before = vars(module).get(name)
    setattr(module, name, types.MethodType(run, module))
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


@contextmanager
def no_cross_entropy(model: Any) -> Iterator[Callable[[Tensor], Tensor | None]]:
    """The model's own loss is what it adds to the cross-entropy inside the block. -> a function of that loss, which is None for nothing.

    That function raises `LookupError` where the model has not asked for its loss function.
    """
    before = vars(model).get("_loss_function")
    zeros: list[Tensor] = []

    def zero(*args: Any, **options: Any) -> Tensor:
        logits = next(value for value in (*args, *options.values()) if isinstance(value, Tensor))
        zeros.append(torch.zeros((), device=logits.device))
        return zeros[-1]

    def added_to(loss: Tensor) -> Tensor | None:
        if not zeros:
            raise LookupError("the model's loss function was not called")
        untouched = loss is zeros[-1] and not loss.is_inference() and loss._version == 0
        return None if untouched else loss

    model._loss_function = zero
    try:
        yield added_to
    finally:
        if before is None:
            del model._loss_function
        else:
            model._loss_function = before
