"""Who takes part, as two functions of a batch: log-likelihoods of its tokens, and a loss whose weights are known in advance.

A contestant may have one of them or both. `prepare` makes of it what is timed for a case: a function of a batch that returns the
gradients (or, without gradients, the log-likelihoods). Who cannot take part says why. `contestants` has the list of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from l3m_kernels import set_workspace
from l3ms.benchmark.inputs import Batch
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


def prepare(contestant: Contestant, case: Case, keep_workspace: bool = False) -> Run:
    """What is timed, within the default workspace or (`keep_workspace`) the one that is set.

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
        if keep_workspace:
            return _outputs(case.op, functions, batch)
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
