"""What a proof of a fused head was about: after a change of it another is wanted, or what was found is found again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from l3ms.model.autocasting import wrapped

# Whose hooks on a head split, bring or cast what goes through.
_KNOWN = ("torch.", "accelerate.", "transformers.", "deepspeed.")


def proven_state(model: Any, inner: Any) -> str:
    """Of the transformers model `inner` in its wrapper `model`, which is what is called."""
    head = inner.get_output_embeddings()
    wrappers = [type(m).__name__ for m in model.modules() if any(child is inner for child in m.children())]
    adapters = [f"{key} {type(value).__name__}" for key, value in (getattr(model, "peft_config", None) or {}).items()]
    hooks = len(head._forward_hooks) + len(head._forward_pre_hooks)
    kind = type(head).__name__.removeprefix("FSDP")  # which fully_shard puts before it
    forward = _given_forward(inner, "_original_forward" if wrapped(inner) else "forward")
    on_head = f"{kind} {hooks} {foreign(head)} {numbers(inner)}"
    return f"{wrappers} {adapters} {on_head} {forward} {inner.config.to_json_string(use_diff=False)}"


def foreign(head: nn.Module) -> str:
    """What may change what comes out of a head, put there by whom nothing is known of: another forward, hooks behind it. Mostly empty."""
    if not head._forward_hooks and "forward" not in vars(head):
        return ""
    held = "_old_forward" if "_hf_hook" in vars(head) else "forward"  # accelerate's stand in `forward`
    return ", ".join([*filter(None, [_given_forward(head, held)]), *_hooks(head)])


def _given_forward(module: Any, attribute: str) -> str:
    """Of somebody who has replaced it on this module; empty for the class's own."""
    given = vars(module).get(attribute)
    if given is None or getattr(given, "__func__", None) is type(module).forward:
        return ""
    return f"{_named(given)} {id(given)}"


def _hooks(head: nn.Module) -> Iterator[str]:
    for number, hook in head._forward_hooks.items():  # numbered by torch, all that there are in a process
        function = getattr(hook, "func", hook)  # of functools.partial
        if not str(getattr(function, "__module__", "")).startswith(_KNOWN):
            yield f"{_named(function)} {number}"


def _named(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def numbers(model: Any) -> dict[str, float]:
    """Of a model and its configuration: a cap of its logits, a scale, the weight of its router's loss are among them."""
    text = model.config.get_text_config()
    places = [("model", model), ("config", model.config), *([] if text is model.config else [("text", text)])]
    return {
        f"{place}.{name}": value
        for place, holder in places
        for name, value in vars(holder).items()
        if type(value) in (int, float) and not name.startswith("_") and not name.endswith("token_id")
    }
