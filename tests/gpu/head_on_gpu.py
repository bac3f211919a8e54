"""The head's ops on a CUDA device, called one way for every backend."""

from dataclasses import replace

import pytest
import torch
from head_cases import Case, Inputs, view
from torch import Tensor

from l3m_kernels import log_likelihood, weighted_log_likelihood
from l3m_kernels.backends import TABLE

DEVICE = "cuda"
HEAD_OPS = ("log_likelihood", "log_likelihood_backward", "weighted_log_likelihood")


def backends_with(*ops: str) -> list[str]:
    return [row.name for row in TABLE if all(row.problem(op, DEVICE) is None for op in ops)]


HEAD_BACKENDS = backends_with(*HEAD_OPS)
MISSING = pytest.param("none", marks=pytest.mark.skip(reason="no GPU backend of ours can be used here"))
backends = pytest.mark.parametrize("backend", HEAD_BACKENDS)
both = pytest.mark.parametrize("weighted", [False, True], ids=["log_likelihood", "weighted"])


def on_device(case: Case, inputs: Inputs) -> Inputs:
    """The same values, and the same strides and offsets, on the device."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        found = view(tensor.detach().contiguous().to(DEVICE), case.view)
        return found.requires_grad_(tensor.requires_grad)

    plain = (None if tensor is None else tensor.to(DEVICE) for tensor in inputs[5:])
    targets = view(inputs.targets.contiguous().to(DEVICE), "contiguous" if case.view == "expanded" else case.view)
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.to(DEVICE)
    return Inputs(moved(inputs.hidden), moved(inputs.weight), targets, cu_seqlens, moved(inputs.bias), *plain)  # type: ignore[arg-type]


def random_case(seed: int, backend: str, **changes) -> Case:
    """float64 is left to the reference, and batches of many parts are not. Hundreds of parts would be a test of long fp32 sums."""
    large = seed % 2 == 0 and backend != "reference"
    if large:
        changes = {"workspace": (None, 1 << 20)[seed // 2 % 2]} | changes
    case = replace(Case.random(seed, large=large), **changes)
    return replace(case, dtype=torch.float32) if case.dtype == torch.float64 and backend != "reference" else case


def run(case: Case, inputs: Inputs, weighted: bool, backend: str) -> dict[str, Tensor]:
    """Forward and backward of inputs on the device -> the values that the oracle knows, on the CPU."""
    hidden, weight, targets, cu_seqlens, bias, seq_weight, grad_sequence, grad_token = inputs
    options = {"bias": bias, "backend": backend, **case.options}
    if case.seed % 2:
        options["scored"] = int((targets != case.ignore_index).sum())
    if weighted:
        loss, out = weighted_log_likelihood(hidden, weight, targets, seq_weight, cu_seqlens, **options)
        if loss.requires_grad:
            loss.backward()
        found = {"loss": loss.detach()}
    else:
        out, found = log_likelihood(hidden, weight, targets, cu_seqlens, **options), {}
        if out.sequence.requires_grad:
            torch.autograd.backward((out.sequence, out.token), (grad_sequence, grad_token))
    found |= {"sequence": out.sequence.detach(), "token": out.token.detach()}
    found |= {f"d_{name}": leaf.grad for name, leaf in inputs.leaves.items() if leaf.grad is not None}
    return {name: value.cpu() for name, value in found.items()}


class Batch:
    """Plain inputs of any size, made on the device: packed, sequences of equal length."""

    def __init__(self, rows: int, width: int, vocabulary: int, dtype: torch.dtype, masked: float = 0.0, seed: int = 0):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        options = {"generator": generator, "device": DEVICE}
        self.hidden = torch.randn(rows, width, **options).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, **options) / width**0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(vocabulary, (rows,), **options)
        self.targets[torch.rand(rows, **options) < masked] = -100
        self.cu_seqlens: Tensor | None = torch.arange(0, rows + 1, rows // 4, device=DEVICE)
        self.seq_weight = torch.tensor([1.0, -0.5, 2.0, 0.25], device=DEVICE)

    def scored(self) -> int:
        return int((self.targets != -100).sum())

    def loss(self, weighted: bool, backend: str, scored: int | None = None) -> Tensor:
        arguments, options = (self.hidden, self.weight, self.targets), {"backend": backend, "scored": scored}
        if weighted:
            return weighted_log_likelihood(*arguments, self.seq_weight, self.cu_seqlens, **options)[0]
        return -(self.seq_weight * log_likelihood(*arguments, self.cu_seqlens, **options).sequence).sum()

    def gradients(self, weighted: bool, backend: str, scored: int | None = None) -> tuple[Tensor, ...]:
        loss = self.loss(weighted, backend, scored)
        return (loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight)))
