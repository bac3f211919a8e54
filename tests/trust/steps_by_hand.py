"""The step written out: what `L3MOptimizer` does, by hand from `l3m_kernels.barrier_weights`, must be the same bits.

    C = (sign (estimate - bound) + margin) / scale,  lambda = B'(C),  S = max(1, sum lambda)
    task:         g <- g min(1, max_norm / |g|)
    constraints:  g of -sum_n w_n log pi(y_n) + sum_i (lambda_i / S) C_i,  g <- g min(S, max_norm / |g|)

then one ordinary step of the wrapped optimizer each, whose state the two share.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

import l3ms
from l3m_kernels import Bounds, barrier_weights, initial_state

OUTCOMES = 12
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.5, 0.95)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.2),
}


class ByHand:
    """The barrier of 0.1.0's paper: a schedule that does not look at the noise, clipping of each half-step on its own."""

    def __init__(self, base: torch.optim.Optimizer, constraints: list[l3ms.Constraint], options: dict[str, Any]):
        self.base, self.constraints, self.schedule = base, constraints, options["mu"]
        self.smoothing, self.max_norm = options["smoothing"], options["max_grad_norm"]
        self.leave_one_out = options["baseline"] == "leave_one_out"
        self.length_norm = options["length_norm"]
        rows = [row for i, constraint in enumerate(constraints) for row in constraint.rows(i)]
        self.bounds = Bounds.of(rows)
        self.owner = [row[0] for row in rows]
        self.state = initial_state(len(constraints), smoothing=self.smoothing)
        self.mu = torch.tensor(self.schedule.start, dtype=torch.float64)
        self.steps = torch.tensor(0)
        self.parameters = [p for group in base.param_groups for p in group["params"]]

    def step(self, total: Tensor, constrained: bool = True) -> None:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).double()
        factor = total if self.max_norm is None else torch.minimum(total, self.max_norm / norm)
        if float(factor) != 1.0:
            for grad in grads:
                grad.mul_(float(factor))
        if not constrained or norm > 0:  # responses that are all alike say nothing: momentum is not replayed for them
            self.base.step()
        self.base.zero_grad()

    def observe(self, rewards: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        norm = {
            "mean": (lengths.double().mean().clamp(min=1)).expand(len(lengths)),
            "sequence": lengths.double().clamp(min=1),
            "none": torch.ones(len(lengths), dtype=torch.float64),
        }[self.length_norm]
        out = barrier_weights(
            rewards, self.state, self.bounds, self.mu,
            smoothing=self.smoothing, norm=norm, leave_one_out=self.leave_one_out,
        )  # fmt: skip
        return out.seq_weight, out

    def values(self, rewards: Tensor) -> tuple[Tensor, Any]:
        """-> sum_k lambda_k / S C_k, of differentiable values (R,)."""
        none = torch.zeros(0, dtype=torch.float64)
        sums = torch.stack([torch.ones_like(rewards), rewards, rewards * rewards], dim=1).detach()
        out = barrier_weights(
            none.reshape(0, len(rewards)), self.state, self.bounds, self.mu,
            smoothing=self.smoothing, norm=none, sums=sums, leave_one_out=self.leave_one_out,
        )  # fmt: skip
        sign, bound, scale = self.bounds.table[:, :3].unbind(1)
        loss = torch.zeros((), dtype=torch.float64)
        for k, owner in enumerate(self.owner):
            loss = loss + out.multiplier[k] / out.total * (sign[k] * (rewards[owner] - bound[k]) / scale[k])
        return loss, out

    def advance(self, out: Any) -> None:
        self.state, self.steps = out.state, self.steps + 1
        self.mu = torch.as_tensor(self.schedule(self.steps, self.mu, torch.tensor(0.0)))


def same_bits(seed: int) -> None:
    """15 iterations of a policy over a few outcomes, by rewards of samples or by differentiable values."""
    draw = random.Random(f"by hand {seed}")
    generator = torch.Generator().manual_seed(seed)
    dtype = draw.choice((torch.float32, torch.float64))
    options: dict[str, Any] = {
        "mu": l3ms.ExponentialDecay(draw.choice((1.0, 0.3)), draw.choice((0.1, 1e-3, 1e-6)), steps=10),
        "smoothing": draw.choice((1.0, 0.5, 0.1, "trend")),
        "max_grad_norm": draw.choice((None, 1.0, 0.05)),
        "baseline": draw.choice(("leave_one_out", "estimate")),
        "length_norm": draw.choice(("mean", "sequence", "none")),
    }
    sampled = draw.random() < 0.6
    constraints = [
        l3ms.Constraint("a", max=draw.uniform(-0.5, 1.0)),
        l3ms.Constraint("b", min=-0.3, max=draw.uniform(-0.2, 0.5), scale=draw.choice((None, 0.2)), margin=0.0),
        l3ms.Constraint("c", min=draw.uniform(-2.0, 0.3), margin=0.05),
    ][: draw.randint(1, 3)]
    kind = draw.choice(sorted(BASES))
    start = torch.randn(OUTCOMES, dtype=dtype, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    opt = l3ms.L3MOptimizer(BASES[kind]([ours]), constraints, **options)
    hand = ByHand(BASES[kind]([theirs]), constraints, options)
    task = torch.randn(OUTCOMES, generator=generator).to(dtype).softmax(0)
    table = torch.randn(OUTCOMES, 3, dtype=torch.float64, generator=generator)[:, : len(constraints)]
    names = [constraint.name for constraint in constraints]
    for step in range(15):
        for p in (ours, theirs):
            (-(task * p.log_softmax(0)).sum()).backward()
        opt.step()
        opt.zero_grad()
        hand.step(torch.ones((), dtype=torch.float64), constrained=False)
        if sampled:
            count = int(torch.randint(2, 9, (), generator=generator))
            picks = torch.multinomial(theirs.detach().softmax(0), count, replacement=True, generator=generator)
            lengths = torch.randint(1, 20, (count,), generator=generator)
            rewards = table[picks].clone()
            rewards[torch.rand(rewards.shape, generator=generator) < 0.15] = math.nan
            listed = {
                name: [None if math.isnan(value) else value for value in rewards[:, i].tolist()]
                for i, name in enumerate(names)
            }
            weights, expected = opt.observe(listed, lengths), hand.observe(rewards, lengths)
            _same(seed, step, "weights", weights, expected[0])
            (-(weights.to(dtype) * ours.log_softmax(0)[picks]).sum()).backward()
            (-(expected[0].to(dtype) * theirs.log_softmax(0)[picks]).sum()).backward()
            out = expected[1]
        else:
            loss = opt.barrier_loss({name: (ours.softmax(0) * table[:, i]).sum() for i, name in enumerate(names)})
            loss.backward()
            values = torch.stack([(theirs.softmax(0) * table[:, i]).sum() for i in range(len(names))])
            loss, out = hand.values(values)
            loss.backward()
        hand.step(out.total)
        opt.step()
        opt.zero_grad()
        hand.advance(out)
        last = opt.estimates.last
        assert last is not None
        _same(seed, step, "multipliers", last.multiplier, out.multiplier)
        _same(seed, step, "mu", opt.mu, hand.mu)
        _same(seed, step, f"parameters, {kind}", ours.detach(), theirs.detach())


def _same(seed: int, step: int, what: str, ours: Tensor, theirs: Tensor) -> None:
    if not torch.equal(ours, theirs):
        raise AssertionError(f"iteration {step}: the {what} differ by {float((ours - theirs).abs().max()):.3g}")
