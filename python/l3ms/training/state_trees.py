"""State in JSON and safetensors: None, bool, int, float, str and tensors in lists, tuples, dicts and Counters. Nothing is unpickled."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """`folder/name.json`, and its tensors in `folder/name.safetensors`; types, keys and values come back as they were, on the CPU; NumPy's
    numbers as Python's, and what is derived from such a type as that.

    Raises `TypeError` for anything else in `tree`, saying where.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, tensors, name))
    folder.mkdir(parents=True, exist_ok=True)  # a rank may be here before the one that writes the weights
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def load_tree(folder: Path, name: str) -> Any:
    """What `save_tree` was given. Raises `ValueError` in one line for files that it did not write, `FileNotFoundError` without any."""
    path = folder / f"{name}.safetensors"
    try:
        tree = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return _decode(tree, load_file(path) if path.exists() else {})
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{folder / name}.json is not a state that was saved: {error or type(error).__name__}"
        ) from None


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        pairs = [
            (_encode(key, tensors, where), _encode(item, tensors, f"{where}.{key}")) for key, item in value.items()
        ]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"cannot save a {type(value).__name__} in a checkpoint: {where}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in inner)
    if kind in ("dict", "counter"):
        made = {_decode(key, tensors): _decode(item, tensors) for key, item in inner}
        return made if kind == "dict" else Counter(made)
    raise ValueError(f"unknown kind {kind!r}")
