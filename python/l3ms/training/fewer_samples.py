"""Which iterations of a training sample: none while the constraints are comfortably met, and not each where a rollout is used again.

`rollout_every="auto"` leaves the constraint half-step out (responses, rewards, data constraints, the step: all of it or none) while
`L3MOptimizer.comfortable()`. Never in the warm-up, where the policy begins to move; never from the last fifth on, or while weights are
averaged, since a certificate is of these; and never more than MOST_LEFT_OUT times in a row.

`rollout_reuse=n` takes the constraint half-steps of n iterations from one rollout, with the importance weights of `barrier.importance`. The
estimates are told of it once. It ends early where the effective sample size is below LEAST_SHARE of the responses, and where an iteration
is left out: what comes after that is to say whether the constraints still hold, which old responses cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l3ms.rollouts.rollout import Rollout
from l3ms.rollouts.sampling import vocabulary_of
from l3ms.training.state_trees import load_tree, save_tree

MOST_LEFT_OUT = 4  # in a row: every fifth constraint half-step is taken in any case

_TENSORS = ("input_ids", "attention_mask", "labels", "lengths", "ended")  # of a rollout, what a half-step takes


@dataclass
class Kept:
    """A rollout that may be used again, and its rewards as they were."""

    responses: Rollout
    rewards: dict[str, list[float | None]]
    log_likelihood: Tensor  # (N,) of the distribution that they were drawn from
    uses: int  # half-steps that were taken from it

    def state(self) -> dict[str, Any]:
        tensors = {name: self.responses[name] for name in _TENSORS}
        return {**tensors, "rewards": self.rewards, "log_likelihood": self.log_likelihood, "uses": self.uses}

    @classmethod
    def of(cls, state: dict[str, Any], temperature: float, device: torch.device, vocabulary: int) -> Kept:
        """Texts and columns are not in the `state`: rewards have been computed. Raises `ValueError` for what is no rollout."""
        _check(state, vocabulary)
        tensors = {name: state[name].to(device) for name in _TENSORS}
        nothing = [""] * len(state["lengths"])
        responses = Rollout(prompts=nothing, completions=nothing, temperature=temperature, **tensors)
        return cls(responses, state["rewards"], state["log_likelihood"].to(device), state["uses"])


class FewerSamples:
    """Of one training. `iteration`s count from 1.

    Attributes:
        left_out: iterations in a row, up to now, without a constraint half-step.
        kept: the rollout that the next half-step may use again.
        sampled: whether the last iteration has sampled.
        sampled_tokens: of all responses so far, end tokens included, over all ranks.
        ess: effective sample size of the last half-step that was weighted, a share of its responses; None where none was.
    """

    def __init__(self, every: str, reuse: int):
        self.auto, self.reuse = every == "auto", reuse
        self.left_out = 0
        self.kept: Kept | None = None
        self.sampled = False
        self.sampled_tokens = 0
        self.ess: float | None = None

    def leaves_out(self, trainer: Any, iteration: int) -> bool:
        """Whether this iteration has no constraint half-step; said once for each iteration, alike on all ranks."""
        args, last = trainer.args, trainer.state.max_steps
        begin = args.get_warmup_steps(last)
        end = min(trainer.average_from, math.floor(0.8 * last) + 1)
        due = not begin < iteration < end or self.left_out >= MOST_LEFT_OUT
        leave = self.auto and not due and trainer.l3m_optimizer.comfortable()
        self.left_out = self.left_out + 1 if leave else 0
        self.sampled, self.ess = False, None
        if leave:
            self.kept = None
        return leave

    def metrics(self) -> dict[str, float]:
        values = {"l3m/constraint_step": float(not self.left_out), "l3m/sampled_tokens": float(self.sampled_tokens)}
        return values if self.ess is None else {**values, "l3m/ess": self.ess}

    # ---- in a checkpoint: counts with the rest of the progress, the rollout in files of each rank ----

    def counts(self) -> dict[str, int]:
        return {"left_out": self.left_out, "sampled_tokens": self.sampled_tokens}

    def restore_counts(self, counts: dict[str, int]) -> None:
        self.left_out, self.sampled_tokens = counts["left_out"], counts["sampled_tokens"]

    def save_rollout(self, folder: Path, suffix: str) -> None:
        if self.kept is not None:
            save_tree(folder, f"rollout{suffix}", self.kept.state())

    def load_rollout(self, folder: Path, suffix: str, temperature: float, model: Any) -> None:
        self.kept = None
        if (folder / f"rollout{suffix}.json").exists():
            tree = load_tree(folder, f"rollout{suffix}")
            self.kept = Kept.of(tree, temperature, model.device, vocabulary_of(model))


def _check(state: dict[str, Any], vocabulary: int) -> None:
    ids, labels = state["input_ids"], state["labels"]
    count = len(ids)
    wanted = {"input_ids": 2, "attention_mask": 2, "labels": 2, "lengths": 1, "ended": 1, "log_likelihood": 1}
    shapes = [tuple(state[name].shape) == tuple(ids.shape[:dimensions]) for name, dimensions in wanted.items()]
    tokens = [ids, torch.where(labels == -100, 0, labels)]
    known = all(not t.is_floating_point() and bool(((t >= 0) & (t < vocabulary)).all()) for t in tokens)
    lengths = torch.equal(state["lengths"], (labels != -100).sum(1))
    rewards = all(isinstance(values, list) and len(values) == count for values in state["rewards"].values())
    uses = type(state["uses"]) is int and state["uses"] >= 1
    if not (count and all(shapes) and known and lengths and rewards and uses):
        raise ValueError("rollout: is no rollout of this model")
