"""Tells when two constraints cannot hold together: both stay violated and the worse of them no longer improves."""

import logging
from typing import Any

logger = logging.getLogger(__name__)


class ConflictWatch:
    """Follows the scaled violations of the constraints, one float each, after every applied constraint step."""

    patience = 100  # steps without improvement, with the same two constraints violated throughout
    improvement = 0.01  # relative, of the worst violation

    def __init__(self, names: list[str]):
        self.names = names
        self.pairs: list[tuple[str, str]] = []  # found so far
        self._best = float("inf")
        self._stalled = 0
        self._violated: list[int] = []

    def update(self, violations: list[float]) -> None:
        """Violations C_i, positive where violated (NaN: not observed yet)."""
        violated = [i for i, value in enumerate(violations) if value > 0]
        if len(violated) < 2 or violated != self._violated:
            self._violated, self._best, self._stalled = violated, float("inf"), 0
            return
        worst = max(violations[i] for i in violated)
        if worst < self._best * (1 - self.improvement):
            self._best, self._stalled = worst, 0
            return
        self._stalled += 1
        if self._stalled == self.patience:
            first, second = sorted(violated, key=lambda i: -violations[i])[:2]
            pair = (self.names[min(first, second)], self.names[max(first, second)])
            if pair not in self.pairs:
                self.pairs.append(pair)
                logger.warning(
                    "constraints %r and %r look infeasible together: both violated for %d steps without progress (%.3g and %.3g)",
                    *pair,
                    self.patience,
                    violations[min(first, second)],
                    violations[max(first, second)],
                )

    def state_dict(self) -> dict[str, Any]:
        return {
            "pairs": list(self.pairs),
            "best": self._best,
            "stalled": self._stalled,
            "violated": list(self._violated),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs = [tuple(pair) for pair in state["pairs"]]  # type: ignore[misc]
        self._best, self._stalled, self._violated = state["best"], state["stalled"], list(state["violated"])
