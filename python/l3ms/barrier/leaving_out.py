"""Iterations that are left out: the constraints are comfortably met, and nothing is sampled to hear so again.

What is known then is foretold: the filter's level goes on along its trend and its band widens (`l3m_kernels.unobserved`), so that by itself
an iteration comes that is not left out. mu and its noise floor go on with time. The shifts of the bounds do not: they are the integral of
what a barrier leaves over that pushes, and one that does not push has nothing to answer for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l3m_kernels import BarrierWeights, unobserved
from l3ms.barrier.schedules import MuSchedule
from l3ms.barrier.step_reports import Progress

COMFORT = 3.0  # standard errors between an estimate and its bound (or the margin, where that is more) where it is comfortably met


class Foretelling:
    """The estimates' part."""

    index: dict[str, int]
    device: torch.device
    bounds: Any
    state: Tensor
    counts: Tensor
    left_out: Tensor
    pending: BarrierWeights | None
    batch_mean: Tensor
    smoothing: Any
    _begun: Tensor | None
    _sums: Tensor
    _last: BarrierWeights | None

    def _pass_time(self, names: Sequence[str]) -> None:
        """Of these the half-step that is being prepared observes nothing, and time passes: their bands widen."""
        if self.smoothing != "trend":
            raise ValueError(
                f'smoothing must be "trend" where time passes and nothing is observed, got {self.smoothing!r}: an average does not know '
                "how far the policy moves meanwhile"
            )
        state = self.state if self._begun is None else self._begun
        rows = torch.zeros(len(state), dtype=torch.bool)
        rows[[self.index[name] for name in names]] = True
        self._begun = torch.where(rows.to(self.device)[:, None], unobserved(self.state, self.counts), state)

    def foretell(self, mu: Tensor) -> BarrierWeights:
        """Where all rewards are one step after the last one, with nothing observed. Nothing is changed."""
        if self.pending is not None:
            raise ValueError("leave_out: something was observed since the last step; step on it first")
        ours: Any = self
        self._pass_time(list(self.index))
        try:
            empty = torch.empty(0, len(self.index), dtype=torch.float64, device=self.device)
            return ours._weights(empty, empty.new_empty(0), self._sums, mu, bounded=False)
        finally:
            ours.discard()

    def comfortable(self, foretold: BarrierWeights) -> Tensor:
        """() bool: every upper confidence bound of a violation is below 0; not so where a bounded reward was never observed."""
        sign, bound, scale = self.bounds.table[:, :3].unbind(1)
        index = self.bounds.reward_index
        beyond = (sign * (foretold.estimate[index] - bound) + COMFORT * foretold.stderr[index]) / scale
        return ((beyond <= 0) & (foretold.violation <= 0)).all()  # NaN and inf compare false

    def skip(self, foretold: BarrierWeights) -> None:
        """The iteration has no constraint step: the estimates are those that were foretold."""
        self._last, self.state = foretold, foretold.state
        self.batch_mean = torch.full_like(self.batch_mean, math.nan)
        self.left_out = self.left_out + 1


class LeavingOut:
    """The optimizer's part."""

    estimates: Any
    schedule: MuSchedule
    _progress: Progress
    _norms: dict[str, Tensor]
    _reports: Any

    @property
    def left_out(self) -> int:
        """Iterations without a constraint half-step. Waits for the device."""
        return int(self.estimates.left_out)

    @torch.no_grad()
    def comfortable(self) -> bool:
        """Whether every constraint is expected to hold now with room to spare: its foretold estimate is beyond its margin and COMFORT
        standard errors inside its bound. The same on all ranks; waits for the device.

        Raises:
            ValueError: smoothing is not "trend", or something was observed since the last step.
        """
        return bool(self.estimates.comfortable(self.estimates.foretell(self._progress.mu)))

    @torch.no_grad()
    def leave_out(self) -> None:
        """Instead of a constraint half-step: time passes, estimates are foretold, mu goes on. Errors as `comfortable`."""
        estimates, mu = self.estimates, self._progress.mu
        self._reports.heard()
        foretold = estimates.foretell(mu)
        estimates.skip(foretold)
        self._norms.pop("constraint", None)  # there was no such gradient
        noise = estimates.noise(foretold).max()
        self._progress.mu = torch.as_tensor(self.schedule(self.passed, mu, noise)).to(mu)

    def step_again(self, total: Tensor) -> None:
        """The next step is once more on responses that were observed before a step that has been taken: on (task + barrier) / S with their
        `total`, () float64, the S of then. The estimates and mu know of them and stay as they are.

        Raises:
            ValueError: something was observed since the last step.
        """
        if self.estimates.pending is not None:
            raise ValueError("step_again: something was observed since the last step; step on it first")
        self.estimates.total = total

    @property
    def passed(self) -> Tensor:
        """() int64, iterations by which mu goes: constraint steps that were applied, and those left out."""
        return self.estimates.steps + self.estimates.left_out
