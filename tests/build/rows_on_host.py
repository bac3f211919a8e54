"""The CUDA sources compiled by the host's compiler, and what the tests do with a row: a call in guarded buffers, its float64 values.

`cuda_on_host` has as much of CUDA's language as the kernels use. Not seen here: the GPU's memory, its exp and tanh, its compiler.
"""

import ctypes
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from row_cases import exact
from torch import Tensor

from l3m_kernels import row_chunks

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "cuda_on_host"
COMPILER = shutil.which("c++") or shutil.which("g++")
DTYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# What C++ does not have, and shared memory, of which each block of a cluster has its own.
LANGUAGE = {
    r"(\w+(?:<[\w, ]+>)?)<<<(.*?), (.*?), 0, stream>>>\((.*?)\);": r"on_host::launch(\2, \3, [&] { \1(\4); });",
    r"__shared__ (\w+) (\w+)(\[.*?\])?;": r"auto& \2 = on_host::shared_variable<\1\3>(__COUNTER__);",
}
GUARD = 64  # elements before and behind a buffer that nothing may touch


def build(folder: Path, changes: tuple[tuple[str, str], ...] = (), csrc: Path = ROOT / "csrc") -> None:
    """kernels.so in the folder; of sources with texts replaced by others, each of which is in one of them."""
    left = set(changes)
    parts = [HERE / "calls.cpp"]
    for path in sorted((csrc / "cuda").glob("*.cu")):
        source = path.read_text()
        for change in changes:
            left -= {change} if change[0] in source else set()
            source = source.replace(*change)
        for cuda, host in LANGUAGE.items():
            source = re.sub(cuda, host, source)
        assert "<<<" not in source, path
        parts.append(folder / f"{path.stem}.cpp")
        parts[-1].write_text(source)
    assert not left, left
    # Fibers jump between their stacks, which a checked longjmp takes for a mistake.
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")
    includes = (f"-I{HERE}", f"-I{csrc}")
    command = [str(COMPILER), *flags, *includes, *map(str, parts), "-o", str(folder / "kernels.tmp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "kernels.tmp").rename(folder / "kernels.so")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def softmax_gradient(
    kernels,
    logits,
    targets,
    upstream,
    bias,
    softcap,
    temperature,
    gradient,
    lse=None,
    stride=None,
    shift=0,
    order=0,
    cluster=False,
    apart=None,
) -> tuple[Tensor, Tensor, int, Any]:
    """-> token (n,), lse (n,), flag, gradients (n, V) in dtype `gradient` or None; the buffers are guarded and poisoned.

    apart: elements from one row of the gradients to the next, where they are not written over the logits.
    """
    rows, vocabulary = logits.shape
    stride = stride or vocabulary
    buffer = torch.full((GUARD + shift + rows * stride + GUARD,), 77.0)
    # A tensor's memory is aligned to 64 bytes here: `shift` elements further it is not.
    body = buffer[GUARD + shift : GUARD + shift + rows * stride].view(rows, stride)
    body[:, :vocabulary] = logits
    before = buffer.clone()
    out = None if apart is None else torch.full((GUARD + rows * apart + GUARD,), 77.0, dtype=gradient)
    written = None if out is None or apart is None else out[GUARD : GUARD + rows * apart].view(rows, apart)
    token, found_lse = torch.full((rows,), 5.0), torch.full((rows,), 6.0) if lse is None else lse.clone()
    flag = torch.zeros(1, dtype=torch.int32)
    kernels.set_order(order)
    status = kernels.softmax_gradient(
        pointer(body), ctypes.c_int64(stride), ctypes.c_int64(rows), ctypes.c_int64(vocabulary), pointer(targets),
        pointer(upstream if gradient else None), pointer(bias), DTYPES[bias.dtype if bias is not None else None],
        DTYPES[gradient], ctypes.c_float(softcap or 0.0), ctypes.c_float(1 / temperature), int(lse is not None),
        pointer(token), pointer(found_lse), pointer(flag), int(cluster), pointer(written), ctypes.c_int64(apart or 0),
    )  # fmt: skip
    assert status == 0
    assert torch.equal(buffer[: GUARD + shift], before[: GUARD + shift])
    assert torch.equal(buffer[-GUARD:], before[-GUARD:])
    assert bool((body[:, vocabulary:] == 77).all()), "between the rows"
    if written is not None:
        assert out is not None
        assert bool((out[:GUARD] == 77).all() and (out[-GUARD:] == 77).all() and (written[:, vocabulary:] == 77).all())
    if gradient is None or written is not None:
        assert torch.equal(body.view(torch.int32), before[GUARD + shift : -GUARD].view(rows, stride).view(torch.int32))
        return token, found_lse, int(flag), None if written is None else written[:, :vocabulary].clone()
    return token, found_lse, int(flag), body.view(gradient)[:, :vocabulary].clone()


ULP = 2.0**-23


def problem(seed: int, vocabulary: int, rows: int = 3):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = draw.choice((0.1, 3.0, 30.0)) * torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    if draw.random() < 0.3:
        logits[0, targets[0]] = logits[0].max() + 25  # a likelihood near 1
    dtype = draw.choice((None, torch.float32, torch.bfloat16, torch.float16))
    bias = None if dtype is None else torch.randn(vocabulary, generator=generator).to(dtype)
    upstream = torch.randn(rows, generator=generator)
    upstream[draw.randrange(rows)] = 0.0
    return (logits, targets, upstream, bias, draw.choice((None, None, 2.0, 30.0)), draw.choice((1.0, 0.7, 2.5))), draw


class Tolerance:
    """What rounding may do to the rows of a problem, and whether results are within."""

    def __init__(self, logits, targets, upstream, bias, softcap, temperature):
        self.token, self.lse, self.gradients = exact(logits, targets, upstream, bias, softcap, temperature)
        self.upstream, self.temperature = upstream.abs(), temperature
        largest = logits.abs().amax(1) + (0 if bias is None else bias.abs().max())
        self.size = 1 + (largest.clamp(max=softcap) if softcap else largest) / temperature
        # relative, of p and of the softcap's derivative
        self.condition = self.size + (2 * largest / softcap if softcap else 0)

    def statistics(self, token: Tensor, lse: Tensor) -> None:
        assert bool(((lse.double() - self.lse).abs() <= 4 * ULP * (self.size + self.lse.abs())).all())
        assert bool(((token.double() - self.token).abs() <= 4 * ULP * (self.size - self.token)).all())
        assert bool((token <= 0).all())
        # no error of the logits' size is left in these
        near_one = (self.token > -1e-3) & (self.size < 2 / self.temperature)
        assert bool(((token.double() - self.token).abs() <= 1e-5 * self.token.abs())[near_one].all())

    def gradient(self, found: Tensor, known: bool) -> None:
        dtype, gradients = found.dtype, self.gradients
        right = gradients.to(dtype).double() if dtype != torch.float32 else gradients
        unit = torch.finfo(dtype).eps if dtype != torch.float32 else 0
        # lse was, to fp32
        rounded = 2 * ULP * (self.size + self.lse.abs()) * self.upstream / self.temperature if known else 0 * self.size
        tiny = 2 * torch.finfo(dtype).smallest_normal * max(unit, ULP)  # subnormal numbers
        rounded = rounded + 1e-15 * self.upstream / self.temperature  # the oracle's own 1 - p
        allowed = 16 * ULP * self.condition[:, None] * gradients.abs() + rounded[:, None] + unit * right.abs() + tiny
        excess = (found.double() - right).abs() - allowed
        assert bool((excess <= 0).all()), (known, excess.max())
        assert not found[self.upstream == 0].any()


def row_kernels(kernels, cluster: bool) -> row_chunks.RowKernels:
    """The kernel as `csrc/cuda_ops.cpp` launches it."""

    def run(
        logits, targets, upstream, bias, softcap, inverse_temperature, grad_dtype, token, lse, flag, known_lse, out=None
    ):
        apart = ctypes.c_int64(0 if out is None else max(out.stride(0), out.shape[1]))
        sizes = map(ctypes.c_int64, (logits.stride(0) if len(logits) > 1 else logits.shape[1], *logits.shape))
        status = kernels.softmax_gradient(
            pointer(logits), *sizes, pointer(targets), pointer(upstream), pointer(bias),
            DTYPES[None if bias is None else bias.dtype], DTYPES[None if upstream is None else grad_dtype],
            ctypes.c_float(softcap), ctypes.c_float(inverse_temperature), int(known_lse),
            *map(pointer, (token, lse, flag)), int(cluster), pointer(out), apart,
        )  # fmt: skip
        assert status == 0

    return row_chunks.RowKernels(run)
