"""How long the head takes on a GPU, counted and not measured; `roofline` prints it.

Letters: n scored rows, m of a chunk, D hidden size, V vocabulary, b bytes of an input; P FLOP/s of products, B byte/s of device memory.

    limit                 2 n D V / P for each product that is needed: NT (logits), NN (d_hidden), TN (d_weight)
    a product             FLOPs / (P times the share of the multiprocessors that its tiles keep busy); bytes / B where more
    row kernel            (4 r + b) n V / B for r readings of the logits, down to 0.8 of B
    fp32 sum of d_weight  8 D V bytes a chunk (4 D V for the first), from hidden behind TN to not hidden at all
    closing passes        over d_weight: its rounding to 16 bits, its multiplication by the loss's gradient

Times are ranges, from all hidden that can be to nothing. A product of fewer tiles than multiprocessors is split in depth by cuBLAS at best,
and not at worst. Launches, waits and the order of rows are left out: the host is ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from l3m_kernels.chunk_sizes import (
    TILE_COLUMNS,
    TILE_ROWS,
    chunk_rows,
    gathered_rows,
    row_bytes,
    row_stride,
    waves,
)
from l3m_kernels.gpu_rates import Gpu
from l3m_kernels.gradient_sums import WHOLE_WAVES

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
MOST_COLUMNS = 262144  # of a row that is read once, into a cluster's registers
SLOW_KERNEL = 0.8  # of a copy's bandwidth, which the row kernel reaches at the least: not measured


class Problem(NamedTuple):
    rows: int  # scored and unscored
    hidden: int
    vocabulary: int
    dtype: str = "bf16"
    masked: float = 0.0  # share of the rows that is not scored
    frozen: bool = False  # no gradient of the weight
    gradients: bool = True  # False: log-likelihoods alone
    workspace: int | None = None  # bytes; None: the default

    @property
    def scored(self) -> int:
        return self.rows - round(self.rows * self.masked)

    @property
    def products(self) -> tuple[str, ...]:
        return ("NT", "NN", "TN")[: 1 if not self.gradients else 2 if self.frozen else 3]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def flops(self) -> float:
        """Of one product over all scored rows."""
        return 2.0 * self.scored * self.hidden * self.vocabulary


@dataclass(frozen=True)
class Design:
    """What is done to a batch, as far as it costs time."""

    name: str
    tiled_chunks: bool  # rows of a chunk by waves of tiles, else by whole multiples of 256
    one_read: bool  # the row kernel reads a row once, where blocks form clusters and V fits: L3M_ROW_KERNEL=cluster
    sums_in_16_bits: bool  # with a single chunk the product writes the weight's gradient as it is returned
    free_scaling: bool  # nothing is multiplied where the loss's gradient is 1
    gathers: bool  # gradients of all rows are held in 16 bits where they fit in the place of the fp32 sum


BEFORE = Design("as in 0.1", False, False, False, False, False)
AFTER = Design("with the mends", True, True, True, True, True)


class Step(NamedTuple):
    name: str
    least: float  # seconds, everything hidden that can be
    most: float  # seconds, nothing hidden
    needed: float  # seconds of these that the limit has too
    flops: float = 0.0
    bytes: float = 0.0
    busy: float | None = None  # share of the multiprocessors that the tiles keep busy
    why: str = ""  # what it loses, and to what

    @property
    def lost(self) -> float:
        return (self.least + self.most) / 2 - self.needed


@dataclass(frozen=True)
class Estimate:
    problem: Problem
    design: Design
    gpu: Gpu
    chunks: tuple[int, ...]  # rows of logits that are held at a time
    gathered: bool  # TN is of all rows at once
    limit: float  # seconds
    steps: tuple[Step, ...]

    @property
    def limit_flops(self) -> float:
        return len(self.problem.products) * self.problem.flops

    @property
    def seconds(self) -> tuple[float, float]:
        return sum(step.least for step in self.steps), sum(step.most for step in self.steps)

    @property
    def share(self) -> tuple[float, float]:
        """Of the limit, from nothing hidden to everything hidden."""
        least, most = self.seconds
        return self.limit / most, self.limit / least

    @property
    def held(self) -> int:
        """Bytes beside inputs and gradients: of the largest chunk, and of what is gathered in the place of the fp32 sum."""
        problem, most = self.problem, max(self.chunks)
        chunk = most * row_bytes(problem.vocabulary, problem.hidden, problem.itemsize)
        if not self.gathered:
            return chunk
        return problem.scored * problem.itemsize * row_stride(problem.vocabulary) + chunk

    @property
    def largest_loss(self) -> Step:
        return max(self.steps, key=lambda step: step.lost)


def break_even(gpu: Gpu, dtype: str, element: int) -> float:
    """Rows of a chunk at which TN takes as long as reading and writing its sum, of `element` bytes each."""
    return element * gpu.rates[dtype].value / gpu.bandwidth.value


def limit(problem: Problem, gpu: Gpu, products: int | None = None) -> float:
    """Seconds of the products, at the rate of large ones; `products` of n D V instead of those that are needed."""
    count = len(problem.products) if products is None else products
    return count * problem.flops / gpu.rates[problem.dtype].value


def chunks_of(problem: Problem, gpu: Gpu, design: Design) -> tuple[int, ...]:
    n, D, V, size = problem.scored, problem.hidden, problem.vocabulary, problem.itemsize
    if design.tiled_chunks:
        rows = chunk_rows(n, V, D, d_weight="TN" in problem.products, **_limits(problem, gpu))
    else:
        held = (problem.workspace or max(512 << 20, 1024 * 4 * V)) // row_bytes(V, D, size)
        most = max(held - held % 256 if held > 256 else held, 1)
        rows = -(-n // -(-n // most))
        rows = -(-rows // 256) * 256 if most >= 256 else rows
    return tuple(min(rows, n - first) for first in range(0, n, rows))


def gathered_chunks(problem: Problem, gpu: Gpu) -> tuple[int, ...]:
    """Rows of the logits that are held at a time where all gradients are gathered; none where they are not."""
    n = problem.scored
    rows = gathered_rows(n, problem.vocabulary, problem.hidden, **_limits(problem, gpu))
    return tuple(min(rows, n - first) for first in range(0, n, rows)) if rows and "TN" in problem.products else ()


def _limits(problem: Problem, gpu: Gpu) -> dict[str, Any]:
    """As the backends have them."""
    matrix = 4 * problem.hidden * problem.vocabulary
    return {
        "multiprocessors": int(gpu.multiprocessors.value),
        "workspace_bytes": problem.workspace,
        "itemsize": problem.itemsize,
        "d_hidden": "NN" in problem.products,
        "accumulator_bytes": matrix if _rounded_by_product(problem, gpu) else 0,
    }


def _rounded_by_product(problem: Problem, gpu: Gpu) -> bool:
    """Whether a single chunk's product writes the weight's gradient in 16 bits, as `gradient_sums` has it."""
    tiles = waves(problem.vocabulary, problem.hidden, int(gpu.multiprocessors.value))
    return "TN" in problem.products and problem.dtype == "bf16" and tiles >= WHOLE_WAVES


def tiles_of(height: int, width: int) -> int:
    return -(-height // TILE_ROWS) * -(-width // TILE_COLUMNS)


def busy(height: int, width: int, multiprocessors: int) -> float:
    """Share of the multiprocessors that the tiles of a product keep busy, of each what is within the result."""
    waves = -(-tiles_of(height, width) // multiprocessors)
    return height * width / (TILE_ROWS * TILE_COLUMNS) / (waves * multiprocessors)


def estimate(problem: Problem, gpu: Gpu, design: Design = AFTER) -> Estimate:
    chunks = chunks_of(problem, gpu, design)
    gathered = gathered_chunks(problem, gpu) if design.gathers and len(chunks) > 1 else ()
    chunks, later = (gathered, (problem.scored,)) if gathered else (chunks, chunks)
    steps = [_product(name, problem, gpu, later if name == "TN" else chunks, design) for name in problem.products]
    steps.insert(1, _row_kernel(problem, gpu, design))
    if "TN" in problem.products:
        steps += [_sums(problem, gpu, later, design, steps[-1]), _closing(problem, gpu, later, design)]
    steps = tuple(step for step in steps if step.most)
    return Estimate(problem, design, gpu, chunks, bool(gathered), limit(problem, gpu), steps)


def _sums_are_returned(problem: Problem, gpu: Gpu, chunks: tuple[int, ...], design: Design) -> bool:
    """Whether what the product writes is the gradient, in its dtype."""
    return problem.itemsize == 4 or (len(chunks) == 1 and design.sums_in_16_bits and _rounded_by_product(problem, gpu))


def _product(name: str, problem: Problem, gpu: Gpu, chunks: tuple[int, ...], design: Design) -> Step:
    D, V, size = problem.hidden, problem.vocabulary, problem.itemsize
    rate, bandwidth, processors = gpu.rates[problem.dtype].value, gpu.bandwidth.value, int(gpu.multiprocessors.value)
    alone = len(chunks) == 1 and _sums_are_returned(problem, gpu, chunks, design)
    least = most = moved = waiting = filled = 0.0
    tiles = 0
    for m in chunks:
        height, width, depth = {"NT": (m, V, D), "NN": (m, D, V), "TN": (V, D, m)}[name]
        result = {"NT": 4 * m * V, "NN": 4 * m * D, "TN": size * D * V if alone else 0}[name]
        data = size * depth * (height + width) + result
        tiles, share = tiles_of(height, width), busy(height, width, processors)
        split = height * width / (tiles * TILE_ROWS * TILE_COLUMNS) if tiles < processors else share
        computing, memory = 2 * m * D * V / rate, data / bandwidth
        least, most = least + max(computing / split, memory), most + max(computing / share, memory)
        waiting += memory if memory > computing / share else 0.0
        moved, filled = moved + data, filled + m * share
    share = filled / problem.scored
    if waiting > most / 2:
        why = f"{name} waits for memory: {_gigabytes(moved)} in {_chunks(chunks)}"
    else:
        where = f" in the last of {_chunks(chunks)}" if len(chunks) > 1 else ""
        why = f"{name} keeps {share:.0%} of {processors} multiprocessors busy: {tiles} tiles{where}"
        why += ", unless cuBLAS splits their depth" if least < most else ""
    return Step(name, least, most, problem.flops / rate, problem.flops, moved, share, why)


def _row_kernel(problem: Problem, gpu: Gpu, design: Design) -> Step:
    once = design.one_read and gpu.clusters and problem.vocabulary <= MOST_COLUMNS
    readings = 1 if once or not problem.gradients else 2
    element = 4 * readings + problem.itemsize * problem.gradients
    data = element * problem.scored * problem.vocabulary
    seconds = data / gpu.bandwidth.value
    why = f"the row kernel moves {element} bytes a logit, {_gigabytes(data)}"
    return Step("row kernel", seconds, seconds / SLOW_KERNEL, 0.0, 0.0, data, None, why)


def _sums(problem: Problem, gpu: Gpu, chunks: tuple[int, ...], design: Design, product: Step) -> Step:
    """Reading and writing the sum, once a chunk; what of it TN does not hide in any case is the least."""
    matrix = 4 * problem.hidden * problem.vocabulary
    alone = len(chunks) == 1 and _sums_are_returned(problem, gpu, chunks, design)
    data = 0 if alone else matrix * (2 * len(chunks) - 1)
    seconds = data / gpu.bandwidth.value
    why = f"the fp32 sum of the weight's gradient is read and written in {_chunks(chunks)}, {_gigabytes(data)}"
    return Step("sum of TN", max(seconds - product.least, 0.0), seconds, 0.0, 0.0, data, None, why)


def _closing(problem: Problem, gpu: Gpu, chunks: tuple[int, ...], design: Design) -> Step:
    weights, size = problem.hidden * problem.vocabulary, problem.itemsize
    passes = []
    if problem.dtype == "fp16":  # the loss's gradient is no fp16 number: what it multiplies is fp32
        passes = [("the power of two", 8), ("the loss's gradient and rounding", 6 if design.free_scaling else 14)]
    else:
        if not _sums_are_returned(problem, gpu, chunks, design):
            passes.append((f"rounding to {problem.dtype}", 4 + size))
        if not design.free_scaling:
            passes.append(("the loss's gradient", 2 * size))
    data = weights * sum(each for _, each in passes)
    seconds = data / gpu.bandwidth.value
    why = f"passes over the weight's gradient for {', '.join(name for name, _ in passes)}, {_gigabytes(data)}"
    return Step("closing passes", seconds, seconds, 0.0, 0.0, data, None, why)


def _gigabytes(data: float) -> str:
    return f"{data / 1e9:.3g} GB"


def _chunks(chunks: tuple[int, ...]) -> str:
    return f"{len(chunks)} chunk{'s' * (len(chunks) != 1)}"
