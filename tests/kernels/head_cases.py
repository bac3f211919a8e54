"""Random cases of the head's ops; how near to the oracle they have to be is in `head_oracle`.

Letters: T tokens, N sequences, L padded length, D hidden size, V vocabulary.
"""

import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from l3m_kernels.backends import TABLE

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FROZEN = ((), (), (), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight", "bias"))
VIEWS = ("contiguous", "transposed", "strided", "offset", "expanded")
NUMBERS = ("normal", "normal", "outlier", "huge", "tiny", "zeros", "ties", "sure", "ruled out", "far from 0", "masked")
DIFFERENTIATED = (
    "both",
    "both",
    "sequence",
    "token",
    "sum",
)  # outputs of `log_likelihood`; of a sum, gradients are expanded


def backends_of(*ops: str) -> list[str]:
    """Names of the backends that have all of `ops` on a CPU here."""
    return [row.name for row in TABLE if all(row.problem(op, "cpu") is None for op in ops)]


HEAD_BACKENDS = backends_of("log_likelihood", "log_likelihood_backward")
WEIGHTED_BACKENDS = backends_of("weighted_log_likelihood")
BOTH = [("log_likelihood", name) for name in HEAD_BACKENDS] + [("weighted", name) for name in WEIGHTED_BACKENDS]


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
    numbers: str = "normal"  # of NUMBERS
    differentiated: str = "both"  # of DIFFERENTIATED
    loss_scale: float = 1.0  # a power of 2: what is differentiated is multiplied by it
    twice: bool = False  # a second backward, which must give the same bits

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
    def hard(cls, seed: int, large: bool = False) -> "Case":
        """A random case with what users do and nobody tries: numbers of all sizes, upstream gradients of all kinds, odd calls."""
        case, draw = cls.random(seed, large), random.Random(f"hard {seed}")
        if not large:  # around the sizes of tiles
            if draw.random() < 0.3:
                case = replace(case, vocabulary=draw.choice((15, 16, 31, 32, 33, 63, 65, 127, 128, 129, 511, 513)))
            if draw.random() < 0.3:
                case = replace(case, width=draw.choice((15, 17, 31, 32, 63, 65, 127, 128, 129, 255)))
            if draw.random() < 0.1:
                case = replace(case, lengths=tuple(draw.choice((0, 0, 1, 2)) for _ in range(draw.choice((13, 40)))))
        numbers = draw.choice(NUMBERS)
        if numbers == "ruled out":
            case = replace(case, bias=True, vocabulary=max(case.vocabulary, 2), softcap=None, view="contiguous")
        return replace(
            case,
            numbers=numbers,
            temperature=draw.choice((case.temperature,) * 4 + (0.01, 50.0)),
            softcap=draw.choice((case.softcap,) * 4 + (None if numbers == "ruled out" else 0.05,)),
            differentiated=draw.choice(DIFFERENTIATED),
            loss_scale=draw.choice((1.0, 1.0, 1.0, -1.0, 2.0**16, 2.0**-20)),
            twice=draw.random() < 0.1,
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

        hidden, weight = spread * normal(*shape, self.width), spread * normal(self.vocabulary, self.width)
        bias = normal(self.vocabulary) if self.bias else None
        targets = torch.randint(self.vocabulary, shape, generator=generator)
        make_unusual(self.numbers, hidden, weight, bias, targets, self.dtype)
        hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
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
        if self.differentiated != "both":
            (grad_sequence if self.differentiated == "token" else grad_token).zero_()
        if self.differentiated == "sum":
            grad_sequence.fill_(1)
        upstream = (tensor.to(compute) for tensor in (seq_weight, grad_sequence, grad_token))
        inputs = Inputs(hidden, weight, targets.to(self.index_dtype), cu_seqlens, bias, *upstream)
        for name, leaf in inputs.leaves.items():
            leaf.requires_grad_(name not in self.frozen)
        return inputs

    @property
    def options(self) -> dict:
        return {"softcap": self.softcap, "temperature": self.temperature, "ignore_index": self.ignore_index}


def make_unusual(
    kind: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
) -> None:
    """Change normal numbers, in place, float64 that will be rounded to `dtype`."""
    half = dtype == torch.float16
    if kind == "outlier":  # as language models have them: a channel hundreds of times larger than others
        hidden[..., 0] *= 300
    elif kind == "huge":
        weight *= 30 if half else 1000
    elif kind == "tiny":  # subnormal, or so that products are
        for tensor in (hidden, weight):
            tensor *= 1e-4 if half else 1e-160 if dtype == torch.float64 else 1e-21
    elif kind == "zeros":
        hidden[..., ::2, :] = 0
        weight[::3] = 0
    elif kind == "ties":
        weight[1::2] = weight[: 2 * (len(weight) // 2) : 2]
    elif kind == "sure":  # of the target, to the last digit and beyond
        wanted = weight[targets]
        hidden.copy_(wanted * 60 / wanted.square().sum(-1, keepdim=True).clamp(min=1))
    elif kind == "far from 0":  # logits that share a large part
        hidden[..., 0], weight[:, 0] = 40, 40
    elif kind in ("ruled out", "masked") and bias is not None:
        bias[1::3] = -torch.inf if kind == "ruled out" else -6e4 if half else -1e9
        targets[targets % 3 == 1] = 0


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
