"""The generators that are everybody's: of Python, NumPy, torch, and the accelerator. What only looks on leaves them as they are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy, torch on the CPU, and the accelerator of this process."""
    name, keys, *rest = np.random.get_state()
    numbers = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    state = {"python": random.getstate(), "numpy": (name, numbers, *rest), "cpu": torch.random.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """What `random_state` returned; an accelerator that it does not know keeps its own."""
    random.setstate(state["python"])
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


@contextmanager
def undrawn(device: torch.device, when: bool = True) -> Iterator[None]:
    """What is drawn inside was not drawn for those outside, `when` that is asked for."""
    if not when:
        yield
        return
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def stream(*parts: Any) -> int:
    """A seed of its own for what `parts` name, in 63 bits: nothing that is drawn from it is drawn elsewhere."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
