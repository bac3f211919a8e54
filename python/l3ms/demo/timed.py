"""Where the time of a demo goes: seconds of each phase of an iteration, and the largest memory of the process."""

import sys
import time
from typing import Any

from l3ms.training.trainer import L3MTrainer


class TimedTrainer(L3MTrainer):
    """An `L3MTrainer` on a CPU whose log has `seconds/task` (forward, backward), `seconds/sampling` and `seconds/constraint` (rewards,
    forward, backward, step) of each iteration."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.iterations: list[dict[str, float]] = []  # seconds by phase
        self._phases: dict[str, float] = {}
        self._sampled = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._phases["task"] = self._phases.get("task", 0.0) + time.perf_counter() - begin
        return loss

    def constraint_half_step(self) -> None:
        begin = self._sampled = time.perf_counter()
        super().constraint_half_step()
        self._phases["sampling"] = self._sampled - begin
        self._phases["constraint"] = time.perf_counter() - self._sampled

    def reward_arguments(self) -> dict[str, Any]:
        """Asked for when the responses are there."""
        self._sampled = time.perf_counter()
        return super().reward_arguments()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({f"seconds/{name}": round(value, 4) for name, value in self._phases.items()})
            self.iterations.append(self._phases)
            self._phases = {}
        super().log(logs, start_time)

    @property
    def mean_seconds(self) -> dict[str, float]:
        """An iteration of the mean, by phase."""
        names = self.iterations[0] if self.iterations else {}
        count = len(self.iterations)
        return {name: round(sum(found.get(name, 0.0) for found in self.iterations) / count, 4) for name in names}


def peak_memory() -> float | None:
    """MiB of this process at its largest; None where the system does not say (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20), 1)
