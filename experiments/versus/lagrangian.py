"""Dual ascent, in the place of GRPO- and PPO-Lagrangian: the same training as L3M's with the multipliers of safe-rlhf's kind.

The rule here (`l3ms.DualAscent`): after every step `lambda <- max(0, lambda + rate C)`, C the violation of the batch in units of the middle
of the range, lambda 0 at the start, one for each bound; a step's gradient is divided by S, which grows with the multipliers.

That of safe-rlhf's PPO-Lagrangian (arXiv 2310.12773; its script `ppo-lag.sh`): one multiplier kept by its logarithm,
`log lambda <- log lambda + rate lambda (mean cost - limit)`, with the mean over a window of the last 128 episodes, rate 0.1, lambda 1
at the start and 5 at most, and a policy step on `(A_reward - lambda A_cost) / (1 + lambda)`. So both integrate the violation, and both
divide by a sum that grows with lambda. Unlike there: two bounds instead of one, the task is a loss on data instead of a reward model,
lambda moves in proportion to the violation alone, can be 0 and has no ceiling; no critics, no clipped ratio (each batch of responses is
used once, for which the ratio is 1), no window beside the rate.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.versus.task import Task, Trained, only
from experiments.versus.yaml_run import run


def train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained:
    """setting: `dual_rate`, multiplier per step and unit of violation."""
    own = only(setting, "dual_rate")
    return run(task, {"solver": "dual_ascent", "dual_rate": float(own["dual_rate"])}, folder)
