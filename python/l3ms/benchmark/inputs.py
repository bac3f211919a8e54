"""The tensors of a case, new ones for every round, and the gradients that they have in float64.

Targets are drawn from the model's own softmax and the weight is scaled so that their mean negative log-likelihood is about that of
training (2 to 3.5): on plain noise every target is unlikely, and methods that skip small probabilities would skip nearly everything.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3m_kernels import log_likelihood, set_workspace, weighted_log_likelihood
from l3ms.benchmark.shapes import DTYPES, Case

IGNORED = -100
EXACT_WORKSPACE = {"cpu": 256 << 20, "cuda": 2 << 30}


class Batch(NamedTuple):
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,) int64, IGNORED where not scored
    cu_seqlens: Tensor  # (N + 1,) int64, sequences of equal length
    seq_weight: Tensor  # (N,) fp32, either sign: loss = -sum_n seq_weight[n] * log pi(sequence n)
    upstream: (
        Tensor  # (T,) fp32, gradient with respect to the tokens' log-likelihoods, where it is not known in advance
    )

    @property
    def sequences(self) -> int:
        return len(self.seq_weight)

    @property
    def token_weight(self) -> Tensor:
        """(T,) the weight of each token's sequence."""
        return self.seq_weight.repeat_interleave(
            self.cu_seqlens.diff(), output_size=len(self.targets)
        )  # or the host waits

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """What a gradient is asked for."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def uniform(self) -> Batch:
        """The same batch with one weight for all sequences, for functions that add up the losses of all tokens."""
        scored = (self.targets != IGNORED).sum()
        return self._replace(seq_weight=torch.ones_like(self.seq_weight) / scored)


class Source:
    """Draws the batches of a case. The weight stays, as it does between the steps of a training run; the rest is new."""

    def __init__(self, case: Case, seed: int, likely: bool = True):
        """likely: draw the targets from the softmax; without it from all tokens alike, which is quick and good for memory alone."""
        self.case, self.seed, self.likely = case, seed, likely
        self.dtype = getattr(torch, DTYPES[case.dtype])
        shape = case.shape
        # The entropy of a softmax of V normal logits falls as log V - spread^2 / 2, and slower when few tokens are left: 2 to 3.5 here.
        spread = math.sqrt(2 * (math.log(shape.vocabulary) + 1))
        generator = torch.Generator(case.device).manual_seed(seed)
        weight = torch.empty(shape.vocabulary, shape.hidden, dtype=self.dtype, device=case.device)
        weight.normal_(0.0, spread / shape.hidden**0.5, generator=generator)
        self.weight = weight.requires_grad_(case.op in ("weighted", "log-likelihood"))
        self.nll: list[float] = []  # mean of the targets of each batch that was drawn

    def draw(self, index: int) -> Batch:
        shape, case = self.case.shape, self.case
        generator = torch.Generator(case.device).manual_seed(1_000_003 * self.seed + index + 1)
        options: dict[str, Any] = {"generator": generator, "device": case.device}
        hidden = torch.empty(shape.rows, shape.hidden, dtype=self.dtype, device=case.device).normal_(
            generator=generator
        )
        if self.likely:
            targets, nll = _sample(hidden, self.weight.detach(), generator)
            self.nll.append(nll)
        else:
            targets = torch.randint(shape.vocabulary, (shape.rows,), **options)
        unscored = torch.randperm(shape.rows, **options)[: shape.rows - case.scored]
        targets[unscored] = IGNORED
        sequences = shape.sequences
        return Batch(
            hidden.requires_grad_(case.op != "no-grad"),
            self.weight,
            targets,
            torch.arange(sequences + 1, device=case.device) * (shape.rows // sequences),
            torch.randn(sequences, **options) / case.scored,
            torch.randn(shape.rows, **options) / case.scored,
        )


def _sample(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """-> (T,) targets ~ softmax(hidden @ weight.T) and their mean nll, a few rows at a time."""
    found, total = [], 0.0
    for chunk in hidden.split(max(1, (1 << 23) // len(weight))):
        logits = (chunk @ weight.t()).float()
        log_probabilities = logits.log_softmax(-1)
        cumulative = log_probabilities.exp().cumsum(-1)
        draw = torch.rand(len(chunk), 1, generator=generator, device=chunk.device) * cumulative[:, -1:]
        picked = torch.searchsorted(cumulative, draw).clamp_(max=len(weight) - 1)
        total -= float(log_probabilities.gather(1, picked).sum())
        found.append(picked[:, 0])
    return torch.cat(found), total / len(hidden)


def exact_dtype(case: Case) -> torch.dtype:
    """float64, or on a device that has not the memory float32: the reference's, whose products are not tf32."""
    if case.device == "cpu":
        return torch.float64
    torch.cuda.empty_cache()
    (rows, hidden, vocabulary), free = case.shape, torch.cuda.mem_get_info()[0]
    held = 8 * hidden * (3 * vocabulary + 3 * rows) + EXACT_WORKSPACE[case.device]
    return torch.float64 if 1.2 * held < free else torch.float32


def expected(case: Case, batch: Batch, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """What `case.op` gives for a batch, computed in `dtype` by the reference backend: gradients, or log-likelihoods without them."""
    hidden, weight = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (batch.hidden, batch.weight))
    arguments = (hidden, weight, batch.targets)
    wanted = tuple(tensor for tensor in (hidden, weight) if tensor.requires_grad)
    set_workspace(EXACT_WORKSPACE[case.device])
    try:
        if case.op == "no-grad":
            return (log_likelihood(*arguments, batch.cu_seqlens, backend="reference").token,)
        if case.op == "log-likelihood":
            token = log_likelihood(*arguments, batch.cu_seqlens, backend="reference").token
            return torch.autograd.grad(token, wanted, batch.upstream.to(dtype))
        loss, _ = weighted_log_likelihood(*arguments, batch.seq_weight.to(dtype), batch.cu_seqlens, backend="reference")
        return torch.autograd.grad(loss, wanted)
    finally:
        set_workspace(None)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in float64, a few rows at a time."""
    difference = norm = 0.0
    for mine, right in zip(found.detach().split(4096), wanted.split(4096), strict=True):
        difference += float((mine.double() - right.double()).square().sum())
        norm += float(right.double().square().sum())
    return math.sqrt(difference / norm) if norm else math.sqrt(difference)
