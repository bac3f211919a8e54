"""G3: torch's own checks of an op, on each of ours and every backend; PyTorch's samples of `linear_cross_entropy`: `torch_samples`."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from barrier_problems import fresh_state, random_problem
from head_cases import HEAD_BACKENDS, VIEWS, Case, view
from parts import Found, Part, Skipped, each
from test_barrier import OPS, random_mu, random_z
from test_ops_opcheck import (
    FULL,
    opcheck,
    test_opcheck_log_likelihood,
    test_opcheck_log_likelihood_backward,
    test_opcheck_weighted_log_likelihood,
)
from torch_samples import counted, refused, sampled

from l3m_kernels.backends import TABLE
from l3m_kernels.barrier import _barrier_curvature, _barrier_weights
from l3m_kernels.ops import _once_differentiable

TRITON = 100  # cases of an op: one takes as long as four of another backend in the interpreter

# ---- opcheck


def checked(check: Callable[[int], None], backend: str | None, seeds: range) -> Found:
    """Every utility of opcheck on each seed."""
    if backend == "triton":
        if "triton" not in HEAD_BACKENDS:
            raise Skipped(next(row.missing for row in TABLE if row.name == "triton") or "it does not run on a CPU here")
        import interpreter

        interpreter.prepare()
        torch.use_deterministic_algorithms(False)  # traced code is not to have what fills empty tensors
    gc.disable()  # a fifth of the time: a trace is many small objects
    try:
        return each(check, seeds)
    finally:
        gc.enable()
        gc.collect()


def of_head(test: Callable[..., None], backend: str, seed: int) -> None:
    while backend == "triton" and Case.random(seed).dtype == torch.float64:  # which is not for it
        seed += 5_000_000
    test(seed, FULL, backend)


def once_differentiable(seed: int) -> None:
    leaves = {name: leaf.detach() for name, leaf in Case.random(seed).build().leaves.items()}
    gradient = random.Random(seed).choice(list(leaves.values()))
    opcheck(_once_differentiable, (gradient, leaves["hidden"], leaves["weight"], leaves.get("bias")), FULL)


def barrier_op(op: Any, seed: int) -> None:
    draw = random.Random(seed)
    mu = random_mu(draw)
    s = mu * mu if draw.random() < 0.5 else 10 ** draw.uniform(-14, 0)
    shape = [draw.choice((0, 1, 2, 3, 5)) for _ in range(draw.randrange(4))]
    points = [random_z(draw, s) for _ in range(math.prod(shape))]
    z = view(torch.tensor(points, dtype=torch.float64).view(shape), draw.choice(VIEWS) if shape else "contiguous")
    z = z.requires_grad_(op is not _barrier_curvature and draw.random() < 0.7)
    opcheck(op, (z, *(torch.tensor(value, dtype=torch.float64) for value in (mu, s))), FULL)


def weights(backend: str, seed: int) -> None:
    rewards, norm, sums, index, bounds, mu, s, smoothing, leave_one_out = random_problem(seed)
    rewards = view(rewards, random.Random(seed).choice(VIEWS[:4]))
    seen = torch.randn(3, rewards.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    fixed = (index, bounds, mu, s, smoothing, leave_one_out, backend)
    # What nothing is known of is NaN, which opcheck takes for another result.
    state = _barrier_weights(seen, norm.new_ones(3), None, fresh_state(rewards, smoothing), *fixed)[-1]
    opcheck(_barrier_weights, (rewards, norm, sums, state, *fixed), FULL)


# ---- what is counted


def parts() -> list[Part]:
    found: list[Part] = []

    def add(name: str, check: Callable[[int], None], cases: int = 500, backend: str | None = None) -> None:
        environment = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
        slow = 3.0 if environment else 1.0
        run = partial(checked, check, backend)
        found.append(Part(name, run, cases, 0 if environment else 2, 100, environment, seconds=0.12 * slow * cases))

    head = {
        "log_likelihood": test_opcheck_log_likelihood,
        "log_likelihood_backward": test_opcheck_log_likelihood_backward,
        "weighted_log_likelihood": test_opcheck_weighted_log_likelihood,
    }
    for backend in sorted({"triton", *HEAD_BACKENDS}):
        cases = TRITON if backend == "triton" else 500
        for name, test in head.items():
            add(f"opcheck {name} {backend}", partial(of_head, test, backend), cases, backend)
        add(f"opcheck barrier_weights {backend}", partial(weights, backend), cases, backend)
    add("opcheck once_differentiable", once_differentiable)
    for op in OPS:
        add(f"opcheck {op._name.split('::')[-1]}", partial(barrier_op, op))
    found.append(Part("torch's samples", sampled, 4_200, 60, 400, seconds=120, close=counted))
    found.append(Part("error inputs of torch and ours", partial(each, refused), 80, 80, seconds=10))
    return found
