"""How long a row of prompt and response may be: positions that a model has, and lengths beyond which it takes others for all of a row.

Where RoPE's frequencies depend on the length (longrope, dynamic), a response that grows beyond the length of the change keeps what the old
ones made of its beginning, while a forward of the whole takes the new ones: log pi as sampled and as scored were 30 to 50 nats apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

CONTEXT = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")  # in configurations
UNSTEADY = ("longrope", "dynamic")  # kinds of RoPE


def context(model: Any) -> int:
    """Positions by its configuration; 1024 where that says nothing."""
    config = model.config.get_text_config(decoder=True)
    found = [value for name in CONTEXT if isinstance(value := getattr(config, name, None), int) and value > 0]
    return min(found, default=1024)


def check_lengths(model: Any, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises `ValueError` where a response of `max_new_tokens` would be beyond what the model has, or takes, positions for."""
    row = max(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
    own = len(prompt_ids[row])
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    for limit, why in limits(model):
        if own + max_new_tokens + virtual > limit:
            more = f", {virtual} virtual ones" if virtual else ""
            raise ValueError(
                f"rollout: prompts[{row}] has {own} tokens{more} and its response max_new_tokens={max_new_tokens}, and {why}: "
                "lower max_new_tokens, or leave long prompts out"
            )


def limits(model: Any) -> Iterator[tuple[int, str]]:
    """Tokens of a row, and why it must not have more."""
    if (rows := _learned(model)) is not None:
        yield rows, f"the model has {rows} positions"
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    for given in _settings(rope):
        kind = str(given.get("rope_type", given.get("type")))
        if not any(name in kind for name in UNSTEADY):
            continue
        change = context(model)
        if "longrope" in kind:
            own = getattr(config, "original_max_position_embeddings", None)
            change = given.get("original_max_position_embeddings") or own or change
        yield change, f"beyond {change} tokens its {kind} RoPE scores all of a row otherwise than it was sampled"


def _settings(rope: Any) -> Iterator[Mapping[str, Any]]:
    """Of all layers, or of each kind of them."""
    if isinstance(rope, Mapping):
        yield rope
        yield from (given for given in rope.values() if isinstance(given, Mapping))


def _learned(model: Any) -> int | None:
    """Tokens that a table of positions has a row for; None where there is none."""
    most = context(model)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            size = module.num_embeddings - int(getattr(module, "offset", 0))
            if size == most:  # not that of an encoder of images
                # RoBERTa and its kin count from behind the padding's
                return size if module.padding_idx is None else size - module.padding_idx - 1
    return None
