"""G4: gradients against finite differences in float64; second derivatives, forward mode and torch.func: right, or refused by the op's name.

What is right is what the same transform makes of the same function in plain torch.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from head_cases import BOTH, Case, Inputs, sequence_of
from parts import Found, Part, each
from test_ops_autograd import gradcheck, scalar, small
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from transforms import TRANSFORMS

import l3m_kernels
from l3m_kernels import (
    Bounds,
    barrier_multiplier,
    barrier_weights,
    drop_in,
    initial_state,
    parallel,
    reference,
    relaxed_log_barrier,
    set_workspace,
)
from l3m_kernels.reference import eager_log_likelihood

ALLOWED = 1e-12  # relative to the largest number of a result, and absolute below 1: what sums in another order may differ by in float64
NAMES = re.compile(r"log_likelihood|relaxed_log_barrier|barrier_multiplier|barrier_curvature|barrier_weights")


# ---- first derivatives


def drop_in_gradcheck(seed: int) -> None:
    """The signatures of others, any reduction."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, width, vocabulary = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 5)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    hidden, weight, bias = leaf(rows, width), leaf(vocabulary, width), leaf(vocabulary)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    ignored = draw.choice((-100, 0, vocabulary))
    targets[1:][torch.rand(rows - 1, generator=generator) < 0.3] = ignored
    targets[0] = draw.randrange(vocabulary)
    reduction = draw.choice(("sum", "none") if bool((targets == ignored).all()) else ("mean", "sum", "none"))
    which, softcap = draw.randrange(3), draw.choice((None, 2.0))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if which == 0:
            options = {"linear_bias": bias, "reduction": reduction, "ignore_index": ignored}
            return drop_in.linear_cross_entropy(hidden, weight, targets, **options)
        if which == 1:
            options = {"ignore_index": ignored, "reduction": reduction, "softcap": softcap}
            return drop_in.liger_fused_linear_cross_entropy(hidden, weight, targets, bias, **options)
        index = targets.clamp(0, vocabulary - 1)[:, None].expand(rows, 2)
        mask = torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) < 0.7
        options = {"bias": bias, "temperature": 0.7, "softcap": softcap, "row_mask": mask}
        return drop_in.selective_log_softmax(hidden, weight, index, **options)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), check_batched_grad=True)


