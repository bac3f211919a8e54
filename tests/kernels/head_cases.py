"""Random cases of the head's ops, the float64 oracle, and how far from it an op may be.

Letters: T tokens, N sequences, L padded length, D hidden size, V vocabulary.

The error of an element is counted in units: ulps, of the precision that the op computes in, at the size of the terms that were added up to
make the element (its condition scale). A log-likelihood is a difference of numbers of the logits' size, so an ulp of a log-likelihood
near 0 would measure luck. An op may have 1.5 times the worst error, in units, of the unfused op + 2 units, and half an ulp of the output's
dtype for the final rounding. The unfused op runs in the compute precision (16-bit inputs widened), so what is asked of bf16 is more than
being as good as the unfused op in bf16. One exception: where a backend multiplies in bf16 (`multiplies_in`), the gradients of the logits
are rounded to it, as the unfused op's are; bf16 is then the precision of the gradients, and the unfused op's are those in bf16.
"""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from l3m_kernels.backends import NATIVE, TABLE
from l3m_kernels.reference import eager_log_likelihood

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FROZEN = ((), (), (), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight", "bias"))
VIEWS = ("contiguous", "transposed", "strided", "offset", "expanded")
FLOAT64_UNITS = 32  # 7e-15 of the condition scale
TOKEN_ABSOLUTE = 1e-3  # of a token's log-likelihood, whatever the inputs' dtype


def backends_of(*ops: str) -> list[str]:
    """Names of the backends that have all of `ops` on a CPU here."""
    return [row.name for row in TABLE if all(row.problem(op, "cpu") is None for op in ops)]


HEAD_BACKENDS = backends_of("log_likelihood", "log_likelihood_backward")
WEIGHTED_BACKENDS = backends_of("weighted_log_likelihood")
BOTH = [("log_likelihood", name) for name in HEAD_BACKENDS] + [("weighted", name) for name in WEIGHTED_BACKENDS]


def multiplies_in(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a backend has the gradients of the logits when it multiplies them out."""
    if dtype == torch.bfloat16 and backend == "cpp" and NATIVE.module.cpu_path() in ("amx", "avx512_bf16"):  # type: ignore[union-attr]
        return dtype
    if backend in ("triton", "cuda"):
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    hidden: Tensor  # (T, D) or (N, L, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,) or (N, L)
    cu_seqlens: Tensor | None  # (N + 1,)
    bias: Tensor | None  # (V,)
    seq_weight: Tensor  # (N,) with zeros and both signs
    grad_sequence: Tensor  # (N,) upstream gradients for log_likelihood
    grad_token: Tensor  # like targets

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Case:
    seed: int
    dtype: torch.dtype
    lengths: tuple[int, ...]  # of the N sequences
    padded: bool
    width: int  # D
    vocabulary: int  # V
    unscored: float  # share of tokens with ignore_index
    ignore_index: int
    temperature: float
    softcap: float | None
    bias: bool
    frozen: tuple[str, ...]  # of hidden, weight, bias
    view: str
    index_dtype: torch.dtype
    logit_size: float
    workspace: int | None  # bytes

    @classmethod
    def random(cls, seed: int, large: bool = False) -> "Case":
        """`large`: enough rows or tokens that a backend cuts them into several parts."""
        draw = random.Random(seed)
        vocabulary = draw.choice((1, 2, 3, 5, 17, 64, 101, 257))
        width = draw.choice((1, 2, 3, 8, 16, 33, 64))
        lengths = [draw.choice((0, 1, 1, 2, 3, 7, 12)) for _ in range(draw.choice((0, 1, 1, 2, 3, 5, 8)))]
        if large:
            vocabulary, rows = draw.choice(
                ((3, 1500), (130, 1100), (601, 500), (1025, 300), (2100, 100), (3500, 40), (9001, 5))
            )
            vocabulary, width = vocabulary - draw.randrange(3), draw.choice((2, 16, 33, 70, 130, 258, 300))
            lengths = [draw.randrange(rows), 0, draw.randrange(1, rows) // 2]
        row = 4 * (vocabulary + 2 * width)
        return cls(
            seed=seed,
            dtype=draw.choice(DTYPES),
            lengths=tuple(lengths),
            padded=draw.random() < 0.4,
            width=width,
            vocabulary=vocabulary,
            unscored=draw.choice((0.0, 0.0, 0.3, 0.7, 1.0)),
            ignore_index=draw.choice((-100, -100, -1, 0)),
            temperature=draw.choice((1.0, 1.0, 0.3, 0.7, 2.5)),
            softcap=draw.choice((None, None, 1.5, 30.0)),
            bias=draw.random() < 0.5,
            frozen=draw.choice(FROZEN),
            view=draw.choice(VIEWS),
            index_dtype=draw.choice((torch.int32, torch.int64)),
            logit_size=draw.choice((0.1, 1.0, 4.0, 20.0)),
            workspace=draw.choice((None, 1, row, 3 * row, 10 * row)),
        )

    @classmethod
    def plain(cls, **changes) -> "Case":
        """A small float64 case with everything on."""
        settings = {
            "seed": 0,
            "dtype": torch.float64,
            "lengths": (3, 0, 4, 1),
            "padded": False,
            "width": 4,
            "vocabulary": 7,
            "unscored": 0.2,
            "ignore_index": -100,
            "temperature": 0.7,
            "softcap": 3.0,
            "bias": True,
            "frozen": (),
            "view": "contiguous",
            "index_dtype": torch.int64,
            "logit_size": 2.0,
            "workspace": None,
        }
        return cls(**settings | changes)

    def build(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        longest = max(self.lengths, default=3)
        shape = (len(self.lengths), longest) if self.padded else (sum(self.lengths),)
        spread = (self.logit_size / self.width**0.5) ** 0.5

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        hidden = (spread * normal(*shape, self.width)).to(self.dtype)
        weight = (spread * normal(self.vocabulary, self.width)).to(self.dtype)
        bias = normal(self.vocabulary).to(self.dtype) if self.bias else None
        targets = torch.randint(self.vocabulary, shape, generator=generator)
        targets[torch.rand(shape, generator=generator) < self.unscored] = self.ignore_index
        cu_seqlens = None
        if self.padded:
            targets[torch.arange(longest) >= torch.tensor(self.lengths, dtype=torch.int64)[:, None]] = self.ignore_index
        else:
            cu_seqlens = torch.tensor((0, *self.lengths)).cumsum(0).to(self.index_dtype)
        hidden, weight = view(hidden, self.view), view(weight, self.view)
        bias = None if bias is None else view(bias, self.view)
        targets = view(targets, "contiguous" if self.view == "expanded" else self.view)
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        seq_weight = normal(len(self.lengths)) * (torch.rand(len(self.lengths), generator=generator) < 0.7)
        grad_sequence = normal(len(self.lengths)) * (torch.rand(len(self.lengths), generator=generator) < 0.8)
        grad_token = normal(*shape) * (torch.rand(shape, generator=generator) < 0.6)
        upstream = (tensor.to(compute) for tensor in (seq_weight, grad_sequence, grad_token))
        inputs = Inputs(hidden, weight, targets.to(self.index_dtype), cu_seqlens, bias, *upstream)
        for name, leaf in inputs.leaves.items():
            leaf.requires_grad_(name not in self.frozen)
        return inputs

    @property
    def options(self) -> dict:
        return {"softcap": self.softcap, "temperature": self.temperature, "ignore_index": self.ignore_index}


def grad_of(leaf: Tensor) -> Tensor:
    """The gradient of a leaf that has one."""
    assert leaf.grad is not None
    return leaf.grad


def view(tensor: Tensor, kind: str) -> Tensor:
    """The same values (for "expanded": those of the first row) under other strides or another offset."""
    if kind == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    if kind == "strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 99)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if kind == "offset":
        longer = torch.cat([tensor.flatten().new_full((7,), 99), tensor.flatten()])
        return longer[7:].view(tensor.shape)
    if kind == "expanded" and tensor.numel():
        return tensor[:1].expand(tensor.shape)
    return tensor


def sequence_of(inputs: Inputs) -> Tensor:
    """(T,) the sequence of each row of the flattened batch."""
    if inputs.cu_seqlens is None:
        return torch.arange(inputs.targets.shape[0]).repeat_interleave(inputs.targets.shape[1])
    lengths = inputs.cu_seqlens.diff().long()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def unfused(case: Case, inputs: Inputs, dtype: torch.dtype, weighted: bool) -> dict[str, Tensor]:
    """Outputs and gradients of the unfused op, computed in `dtype` throughout."""
    leaves = {name: leaf.detach().to(dtype).contiguous().requires_grad_() for name, leaf in inputs.leaves.items()}
    hidden = leaves["hidden"].reshape(-1, case.width)
    targets = inputs.targets.long().reshape(-1)
    token = eager_log_likelihood(hidden, leaves["weight"], targets, leaves.get("bias"), **case.options)
    sequence = token.new_zeros(len(inputs.seq_weight)).index_add(0, sequence_of(inputs), token)
    if weighted:
        value = -(inputs.seq_weight.to(dtype) * sequence).sum()
    else:
        value = (inputs.grad_sequence.to(dtype) * sequence).sum()
        value = value + (inputs.grad_token.to(dtype).flatten() * token).sum()
    value.backward()
    result = {"token": token.detach().view(inputs.targets.shape), "sequence": sequence.detach()}
    if weighted:
        result["loss"] = value.detach()
    return result | {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def condition_scales(case: Case, inputs: Inputs, weighted: bool) -> dict[str, Tensor]:
    """For each output and gradient, the size of the terms that are added up to make its elements, in float64."""
    hidden = inputs.hidden.detach().double().reshape(-1, case.width)
    weight, targets = inputs.weight.detach().double(), inputs.targets.long().reshape(-1)
    bias = None if inputs.bias is None else inputs.bias.detach().double()
    sequence = sequence_of(inputs)
    scored = targets != case.ignore_index
    sizes = hidden.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    size = sizes.amax(1) / case.temperature  # (T,) of the logits
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if case.softcap is not None:
        logits = case.softcap * (logits / case.softcap).tanh()
    log_probability = (logits / case.temperature).log_softmax(1)  # (T, V)
    probability = log_probability.exp()
    correct = torch.nn.functional.one_hot(targets.where(scored, 0), case.vocabulary)
    token = torch.where(scored, size - (log_probability * correct).sum(1), 0)
    per_sequence = token.new_zeros(len(inputs.seq_weight)).index_add(0, sequence, token)
    if weighted:
        upstream = inputs.seq_weight.double().abs()[sequence]
    else:
        upstream = inputs.grad_sequence.double().abs()[sequence] + inputs.grad_token.double().abs().flatten()
    spread = 2 + size[:, None] + math.log(case.vocabulary)
    d_logits = (upstream * scored / case.temperature)[:, None] * (probability * spread + correct * (1 - probability))
    scales = {
        "token": token.view(inputs.targets.shape),
        "sequence": per_sequence,
        "d_hidden": (d_logits @ weight.abs()).view(inputs.hidden.shape),
        "d_weight": d_logits.T @ hidden.abs(),
        "d_bias": d_logits.sum(0),
    }
    if weighted:
        scales["loss"] = (inputs.seq_weight.double().abs() * per_sequence).sum()
    return scales


def unfused_logit_units(case: Case, inputs: Inputs, dtype: torch.dtype) -> float:
    """Worst error of a logit of the unfused op in `dtype`, in units of a token's log-likelihood.

    Where all rows are one row, so are all logits and their errors: in the unfused op's difference of them nothing is left of it. An op that
    has the target's logit from elsewhere, more precise even, has the whole error of the others, and no other row to show it.
    """
    hidden, weight = inputs.hidden.detach().reshape(-1, case.width), inputs.weight.detach()
    if not hidden.numel():
        return 0.0
    exact = hidden.double() @ weight.double().T
    error = (hidden.to(dtype) @ weight.to(dtype).T).double() - exact
    size = hidden.double().abs() @ weight.double().abs().T
    return (error.abs() / ulp(size, dtype)).max().item()


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of the numbers of `dtype` at `size` (float64); that of the smallest normal number below it."""
    information = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=information.tiny)).exponent
    return information.eps * torch.exp2(exponent.double() - 1)


