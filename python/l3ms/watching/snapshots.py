"""Where a run can go back to: trained weights, optimizer and running average, on the CPU, in memory.

A snapshot of P trained parameters holds them once, AdamW's two moments, and in the averaged part of the run the average, which is fp32
whatever the weights are: 12 P to 16 P bytes in fp32. Two are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3ms.model.averaging import WeightAverage, trained
from l3ms.model.sharding import local
from l3ms.watching.watched import Watched

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a parameter group, as torch's schedules keep them


class Snapshot(NamedTuple):
    iteration: int
    weights: dict[str, Tensor]  # trained parameters, of sharded ones this rank's part
    optimizer: dict[str, Any]  # L3MOptimizer.state_dict()
    average: tuple[int, dict[str, Tensor]] | None  # iterations in it, its trained parameters

    @classmethod
    def of(cls, trainer: Watched) -> Snapshot:
        assert trainer.l3m_optimizer is not None
        averaged = trainer.average
        return cls(
            trainer.state.global_step,
            _trained(trainer.policy),
            _on_cpu(trainer.l3m_optimizer.state_dict()),
            None if averaged is None else (averaged.n_averaged, _on_cpu(averaged.weights)),
        )

    @torch.no_grad()
    def restore(self, trainer: Watched) -> None:
        """Weights, the wrapped optimizer's state, estimates and mu become the snapshot's, and the average is without what came after it.

        What counts the run goes on: iterations, applied and skipped steps, the learning rate and its scheduler, the prompts. A mu that
        decays with the noise therefore restarts at the snapshot's and still arrives where it should at the end of the run.
        """
        optimizer = trainer.l3m_optimizer
        assert optimizer is not None
        model = trainer.policy
        _copy(self.weights, model)
        rates = [{key: group[key] for key in RATES if key in group} for group in optimizer.param_groups]
        counted = {"constraint_steps": optimizer.constraint_steps, "skipped_steps": optimizer.skipped_steps}
        counted["left_out"] = optimizer.left_out
        state = _on_cpu(self.optimizer)  # a copy: load_state_dict keeps what it is given, and steps are in place
        state["l3m"].update(counted, skipped_in_a_row=0)
        optimizer.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group.update(rate)
        trainer.average = None if self.average is None else WeightAverage.of(*self.average, model)


class Snapshots:
    """Two: one from before what is looked at, and a newer one that will be that."""

    kept = 2

    def __init__(self) -> None:
        self._taken: list[Snapshot] = []

    @property
    def iterations(self) -> list[int]:
        return [snapshot.iteration for snapshot in self._taken]

    def take(self, trainer: Watched, before: int) -> None:
        """But where only the oldest is from iteration `before` or earlier: it is still needed."""
        if len(self._taken) == self.kept and self._taken[-1].iteration > before:
            return
        del self._taken[: -self.kept + 1]  # before the next: never three in memory
        self._taken.append(Snapshot.of(trainer))

    def restore(self, trainer: Watched, before: int) -> int:
        """Go back to the newest one up to iteration `before`, or else the oldest; later ones go. -> its iteration."""
        old = [snapshot for snapshot in self._taken if snapshot.iteration <= before]
        chosen = old[-1] if old else self._taken[0]
        self._taken = [snapshot for snapshot in self._taken if snapshot.iteration <= chosen.iteration]
        chosen.restore(trainer)
        return chosen.iteration


def halve_learning_rate(trainer: Watched) -> None:
    """Of all parameter groups, now and for the rest of the schedule, whose position stays."""
    assert trainer.l3m_optimizer is not None
    scheduler: Any = trainer.lr_scheduler
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    for group in trainer.l3m_optimizer.param_groups:
        for key in RATES:
            if key in group:
                group[key] = group[key] / 2
    _halve(scheduler)
    scheduler._last_lr = [group["lr"] for group in trainer.l3m_optimizer.param_groups]


def _halve(scheduler: Any) -> None:
    """The rates that a schedule of torch keeps, or those that it is made of."""
    for part in getattr(scheduler, "_schedulers", ()):
        _halve(part)
    for name in ("base_lrs", "max_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate / 2 for rate in getattr(scheduler, name)])


def _trained(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: _on_cpu(local(p.detach())) for name, p in trained(module)}


def _copy(kept: Mapping[str, Tensor], module: torch.nn.Module) -> None:
    parameters = dict(trained(module))
    for name, tensor in kept.items():
        local(parameters[name].detach()).copy_(tensor)


def _on_cpu(value: Any) -> Any:
    """A copy that shares no memory, tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value
