"""How many rows of a batch go through the vocabulary at a time on a GPU: as whole waves of tiles as the workspace allows. No torch here.

Letters: n rows, m rows of a chunk, D hidden size, V vocabulary, P multiprocessors.

A chunk of m rows is three products, each cut into tiles of 128 x 256 results, of which the multiprocessors take P at a time, a wave:

    NT  logits (m, V)     ceil(m / 128) ceil(V / 256) tiles, D deep
    NN  d_hidden (m, D)   ceil(m / 128) ceil(D / 256) tiles, V deep: few and deep, so a last wave that is not full is dear
    TN  d_weight (V, D)   ceil(V / 128) ceil(D / 256) tiles, m deep; of several chunks, each reads and writes the fp32 sum

768 rows at D = 4096 are 96 tiles on 132 multiprocessors, a wave that is 73% full; 1024 rows are 128 tiles, 97%; 1536 are 192, 73% again.
So what fits the workspace is no answer yet: of the least number of chunks, and larger ones whose chunks have `LEAST_ROWS`, the one is
chosen that takes the least time by this count, and the rows are dealt out to it equally.

Where the gradients of all rows' logits fit into 16 bits in the place of the fp32 sum, n up to about 2 D, they are gathered, and TN is one
product, of which there is no sum to read and write; `gathered_rows` has the rows of a chunk of the other two then. NN stays cut: 1024 rows
of it are one wave that reads each operand once, 827 TFLOP/s on an H200 where it is alone, and 8192 at once 718 (D = 4096, V = 128256,
bench/results/nvidia-h200.md); within a whole call, which the device's power limits, both take 11.8 ms.
"""

import functools

ROW_BYTES = 128  # each row of logits begins at a multiple of this, whatever V
TILE_ROWS, TILE_COLUMNS = 128, 256  # of a product, by one multiprocessor
DEPTH_MULTIPLE = 16  # rows of a chunk, where they are not whole tiles: one step of the third product's sums
FLOPS_PER_BYTE = 200  # products in the time that memory takes for a byte: 184 on an H200, 263 on an H100
HIDDEN = 0.5  # of the sum's traffic, behind the product that it is of: not measured
MOST_TRIED = 32  # numbers of chunks beside the least

DEFAULT_WORKSPACE = 512 << 20  # bytes
LEAST_ROWS = 1024  # that the default holds, whatever V and D; chunks are not made smaller for the sake of whole waves
LEAST_GATHERED = 512  # of a chunk of logits alone: below, reading the weight takes more than half of the product's time


