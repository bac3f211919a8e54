"""Who takes part: the backends of l3m_kernels, what torch has itself, and the peers of other packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_kernels import backends, log_likelihood, weighted_log_likelihood
from l3ms.benchmark.contestant import Contestant, Functions, Unavailable
from l3ms.benchmark.inputs import IGNORED, Batch
from l3ms.benchmark.peers import PEERS
from l3ms.benchmark.shapes import Case

# ---- ours ------------------------------------------------------------------------------------------------------------

NEEDED = {
    "weighted": ("weighted_log_likelihood",),
    "frozen": ("weighted_log_likelihood",),
    "log-likelihood": ("log_likelihood", "log_likelihood_backward"),
    "no-grad": ("log_likelihood",),
}


def our_backends(device: str = "cpu") -> list[str]:
    """The backends of l3m_kernels for a device, fastest first, whether they can be used here or not."""
    return [row.name for row in backends().backends if row.devices == ("*",) or device in row.devices]


def _ours(backend: str, case: Case) -> Functions:
    row = next(row for row in backends().backends if row.name == backend)
    if problem := next((text for op in NEEDED[case.op] if (text := row.problem(op, case.device))), None):
        raise Unavailable(problem)

    # The count, as the constraint step gives it: a GPU is not waited for.
    options: dict[str, Any] = {"scored": case.scored, "backend": backend}

    def token(batch: Batch) -> Tensor:
        return log_likelihood(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, **options).token

    def loss(batch: Batch) -> Tensor:
        arguments = (batch.hidden, batch.weight, batch.targets, batch.seq_weight, batch.cu_seqlens)
        return weighted_log_likelihood(*arguments, **options)[0]

    return Functions(token, loss)


# ---- torch -----------------------------------------------------------------------------------------------------------


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(T,) log-likelihoods, with the (T, V) logits held: what a training loop does that has no fused head."""
    scored = targets != IGNORED
    picked = F.linear(hidden, weight).log_softmax(-1).gather(-1, targets.where(scored, 0)[:, None])
    return picked[:, 0].where(scored, 0)


def _of(function: Callable[[Tensor, Tensor, Tensor], Tensor], batch: Batch) -> Tensor:
    return function(batch.hidden, batch.weight, batch.targets)


def _eager(case: Case) -> Functions:
    return Functions(partial(_of, eager))


def _compiled(case: Case) -> Functions:
    return Functions(partial(_of, torch.compile(eager, dynamic=False)))


def _native(case: Case, chunked: bool, reduction: str) -> Functions:
    """torch's own fused head, from version 2.13 on."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def call(batch: Batch) -> Tensor:
        return F.linear_cross_entropy(
            batch.hidden, batch.weight, batch.targets, reduction=reduction, ignore_index=IGNORED, options=options
        )

    if reduction == "none":
        return Functions(lambda batch: -call(batch))
    return Functions(loss=lambda batch: call(batch) / case.scored)


def _products(case: Case) -> Functions:
    """The products that the op cannot do without, on the scored rows, into memory that is there: a ceiling, not a loss."""
    buffers: list[Tensor] = []

    def run(batch: Batch) -> tuple[Tensor, ...]:
        hidden, weight = batch.hidden.detach()[batch.targets != IGNORED], batch.weight.detach()
        if not buffers:
            buffers.extend(
                (hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden), torch.empty_like(weight))
            )
        logits, d_hidden, d_weight = buffers
        torch.mm(hidden, weight.t(), out=logits)
        if batch.hidden.requires_grad:
            torch.mm(logits, weight, out=d_hidden)
        if batch.weight.requires_grad:
            torch.mm(logits.t(), hidden, out=d_weight)
        return ()

    return Functions(run=run)


def contestants(device: str = "cpu") -> dict[str, Contestant]:
    """All of them, ours first."""
    table = []
    for name in our_backends(device):
        title, make = f"l3m_kernels {name}", partial(_ours, name)
        table.append(Contestant(name, title, make, "ours"))
        if name != "reference":
            table.append(Contestant(f"{name}-low-memory", f"{title}, low memory", make, "ours", low_memory=True))
    table += [
        Contestant("eager", "torch, logits held", _eager),
        Contestant("compile", "torch.compile of that", _compiled, compiled=True),
    ]
    for chunked, name, title in ((False, "torch-none", "options=None"), (True, "torch-chunked", "chunked")):
        title = f"F.linear_cross_entropy, {title}"
        table.append(Contestant(name, title, partial(_native, chunked=chunked, reduction="none")))
        summed = partial(_native, chunked=chunked, reduction="sum")
        table.append(Contestant(f"{name}-sum", f"{title}, sum", summed, uniform=True))
    table += [*PEERS, Contestant("products", "the bare products, torch.mm", _products, "limit")]
    return {contestant.name: contestant for contestant in table}
