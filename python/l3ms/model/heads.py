"""The fused head inside a transformers model: `fuse_head(model)` gives its own forward one more argument, `seq_weight`.

With `seq_weight` the model returns the weighted log-likelihood instead of logits, computed where the head's module runs. The call goes
through the model as usual, so whatever wraps it (DDP, FSDP, PEFT, gradient checkpointing) sees an ordinary forward and has the head's
weight at hand; nothing depends on the architecture's code.
"""

import functools
import inspect
import types
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from l3m_kernels import weighted_log_likelihood
from l3ms.model.losses import shift


@dataclass
class HeadOutput(ModelOutput):
    """What a model with a fused head returns for `seq_weight`."""

    loss: Tensor | None = None  # (), -sum_n seq_weight_n log pi(y_n)
    sequence: Tensor | None = None  # (N,) log-likelihoods, detached
    length: Tensor | None = None  # (N,) scored tokens
    token: Tensor | None = None  # (N, L) detached


@dataclass(frozen=True)
class HeadOptions:
    """What the model does to its logits after the head's product."""

    softcap: float | None
    divisor: float  # of the logits, after the softcap


def head_options(model: PreTrainedModel) -> HeadOptions:
    """Read from the configuration: Gemma's softcap, Cohere's logit_scale, Granite's logits_scaling."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = 1.0 / (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "logits_scaling", None) or 1.0)
    return HeadOptions(softcap, divisor)


def fuse_head(model: nn.Module, backend: str | None = None) -> PreTrainedModel:
    """Let `model(..., labels=labels, seq_weight=weights)` return a `HeadOutput`, in place; other calls are as before.

    Extra arguments of such a call: `labels` (N, L), not shifted, -100 where not scored; `seq_weight` (N,) constants; `temperature`;
    `scored`, the number of `labels[:, 1:]` that are not -100, where it is known on the host: a GPU then need not be waited for.

    Returns:
        the transformers model (inside PEFT's wrapper, if any).

    Raises:
        ValueError: no linear output head, or a model that does something to its logits which the fused head would leave out: one token
            is compared.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"fuse_head: wanted a transformers model, got {type(inner).__name__}")
    if isinstance(inner, _FusedHead):
        return inner
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"fuse_head: {type(inner).__name__} has no plain linear output head (got {type(head).__name__}); "
            "an adapter on lm_head is not supported: leave it out of the adapter's target modules"
        )
    plain = type(inner)
    inner.__class__ = _fused_class(plain)
    inner._l3m_backend = backend  # type: ignore[attr-defined]
    training = inner.training
    try:
        _check_against_logits(inner.eval())
    except BaseException:
        inner.__class__ = plain  # refused: as it was, and refused again the next time
        raise
    finally:
        inner.train(training)
    return inner


class _FusedHead:
    """Mixed into the model's class: the fused branch of its forward."""

    _l3m_backend: str | None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """For pickle and torch.save: the class was made here, so what is kept is the one it was made from."""
        return _unfilled, (type(self).__mro__[2],), super().__reduce_ex__(2)[2]

    def _fused_forward(
        self,
        forward: Any,
        args: tuple,
        labels: Tensor,
        seq_weight: Tensor,
        temperature: float,
        scored: int | None,
        kwargs: dict,
    ) -> HeadOutput:
        model: Any = self
        options = head_options(model)
        targets = shift(labels)
        found: list[HeadOutput] = []

        def run(head: nn.Linear, hidden: Tensor) -> Tensor:
            fused = {
                "softcap": options.softcap,
                "temperature": temperature * options.divisor,
                "scored": scored,
                "backend": model._l3m_backend,
            }
            loss, seen = weighted_log_likelihood(hidden, head.weight, targets, seq_weight, bias=head.bias, **fused)
            found.append(HeadOutput(loss=loss, sequence=seen.sequence, length=seen.length, token=seen.token))
            return hidden.new_zeros((*hidden.shape[:-1], 1))  # what the model's own code takes for logits

        with _replaced_forward(model.get_output_embeddings(), run):
            forward(*args, **kwargs)
        return found[0]


@functools.cache
def _fused_class(cls: type) -> type:
    """A subclass of the model's class, of the same name (it is written into saved configurations)."""

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self, *args, labels=None, seq_weight=None, temperature=1.0, scored=None, **kwargs):
        if seq_weight is None:
            return (
                cls.forward(self, *args, **kwargs)
                if labels is None
                else cls.forward(self, *args, labels=labels, **kwargs)
            )  # type: ignore[attr-defined]
        own = functools.partial(cls.forward, self)  # type: ignore[attr-defined]
        return self._fused_forward(own, args, labels, seq_weight, temperature, scored, kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]  # generate() reads it
    return type(
        cls.__name__, (_FusedHead, cls), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    )


def _unfilled(plain: type) -> Any:
    """An instance of the fused class before its state is set."""
    fused: Any = _fused_class(plain)
    return fused.__new__(fused)


@contextmanager
def _replaced_forward(module: nn.Module, run: Any):
    """`module.forward` is `run(module, x)` inside the block. Hooks around the module's call stay."""
    before = module.__dict__.get("forward")
    module.forward = types.MethodType(run, module)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@torch.no_grad()
def _check_against_logits(model: Any) -> None:
    vocabulary = model.get_output_embeddings().weight.shape[0]
    ids = (torch.arange(4, device=model.device) * 7919 % vocabulary)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    plain = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    fused = model(input_ids=ids, labels=ids, seq_weight=torch.zeros(1, device=ids.device), use_cache=False).token[
        0, :-1
    ]
    # 16-bit logits are rounded in the plain forward, at sizes of 30 by up to 0.06.
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25
    if not torch.allclose(plain, fused.to(plain), atol=tolerance, rtol=tolerance):
        raise ValueError(
            f"fuse_head: {type(model).__name__} changes its logits in a way that the fused head does not know "
            f"(log-likelihoods {plain.tolist()} against {fused.tolist()}); it cannot be used"
        )
