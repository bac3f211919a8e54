"""The frozen model that a divergence is measured from."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from l3ms.model.heads import fuse_head
from l3ms.model.pretrained import load_pretrained, reason


class Reference:
    """Given, or loaded or copied once; or the policy itself without its adapters. `where` names its owner in errors."""

    def __init__(self, where: str, given: Any, trust_remote_code: bool = False):
        self.where, self.trust_remote_code = where, trust_remote_code
        self.source = str(given) if isinstance(given, (str, Path)) else None
        self.model: Any = None if self.source is not None else given
        self.adapters = False  # the reference is the policy without them

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return self

    def prepare(self, model: Any) -> None:
        """Load it; or it is `model` as it is now, a copy or what is under the adapters."""
        adapted = hasattr(model, "disable_adapter")
        if self.model is None and not self.adapters:
            own = self.source is None or (adapted and model.get_base_model().name_or_path == self.source)
            if own and adapted:
                self.adapters = True
            elif own:
                fuse_head(model)
                self.model = copy.deepcopy(model).eval().requires_grad_(False)
            else:
                self.model = self._load(model)
        if self.adapters and not adapted:
            raise ValueError(f"{self.where}: reference is the model without its adapters, but this one has none")
        if self.model is not None:
            ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (model, self.model))
            if ours != theirs:
                raise ValueError(
                    f"{self.where}: reference must have the model's vocabulary of {ours} tokens, got {theirs}"
                )

    def of(self, model: Any) -> tuple[Any, Any]:
        """(reference, the context to use it in), for the policy `model`."""
        if self.model is None and self.source is None and not self.adapters:
            raise ValueError(
                f"{self.where}: reference is missing: call prepare(model) before the training, or give one"
            )
        self.prepare(model)
        if self.adapters:
            return model, model.disable_adapter()
        reference: Any = self.model
        return reference.to(next(model.parameters()).device), nullcontext()

    def _load(self, model: Any) -> Any:
        from transformers import AutoModelForCausalLM

        source: Any = self.source
        try:
            reference = load_pretrained(
                AutoModelForCausalLM, source, dtype=model.dtype, trust_remote_code=self.trust_remote_code
            )
            return reference.eval().requires_grad_(False)
        except Exception as error:  # transformers, the hub client and safetensors raise many kinds
            raise ValueError(
                f"{self.where}: reference cannot be loaded from {self.source!r}: {reason(error)}"
            ) from error
