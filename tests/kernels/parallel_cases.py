"""Calls of the vocabulary-parallel head: whole tensors of each, made alike on every rank and in the test that compares."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

V, D = 23, 8
CU_SEQLENS = (0, 4, 4, 9, 13)  # with an empty sequence


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]  # of each rank
    dtype: torch.dtype = torch.float64
    backend: str | None = "reference"
    weighted: bool = False
    bias: bool = False
    padded: bool = False
    frozen: tuple[str, ...] = ()
    ruled_out: tuple[int, int] | None = None  # tokens with a bias of -inf
    upstream: str = "both"  # what is differentiated
    transposed: bool = False  # hidden's strides
    ignored: tuple[int, ...] = (2, 7)  # tokens that are not scored
    width: int = D
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Any, ...]:
        """hidden, weight, targets, cu_seqlens or None, bias or None, gradients of sequence and token, seq_weight."""
        generator = torch.Generator().manual_seed(5)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        vocabulary, tokens = sum(self.rows), 12 if self.padded else CU_SEQLENS[-1]
        hidden, weight = self.scale * randn(tokens, self.width), randn(vocabulary, self.width) / 2
        targets = torch.randint(vocabulary, (tokens,), generator=generator)
        targets[list(self.ignored)] = self.options.get("ignore_index", -100)
        targets[0], targets[-1] = 0, vocabulary - 1
        bias: Any = randn(vocabulary) if self.bias else None
        if self.ruled_out:
            bias[slice(*self.ruled_out)] = -torch.inf
        sequences = 3 if self.padded else len(CU_SEQLENS) - 1
        grad_sequence, grad_token = randn(sequences), randn(tokens)
        seq_weight = torch.tensor([0.5, 0.0, -1.5, 0.25][:sequences], dtype=torch.float64)
        cu_seqlens = None if self.padded else torch.tensor(CU_SEQLENS)
        if self.padded:
            hidden, targets, grad_token = hidden.view(3, 4, -1), targets.view(3, 4), grad_token.view(3, 4)
        if self.transposed:
            hidden = hidden.mT.contiguous().mT
        floats = [None if t is None else t.to(self.dtype) for t in (hidden, weight, bias)]
        return floats[0], floats[1], targets, cu_seqlens, floats[2], grad_sequence, grad_token, seq_weight

    def whole(self) -> "Case":
        return replace(self, rows=(sum(self.rows),))

    def run(self, log_likelihood, weighted_log_likelihood, part=slice(None), exact=False, **more):
        """The call with rows `part` of the vocabulary, and its backward -> names to tensors. `exact`: of the same numbers in float64."""
        hidden, weight, targets, cu_seqlens, bias, grad_sequence, grad_token, seq_weight = self.tensors()
        if exact:
            hidden, weight, bias = hidden.double(), weight.double(), None if bias is None else bias.double()
        leaves = {"hidden": hidden, "weight": weight[part].contiguous(), "bias": None if bias is None else bias[part]}
        for name, leaf in leaves.items():
            if leaf is not None and name not in self.frozen:
                leaf.requires_grad_()
        options = {**self.options, "bias": leaves["bias"], "backend": "reference" if exact else self.backend, **more}
        if self.weighted:
            loss, found = weighted_log_likelihood(
                leaves["hidden"], leaves["weight"], targets, seq_weight, cu_seqlens, **options
            )
            results = {"loss": loss.detach()}
        else:
            found = log_likelihood(leaves["hidden"], leaves["weight"], targets, cu_seqlens, **options)
            loss, results = hidden.new_zeros(()), {}
            if self.upstream in ("both", "sequence"):
                loss = loss + (found.sequence * grad_sequence.to(found.sequence)).sum()
            if self.upstream in ("both", "token"):
                loss = loss + (found.token * grad_token.to(found.token)).sum()
        loss.backward()
        results |= {"sequence": found.sequence.detach(), "length": found.length, "token": found.token.detach()}
        grads = {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
        return results | {name: grad for name, grad in grads.items() if grad is not None}


EVERYTHING = {"softcap": 3.0, "temperature": 0.7, "ignore_index": 7, "scored": 11}
# Two ranks: even, uneven, one without rows.
TWO = {
    f"{name}, {backend}, {'weighted' if weighted else 'plain'}": replace(case, backend=backend, weighted=weighted)
    for name, case in {
        "even": Case((12, 12)),
        "all options": Case((12, 11), bias=True, options=EVERYTHING),
        "padded": Case((5, 18), padded=True, bias=True, options={"temperature": 1.5}),
        "none here": Case((0, 23), bias=True),
        "none here, hidden transposed": Case((0, 23), transposed=True, ignored=()),
        "none there": Case((23, 0), options={"softcap": 2.0}),
        "frozen weight": Case((12, 11), bias=True, frozen=("weight",)),
        "frozen hidden": Case((12, 11), bias=True, frozen=("hidden", "bias")),
        "ruled out": Case((12, 11), bias=True, ruled_out=(15, 22)),
    }.items()
    for backend in ("reference", "cpp")
    for weighted in (False, True)
}
TWO |= {
    f"{str(dtype)[6:]}, {backend}, {name}": Case((120, 131), dtype, backend, width=64, scale=scale, bias=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for backend in ("reference", "cpp")
    for name, scale in {"large logits": 2.0, "small logits": 0.25}.items()
}
TWO["sequence alone"] = Case((12, 11), upstream="sequence")
TWO["token alone"] = Case((12, 11), upstream="token", backend="cpp")
TWO["sure of a token"] = Case((12, 11), torch.float32, "cpp", scale=8.0)
FOUR = {
    "chunks": Case((6, 6, 6, 5), bias=True, options=EVERYTHING),
    "chunks, weighted": Case((6, 6, 6, 5), backend="cpp", weighted=True),
    "some empty": Case((0, 20, 3, 0), backend="cpp", bias=True),
    "a rank ruled out": Case((12, 4, 6, 1), bias=True, ruled_out=(12, 16)),
    "a rank ruled out, cpp": Case((12, 4, 6, 1), bias=True, backend="cpp", ruled_out=(12, 16)),
}
TRITON = Case((12, 11), torch.float32, "triton", bias=True, options={"softcap": 3.0, "temperature": 0.7})
