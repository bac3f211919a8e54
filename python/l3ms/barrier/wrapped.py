"""The optimizer that `L3MOptimizer` wraps: what it must be, and what is passed on to it where it has it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from l3ms.barrier import packed_state
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
    """ValueError for what no half-step can be made with: no optimizer or ours, no parameters, a step that needs a closure or climbs."""
    if not isinstance(base, torch.optim.Optimizer):
        raise ValueError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
    if isinstance(base, Wrapping):
        raise ValueError("base is an L3MOptimizer already: wrap the plain optimizer, once, with all constraints")
    if type(base).__module__.partition(".")[0] == "accelerate":
        raise ValueError(
            "base is prepared by accelerate, which would hide from the barrier when a step is due: wrap it first, "
            "accelerator.prepare(l3ms.L3MOptimizer(base, ...))"
        )
    if not any(group["params"] for group in base.param_groups):
        raise ValueError("base has no parameters: is anything trainable (requires_grad)?")
    if any(group.get("maximize") for group in base.param_groups):
        raise ValueError(
            "base must minimise: with maximize=True it would climb the constraints' loss; negate the task's"
        )
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


def changed(optimizer: Any, state: dict[str, Any], hooks: Mapping[Any, Callable[..., Any]]) -> dict[str, Any]:
    """The state as torch's `hooks` on state dicts leave it, each of which may return another."""
    for hook in hooks.values():
        state = state if (other := hook(optimizer, state)) is None else other
    return state


def first_parameter(base: torch.optim.Optimizer) -> nn.Parameter:
    """Of any group: those of biases and norms, or all others, may be empty."""
    return next(parameter for group in base.param_groups for parameter in group["params"])


class Wrapping:
    """What is passed on to `base`: groups, state and defaults, of which there is one set for both, whoever loads or replaces it; new
    groups; `train()` and `eval()` where it has two modes (schedule-free)."""

    base: torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._made:
            self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._made:
            self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        if self._made:
            self.base.defaults = defaults

    @property
    def _made(self) -> bool:
        """Whether torch's own __init__, which would begin with no groups, is through."""
        return "estimates" in vars(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To `base`, which steps it, with its defaults. Raises `ValueError` where that is several, of which nobody says which."""
        if self._made:
            self.base.add_param_group(param_group)
            packed_state.reserve(self.param_groups)

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
