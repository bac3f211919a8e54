"""What time must not depend on, and what it must be linear in: constraints, and scored rows.

A constraint step is `barrier_weights` (rewards to one weight per response) and the head with those weights: K constraints enter the first,
which takes microseconds, and leave it as the same N weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from l3m_kernels import Bounds, barrier_weights, initial_state, weighted_log_likelihood
from l3ms.benchmark import device
from l3ms.benchmark.contestant import Contestant
from l3ms.benchmark.inputs import Batch, Source
from l3ms.benchmark.race import Race, clock, turns
from l3ms.benchmark.results import Scaling, ScalingPoint
from l3ms.benchmark.shapes import Case

Said = Callable[[str], None]


def over_rows(
    sizes: Sequence[int], like: Case, contestants: Sequence[Contestant], rounds: int, seed: int, said: Said
) -> Scaling:
    """Time of one forward and backward for each number of rows, all of them scored."""
    points = []
    for rows in sizes:
        case = like._replace(shape=like.shape._replace(rows=rows), masked=0.0)
        race = Race(case, contestants, seed)
        race.check(said, exact=False)
        race.time(rounds, said)
        points += [
            ScalingPoint(
                size=rows, contestant=name, title=entry.contestant.title, seconds=entry.seconds, reason=entry.reason
            )
            for name, entry in race.entries.items()
        ]
    return Scaling(
        over="rows", hidden=like.shape.hidden, vocabulary=like.shape.vocabulary, dtype=like.dtype, points=points
    )


def constraint_step(
    constraints: int, backend: str | None, on: str = "cpu"
) -> Callable[[tuple[Batch, Tensor]], tuple[Tensor, ...]]:
    """A function of (batch, rewards (N, 8)): one constraint step with that many constraints, gradients out."""
    rows = [(k, 1.0 - 2 * (k % 2), 0.1 * k, 1.0, 0.0, 2.0, float("inf")) for k in range(constraints)]
    bounds, state = Bounds.of(rows, on), initial_state(constraints, on)
    mu = torch.tensor(0.1, dtype=torch.float64, device=on)

    def step(argument: tuple[Batch, Tensor]) -> tuple[Tensor, ...]:
        batch, rewards = argument
        weights = barrier_weights(rewards[:, :constraints].contiguous(), state, bounds, mu).seq_weight
        arguments = (batch.hidden, batch.weight, batch.targets, weights, batch.cu_seqlens)
        return torch.autograd.grad(weighted_log_likelihood(*arguments, backend=backend)[0], batch.wanted)

    return step


def over_constraints(
    sizes: Sequence[int], like: Case, backend: str | None, rounds: int, seed: int, said: Said
) -> Scaling:
    """Time of a constraint step for each number of constraints, the numbers taking turns."""
    case = like._replace(op="weighted", masked=0.0)
    source = Source(case, seed)
    generator = torch.Generator(case.device).manual_seed(seed)
    steps = {str(size): constraint_step(size, backend, case.device) for size in sizes}
    measured = device.clock if case.device == "cuda" else clock
    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def draw(index: int) -> tuple[Batch, Tensor]:
        size, options = (case.shape.sequences, max(sizes)), {"generator": generator, "device": case.device}
        rewards = torch.randn(size, dtype=torch.float64, **options)
        return source.draw(index), rewards

    argument, drawn = draw(0), -1
    for step in steps.values():
        step(argument)
    for index, name in turns(list(steps), dict.fromkeys(steps, rounds)):
        if index != drawn:
            argument, drawn = draw(index + 1), index
        said(f"{name} constraints")
        seconds[name].append(measured(steps[name], argument))
    points = [
        ScalingPoint(size=int(name), contestant=backend or "auto", title="constraint step", seconds=found)
        for name, found in seconds.items()
    ]
    return Scaling(
        over="constraints",
        hidden=case.shape.hidden,
        vocabulary=case.shape.vocabulary,
        dtype=case.dtype,
        rows=case.shape.rows,
        points=points,
    )
