"""The optimizer that `L3MOptimizer` wraps: what it must be, and what is passed on to it where it has it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


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


def first_parameter(base: torch.optim.Optimizer) -> nn.Parameter:
    """Of any group: those of biases and norms, or all others, may be empty."""
    return next(parameter for group in base.param_groups for parameter in group["params"])


class Modes:
    """`train()` and `eval()` of a `base` that has two modes (schedule-free); nothing for others."""

    base: torch.optim.Optimizer

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
