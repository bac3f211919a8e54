"""The barrier's state as a text in the optimizer's parameter groups, for tools that keep nothing else of an optimizer's state.

`torch.distributed.checkpoint.state_dict` (FSDP2, torchtitan, accelerate) hands on `state` and `param_groups` alone. A text is an option
of a group like another to it: kept, loaded and sent to other ranks as it is, whatever is sharded. Floats come back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "l3m"  # of the option, None while a training runs


def reserve(groups: Iterable[dict[str, Any]]) -> None:
    """The option in each group: what is loaded flattened is looked for under the names that the groups have."""
    for group in groups:
        group.setdefault(KEY, None)


def joined(base: Mapping[str, Any], ours: Any) -> dict[str, Any]:
    """The state_dict of an optimizer with that of the barrier: under KEY, and in each group, any of which may be all that is kept."""
    text = json.dumps(_plain(ours))
    return {**base, "param_groups": [{**group, KEY: text} for group in base["param_groups"]], KEY: ours}


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """What `joined` was given, the barrier's None where it is nowhere."""
    groups = state.get("param_groups", [])
    plain = [{name: value for name, value in group.items() if name != KEY} for group in groups]
    base = {name: value for name, value in state.items() if name != KEY} | {"param_groups": plain}
    if KEY in state:
        return base, state[KEY]
    # An empty group is not loaded by torch's tools: its text is that of the optimizer that was there before
    texts = [group[KEY] for group in groups if group["params"] and group.get(KEY) is not None]
    return base, _made(json.loads(texts[0])) if texts else None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if isinstance(value, dict):
        return {"items": {name: _plain(item) for name, item in value.items()}}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return [_made(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {name: _made(item) for name, item in value["items"].items()}
    return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
