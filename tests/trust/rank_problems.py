"""Random runs of `L3MOptimizer` on a policy over a few responses, whose batches some ranks share: another split in each step, ranks with no
row, rewards that are missing or not finite, responses of no token, batches in parts; constraints, solvers and options of every kind."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import l3ms
from l3ms.model.sharding import whole

STEPS = 50
RESPONSES, FEATURES = 8, 5
LENGTHS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])  # of the responses; the first has no token, and no gradient
KINDS = ("gradients averaged", "DDP", "fully_shard")


@dataclass
class Problem:
    seed: int
    kind: str = ""
    double: bool = True
    rows: int = 8
    constraints: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    parts: int = 1
    joint: bool = False
    importance: bool = False
    optimizer: str = "SGD"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32


def drawn(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """In place of a reward function: `batch` draws what it would say."""
    raise AssertionError


def constraint(picks: random.Random, number: int, name: str) -> Any:
    kinds = {
        "mean": lambda: l3ms.Constraint(name, min=picks.uniform(-0.2, 0.6)),
        "range": lambda: l3ms.Constraint(name, min=-0.3, max=picks.uniform(0.0, 0.5)),
        "share": lambda: l3ms.Constraint(name, drawn, threshold=0.2, min=picks.uniform(0.3, 0.7)),
        "quantile": lambda: l3ms.Constraint(name, drawn, quantile=picks.choice((0.25, 0.5)), min=-0.5),
        "scaled": lambda: l3ms.Constraint(name, max=picks.uniform(-0.5, 0.2), scale=0.3, margin=0.05),
        "monitor": lambda: l3ms.Constraint(name, monitor=True) if number else l3ms.Constraint(name, min=0.5),
    }
    return picks.choice(list(kinds.values()))()


def problem(seed: int) -> Problem:
    picks = random.Random(seed)
    made = Problem(
        seed,
        kind=KINDS[seed % 3],
        double=seed % 4 != 3,
        rows=picks.choice((4, 5, 8, 11)),
        parts=picks.choice((1, 2, 3)),
    )
    made.constraints = [constraint(picks, number, f"reward {number}") for number in range(picks.choice((1, 2, 3)))]
    if picks.random() < 0.6:
        made.constraints.append(l3ms.Length(min=2, max=picks.choice((3, 5))))
    if picks.random() < 0.5:
        made.constraints.append(l3ms.Constraint("nll", max=picks.uniform(1.0, 2.0)))
    solver = picks.choice(("barrier", "barrier", "barrier", "dual_ascent", "augmented_lagrangian", "penalty"))
    made.options = {
        "solver": solver,
        "mu": l3ms.NoiseFloorDecay(1.0, 1e-3, steps=STEPS)
        if picks.random() < 0.7
        else l3ms.ExponentialDecay(1.0, 0.05, STEPS),
        "smoothing": picks.choice(("trend", "ema", 0.3)),
        "max_grad_norm": picks.choice((1.0, 0.3, None if solver != "barrier" else 5.0)),
        "clipping": picks.choice(("separate", "adaptive")),
        "length_norm": picks.choice(("mean", "sequence", "none")),
        "baseline": picks.choice(("leave_one_out", "estimate")),
        "nonfinite": picks.choice(("raise", "drop")),
    }
    made.joint = picks.random() < 0.25
    made.importance = picks.random() < 0.3 and made.options["baseline"] == "leave_one_out"
    # Adam makes steps of the rounding of gradients that are nearly 0
    made.optimizer = picks.choice(("SGD", "momentum", "AdamW")) if made.double else "SGD"
    return made


def batch(made: Problem, step: int) -> dict[str, Any]:
    """Of one step, whole: the rows of the task, those of the constraints, and what the rewards are."""
    generator = torch.Generator().manual_seed(1000 * made.seed + step)
    picks = random.Random(1000 * made.seed + step)
    rows = made.rows
    found: dict[str, Any] = {
        name: (torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64).to(made.dtype),
               torch.randint(0, RESPONSES, (rows,), generator=generator))
        for name in ("task", "samples", "data")
    }  # fmt: skip
    rewards: dict[str, list[float | None]] = {}
    chosen = found["samples"][1]
    for number, item in enumerate(made.constraints):
        if item.name.startswith("reward"):
            noise = torch.randn(rows, generator=generator, dtype=torch.float64)
            values: list[float | None] = (0.15 * (chosen - 3) * (-1) ** number + 0.5 * noise).tolist()
            lost = picks.random()
            if lost < 0.25:  # all, or a few
                values = [None if lost < 0.03 or picks.random() < 0.3 else value for value in values]
            if made.options["nonfinite"] == "drop" and picks.random() < 0.3:
                values[picks.randrange(rows)] = picks.choice((float("nan"), float("inf")))
            rewards[item.name] = item.indicator(values)
    found["rewards"] = rewards
    found["importance"] = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.5
    return found


def cut(picks: random.Random, rows: int, into: int) -> list[int]:
    """A random split of rows, some parts of which may have none. -> where each begins, and the end"""
    return [0, *sorted(picks.randint(0, rows) for _ in range(into - 1)), rows]


def run(made: Problem, rank: int, world: int, group: Any, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the weights at the end, whole, and the multipliers, estimates, their errors and mu of each step."""
    model: Any = torch.nn.Linear(FEATURES, RESPONSES, bias=False, dtype=made.dtype)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-0.5, 0.5, RESPONSES * FEATURES).reshape(RESPONSES, FEATURES).sin())
    called = model
    if made.kind == "DDP" and world > 1:
        called = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    elif made.kind == "fully_shard" and world > 1:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    parameters = list(model.parameters())
    base: torch.optim.Optimizer
    if made.optimizer == "AdamW":
        base = torch.optim.AdamW(parameters, lr=0.01)
    else:
        base = torch.optim.SGD(
            parameters, lr=0.05 if made.double else 0.02, momentum=0.5 * (made.optimizer == "momentum")
        )
    opt = l3ms.L3MOptimizer(base, made.constraints, process_group=group, **made.options)
    names = {item.name for item in made.constraints}

    def likelihoods(rows: tuple[torch.Tensor, torch.Tensor], part: slice) -> torch.Tensor:
        """Of the responses, a token each like the first."""
        inputs, chosen = (each[part] for each in rows)
        token = called(inputs).log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        return token * LENGTHS[chosen].clamp(max=1).to(token)

    def step() -> None:
        if made.kind == "gradients averaged" and world > 1:
            for parameter in parameters:
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad.div_(world)
        opt.step()
        opt.zero_grad()

    found = []
    for number in range(STEPS):
        picks = random.Random(f"{made.seed} {number} {world}")  # the same on all ranks
        whole_batch = batch(made, number)
        ends = cut(picks, made.rows, world)
        mine = slice(ends[rank], ends[rank + 1])
        rows = mine.stop - mine.start
        inner = cut(random.Random(f"{made.seed} {number} {rank}"), rows, parts)
        pieces = [slice(mine.start + a, mine.start + b) for a, b in itertools.pairwise(inner)]
        task_weight = world / made.rows
        if not made.joint:
            for piece in pieces:
                (-task_weight * likelihoods(whole_batch["task"], piece).sum()).backward()
            step()
        lengths = LENGTHS[whole_batch["samples"][1]]
        rewards: dict[str, Any] = {name: values[mine] for name, values in whole_batch["rewards"].items()}
        if "length" in names:
            rewards["length"] = lengths[mine]
        weighed = {"importance": whole_batch["importance"][mine]} if made.importance else {}
        weights = opt.observe(rewards, lengths[mine], **weighed)
        for piece in pieces:
            weight = weights[piece.start - mine.start : piece.stop - mine.start]
            (-(weight * likelihoods(whole_batch["samples"], piece)).sum()).backward()
        if "nll" in names:
            opt.barrier_loss({"nll": -likelihoods(whole_batch["data"], mine)}).backward()
        if made.joint:
            for piece in pieces:
                share = opt.task_weight.to(made.dtype) * task_weight
                (-share * likelihoods(whole_batch["task"], piece).sum()).backward()
        step()
        last = opt.estimates.last
        assert last is not None
        found.append(torch.cat([last.multiplier, last.estimate, last.stderr, opt.mu[None]]))
    return whole(parameters[0].detach()).clone(), torch.stack(found)
