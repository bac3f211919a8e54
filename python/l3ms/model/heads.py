"""The fused head inside a transformers model: `fuse_head(model)` gives its own forward one more argument, `seq_weight`.

With `seq_weight` the model returns the weighted log-likelihood instead of logits, computed where the head's module runs. The call goes
through the model as usual, so whatever wraps it (DDP, FSDP, PEFT, gradient checkpointing) sees an ordinary forward and has the head's
weight at hand; nothing depends on the architecture's code. What the model does to its logits and its loss is found by asking it
(`after_head`), and all is proven on the model at hand, through what will be called (`head_proofs`).
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from l3m_kernels import log_likelihood, weighted_log_likelihood
from l3ms.model.after_head import AfterHead, find_after_head, no_cross_entropy, replaced_forward
from l3ms.model.head_output import HeadOutput as HeadOutput
from l3ms.model.head_products import Product, head_module, head_rows, is_sharded, product
from l3ms.model.head_proofs import as_it_was, prompt, prove, unreached
from l3ms.model.inside_adapters import inside_adapters
from l3ms.model.losses import shift
from l3ms.model.proven_states import foreign, numbers, proven_state
from l3ms.model.sharding import any_rank, check_flat
from l3ms.model.split_heads import Linked, as_bits, exact_numbers


def fuse_head(model: nn.Module, backend: str | None = None) -> PreTrainedModel:
    """Let `model(..., labels=labels, seq_weight=weights)` return a `HeadOutput`, in place; other calls are as before.

    Extra arguments of such a call: `labels` (N, L), not shifted, -100 where not scored; `seq_weight` (N,) constants; `temperature`;
    `scored`, the number of `labels[:, 1:]` that are not -100, where it is known on the host: a GPU then need not be waited for;
    `auxiliary`: whether the loss holds what the model adds to its own loss (the router loss of a mixture of experts with
    `output_router_logits`, a z-loss, AdaLoRA's regulariser). That belongs to a mean over tokens: by default it is in the loss times the
    sum of the tokens' weights, which is 1 for a mean, and not at all where a weight is negative.

    A tensor-parallel head (`tp_plan="auto"`: its weight is a DTensor of rows) is computed where its rows are, see `l3m_kernels.parallel`;
    calls are then made on all ranks that share it, with the same batch.

    The head is proven on short prompts against the model's own logits, see `head_proofs`; again where this is called again after
    adapters, wrappers or the configuration have changed.

    Args:
        model: a transformers model, or what wraps it and will be called: PEFT, torch.compile.

    Returns:
        the transformers model (inside PEFT's wrapper, if any).

    Raises:
        ValueError: what cannot be proven, by name: no linear output head, an unknown adapter on it, an encoder-decoder, a model that is
            not causal or does something to its logits which the fused head would leave out, a wrapper that does not pass the call on.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"fuse_head: wanted a transformers model, got {type(model).__name__}")
    check_flat(model, "fuse_head")
    inner = _inner(model)
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        raise ValueError(f"fuse_head: {name} is an encoder-decoder; only causal language models can be used")
    head_module(inner)
    state = proven_state(model, inner)
    plain: Any = type(inner)
    fused = issubclass(plain, _FusedHead)
    # One rank's configuration may have changed (it saved the model): those that make forwards together prove together.
    on_head = foreign(inner.get_output_embeddings())
    if not any_rank(inner, not (fused and state in inner._l3m_proven)):
        inner._l3m_foreign = on_head
        return inner
    before = {key: value for key, value in vars(inner).items() if key.startswith("_l3m_")}
    rebound: list[tuple[dict[str, Any], str, Any]] = []
    try:
        with as_it_was(model):
            after = find_after_head(model, inner, prompt(inner))
        if not fused:
            inner.__class__ = _fused_class(plain)
            inner._l3m_backend = backend
            rebound = _rebind(model, inner, plain)
        inner._l3m_after, inner._l3m_found, inner._l3m_foreign = after, numbers(inner), on_head
        with as_it_was(model):
            prove(model, inner, after)
    except BaseException as error:  # refused: as it was, and refused again the next time
        for attributes, key, kept in rebound:
            attributes[key] = kept
        inner.__class__ = plain
        for key in [key for key in vars(inner) if key.startswith("_l3m_")]:
            delattr(inner, key)
        vars(inner).update(before)
        if not isinstance(error, Exception) or (isinstance(error, ValueError) and str(error).startswith("fuse_head: ")):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"fuse_head: {name} cannot be tried: {type(error).__name__}: {reason}") from error
    inner._l3m_proven = (*inner._l3m_proven, state)
    return inner


