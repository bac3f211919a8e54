"""The gradients that the products of all chunks add up to, and when they are rounded.

Letters: T tokens of a packed batch, n rows of a chunk, D hidden size, V vocabulary.

Every sum is fp32 and rounded once. Where one product is the whole sum it leaves the product in 16 bits, so that nothing reads it again:
d_weight (V, D) of a batch that is one chunk, d_hidden of a large chunk. Not where cuBLAS may share a sum between multiprocessors, which it
does where tiles are few: it may then round the parts too.
"""

import torch
from torch import Tensor

from l3m_kernels.chunk_sizes import waves
from l3m_kernels.chunked import NEEDS, Head, gradient_dtype
from l3m_kernels.products import Product, matmul
from l3m_kernels.row_order import Rows

LARGEST_HALF = 14  # fp16 gradients of the logits stay below 2**14: nothing overflows, and least is lost below 6e-8
WHOLE_WAVES = 4  # of tiles, from which on no product is expected to share a sum


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 elsewhere, where tiles are no matter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class GradientSums:
    """The gradients of one call; empty where not needed.

    fp16 gradients of the logits are multiplied by a power of two, so that those of small upstream gradients are not 0; it is taken out
    of the sums again.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        rows: Rows,
        needs: NEEDS,
        unscaled: bool,
        exact: Product | None,
        part: bool = False,
    ):
        """The fault of `rows`, where there is one, is added to all, 0 or NaN. `exact`: as in `products.matmul`. `part`: of the
        vocabulary, whose d_hidden is added to those of others and so not rounded.
        """
        self.head, self.rows, self.needs, self.exact = head, rows, needs, exact
        self.half = hidden.dtype == torch.float16
        self.dtype = gradient_dtype(hidden.dtype, unscaled)
        hidden_dtype = torch.float32 if part else self.dtype
        self.device = hidden.device
        self.unscale: Tensor | None = None
        shape = hidden.shape if needs[0] else (0,)
        every = rows.all_with_gradient  # each is written, in order
        options = {"dtype": hidden_dtype, "device": hidden.device}
        self.hidden = torch.empty(shape, **options) if every else self._begun(torch.zeros(shape, **options))
        # (V, D), fp32 until it is complete, unless it is complete at once: with one chunk, and in low-memory mode each block
        self.weight: Tensor | None = None
        self.bias = self._begun(hidden.new_zeros(len(head.weight) if needs[2] else 0, dtype=torch.float32))

    def _begun(self, zeros: Tensor) -> Tensor:
        return zeros if self.rows.fault is None else zeros.add_(self.rows.fault)

    def _rounds_once(self, height: int, columns: int) -> bool:
        """Whether a product of that shape may write 16-bit numbers."""
        if self.dtype.itemsize != 2 or self.half:
            return False
        return waves(height, columns, multiprocessors(self.device)) >= WHOLE_WAVES

    @property
    def saved_by_one_chunk(self) -> int:
        """Bytes of the fp32 sum of the weight's gradient, where a single chunk does without it."""
        needed = self.needs[1] and not self.head.low_memory and self._rounds_once(*self.head.weight.shape)
        return 4 * self.head.weight.numel() if needed else 0

    def scaled(self, upstream: Tensor) -> Tensor:
        """upstream (n,) fp32, of all rows, as the row kernel is to have it."""
        if not self.half or not len(upstream):
            return upstream
        largest = upstream.abs().amax() / self.head.temperature
        exponent = (LARGEST_HALF - torch.frexp(largest).exponent).clamp(-100, 100)
        exponent = exponent.where((largest > 0) & largest.isfinite(), 0).float()
        self.unscale = torch.exp2(-exponent)
        return upstream * torch.exp2(exponent)

    def add_weight(self, inputs: Tensor, gradient: Tensor, only: bool) -> None:
        """The weight's gradient of rows, all columns: inputs (n, D), gradient (n, V). `only`: there are no others."""
        if self.needs[1]:
            first = self.weight is None
            if self.weight is None:
                dtype = self.dtype if only and self.saved_by_one_chunk else torch.float32
                self.weight = inputs.new_empty(self.head.weight.shape, dtype=dtype)
            matmul(gradient.t(), inputs, self.weight, self.exact, accumulate=not first)

    def add_rows(self, chunk: slice, inputs: Tensor, gradient: Tensor) -> None:
        """The other gradients of a chunk of rows, all columns: inputs (n, D), of which the shape is looked at, gradient (n, V)."""
        if self.needs[2]:
            self.bias += gradient.sum(0, dtype=torch.float32)
        if self.needs[0]:
            rounds = self.hidden.dtype == self.dtype and self._rounds_once(*inputs.shape)
            whole = rounds or self.hidden.dtype == torch.float32
            in_place = self.rows.all_with_gradient and self.unscale is None and whole
            dtype = self.dtype if rounds else torch.float32
            d_inputs = self.hidden[chunk] if in_place else torch.empty_like(inputs, dtype=dtype)
            matmul(gradient, self.head.weight, d_inputs, self.exact)
            if not in_place:
                self.write_hidden(chunk, d_inputs)

    def add_columns(self, first: int, last: int, inputs: Tensor, gradient: Tensor, d_inputs: Tensor | None) -> None:
        """All rows, columns [first, last): inputs (n, D), gradient (n, last - first); d_inputs (n, D) fp32 is added to."""
        if self.needs[2]:
            self.bias[first:last] = gradient.sum(0, dtype=torch.float32)
        if self.needs[1]:
            if self.weight is None:
                self.weight = inputs.new_empty(self.head.weight.shape, dtype=self.dtype)
            rounds = self.dtype == torch.float32 or self._rounds_once(last - first, inputs.shape[1])
            if rounds and self.unscale is None:
                matmul(gradient.t(), inputs, self.weight[first:last], self.exact)
            else:
                block = inputs.new_empty(last - first, inputs.shape[1], dtype=torch.float32)
                matmul(gradient.t(), inputs, block, self.exact)
                self._write(block, self.weight[first:last])
        if d_inputs is not None:
            matmul(gradient, self.head.weight[first:last], d_inputs, self.exact, accumulate=True)

    def write_hidden(self, chunk: slice, d_inputs: Tensor) -> None:
        """d_inputs (n, D), complete."""
        if self.rows.all_with_gradient:
            self._write(d_inputs, self.hidden[chunk])
        else:
            self.hidden.index_copy_(0, self.rows.index[chunk], self._true(d_inputs, self.hidden.dtype))

    def _write(self, sums: Tensor, out: Tensor) -> None:
        """In one pass."""
        if self.unscale is None:
            out.copy_(sums)
        else:
            torch.mul(sums, self.unscale, out=out)

    def _true(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums in the dtype of the gradient, which may be the same memory, in one pass or none."""
        if sums.dtype == dtype:
            return sums if self.unscale is None else sums.mul_(self.unscale)
        found = torch.empty_like(sums, dtype=dtype)
        self._write(sums, found)
        return found

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """-> d_hidden (T, D), d_weight (V, D), d_bias (V,)."""
        if self.weight is None:
            zeros = self.hidden.new_zeros(self.head.weight.shape if self.needs[1] else 0, dtype=self.dtype)
            weight = self._begun(zeros)  # no row was added
        else:
            weight = self.weight if self.head.low_memory else self._true(self.weight, self.dtype)
        return self.hidden, weight, self._true(self.bias, self.dtype)
