"""What steps leave on the device, and what the host says of it: gradients not finite, where mu waits for the noise, conflicts.

A step leaves a few numbers on the device. On a CPU they are looked at at once. From a CUDA device they are copied without waiting and
looked at when they have arrived, as a rule in the next step: nothing that is decided here changes an update.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3ms.barrier.conflicts import ConflictWatch
from l3ms.barrier.schedules import MuSchedule, NoiseFloorDecay, noise_floor

logger = logging.getLogger(__name__)

UNOBSERVED = 20  # steps without a single observation, after which the constraints are taken to have been forgotten


@dataclass
class Progress:
    """() each, on the device. Not attributes of the optimizer: dynamo loses what is assigned to those (torch 2.13)."""

    mu: Tensor  # float64
    skipped: Tensor  # int64, steps
    in_a_row: Tensor  # int64, those up to now whose gradient was not finite

    @classmethod
    def at(cls, mu: Tensor, skipped: int = 0, in_a_row: int = 0) -> "Progress":
        return cls(mu, *(torch.full_like(mu, count, dtype=torch.int64) for count in (skipped, in_a_row)))


class StepNumbers(NamedTuple):
    """Of one step, on the device; only the first of a task half-step."""

    skipped_in_a_row: Tensor  # () int64, with this step
    applied: Tensor | None = None  # () bool
    mu: Tensor | None = None  # () float64, after it
    multiplier: Tensor | None = None  # (K,) float64
    violation: Tensor | None = None  # (K,) float64
    noise: Tensor | None = None  # (R,) float64, standard errors of the dimensionless constraints


class StepReports:
    """Takes the numbers of each step, in order, and logs; `failure` is set while too many steps in a row have been skipped.

    Args:
        names: of the constraints; owner: (K,) the constraint of each one-sided bound.
        schedule: of mu; max_skipped: steps in a row with a gradient that is not finite.
    """

    def __init__(self, names: list[str], owner: list[int], schedule: MuSchedule, max_skipped: int):
        self.names, self.owner, self.end, self.max_skipped = names, owner, schedule.end, max_skipped
        self.conflicts = ConflictWatch(names)
        self.failure: str | None = None
        self._waits = isinstance(schedule, NoiseFloorDecay)
        self._met_at: float | None = None  # the mu that was logged last
        self._unobserved = 0 if names else -1  # steps so far, until something is observed; negative from then on
        self._under_way: deque[tuple[Copy, list[int]]] = deque()

    def send(self, numbers: StepNumbers) -> None:
        """Start the copies and look at those that have arrived."""
        self._count(observed=numbers.applied is not None)
        parts = [part.reshape(-1).double() for part in numbers if part is not None]
        start = _copy_later if parts[0].device.type == "cuda" else _copy_now
        self._under_way.append((start(torch.cat(parts)), [len(part) for part in parts]))
        while self._under_way and self._under_way[0][0].arrived():
            self._look()

    def heard(self) -> None:
        """The constraints are looked after."""
        self._unobserved = -1

    def _count(self, observed: bool) -> None:
        if observed:
            self.heard()
        if self._unobserved < 0:
            return
        self._unobserved += 1
        if self._unobserved == UNOBSERVED:
            logger.warning(
                "L3MOptimizer: %d steps, and nothing was observed: the constraints (%s) have no part in this training; call observe(), "
                "constraint_loss() or barrier_loss() before a backward and step() of their own, or let a trainer do so: "
                "l3ms.constrained(TrainerClass)(..., constraints=[...]) with a plain optimizer",
                UNOBSERVED, ", ".join(self.names),
            )  # fmt: skip

    def wait(self) -> None:
        """Until everything that was sent has been looked at."""
        while self._under_way:
            self._under_way[0][0].wait()
            self._look()

    def _look(self) -> None:
        copy, sizes = self._under_way.popleft()
        in_a_row, applied, mu, multiplier, violation, noise = _split(copy.values.tolist(), sizes)
        self.failure = None
        if in_a_row[0] >= self.max_skipped:
            cause = f"constraint {self.names[self.owner[_largest(multiplier)]]!r}" if multiplier else "the task loss"
            self.failure = (
                f"the gradient of {cause} was not finite in {in_a_row[0]:.0f} steps in a row; "
                "look at its reward or loss, or lower the learning rate"
            )
        if applied and applied[0]:
            self._report_floor(mu[0], noise)
            sides = list(zip(violation, self.owner, strict=True))
            worst = [max((v for v, owner in sides if owner == i), default=-math.inf) for i in range(len(noise))]
            self.conflicts.update(worst)

    def _report_floor(self, mu: float, noise: list[float]) -> None:
        """Log where mu meets the noise floor, and again once it has fallen by a fifth."""
        if not self._waits:
            return
        noisiest = _largest(noise)
        floor = float(noise_floor(torch.tensor(noise[noisiest], dtype=torch.float64)))
        met = floor >= mu * (1 - 1e-9) and mu > self.end
        if met and (self._met_at is None or mu < 0.8 * self._met_at):
            logger.info("mu waits at %.3g: the noise floor of constraint %r is %.3g", mu, self.names[noisiest], floor)
            self._met_at = mu

    def state_dict(self) -> dict[str, Any]:
        self.wait()
        return {"reported_mu": self._met_at, "conflicts": self.conflicts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._under_way.clear()
        before = state.get("constraint_steps") or state.get("left_out")
        self._unobserved = -1 if before or not self.names else 0
        self.failure, self._met_at = None, state["reported_mu"]
        self.conflicts.load_state_dict(state["conflicts"])


def _split(values: list[float], sizes: list[int]) -> list[list[float]]:
    """One list for each field of `StepNumbers`, empty where it was not sent."""
    ends = list(itertools.accumulate(sizes))
    parts = [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return parts + [[]] * (len(StepNumbers._fields) - len(parts))


def _largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


class Copy(NamedTuple):
    """Values on their way to the host."""

    values: Tensor
    arrived: Callable[[], bool]
    wait: Callable[[], None]


def _copy_now(values: Tensor) -> Copy:
    return Copy(values.cpu(), lambda: True, lambda: None)


def _copy_later(values: Tensor) -> Copy:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return Copy(host, event.query, event.synchronize)
