"""How well the running estimates follow policies whose mean moves in a known way: `python bench/estimates.py`.

Prints a table: for each way, and for the moving average of the paper and the filter of level and trend, the share of steps in which the 95%
band covers the mean, its standard error, and the error of the estimate. Speeds and errors are in standard errors of one batch's mean,
so neither the reward's unit nor the batch size matters. Rewards are skewed (Gamma, shape 2), as lengths are. bench/results/estimates.md
keeps it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from l3m_kernels import Bounds, barrier_weights, initial_state

STEPS = 120
Way = tuple[Callable[[int], float], range]  # the mean at a step, and the steps that are looked at

WAYS: dict[str, Way] = {
    "at rest, steps 3 to 60": (lambda t: 0.0, range(2, 60)),
    "at rest, steps 61 to 120": (lambda t: 0.0, range(60, STEPS)),
    **{f"moves by {v:g} a step": (lambda t, v=v: v * t, range(2, 60)) for v in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)},
    **{f"rests, then moves by {v:g}": (lambda t, v=v: v * max(t - 60, 0), range(60, STEPS)) for v in (0.1, 0.5, 1.0)},
    **{f"moves by {v:g}, then rests": (lambda t, v=v: v * min(t, 30), range(30, 90)) for v in (0.1, 0.5, 1.0)},
    **{f"approaches over {tau} steps": (lambda t, tau=tau: 20 * math.exp(-t / tau), range(2, 3 * tau)) for tau in (5, 10, 20)},
    "swings by 3 in 40 steps": (lambda t: 3 * math.sin(t * math.tau / 40), range(2, STEPS)),
}  # fmt: skip


def follow(way: Way, smoothing: float | str, runs: int, responses: int, seed: int = 0) -> tuple[float, float, float]:
    """-> coverage of the 95% band, mean standard error, root mean square error, over the steps of the way that are looked at."""
    generator = torch.Generator().manual_seed(seed)
    gamma = torch.empty(responses, runs, dtype=torch.float64)
    state = initial_state(runs, smoothing=smoothing)  # type: ignore[arg-type]  # a run is a reward here
    bounds = Bounds.of([(0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0)])
    path, steps = way
    errors, bands = [], []
    for step in range(STEPS):
        gamma = -torch.log(torch.rand(2, responses, runs, dtype=torch.float64, generator=generator)).sum(0)
        rewards = path(step) + (gamma - 2.0) / math.sqrt(2.0) * math.sqrt(responses)
        out = barrier_weights(rewards, state, bounds, 0.1, smoothing=smoothing)  # type: ignore[arg-type]
        state = out.state
        if step in steps:
            errors.append(out.estimate - path(step))
            bands.append(out.stderr)
    error, band = torch.stack(errors), torch.stack(bands)
    covered = (error.abs() <= 1.96 * band).double().mean()
    return float(covered), float(band.mean()), float(error.square().mean().sqrt())


def table(runs: int, responses: int) -> str:
    lines = [
        f"| the mean ({responses} responses a step, {runs} runs) | average: covered | band | error | filter: covered | band | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, way in WAYS.items():
        cells = [name]
        for smoothing in (0.1, "trend"):
            covered, band, error = follow(way, smoothing, runs, responses)
            cells += [f"{covered:.1%}", f"{band:.2f}", f"{error:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--responses", type=int, default=8)
    options = parser.parse_args()
    print(table(options.runs, options.responses))