def unfused(kind: type) -> type:
    """The model's own class, of one that was made here or by fully_shard."""
    return next(k for k in kind.__mro__ if not issubclass(k, _FusedHead) and not hasattr(k, "unshard"))


def take_over_head(copied: Any, model: Any) -> None:
    """The head of a copy, which has the model's own class, is fused where that of `model` is, and as proven as that."""
    inner, target = inside_adapters(model), inside_adapters(copied)
    if isinstance(inner, _FusedHead):
        target.__class__ = _fused_class(type(target))
        vars(target).update({key: value for key, value in vars(inner).items() if key.startswith("_l3m_")})
        target._l3m_foreign = foreign(
            target.get_output_embeddings()
        )  # copied too, and told apart by what is the copy's


def _inner(model: Any) -> Any:
    inner = inside_adapters(getattr(model, "_orig_mod", model))  # of torch.compile
    inner = getattr(inner, "_orig_mod", inner)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"fuse_head: wanted a transformers model, got {type(inner).__name__}")
    return inner


def _rebind(model: nn.Module, inner: Any, plain: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """Wrappers that kept `inner.forward` from before (PEFT's AdaptionPrompt, accelerate's hooks) keep the new one. -> what they had."""
    before = []
    for module in model.modules():
        for name in ("forward", "_old_forward"):
            kept = vars(module).get(name)
            if isinstance(kept, types.MethodType) and kept.__self__ is inner and kept.__func__ is plain.forward:
                before.append((vars(module), name, kept))
                vars(module)[name] = types.MethodType(type(inner).forward, inner)
    return before


class _FusedHead:
    """Mixed into the model's class: the fused branch of its forward."""

    _l3m_backend: str | None
    _l3m_after: AfterHead
    _l3m_proven: tuple[str, ...] = ()
    _l3m_found: dict[str, float] | None = None  # numbers of the model when `_l3m_after` was found; None: of 0.1.0
    _l3m_foreign: str = ""  # what was on its head when it was proven

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Around the hooks of fully_shard, which cast what is called."""
        if hasattr(self, "unshard") and isinstance(seq_weight := kwargs.get("seq_weight"), Tensor):
            kwargs["seq_weight"] = as_bits(seq_weight)
        called: Any = super()
        out = called.__call__(*args, **kwargs)
        if kwargs.get("seq_weight") is not None and not isinstance(out, HeadOutput):
            raise unreached(type(self).__name__, f"{type(self).__name__} has a forward of its own")
        return out

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """For pickle and torch.save: the class was made here, so what is kept is the one it was made from."""
        return _unfilled, (type(self).__mro__[2],), super().__reduce_ex__(2)[2]

    def _after_head(self, head: nn.Module) -> AfterHead:
        """As it was proven; found again for a head that was resized since, other numbers of the model (a cap, a scale), or a file of 0.1.0.

        Raises ValueError for a head with another forward or another hook than when it was proven.
        """
        model: Any = self
        if (now := foreign(head)) != model._l3m_foreign:
            raise ValueError(
                f"fuse_head: the head of {type(model).__name__} has another forward or hook than when it was fused ({now or 'none'}): "
                "call fuse_head again"
            )
        if (
            "_l3m_after" not in vars(model)
            or model._l3m_after.rows != head_rows(head)
            or model._l3m_found != numbers(model)
        ):
            with as_it_was(model):
                after = find_after_head(model, model, prompt(model))
            model._l3m_after, model._l3m_found = after, numbers(model)
        return model._l3m_after

    def _fused_forward(
        self,
        forward: Any,
        args: tuple,
        labels: Tensor | None,
        seq_weight: Tensor,
        temperature: float,
        scored: int | None,
        auxiliary: bool | None,
        kwargs: dict,
    ) -> HeadOutput:
        model: Any = self
        name, head = type(model).__name__, head_module(model)
        if labels is None:
            raise ValueError(f"{name}: seq_weight weighs labels, and there are none")
        seq_weight = exact_numbers(seq_weight, name)
        after, targets = self._after_head(head), shift(labels)
        own_loss = None if auxiliary is False else after.own_loss
        found: list[tuple[Linked, Any]] = []

        def run(module: nn.Module, hidden: Tensor) -> Tensor:
            if found or hidden.shape[:-1] != targets.shape:
                what = "twice" if found else f"on {tuple(hidden.shape)} for labels {tuple(targets.shape)}"
                wanted = "once, on every position: leave logits_to_keep out"
                raise ValueError(f"{name}: its head was called {what}; with seq_weight it must be {wanted}")
            hidden, weight, bias = product(module, hidden)
            if is_sharded(weight) and (after.columns < after.rows or own_loss == "normalised"):
                normalised = own_loss == "normalised"
                why = (
                    "its loss takes the logits' log-sum-exp"
                    if normalised
                    else "its logits are not all rows of the head"
                )
                raise ValueError(
                    f"fuse_head: {name} has a tensor-parallel head, and {why}; leave lm_head out of its tp_plan"
                )
            if after.columns < after.rows:
                weight, bias = weight[: after.columns], None if bias is None else bias[: after.columns]
            head = Product(hidden, weight, bias)
            fused = {
                "softcap": after.softcap,
                "temperature": temperature * after.divisor,
                "scored": scored,
                "backend": model._l3m_backend,
            }
            weights = seq_weight.to(hidden.device)
            loss, seen = weighted_log_likelihood(hidden, weight, targets.to(hidden.device), weights, bias=bias, **fused)
            if own_loss == "normalised":
                logits = _log_normaliser(head, model._l3m_backend)[..., None]
            else:  # What the model's own code takes for logits. Nobody uses them; who did would be heard of.
                logits = hidden.new_full((*hidden.shape[:-1], 1), torch.nan)
            linked = Linked.of(module, loss, logits)
            found.append((linked, seen))
            return linked.logits

        added = None
        with replaced_forward(head, run):
            if own_loss is None:
                forward(*args, **kwargs)
            else:
                with no_cross_entropy(model) as added_to:
                    out = forward(*args, labels=labels, **kwargs)
                added = added_to(out.loss if hasattr(out, "loss") else out[0])
        if not found:
            raise ValueError(f"{name}: its forward did not call its head")
        ((linked, seen),) = found
        loss = linked.loss()
        weights = seq_weight.to(loss.device)
        share = None  # of what is added
        if auxiliary is None:
            share = torch.where((weights >= 0).all(), (weights * seen.length).sum(), 0.0).to(loss.dtype)
        elif auxiliary:
            share = loss.new_ones(())
        added = None if added is None else added.to(loss)
        out = HeadOutput(sequence=seen.sequence, length=seen.length, token=seen.token, auxiliary=added)
        out.hand(loss if added is None or share is None else loss + share * added, share)
        return out


@functools.cache
def _fused_class(cls: type) -> type:
    """A subclass of the model's class, of the same name (it is written into saved configurations)."""
    plain: Any = cls

    @functools.wraps(plain.forward)
    def forward(self, *args, labels=None, seq_weight=None, temperature=1.0, scored=None, auxiliary=None, **kwargs):
        if seq_weight is None:
            given = kwargs if labels is None else {**kwargs, "labels": labels}
            return plain.forward(self, *args, **given)
        own = functools.partial(plain.forward, self)
        return self._fused_forward(own, args, labels, seq_weight, temperature, scored, auxiliary, kwargs)

    forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]  # generate() reads it
    # accelerate's unwrap_model(keep_fp32_wrapper=False) goes on to the innermost, which is another forward
    del forward.__wrapped__
    return type(
        cls.__name__, (_FusedHead, cls), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    )


def _unfilled(plain: type) -> Any:
    """An instance of the fused class before its state is set."""
    fused: Any = _fused_class(plain)
    return fused.__new__(fused)


def _log_normaliser(head: Product, backend: str | None) -> Tensor:
    """(N, L) logsumexp of the logits of every position, differentiable, without the logits: x_0 - log pi(0)."""
    first = (head.hidden.float() * head.weight[0].float()).sum(-1)
    first = first if head.bias is None else first + head.bias[0]
    zeros = torch.zeros(head.hidden.shape[:-1], dtype=torch.int64, device=head.hidden.device)
    return first - log_likelihood(head.hidden, head.weight, zeros, bias=head.bias, backend=backend).token