def assert_close_to_oracle(
    case: Case, inputs: Inputs, found: dict[str, Tensor], weighted: bool, backend: str = "reference"
) -> dict[str, float]:
    """Every value of `found` is as near to the float64 oracle as the module's docstring says.

    -> the worst error of each, as a share of what is allowed.
    """
    oracle = unfused(case, inputs, torch.float64, weighted)
    scales = condition_scales(case, inputs, weighted)
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    baseline = oracle if compute == torch.float64 else unfused(case, inputs, compute, weighted)
    operands = multiplies_in(backend, case.dtype)
    if operands != compute:
        rounded = unfused(case, inputs, operands, weighted)
        baseline |= {name: value for name, value in rounded.items() if name.startswith("d_")}
    # What is made of subnormal numbers has no relative accuracy.
    underflow = torch.finfo(compute).tiny / torch.finfo(compute).eps
    worst = {}
    for name, value in found.items():
        truth, unit = oracle[name], ulp(scales[name] + underflow, operands if name.startswith("d_") else compute)
        error = (value.double() - truth).abs()
        # Where all rows are one row, equal terms are rounded alike when they are added up, and their errors add up too: in the order
        # of one op more than in that of another
        equal = case.view == "expanded" and name.startswith("d_")
        if compute == torch.float64:
            allowed = max(FLOAT64_UNITS, equal * (case.vocabulary + inputs.targets.numel()) / 16) * unit
        else:
            units = ((baseline[name].double() - truth).abs() / unit).max().item() if truth.numel() else 0.0
            if case.view == "expanded" and name in ("token", "sequence", "loss"):
                units = max(units, unfused_logit_units(case, inputs, compute))
            if equal:
                terms = case.vocabulary if name == "d_hidden" else inputs.targets.numel()
                units = max(units, terms**0.5 / 4)
            allowed = (1.5 * units + 2) * unit
        if value.dtype.itemsize == 2:
            allowed = allowed + 0.5 * ulp(truth.abs() + allowed, value.dtype)
        if name == "token":
            allowed = allowed.clamp(max=TOKEN_ABSOLUTE)
        worst[name] = torch.where(error == 0, 0, error / allowed).max().item() if truth.numel() else 0.0
        excess = error - allowed
        assert not excess.isnan().any(), f"{name} is NaN in {case}"
        assert bool((excess <= 0).all()), (
            f"{name}: error {error.max().item():.3g}, {worst[name]:.2f} of what is allowed, in {case}"
        )
    return worst
