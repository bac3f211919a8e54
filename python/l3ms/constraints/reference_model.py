"""The frozen model that a divergence is measured from.

Of a model with adapters it is the model as it is when the training starts. That is the model without them only where they change nothing
yet: PiSSA and OLoRA take their start out of the weights under them, an adapter that was trained before has moved. So a copy of what is
trained is kept, which is small, and put in its place while the reference is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

from torch import Tensor

from l3ms.model.averaging import trained
from l3ms.model.copies import shard_like, whole_copy
from l3ms.model.heads import fuse_head
from l3ms.model.pretrained import load_whole, reason
from l3ms.model.sharding import as_placed, fully_sharded, is_part, is_sharded, local, reshard, whole

logger = logging.getLogger(__name__)

OWN_BASE = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
)  # init_lora_weights that leave the weights under the adapter alone

# In names of what is an adapter's, beside its own prefix.
PARTS = ("prompt_encoder.", "modules_to_save.", "trainable_tokens_")


class Reference:
    """Given, or loaded or copied once; or the policy itself without its adapters, or with those that it started with. `where` names its
    owner in errors."""

    def __init__(self, where: str, given: Any, trust_remote_code: bool = False):
        self.where, self.trust_remote_code = where, trust_remote_code
        self.source = str(given) if isinstance(given, (str, Path)) else None
        self.model: Any = None if self.source is not None else given
        self.adapters = False  # the reference is the policy without them
        self.start: dict[str, Tensor] | None = None  # or with what was trained as it was
        self._policy: Any = None  # a weak one: whose start the reference is, None where it is given or loaded
        self._earlier: WeakSet[Any] = WeakSet()  # whose start it was

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return self

    def prepare(self, model: Any) -> None:
        """Load it; or it is `model` as it is now, a copy or what is under the adapters, until another model is prepared."""
        if self._policy is not None and self._policy() is not model:
            if (before := self._policy()) is not None:
                self._earlier.add(before)
            self._earlier.discard(model)
            self.model, self.adapters, self.start, self._policy = None, False, None, None
            logger.warning("%s: reference is another model now, as it is at the start of its training", self.where)
        self._find(model)

    def _find(self, model: Any) -> None:
        adapted = hasattr(model, "disable_adapter")
        if self.model is None and not self.adapters and self.start is None:
            given = self.source is not None
            own = not given or (
                adapted
                and model.get_base_model().name_or_path == self.source
                and not (_base_changed(model) or _base_trained(model))
            )
            self._policy = ref(model) if own else None
            if own and adapted and (given or _changes_nothing(model)):
                self.adapters = True
            elif own and adapted:
                self.start = {name: parameter.detach().clone() for name, parameter in trained(model)}
            elif own:
                fuse_head(model)
                self.model = whole_copy(model).eval().requires_grad_(False)
            else:
                self.model = self._load(model)
        if (self.adapters or self.start is not None) and not adapted:
            raise ValueError(f"{self.where}: reference is the model without its adapters, but this one has none")
        if self.model is not None:
            ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (model, self.model))
            if ours != theirs:
                raise ValueError(
                    f"{self.where}: reference must have the model's vocabulary of {ours} tokens, got {theirs}"
                )

    def of(self, model: Any) -> tuple[Any, Any]:
        """(reference, the context to use it in), for the policy `model`."""
        if self.model is None and self.source is None and not self.adapters and self.start is None:
            raise ValueError(
                f"{self.where}: reference is missing: call prepare(model) before the training, or give one"
            )
        if model in self._earlier:
            raise ValueError(
                f"{self.where}: reference is the start of another model's training by now: give each model a constraint of its own"
            )
        self._find(model)
        if self.adapters:
            if name := _base_trained(model):
                raise ValueError(
                    f"{self.where}: reference is the model without its adapters, and {name} is trained too: give reference="
                )
            return model, model.disable_adapter()
        if self.start is not None:
            return model, self._as_at_the_start(model)
        reference: Any = self.model
        if is_sharded(model):  # and so is the reference: whole it would be what the policy's parts were to save
            if next(fully_sharded(model), None) is not None and next(fully_sharded(reference), None) is None:
                fuse_head(reference)
                shard_like(reference, model)
            return reference, nullcontext()
        return reference.to(next(model.parameters()).device), nullcontext()

    @contextmanager
    def _as_at_the_start(self, model: Any) -> Iterator[None]:
        """What is trained is what it was when the training started."""
        assert self.start is not None
        reshard(model)
        parameters = dict(model.named_parameters())
        for name, value in self.start.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise ValueError(
                    f"{self.where}: reference is the model with its first adapters, and this one has no whole {name} "
                    "(sharded, or another model): give reference="
                )
        if any(is_part(parameters[name]) for name in self.start):
            try:
                with _values(parameters, self.start):
                    yield
            finally:
                reshard(model)  # of what was gathered of the start nothing is left
            return
        now = {name: parameters[name].data for name in self.start}
        try:
            for name, value in self.start.items():
                parameters[name].data = value.to(now[name])
            yield
        finally:
            for name, value in now.items():
                parameters[name].data = value

    def _load(self, model: Any) -> Any:
        from transformers import AutoModelForCausalLM

        source: Any = self.source
        try:
            reference = load_whole(
                AutoModelForCausalLM, source, dtype=model.dtype, trust_remote_code=self.trust_remote_code
            )
            return reference.eval().requires_grad_(False)
        except Exception as error:  # transformers, the hub client and safetensors raise many kinds
            raise ValueError(
                f"{self.where}: reference cannot be loaded from {self.source!r}: {reason(error)}"
            ) from error


@contextmanager
def _values(parameters: dict[str, Any], values: dict[str, Tensor]) -> Iterator[None]:
    """Sharded parameters have other values: fully_shard gathers from the memory that they have."""
    now = {name: local(parameters[name].detach()).clone() for name in values}
    try:
        for name, value in values.items():
            local(parameters[name].detach()).copy_(local(as_placed(value, parameters[name])))
        yield
    finally:
        for name, value in now.items():
            local(parameters[name].detach()).copy_(value)


def _changes_nothing(model: Any) -> bool:
    """Whether only plain LoRA matrices are trained, and each product with them is 0: the model is the one without its adapters."""
    plain = all(".lora_A." in name or ".lora_B." in name or ".lora_embedding_" in name for name, _ in trained(model))
    second = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]
    return plain and bool(second) and not any(bool(whole(p).any()) for p in second)


def _base_trained(model: Any) -> str | None:
    """The name of a parameter that is trained and is no adapter's (LoRA's bias="all", a norm): without them it is not what it was."""
    kinds = (getattr(model.base_model, "prefix", None) or PARTS[0], *PARTS)
    return next((name for name, _ in trained(model) if not any(kind in name for kind in kinds)), None)


def _base_changed(model: Any) -> bool:
    """Whether an adapter took its start out of the weights under it, which are then not those that were loaded."""
    return any(getattr(c, "init_lora_weights", True) not in OWN_BASE for c in model.peft_config.values())