def barrier_gradcheck(seed: int) -> None:
    """The barrier has two derivatives: gradcheck of it and its slope, gradgradcheck of it; a third is refused."""
    draw = random.Random(seed)
    mu = draw.uniform(0.2, 1)
    s = mu * mu if draw.random() < 0.5 else draw.uniform(0.05, 1)
    z = torch.tensor([draw.choice((draw.uniform(-3, 2), -s * draw.uniform(0.5, 1.5))) for _ in range(4)])
    z = z.double().requires_grad_()
    assert torch.autograd.gradcheck(partial(relaxed_log_barrier, mu=mu, s=s), z, check_batched_grad=True)
    assert torch.autograd.gradcheck(partial(barrier_multiplier, mu=mu, s=s), z, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(partial(relaxed_log_barrier, mu=mu, s=s), z)
    curvature = torch.autograd.grad(barrier_multiplier(z, mu, s).sum(), z, create_graph=True)[0]
    try:
        curvature.sum().backward()
    except RuntimeError as error:
        if not NAMES.search(str(error)):
            raise
    else:
        raise AssertionError("a third derivative of the barrier is not refused")


# ---- the same graph again


def repeated(op: str, backend: str, seed: int) -> None:
    """Each backward of a graph that is kept has the same bits, whatever became of the first gradients; inputs stay what they are."""
    case = Case.random(seed)
    inputs = case.build()
    set_workspace(case.workspace)
    leaves = [leaf for leaf in inputs.leaves.values() if leaf.requires_grad]
    before = [None if tensor is None else tensor.detach().clone() for tensor in inputs]
    loss = scalar(op, backend, case, inputs, inputs.leaves)
    assert loss.requires_grad == bool(leaves)
    if leaves:
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        copies = [gradient.clone() for gradient in first]
        for gradient in first:
            gradient.fill_(3)
        again = torch.autograd.grad(loss, leaves, retain_graph=True)
        last = torch.autograd.grad(loss, leaves)
        for found in (again, last):
            for copy, gradient in zip(copies, found, strict=True):
                assert torch.equal(copy, gradient), "another backward has other bits"
    for old, new in zip(before, inputs, strict=True):
        assert old is new is None or (old is not None and new is not None and torch.equal(old, new)), "an input changed"


# ---- every other way to differentiate


class Problem(NamedTuple):
    ours: Callable[[Tensor], Tensor]  # a tensor to a number
    plain: Callable[[Tensor], Tensor]
    at: Tensor


def head_problem(op: str, backend: str, seed: int, of: ModuleType = l3m_kernels) -> Problem:
    case = small(seed)
    inputs = case.build()
    set_workspace(case.workspace)
    leaves = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    name = random.Random(seed).choice(sorted(name for name, leaf in leaves.items() if leaf.numel()))

    def ours(x: Tensor) -> Tensor:
        return scalar(op, backend, case, inputs, leaves | {name: x}, of)

    def plain(x: Tensor) -> Tensor:
        return plain_scalar(op, case, inputs, leaves | {name: x})

    return Problem(ours, plain, leaves[name].contiguous())


def plain_scalar(op: str, case: Case, inputs: Inputs, leaves: dict[str, Tensor]) -> Tensor:
    hidden, targets = leaves["hidden"].flatten(0, -2), inputs.targets.long().flatten()
    token = eager_log_likelihood(hidden, leaves["weight"], targets, leaves.get("bias"), **case.options)
    sequence = token.new_zeros(len(inputs.seq_weight)).index_add(0, sequence_of(inputs), token)
    if op == "weighted":
        return -(inputs.seq_weight * sequence).sum()
    return (inputs.grad_sequence * sequence).sum() + (inputs.grad_token.flatten() * token).sum()


def barrier_problem(which: str, seed: int) -> Problem:
    draw = random.Random(seed)
    mu = draw.uniform(0.1, 1)
    at = torch.tensor([draw.uniform(-2, 1) for _ in range(3)], dtype=torch.float64)
    constant = torch.tensor(mu, dtype=torch.float64), torch.tensor(mu * mu, dtype=torch.float64)
    if which != "barrier_weights":
        ours = {"relaxed_log_barrier": relaxed_log_barrier, "barrier_multiplier": barrier_multiplier}[which]
        plain = getattr(reference, which)
        return Problem(lambda z: ours(z, mu).sum(), lambda z: plain(z, *constant).sum(), at)
    bounds, state, norm = Bounds.of([(0, 1.0, 0.3, 1.0, 0.0, 0.0, math.inf)]), initial_state(1), at.new_ones(3)

    def weights(rewards: Tensor) -> Tensor:
        return barrier_weights(rewards[:, None], state, bounds, mu).multiplier.sum()

    def plain_weights(rewards: Tensor) -> Tensor:
        arguments = (rewards[:, None], norm, None, state, bounds.reward_index, bounds.table)
        return reference.barrier_weights(*arguments, *constant, 0.1, True)[1].sum()

    return Problem(weights, plain_weights, at)


def transformed(problem: Callable[[int], Problem], seed: int, counts: Found) -> float | None:
    """-> the error as a share of what is allowed; None where it is refused by name."""
    names = list(TRANSFORMS)
    name = names[seed % len(names)]
    transform = TRANSFORMS[name]
    given = problem(seed // len(names))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it is made of
            found = transform(given.ours, given.at.clone())
    except RuntimeError as error:
        if not NAMES.search(str(error)):
            raise AssertionError(f"{name}: refused without the op's name: {error}") from error
        counts.sums["refused by name"] = counts.sums.get("refused by name", 0) + 1
        return None
    counts.sums["right"] = counts.sums.get("right", 0) + 1
    wanted = transform(given.plain, given.at.clone())
    if found.shape != wanted.shape:
        raise AssertionError(f"{name}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    size = max(1.0, wanted.abs().max().item())
    share = (found.detach() - wanted.detach()).abs().max().item() / (ALLOWED * size)
    if not share <= 1:
        raise AssertionError(f"{name}: {found.flatten()[:3].tolist()}, wanted {wanted.flatten()[:3].tolist()}")
    return share


def all_transforms(problem: Callable[[int], Problem], seeds: range) -> Found:
    counts = Found()
    found = each(partial(transformed, problem, counts=counts), seeds)
    found.sums = counts.sums
    return found


def one_rank(run: Callable[[range], Found], seeds: range) -> Found:
    """In a group of this process alone, which shares a vocabulary with nobody."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        return run(seeds)
    finally:
        dist.destroy_process_group()


def counted(found: Found) -> None:
    found.figures |= {name: int(value) for name, value in found.sums.items()}


def parts() -> list[Part]:
    found = []
    rounds = len(TRANSFORMS)
    for op, backend in BOTH:
        if backend == "triton":  # which has no float64
            continue
        check = partial(gradcheck, op, backend, check_batched_grad=True)
        found += [
            Part(f"gradcheck {op} {backend}", partial(each, check), 1_000, 6, 200, seconds=25),
            Part(
                f"kept graphs {op} {backend}",
                partial(each, partial(repeated, op, backend)),
                3_000,
                20,
                1_000,
                seconds=15,
            ),
            Part(
                f"transforms {op} {backend}",
                partial(all_transforms, partial(head_problem, op, backend)),
                100 * rounds,
                rounds,
                25 * rounds,
                seconds=15,
                close=counted,
            ),
        ]
        shared = partial(gradcheck, op, backend, of=parallel)
        mapped = partial(all_transforms, partial(head_problem, op, backend, of=parallel))
        found += [
            Part(f"gradcheck parallel {op} {backend}", partial(one_rank, partial(each, shared)), 250, 4, seconds=15),
            Part(
                f"transforms parallel {op} {backend}",
                partial(one_rank, mapped),
                20 * rounds,
                rounds,
                seconds=10,
                close=counted,
            ),
        ]
    found += [
        Part("gradcheck drop-ins", partial(each, drop_in_gradcheck), 400, 6, 100, seconds=25),
        Part("gradcheck barrier", partial(each, barrier_gradcheck), 300, 6, 100, seconds=15),
    ]
    for which in ("relaxed_log_barrier", "barrier_multiplier", "barrier_weights"):
        run = partial(all_transforms, partial(barrier_problem, which))
        found.append(Part(f"transforms {which}", run, 100 * rounds, rounds, 50 * rounds, seconds=5, close=counted))
    return found
