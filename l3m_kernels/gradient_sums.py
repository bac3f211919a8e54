"""The products that carry the gradient of the logits to hidden, weight and bias, and their sums over chunks.

Letters: T tokens of a packed batch, n rows of a chunk, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from l3m_kernels.chunked import NEEDS, Head, gradient_dtype

LARGEST_HALF = 14  # fp16 gradients of the logits stay below 2**14: nothing overflows, and least is lost below 6e-8


def matmul_fp32(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (m, n) fp32 = a (m, k) @ b (k, n), or += it. 16-bit operands are multiplied as they are on CUDA, widened elsewhere."""
    if a.is_cuda and a.dtype != torch.float32 and hasattr(torch.ops.aten.mm, "dtype_out"):
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif accumulate:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)


class GradientSums:
    """The gradients of one call, summed in fp32 and rounded once; empty where not needed.

    fp16 gradients of the logits are multiplied by a power of two, so that those of small upstream gradients are not 0; it is taken out
    of the sums again.
    """

    def __init__(
        self, hidden: Tensor, head: Head, index: Tensor, needs: NEEDS, unscaled: bool, fault: Tensor | None = None
    ):
        """`index` (n,), the rows of hidden that may be added; `fault` () fp32, where there is one: added to all, 0 or NaN."""
        self.head, self.index, self.needs, self.fault = head, index, needs, fault
        self.half = hidden.dtype == torch.float16
        self.dtype = gradient_dtype(hidden.dtype, unscaled)
        self.unscale: Tensor | None = None
        self.hidden = self._begun(hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=self.dtype))
        # (V, D), fp32 until it is complete; in low-memory mode each block is complete at once
        self.weight: Tensor | None = None
        self.bias = self._begun(hidden.new_zeros(len(head.weight) if needs[2] else 0, dtype=torch.float32))

    def _begun(self, zeros: Tensor) -> Tensor:
        return zeros if self.fault is None else zeros.add_(self.fault)

    def scaled(self, upstream: Tensor) -> Tensor:
        """upstream (n,) fp32, of all rows, as the row kernel is to have it."""
        if not self.half or not len(upstream):
            return upstream
        largest = upstream.abs().amax() / self.head.temperature
        exponent = (LARGEST_HALF - torch.frexp(largest).exponent).clamp(-100, 100)
        exponent = exponent.where((largest > 0) & largest.isfinite(), 0).float()
        self.unscale = torch.exp2(-exponent)
        return upstream * torch.exp2(exponent)

    def add_rows(self, chunk: slice, inputs: Tensor, gradient: Tensor) -> None:
        """A chunk of rows, all columns: inputs (n, D), gradient (n, V)."""
        if self.needs[2]:
            self.bias += gradient.sum(0, dtype=torch.float32)
        if self.needs[1]:
            first = self.weight is None
            if self.weight is None:
                self.weight = inputs.new_empty(self.head.weight.shape, dtype=torch.float32)
            matmul_fp32(gradient.t(), inputs, self.weight, accumulate=not first)
        if self.needs[0]:
            d_inputs = torch.empty_like(inputs, dtype=torch.float32)
            matmul_fp32(gradient, self.head.weight, d_inputs)
            self.write_hidden(chunk, d_inputs)

    def add_columns(self, first: int, last: int, inputs: Tensor, gradient: Tensor, d_inputs: Tensor | None) -> None:
        """All rows, columns [first, last): inputs (n, D), gradient (n, last - first); d_inputs (n, D) fp32 is added to."""
        if self.needs[2]:
            self.bias[first:last] = gradient.sum(0, dtype=torch.float32)
        if self.needs[1]:
            if self.weight is None:
                self.weight = inputs.new_empty(self.head.weight.shape, dtype=self.dtype)
            block = inputs.new_empty(last - first, inputs.shape[1], dtype=torch.float32)
            matmul_fp32(gradient.t(), inputs, block)
            self.weight[first:last] = self._true(block)
        if d_inputs is not None:
            matmul_fp32(gradient, self.head.weight[first:last], d_inputs, accumulate=True)

    def write_hidden(self, chunk: slice, d_inputs: Tensor) -> None:
        """d_inputs (n, D) fp32, complete."""
        self.hidden.index_copy_(0, self.index[chunk], self._true(d_inputs).to(self.dtype))

    def _true(self, scaled: Tensor) -> Tensor:
        return scaled if self.unscale is None else scaled.mul_(self.unscale)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """-> d_hidden (T, D), d_weight (V, D), d_bias (V,)."""
        if self.weight is None:
            zeros = self.hidden.new_zeros(self.head.weight.shape if self.needs[1] else 0, dtype=self.dtype)
            weight = self._begun(zeros)  # no row was added
        else:
            weight = self.weight if self.head.low_memory else self._true(self.weight).to(self.dtype)
        return self.hidden, weight, self._true(self.bias).to(self.dtype)