def waves(height: int, columns: int, multiprocessors: int) -> float:
    """Of tiles of a product of that shape, the last one perhaps a part of one."""
    return -(-height // TILE_ROWS) * -(-columns // TILE_COLUMNS) / multiprocessors


def row_stride(vocabulary: int) -> int:
    """Elements from one row of fp32 logits to the next."""
    multiple = ROW_BYTES // 4
    return -(-vocabulary // multiple) * multiple


def row_bytes(vocabulary: int, width: int, itemsize: int) -> int:
    """What a row of a chunk holds: its fp32 logits, its inputs (of `itemsize` bytes an element), and their gradient in fp32."""
    return 4 * row_stride(vocabulary) + width * (itemsize + 4)


def default_workspace(vocabulary: int, width: int, itemsize: int) -> int:
    """Bytes, where none were asked for: 512 MiB, or 1024 rows with all that a row holds where that is more."""
    return max(DEFAULT_WORKSPACE, LEAST_ROWS * row_bytes(vocabulary, width, itemsize))


def chunk_rows(
    scored: int,
    vocabulary: int,
    width: int,
    *,
    multiprocessors: int,
    workspace_bytes: int | None = None,
    itemsize: int = 2,
    d_hidden: bool = True,
    d_weight: bool = True,
    accumulator_bytes: int = 0,
) -> int:
    """Rows of each chunk of `scored` rows but the last, which has what is left: at least 1, at most `scored` (0 for none).

    Args:
        scored: n, rows of this pass.
        multiprocessors: P of the device; 1 where tiles do not matter: the fewest chunks then.
        workspace_bytes: never exceeded, unless it holds not even one row. None: `default_workspace`, which holds at least 1024 rows.
        itemsize: bytes of an element of hidden and weight.
        d_hidden: the second product is needed.
        d_weight: the third product is needed.
        accumulator_bytes: what several chunks hold beside the workspace and a single one does not. One chunk may use it.
    """
    if scored < 1:
        return 0
    if workspace_bytes is None:
        workspace_bytes = default_workspace(vocabulary, width, itemsize)
    each = row_bytes(vocabulary, width, itemsize)
    if scored * each <= workspace_bytes + accumulator_bytes:
        return scored
    limit = min(max(workspace_bytes // each, 1), scored)
    return _cheapest(scored, limit, vocabulary, width, multiprocessors, d_hidden, d_weight)


def gathered_rows(
    scored: int,
    vocabulary: int,
    width: int,
    *,
    multiprocessors: int,
    workspace_bytes: int | None = None,
    itemsize: int = 2,
    d_hidden: bool = True,
    accumulator_bytes: int = 0,
) -> int:
    """Rows of each chunk where the gradients of all `scored` rows' logits are gathered; 0: they do not fit, or are fp32 already.

    Arguments as for `chunk_rows`; the sum of `accumulator_bytes` is not held then.
    """
    if not scored or itemsize != 2:
        return 0
    if workspace_bytes is None:
        workspace_bytes = default_workspace(vocabulary, width, itemsize)
    gathered = scored * itemsize * row_stride(vocabulary)
    limit = (workspace_bytes + accumulator_bytes - gathered) // row_bytes(vocabulary, width, itemsize)
    if limit < min(LEAST_GATHERED, scored):
        return 0
    return _cheapest(scored, min(limit, scored), vocabulary, width, multiprocessors, d_hidden, False)


@functools.lru_cache(maxsize=1024)
def _cheapest(
    rows: int, limit: int, vocabulary: int, width: int, multiprocessors: int, d_hidden: bool, d_weight: bool
) -> int:
    least = -(-rows // limit)  # chunks
    sizes: set[int] = set()
    for count in range(least, least + min(least, MOST_TRIED) + 1):
        equal = -(-rows // count)
        multiples = (TILE_ROWS, DEPTH_MULTIPLE, 1)
        size = next(size for m in multiples if (size := -(-equal // m) * m) <= limit)
        if count == least or size >= LEAST_ROWS:
            sizes.add(size)
    problem = (vocabulary, width, multiprocessors, d_hidden, d_weight)
    return min(sorted(sizes), key=lambda size: _time(rows, size, *problem))


def _time(
    rows: int, size: int, vocabulary: int, width: int, multiprocessors: int, d_hidden: bool, d_weight: bool
) -> float:
    """Of all chunks, in steps of one tile by one in depth."""
    whole, last = divmod(rows, size)
    count = whole + bool(last)
    passes = whole * _products(size, vocabulary, width, multiprocessors, d_hidden, d_weight)
    passes += _products(last, vocabulary, width, multiprocessors, d_hidden, d_weight) if last else 0
    traffic = count * 8 * width * vocabulary if d_weight else 0
    step = 2 * TILE_ROWS * TILE_COLUMNS * multiprocessors  # FLOPs of one step of the whole device
    return passes + (1 - HIDDEN) * traffic * FLOPS_PER_BYTE / step


def _products(rows: int, vocabulary: int, width: int, multiprocessors: int, d_hidden: bool, d_weight: bool) -> int:
    """Steps in depth of one chunk's products, waves of tiles one after the other."""
    steps = _whole(waves(rows, vocabulary, multiprocessors)) * width
    steps += _whole(waves(rows, width, multiprocessors)) * vocabulary if d_hidden else 0
    return steps + (_whole(waves(vocabulary, width, multiprocessors)) * rows if d_weight else 0)


def _whole(waves: float) -> int:
    return -int(-waves // 1)
