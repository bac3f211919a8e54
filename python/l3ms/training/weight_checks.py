"""Two ways in which a step goes wrong without an error: it makes weights that are not finite, or none that rounding lets move."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l3ms.model.averaging import trained
from l3ms.model.sharding import local
from l3ms.ranks.group import OtherRankFailed

logger = logging.getLogger(__name__)

SAMPLED = 4096  # weights of each parameter whose movement is looked at
ITERATIONS = 10  # with a learning rate above 0, after which is judged
FEWEST = 0.5  # share of weights with a gradient that should move


class WeightChecks:
    """Of a training: `before_step` and `after_step` of the task, `finite` after each half-step."""

    def __init__(self, model: torch.nn.Module, optimizer: Any = None):
        """An optimizer that rounds stochastically (torchao's) moves few weights in a step, and all of them in the mean."""
        self.model = model
        parts = getattr(optimizer, "parts", [optimizer])
        stochastic = all(getattr(part, "bf16_stochastic_round", False) for part in parts)
        narrow = () if stochastic else (torch.bfloat16, torch.float16)
        self._narrow = [(name, p) for name, p in trained(model) if p.dtype in narrow]
        self._before: list[tuple[Tensor, Tensor]] = []  # sampled weights, and which of them have a gradient
        self._moved = self._due = self._seen = 0

    @torch.no_grad()
    def finite(self, iteration: int, half_step: str) -> None:
        """RuntimeError on every rank where a step has made a weight NaN or infinite on any of them. Waits for the device."""
        parts = [(name, local(p.detach())) for name, p in trained(self.model)]
        if not parts:
            return
        parameters = [
            (name, part) for name, part in parts if part.numel()
        ]  # of a short one the last ranks have nothing
        norms = torch._foreach_norm([p for _, p in parameters], float("inf"))  # pyright: ignore[reportPrivateImportUsage]
        bad = torch.stack([~norm.isfinite() for norm in norms] or [parts[0][1].new_zeros((), dtype=torch.bool)])
        any_bad = bad.any().float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(any_bad, dist.ReduceOp.MAX)
        if any_bad.item():
            names = [name for (name, _), found in zip(parameters, bad.tolist(), strict=True) if found]
            where = f"{names[0]} and {len(names) - 1} more parameters" if names else "weights of another rank"
            raise (RuntimeError if names else OtherRankFailed)(
                f"iteration {iteration}: the {half_step} half-step has made weights that are not finite ({where}); "
                "lower the learning rate, or look at the optimizer's eps and at the dtype of the weights"
            )

    @torch.no_grad()
    def before_step(self, learning_rate: float) -> None:
        if self._narrow and self._seen < ITERATIONS and learning_rate > 0:
            self._before = [(_sample(p).clone(), _sample(p.grad) != 0) for _, p in self._narrow if p.grad is not None]

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._before:
            return
        now = [_sample(p) for _, p in self._narrow if p.grad is not None]
        for (before, due), after in zip(self._before, now, strict=True):
            self._moved += int(((before != after) & due).sum())
            self._due += int(due.sum())
        self._before, self._seen = [], self._seen + 1
        if self._seen == ITERATIONS and self._moved < FEWEST * self._due:
            logger.warning(
                "%.0f%% of the %s weights with a gradient moved in %d steps: the others' steps are below half of their last bit; "
                "train float32 weights with bfloat16 activations (train.dtype: float32 and train.autocast: true; bf16=True of "
                "L3MConfig), round stochastically (optimizers=(torchao.optim._AdamW(..., bf16_stochastic_round=True), None)), or raise the "
                "learning rate",
                100 * self._moved / self._due, str(self._narrow[0][1].dtype).removeprefix("torch."), ITERATIONS,
            )  # fmt: skip


def _sample(tensor: Any) -> Tensor:
    flat = local(tensor.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)]
