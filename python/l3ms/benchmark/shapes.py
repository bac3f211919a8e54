"""What is measured: ops, shapes, dtypes and the share of rows that is not scored. The one place where sizes are written down.

Letters: n scored and unscored rows, D hidden size, V vocabulary, N sequences of equal length, K one-sided constraints.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from l3ms.config.yaml_reader import ConfigError


class Shape(NamedTuple):
    rows: int
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return f"n{self.rows}-D{self.hidden}-V{self.vocabulary}"

    @property
    def sequences(self) -> int:
        """N: at most 16, and a divisor of the rows, for the peers that know padded batches only."""
        return math.gcd(self.rows, 16)


# Of Llama 2, Llama 3 and Qwen 2.5; fewer rows where the vocabulary is larger, so that each takes seconds on two cores.
SHAPES = (Shape(2048, 1024, 32000), Shape(1024, 512, 128256), Shape(1024, 896, 151936))
TINY = Shape(64, 32, 512)

# Products n x D x V that an op needs, 2 n D V FLOPs each on the scored rows. What is recomputed is not counted: less is better.
OPS = {"weighted": 3, "log-likelihood": 3, "no-grad": 1, "frozen": 2}
OP_TITLES = {
    "weighted": "weighted_log_likelihood, forward and backward",
    "log-likelihood": "log_likelihood, forward and backward, upstream gradient not known in advance",
    "no-grad": "log_likelihood without gradients",
    "frozen": "weighted_log_likelihood, forward and backward, frozen head",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
MASKED = (0.0, 0.4)

SCALING_ROWS = (256, 512, 1024, 2048, 4096, 8192)
SCALING_CONSTRAINTS = (1, 2, 4, 8)
RESPONSES = (64, 4096)  # of a constraint step, for `barrier_weights` alone

# Parameters of an optimizer step: 10M in 56 tensors.
STEP = (
    (16000, 256),
    *((256, 256), (256, 256), (1024, 256), (256, 1024), (256,)) * 9,
    *((256,),) * 9,
    (256, 256),
)


class Case(NamedTuple):
    op: str
    shape: Shape
    dtype: str
    masked: float
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.masked:.0%} unscored"

    @property
    def scored(self) -> int:
        return self.shape.rows - round(self.shape.rows * self.masked)

    @property
    def flops(self) -> float:
        return 2.0 * OPS[self.op] * self.scored * self.shape.hidden * self.shape.vocabulary


def cases_of(op: str) -> tuple[Case, ...]:
    """The committed cases of one op: every shape for the first op, the first shape for the others."""
    shapes = SHAPES if op == "weighted" else SHAPES[:1]
    return tuple(Case(op, shape, dtype, masked) for shape in shapes for dtype in DTYPES for masked in MASKED)


FULL = tuple(case for op in OPS for case in cases_of(op))
# On a GPU, in the order of what is asked first: Llama 3 8B, Llama 3.2 1B, Qwen 2.5 7B, and Gemma 2 2B with half the rows.
GPU_SHAPES = (
    Shape(8192, 4096, 128256),
    Shape(8192, 2048, 128256),
    Shape(8192, 3584, 152064),
    Shape(4096, 2304, 256000),
)
GPU_FULL = (
    *(Case("weighted", GPU_SHAPES[0], "bf16", masked, "cuda") for masked in MASKED),
    *(Case(op, GPU_SHAPES[0], "bf16", 0.0, "cuda") for op in ("frozen", "no-grad", "log-likelihood")),
    *(Case("weighted", shape, "bf16", masked, "cuda") for shape in GPU_SHAPES[1:] for masked in MASKED),
    *(Case(op, GPU_SHAPES[0], "bf16", 0.4, "cuda") for op in ("frozen", "no-grad", "log-likelihood")),
)
GPU_BUDGET = 450.0  # seconds for all of them

QUICK = Case("weighted", SHAPES[0], "bf16", 0.4)


def select_cases(
    ops: list[str], shapes: list[str], dtypes: list[str], masked: list[float], device: str = "cpu"
) -> tuple[Case, ...]:
    """The cases that options of the command line name; what is not named is that of `QUICK`, or on a GPU of `GPU_FULL`'s first.

    Raises:
        ConfigError: an op, shape, dtype or share that is not one, naming the option.
    """
    for option, names, known in (("--op", ops, OPS), ("--dtype", dtypes, DTYPES)):
        for name in names:
            if name not in known:
                raise ConfigError(option, f"must be one of {', '.join(known)}, got {name!r}")
    for share in masked:
        if not 0 <= share < 1:
            raise ConfigError("--masked", f"must be a share of the rows, at least 0 and less than 1, got {share:g}")
    quick = QUICK if device == "cpu" else GPU_FULL[0]
    parsed = [parse_shape(text) for text in shapes] or [quick.shape]
    cases = tuple(
        Case(op, shape, dtype, share, device)
        for op in ops or [quick.op]
        for shape in parsed
        for dtype in dtypes or [quick.dtype]
        for share in masked or [quick.masked]
    )
    if empty := next((case for case in cases if case.scored < 1), None):
        raise ConfigError("--masked", f"leaves none of {empty.shape.rows} rows scored, got {empty.masked:g}")
    return tuple(dict.fromkeys(cases))


def parse_shape(text: str) -> Shape:
    """`n,D,V`: rows, hidden size and vocabulary.

    Raises:
        ConfigError: not three positive whole numbers.
    """
    parts = text.replace(" ", "").split(",")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError("--shape", f"must be n,D,V (rows, hidden size, vocabulary), as 2048,1024,32000, got {text!r}")
    return Shape(*map(int, parts))
