"""Matrix products as the head wants them: 16-bit operands as they are, sums in fp32, fp32 operands in fp32.

How exact the products of fp32 are is a setting of the whole process (`torch.backends.cuda.matmul`). A call that changed it, even for the
time it takes, would change the products of the program's other threads, so it is read here and never written. Torch's own way for one
thread (`at::NoTF32Guard`) exists in C++ alone, and backend `cuda` has it; `triton` has a kernel of its own for programs that allow TF32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor, bool], None]  # a (m, k), b (k, n), out (m, n), accumulate
LT = "with torch.backends.cuda.preferred_blas_library('cublaslt') and TF32 allowed, backend 'cuda' cannot keep products of float32 exact"
FP16_SUMS = "torch.backends.cuda.matmul.allow_fp16_accumulation is on, and the head's sums are to be in float32"


def tf32_allowed() -> bool:
    """Whether torch may round the fp32 operands of a product on a GPU, as the program has set it by now."""
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):  # torch 2.9
        return settings.fp32_precision not in ("ieee", "none")
    return bool(settings.allow_tf32)


def plain(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """By torch, of operands of one dtype: what it allows itself is its affair."""
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def where_tf32_is_allowed(kernel: Product) -> Product:
    """`kernel` where torch's product may not be exact, else torch's. Another thread that allows TF32 in the microseconds between the look
    and the launch is not seen.
    """

    def run(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        (kernel if tf32_allowed() else plain)(a, b, out, accumulate)

    return run


def guarded(op: Product) -> Product:
    """`op` has torch's guard, which holds for cuBLAS and not for cuBLASLt.

    Raises:
        RuntimeError: cuBLASLt is to be preferred, and may use TF32.
    """

    def run(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
        if tf32_allowed() and "cublaslt" in str(torch.backends.cuda.preferred_blas_library()).lower():
            raise RuntimeError(f"l3m_kernels: {LT}; prefer 'cublas', forbid TF32, or take backend='triton'")
        op(a, b, out, accumulate)

    return run


def matmul(a: Tensor, b: Tensor, out: Tensor, exact: Product | None, accumulate: bool = False) -> None:
    """out (m, n) = a (m, k) @ b (k, n), or += it; out is fp32, or of the 16-bit dtype of a and b and then rounded once (no `accumulate`).

    Args:
        exact: the product of fp32 operands in fp32; None: torch's.

    Raises:
        RuntimeError: the program has torch add up products of float16 in float16.
    """
    if a.dtype == torch.float32:
        (exact or plain)(a, b, out, accumulate)
    elif not a.is_cuda or not hasattr(torch.ops.aten.mm, "dtype_out"):  # widened
        if out.dtype == torch.float32:
            matmul(a.float(), b.float(), out, exact, accumulate)
        else:
            wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
            matmul(a.float(), b.float(), wide, exact)
            out.copy_(wide)
    else:
        if a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
            raise RuntimeError(f"l3m_kernels: {FP16_SUMS}; turn it off, or use bfloat16")
        if out.dtype != torch.float32:
            torch.mm(a, b, out=out)
        elif accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
