"""The transformers model inside a model with adapters."""

from typing import Any


def inside_adapters(model: Any) -> Any:
    """The model that peft has put its adapters into, which has the head and the settings; the model itself where there are none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def active_adapters(model: Any) -> list[str] | None:
    """Their names; None where peft has put none into it."""
    found = getattr(model, "active_adapters", None)
    return list(found) if isinstance(found, list) else None


def reads_rows(model: Any) -> bool:
    """Whether what an adapter adds to a token depends on the other tokens of its row: an activated LoRA adds from its invocation on, X-LoRA
    weighs by all of them. Then no part of a row can go through the model on its own."""
    configs = (getattr(model, "peft_config", None) or {}).values()
    return any(
        getattr(config, "alora_invocation_tokens", None) or getattr(config, "peft_type", None) == "XLORA"
        for config in configs
    )
