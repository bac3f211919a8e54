"""Do two constraints pull against each other? The cosine of their gradients, from one batch of responses.

The gradient of E[r] is E[(r(y) - b) grad log pi(y|x)]. A batch is split into M groups, each with a gradient of its own and the other
responses of the group as baseline. Products of two different groups are free of each other's noise, so that

    X_ab = sum_(j != k) <g_a^j, g_b^k>

is unbiased for the product of the true gradients, and cos = X_ab / sqrt(X_aa X_bb), summed over the last evaluations; its standard error is
the jackknife's over the groups. (The plain cosine of two noisy gradients of the same responses tells of the correlation of the rewards.)
Gradients are kept as sketches: coordinates get random signs and are summed into SKETCH buckets (Charikar et al. 2002, count sketch),
which keeps inner products up to |g||h| / sqrt(SKETCH).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3ms.model.modes import evaluating
from l3ms.rollouts.rollout import Rollout

SKETCH = 1 << 16
GROUPS = 4  # at most, of a batch; each has 2 responses at least


class Cosine(NamedTuple):
    value: float
    stderr: float


def sketch(gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size], seed: int = 0) -> Tensor:
    """Gradients of some shapes (None: zero) -> (SKETCH,) fp32 on their device; the same signs in every call."""
    total: Tensor | None = None
    for number, (gradient, shape) in enumerate(zip(gradients, shapes, strict=True)):
        if gradient is None:
            continue
        device = gradient.device
        generator = torch.Generator(device).manual_seed(seed + number)
        signs = torch.randint(0, 2, (shape.numel(),), dtype=torch.int8, device=device, generator=generator)
        signed = gradient.detach().reshape(-1).float() * (2 * signs - 1)
        padded = torch.nn.functional.pad(signed, (0, -shape.numel() % SKETCH))
        folded = padded.view(-1, SKETCH).sum(0)
        total = folded if total is None else total + folded
    if total is None:
        raise ValueError("sketch: no parameter has a gradient")
    return total


def group_weights(values: Sequence[float | None], groups: int) -> Iterator[tuple[slice, Tensor]]:
    """Rewards of n responses -> for each group its slice and (n_group,) fp32 weights w with loss = -sum w log pi(y): its gradient is
    *minus* that of the group's mean reward, see `reward_gradients`. None and non-finite values weigh nothing."""
    size = len(values) // groups
    for start in range(0, groups * size, size):
        given = torch.tensor(
            [math.nan if v is None else float(v) for v in values[start : start + size]], dtype=torch.float64
        )
        kept = given.isfinite()
        count = int(kept.sum())
        centred = torch.where(kept, given - given[kept].mean(), 0.0) if count > 1 else torch.zeros_like(given)
        # (r - mean of the others) / n = (r - mean) / (n - 1)
        yield slice(start, start + size), (centred / max(count - 1, 1)).float()


def reward_gradients(
    model: Any,
    rollout: Rollout,
    rewards: Sequence[Sequence[float | None]],
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    groups: int = GROUPS,
) -> Tensor | None:
    """Sketched gradients (R, M, SKETCH) fp32 of R mean rewards in M groups of the responses, with respect to the trained parameters.

    Costs R forward and backward passes over the batch; needs the memory of one gradient beside the model's. `.grad`, the mode and the
    random state are left alone. None with fewer than 4 responses.

    Args:
        model: with a fused head, not wrapped for data parallelism.
        rewards: R lists of one value per response.
        batch_size: responses in one pass.
    """
    groups = min(groups, len(rollout) // 2)
    if groups < 2:
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    shapes = [p.shape for p in trained]
    with evaluating(model):
        found = []
        for values in rewards:
            for part, weights in group_weights(values, groups):
                total = torch.zeros(SKETCH, device=rollout.labels.device)
                for start in range(part.start, part.stop, batch_size):
                    piece = slice(start, min(start + batch_size, part.stop))
                    loss = model(
                        **rollout.inputs(piece),
                        seq_weight=weights[piece.start - part.start : piece.stop - part.start].to(
                            rollout.labels.device
                        ),
                        temperature=temperature,
                        auxiliary=False,
                    ).loss
                    total -= sketch(torch.autograd.grad(loss, trained, allow_unused=True), shapes)
                found.append(total)
    return torch.stack(found).view(len(rewards), groups, SKETCH)


class PairCosines:
    """The cosines of R gradients, pair by pair, from the last evaluations."""

    def __init__(self, count: int, evaluations: int = 4):
        self.count = count
        self._grams: deque[Tensor] = deque(maxlen=evaluations)  # (E, R, M, R, M) float64 each, on the host

    @property
    def evaluations(self) -> int:
        return len(self._grams)

    def add(self, *gradients: Tensor) -> None:
        """One evaluation: (R, M, P) gradients; one such tensor or Gram of each rank."""
        self.add_grams([gram(part) for part in gradients])

    def add_grams(self, grams: Sequence[Tensor]) -> None:
        """One evaluation: the `gram` of each rank, of one shape."""
        self._grams.append(torch.stack(list(grams)))

    @property
    def grams(self) -> list[Tensor]:
        """Of each evaluation that counts: what `add_grams` was given."""
        return list(self._grams)

    def cosine(self, a: int, b: int) -> Cosine | None:
        """Of gradients a and b with its standard error; None where a gradient cannot be told from noise."""
        products = [self._products(i, j) for i, j in ((a, b), (a, a), (b, b))]
        whole = _ratio(*(float(total) for total, _ in products))
        if whole is None:
            return None
        left_out = [_ratio(*values) for values in zip(*(without.tolist() for _, without in products), strict=True)]
        found = [value for value in left_out if value is not None]
        if len(found) < len(left_out):
            return None
        mean = math.fsum(found) / len(found)
        variance = (len(found) - 1) / len(found) * math.fsum((value - mean) ** 2 for value in found)
        return Cosine(max(-1.0, min(1.0, whole)), math.sqrt(variance))

    def _products(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        """X_ab, and (groups of all evaluations,) X_ab without each group."""
        blocks = [part[:, a, :, b, :] for part in self._grams]  # (E, M, M)
        apart = [block - torch.diag_embed(block.diagonal(dim1=-2, dim2=-1)) for block in blocks]
        total = torch.stack([block.sum() for block in apart]).sum()
        own = torch.cat([(block.sum(-1) + block.sum(-2)).reshape(-1) for block in apart])
        return total, total - own


def gram(gradients: Tensor) -> Tensor:
    """(R, M, P) -> (R, M, R, M) float64 inner products, on the host."""
    count, groups, _ = gradients.shape
    flat = gradients.reshape(count * groups, -1).double()
    return (flat @ flat.T).cpu().view(count, groups, count, groups)


def _ratio(cross: float, first: float, second: float) -> float | None:
    return cross / math.sqrt(first * second) if first > 0 and second > 0 else None
