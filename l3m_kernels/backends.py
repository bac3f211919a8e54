"""One table of backends: which functions each has, for which devices, and why not where not.

An op is a name; a backend implements it by a function of the signature that `reference`/`chunked` has. `auto` takes the first backend
in the table's order that is available on the device and has the op.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real

import torch

from l3m_kernels import _native, _native_head, chunk_sizes, chunked, products, reference, row_chunks

NATIVE = _native.load()


@dataclass(frozen=True)
class Backend:
    name: str
    devices: tuple[str, ...]  # torch device types; ("*",) is any
    ops: Mapping[str, Callable] = field(default_factory=dict)
    missing: str | None = None  # why it cannot be used here
    float64: bool = True  # has the head's ops for float64 inputs
    automatic: bool = True  # `auto` may take it
    # Of a GPU's compute capability: why not on it, or None.
    cannot_run_on: Callable[[tuple[int, int]], str | None] | None = None
    # values *= factor () fp32 on the device, at no cost where that is 1.
    scale: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def problem(self, op: str, device: str, dtype: torch.dtype | None = None, index: int | None = None) -> str | None:
        """Why this backend cannot run `op` on `device`, for hidden states of `dtype` where the op has any; or None. `index`: of a GPU, None
        for the current one.
        """
        if self.missing:
            return self.missing
        if self.devices != ("*",) and device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device}"
        if op not in self.ops:
            return f"does not implement {op} (it has: {', '.join(self.ops)})"
        if dtype == torch.float64 and not self.float64:
            return "computes in float32, and the inputs are float64"
        if device != "cuda" or self.cannot_run_on is None or not torch.cuda.is_available():
            return None
        capability = torch.cuda.get_device_capability(index)
        if why := self.cannot_run_on(capability):
            return f"{why}; {torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}"
        return None


LEAST_CAPABILITY = (8, 0)  # Ampere: products of bfloat16, and what Triton compiles for


def _too_old(capability: tuple[int, int]) -> str | None:
    return None if capability >= LEAST_CAPABILITY else "needs a GPU of compute capability 8.0 or newer"


def _not_compiled(capability: tuple[int, int]) -> str | None:
    if too_old := _too_old(capability):
        return too_old
    if _native.runs_on(NATIVE.architectures, capability):
        return None
    return f"was compiled for compute capabilities {', '.join(NATIVE.architectures)} (TORCH_CUDA_ARCH_LIST at build time says for which)"


def _native_ops() -> dict[str, Callable]:
    if NATIVE.module is None:
        return {}
    return _native_head.head_ops() | {"barrier_weights": torch.ops.l3m_kernels.cpp_barrier_weights}


def _triton() -> Backend:
    """Triton is imported only where its kernels can run. In its interpreter that is a CPU too, slowly: for tests, when asked by name."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed: pip install triton (torch's CUDA builds for Linux come with it)"
    elif not interpreted and not torch.cuda.is_available():
        missing = "no CUDA device here; TRITON_INTERPRET=1 runs its kernels in Triton's interpreter, for tests"
    if missing:
        return Backend("triton", ("cuda",), missing=missing)
    from l3m_kernels import triton_ops

    product = products.where_tf32_is_allowed(triton_ops.product)
    kernels = row_chunks.RowKernels(triton_ops.softmax_gradient, triton_ops.sequence_sums, product)
    ops = row_chunks.head_ops(kernels) | {"barrier_weights": triton_ops.barrier_weights}
    devices = ("cuda", "cpu") if interpreted else ("cuda",)
    return Backend(
        "triton", devices, ops, float64=False, automatic=not interpreted, cannot_run_on=_too_old, scale=triton_ops.scale
    )


def _cuda_ops() -> dict[str, Callable]:
    if NATIVE.no_cuda:
        return {}
    kernels = torch.ops.l3m_kernels
    rows = row_chunks.RowKernels(kernels.cuda_softmax_gradient, product=products.guarded(kernels.cuda_product))
    return row_chunks.head_ops(rows) | {"barrier_weights": kernels.cuda_barrier_weights}


def _cuda_scale() -> Callable | None:
    return None if NATIVE.no_cuda else torch.ops.l3m_kernels.cuda_scale


# Fastest first: `auto` goes down this list.
TABLE: tuple[Backend, ...] = (
    Backend(
        "cuda", ("cuda",), _cuda_ops(), NATIVE.no_cuda, float64=False, cannot_run_on=_not_compiled, scale=_cuda_scale()
    ),
    _triton(),
    Backend("cpp", ("cpu",), _native_ops(), None if NATIVE.module else NATIVE.reason),
    Backend(
        "reference",
        ("*",),
        {
            "log_likelihood": chunked.log_likelihood,
            "log_likelihood_backward": chunked.log_likelihood_backward,
            "part_backward": chunked.part_backward,
            "weighted_log_likelihood": chunked.weighted_log_likelihood,
            "barrier_weights": reference.barrier_weights,
        },
    ),
)


def _automatic(op: str, device: str, dtype: torch.dtype | None = None, index: int | None = None) -> Iterator[Backend]:
    """The rows that `auto` may take, the first one first."""
    return (row for row in TABLE if row.automatic and row.problem(op, device, dtype, index) is None)


def name_of(backend: str | None) -> str:
    """As the ops take it: only None is automatic."""
    return "auto" if backend is None else backend


