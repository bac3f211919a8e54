"""The transformers model inside a model with adapters."""

from typing import Any


def inside_adapters(model: Any) -> Any:
    """The model that peft has put its adapters into, which has the head and the settings; the model itself where there are none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
