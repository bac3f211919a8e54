"""Who takes part, as two functions of a batch: log-likelihoods of its tokens, and a loss whose weights are known in advance.

A contestant may have one of them or both. `prepare` makes of it what is timed for a case: a function of a batch that returns the
gradients (or, without gradients, the log-likelihoods). Who cannot take part says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l3m_kernels import backends, log_likelihood, set_workspace, weighted_log_likelihood
from l3ms.benchmark.inputs import IGNORED, Batch
from l3ms.benchmark.shapes import Case

Run = Callable[[Batch], tuple[Tensor, ...]]


class Unavailable(Exception):
    """Why a contestant cannot take part in a case."""


@dataclass(frozen=True)
class Functions:
    token: Callable[[Batch], Tensor] | None = None  # (T,) log-likelihoods, 0 where not scored
    loss: Callable[[Batch], Tensor] | None = None  # () -sum_n seq_weight[n] * log pi(sequence n), up to a constant
    run: Run | None = None  # instead of both: what is timed, its result is not checked


@dataclass(frozen=True)
class Contestant:
    name: str  # --contestants
    title: str
    make: Callable[[Case], Functions]
    kind: str = "peer"  # or "ours", or "limit": the bare matrix products
    uniform: bool = False  # adds up the losses of all tokens, so it gets one weight for all sequences
    compiled: bool = False  # its first call compiles
    low_memory: bool = False  # of `l3m_kernels.set_workspace`


def prepare(contestant: Contestant, case: Case) -> Run:
    """What is timed.

    Raises:
        Unavailable: why the contestant cannot take part.
    """
    try:
        functions = contestant.make(case)
    except Unavailable:
        raise
    except Exception as error:  # a peer's import may fail in any way
        raise Unavailable(reason(error)) from error
    if functions.run is not None:
        return functions.run
    if case.op in ("no-grad", "log-likelihood") and functions.token is None:
        raise Unavailable("gives one loss, not the log-likelihoods of tokens")

    def run(batch: Batch) -> tuple[Tensor, ...]:
        batch = batch.uniform() if contestant.uniform else batch
        set_workspace(None, low_memory=contestant.low_memory)
        try:
            return _outputs(case.op, functions, batch)
        finally:
            set_workspace(None)

    return run


def _outputs(op: str, functions: Functions, batch: Batch) -> tuple[Tensor, ...]:
    if op == "no-grad":
        assert functions.token is not None
        with torch.no_grad():
            return (functions.token(batch),)
    if op == "log-likelihood":
        assert functions.token is not None
        token = functions.token(batch)
        return torch.autograd.grad(token, batch.wanted, batch.upstream.to(token.dtype))
    if functions.loss is not None:
        return torch.autograd.grad(functions.loss(batch), batch.wanted)
    assert functions.token is not None
    return torch.autograd.grad(-(batch.token_weight * functions.token(batch)).sum(), batch.wanted)


def reason(error: BaseException) -> str:
    """One short line for what a peer raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({text})"
    if "active drivers" in text:
        return f"needs a GPU: Triton finds {text}"
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 160 else f"{text[:159]}…"


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
    from l3ms.benchmark.peers import PEERS

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