def select(op: str, backend: str, device: str, dtype: torch.dtype | None = None, index: int | None = None) -> Callable:
    """The function that runs `op` on `device`; `backend` is "auto" or a name, `dtype` that of the hidden states, `index` that of a GPU.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: it is not available here, and why.
    """
    if backend == "auto":
        return next(_automatic(op, device, dtype, index)).ops[op]
    for row in TABLE:
        if row.name == backend:
            if problem := row.problem(op, device, dtype, index):
                raise RuntimeError(
                    f"{op}: backend {backend!r} cannot be used: {problem}; backend=None picks one that can"
                )
            return row.ops[op]
    raise ValueError(
        f"{op}: backend must be one of {', '.join(row.name for row in TABLE)} or None (automatic), got {backend!r}"
    )


def scale_in_place(op: str, backend: str, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """The `scale` of the backend that runs `op`, or None."""
    rows = TABLE if backend != "auto" else _automatic(op, device.type, index=device.index)
    return next((row.scale for row in rows if backend in ("auto", row.name)), None)


# Bytes held beyond inputs, outputs and gradient accumulators, and the rows of fp32 logits that they hold at least: each chunk of
# rows reads and writes the whole sum of the weight's gradient, which costs as much as the products where chunks are small.
# These are a CPU's; a GPU's are in `chunk_sizes`.
DEFAULT_WORKSPACE, LEAST_ROWS = 64 << 20, 384
_workspace: int | None = None
_low_memory = False


def set_workspace(bytes: float | None, *, low_memory: bool = False) -> None:
    """Bound the memory that the head's ops hold beyond inputs, outputs and gradient accumulators, in bytes.

    Args:
        bytes: None restores the default: 64 MiB on a CPU, or 384 rows of logits (4 V bytes each) where that is more (from V = 43,691
            on); 512 MiB on a GPU, or 1024 rows, with their inputs and the gradient of these. At least one row of logits is always held,
            and the tiles of the threads. Where the weight has 16 bits, an fp32 accumulator of its gradient (4 V D bytes) comes on top, or
            exponentials of that size, or both within it; or on a GPU, instead of an accumulator, all rows at once where that is enough.
        low_memory: do without these: logits are computed a second time, 8 n D V FLOPs instead of 6, and every row of the weight's
            gradient is written once. Backend `cpp` has this, for as many rows as their operands fit half of the workspace (8,000 at
            D = 1024 in bf16, by default); beyond, and in the reference, an accumulator is held. Backend `triton` has it for any number
            of rows, and holds the hidden states of all of them with their gradient in fp32.

    Backend `cpp` keeps the largest piece of this memory from one call to the next, and that of its last gradients once they are freed;
    `release_workspace` gives it back.

    Raises:
        ValueError: not a positive whole number of bytes.
    """
    global _workspace, _low_memory
    if bytes is not None:
        if isinstance(bytes, bool) or not isinstance(bytes, Real) or not 0 < bytes < 1 << 63 or bytes % 1:
            raise ValueError(f"set_workspace: bytes must be a positive whole number or None, got {bytes!r}")
        bytes = int(bytes)
    _workspace, _low_memory = bytes, low_memory


def release_workspace() -> None:
    """Give back the memory that the head's ops keep from one call to the next, as `torch.cuda.empty_cache` does."""
    if NATIVE.module is not None:
        NATIVE.module.release_workspace()


def workspace(device: str, vocabulary: int = 0, width: int = 0, itemsize: int = 4) -> int:
    """The bound in force on a device type, in bytes, for a head of that many tokens, and hidden states of that size."""
    if _workspace is not None:
        return _workspace
    if device == "cpu":
        return max(DEFAULT_WORKSPACE, LEAST_ROWS * 4 * vocabulary)
    return chunk_sizes.default_workspace(vocabulary, width, itemsize)


def head_of(weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, temperature: float) -> chunked.Head:
    """The last layer of the model, with the bounds in force."""
    vocabulary, width = weight.shape
    bound = workspace(weight.device.type, vocabulary, width, weight.itemsize)
    return chunked.Head(weight, bias, softcap, temperature, bound, _low_memory)


@dataclass(frozen=True)
class Report:
    """What runs here. `str()` of it is what `python -m l3m_kernels` prints."""

    torch: str
    python: str
    devices: tuple[str, ...]
    backends: tuple[Backend, ...]
    native: str  # how the native library was built, or why it was not

    def __str__(self) -> str:
        lines = [
            f"torch {self.torch}, Python {self.python}, devices: {', '.join(self.devices)}",
            f"native library: {self.native}",
        ]
        for row in self.backends:
            state = f"not available: {row.missing}" if row.missing else f"available: {', '.join(row.ops)}"
            where = "any device" if row.devices == ("*",) else ", ".join(row.devices)
            lines.append(f"  {row.name:<10} {where:<11} {state}")
        for op in TABLE[-1].ops:
            chosen = (f"{next(_automatic(op, d)).name} on {d}" for d in self.devices)
            lines.append(f"  {op}: {', '.join(chosen)}")
        return "\n".join(lines)


def backends() -> Report:
    """What is available here, for which device, and why not where not."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return Report(torch.__version__, sys.version.split()[0], devices, TABLE, NATIVE.reason)
