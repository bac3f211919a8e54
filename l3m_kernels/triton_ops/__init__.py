"""The Triton kernels: the fused pass over rows of logits, sums per sequence, rewards to sequence weights in one launch, and two small ones:
a product of fp32 matrices that is exact where the program allows TF32, and a gradient times a number on the device.

What calls them is `l3m_kernels.row_chunks`, which says what each takes. `python -m l3m_kernels.triton_ops` compiles them for every
architecture without a GPU. With TRITON_INTERPRET=1, set before this is imported, they run in Triton's interpreter on CPU tensors.
"""

from l3m_kernels.triton_ops.barrier import barrier_weights
from l3m_kernels.triton_ops.product import product
from l3m_kernels.triton_ops.scale import scale
from l3m_kernels.triton_ops.sequence_sums import sequence_sums
from l3m_kernels.triton_ops.softmax_gradient import softmax_gradient

__all__ = ["barrier_weights", "product", "scale", "sequence_sums", "softmax_gradient"]
