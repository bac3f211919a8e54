"""The optimizer that `L3MOptimizer` wraps: what it must be, and what is passed on to it where it has it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from l3ms.barrier.several import SeveralOptimizers


def as_one(base: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer that is wrapped, several as one. ValueError where no half-step can be made with it, or with one of them."""
    several = isinstance(base, Sequence)
    one = SeveralOptimizers(base) if several else base
    check_base(one)
    for part in base if several else ():
        check_base(part)
    return one


def check_base(base: Any) -> None:
    """ValueError for what no half-step can be made with: no optimizer, no parameters, a step that needs a closure."""
    if not isinstance(base, torch.optim.Optimizer):
        raise ValueError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
    if not any(group["params"] for group in base.param_groups):
        raise ValueError("base has no parameters: is anything trainable (requires_grad)?")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"base must step without a closure, which {type(base).__name__} needs: the two half-steps are two backward "
            "passes, each before its own step()"
        )


def call_once(closure: Callable[[], Any] | None) -> Any:
    """What a `closure` of the user's returns, made with gradients; ValueError for that of Lightning's automatic optimization."""
    if closure is None:
        return None
    inner: Any = closure
    while isinstance(
        inner, functools.partial
    ):  # its precision plugin binds the module, the optimizer and the closure itself
        inner = next((value for value in reversed(inner.args) if callable(value)), inner.func)
    if type(inner).__module__.endswith("loops.optimization.automatic"):
        raise ValueError(
            "Lightning's automatic optimization makes one step of each batch, and an L3MOptimizer two: set "
            "self.automatic_optimization = False, and take both half-steps in training_step (examples/lightning_loop.py)"
        )
    with torch.enable_grad():
        return closure()


def first_parameter(base: torch.optim.Optimizer) -> nn.Parameter:
    """Of any group: those of biases and norms, or all others, may be empty."""
    return next(parameter for group in base.param_groups for parameter in group["params"])


class Wrapping:
    """What is passed on to `base`: new groups; `train()` and `eval()` where it has two modes (schedule-free)."""

    base: torch.optim.Optimizer
    _share: Callable[[], None]  # of groups and state there is one, of both

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To `base`, which steps it, with its defaults. Raises `ValueError` where that is several, of which nobody says which."""
        if "estimates" not in vars(self):  # torch's own __init__
            super().add_param_group(param_group)  # type: ignore[misc]
            return
        self.base.add_param_group(param_group)
        self._share()

    def train(self) -> None:
        """The weights that steps are made with."""
        self._pass_on("train")

    def eval(self) -> None:
        """The weights that are evaluated and kept."""
        self._pass_on("eval")

    def _pass_on(self, mode: str) -> None:
        change = getattr(self.base, mode, None)
        if callable(change):
            change()
