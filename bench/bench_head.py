"""The head, forward and backward with known weights: ours against the head that holds its logits, on the same tensors.

Targets are drawn from the model's own softmax, so that their probabilities are those of training and not of noise. Gradients are
checked against float64 before anything is timed; new inputs in every round.
"""

from collections.abc import Callable

import pytest
import torch
from shapes import HEAD, Shape
from torch import Tensor

from l3m_kernels import weighted_log_likelihood
from l3m_kernels.reference import eager_log_likelihood

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, seq_weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    return weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens)[0]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, seq_weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    token = eager_log_likelihood(hidden, weight, targets)
    return -(seq_weight.repeat_interleave(cu_seqlens.diff()) * token).sum()


def inputs(shape: Shape, dtype: torch.dtype, masked: float, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape.rows, shape.hidden, generator=generator)
    weight = torch.randn(shape.vocabulary, shape.hidden, generator=generator) * (3 / shape.hidden**0.5)
    targets = torch.distributions.Categorical(logits=hidden @ weight.t()).sample()
    targets[torch.rand(shape.rows, generator=generator) < masked] = -100
    seq_weight = torch.randn(shape.sequences, generator=generator) / shape.rows
    cu_seqlens = torch.arange(shape.sequences + 1) * (shape.rows // shape.sequences)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, seq_weight, cu_seqlens


def gradients(loss: Loss, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    hidden, weight, *rest = arguments
    return list(torch.autograd.grad(loss(hidden, weight, *rest), (hidden, weight)))


@pytest.mark.parametrize("masked", [0.0, 0.4], ids=["all-scored", "40%-masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", HEAD, ids=str)
@pytest.mark.parametrize("loss", [ours, eager], ids=lambda loss: loss.__name__)
def test_forward_and_backward(benchmark, loss: Loss, shape: Shape, dtype: torch.dtype, masked: float) -> None:
    arguments = inputs(shape, dtype, masked)
    exact = tuple(t.detach().double().requires_grad_() if t.requires_grad else t for t in arguments)
    for found, wanted in zip(gradients(loss, arguments), gradients(eager, exact), strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)

    rounds = [inputs(shape, dtype, masked, seed) for seed in range(1, 6)]
    current = iter(rounds * 100)
    benchmark.group = f"head fwd+bwd {shape} {dtype} masked {masked:.0%}"
    scored = float((arguments[2] != -100).float().mean())
    benchmark.extra_info["gflop_of_scored_rows"] = shape.flops(3, scored) / 1e9
    benchmark.pedantic(
        lambda batch: gradients(loss, batch), setup=lambda: ((next(current),), {}), rounds=5, warmup_rounds=1
    )
