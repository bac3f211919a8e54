"""The row kernels as their compilers made them, in PTX, and calls of them on a CPU: Triton's for sm_90 and, where nvcc is, CUDA C++'s."""

import os
import random
import shutil
import struct
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ptx.memory import Memory
from ptx.program import Program
from ptx.running import GLOBAL, run
from ptx.text import entries
from row_cases import exact
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda" / "softmax_gradient.cu"
CLUSTER = ROOT / "csrc" / "cuda" / "softmax_gradient_cluster.cu"
NVCC = shutil.which("nvcc")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CUDA_NAMES = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
CUDA_DTYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
ULP = 2.0**-23
REST = 77.0  # in a row of logits, behind its V columns


@dataclass
class Rows:
    """A call of the row kernel. Letters: n rows, V vocabulary."""

    logits: Tensor  # (n, V) fp32
    targets: Tensor  # (n,) int64
    upstream: Tensor  # (n,) fp32
    bias: Tensor | None  # (V,)
    softcap: float  # 0: none
    temperature: float
    gradient: torch.dtype | None  # None: log-likelihoods alone
    lse: Tensor | None = None  # (n,) fp32, where it is known

    def only(self, *which: int) -> "Rows":
        """Some of the rows."""
        index = torch.tensor(which)
        lse = None if self.lse is None else self.lse[index]
        return replace(
            self, logits=self.logits[index], targets=self.targets[index], upstream=self.upstream[index], lse=lse
        )


@dataclass
class Found:
    token: Tensor  # (n,) fp32
    lse: Tensor
    flag: int
    gradient: Tensor | None  # (n, V)


def problem(seed: int, vocabulary: int, extras: bool, gradient: torch.dtype | None, known: bool = False) -> Rows:
    """Rows: plain, of upstream 0, of a target that does not exist, of a likelihood near 1 (lse is known: of the last columns)."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = draw.choice((0.5, 3.0)) * torch.randn(4, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (4,), generator=generator)
    targets[2] = draw.choice((-1, vocabulary, 2**40, -(2**62)))
    logits[3, targets[3]] = logits[3].max() + 12
    upstream = torch.randn(4, generator=generator)
    upstream[1] = 0.0
    bias = torch.randn(vocabulary, generator=generator).to(gradient or torch.float32) if extras else None
    softcap, temperature = draw.choice((2.0, 30.0)) if extras else 0.0, draw.choice((1.0, 0.7, 2.5))
    lse = None
    if known:
        z = logits if bias is None else logits + bias.float()
        lse = ((softcap * torch.tanh(z / softcap) if softcap else z) / temperature).double().logsumexp(1).float()
    return Rows(logits, targets, upstream, bias, softcap, temperature, gradient, lse)


class Buffers:
    """The arguments of a call in guarded memory: what is only read cannot be written, rows are `stride` apart."""

    def __init__(self, rows: Rows, stride: int, shift: int = 0):
        """shift: bytes by which the logits lie off 256"""
        count, self.vocabulary = rows.logits.shape
        self.rows, self.stride, self.shift = rows, stride, shift
        body = np.full((count, stride), REST, np.float32)
        body[:, : self.vocabulary] = rows.logits.numpy()
        self.before = np.concatenate([np.full(shift, 0xEE, np.uint8), body.reshape(-1).view(np.uint8)])
        self.memory = Memory(GLOBAL, 2 * self.before.nbytes + (1 << 15))
        place = self.memory.place
        self.logits = place("logits", self.before, writable=rows.gradient is not None) + shift
        self.targets = place("targets", rows.targets.numpy(), writable=False)
        self.upstream = place("upstream", rows.upstream.numpy(), writable=False)
        self.bias = 0 if rows.bias is None else place("bias", bytes_of(rows.bias), writable=False)
        self.token = place("token", 4 * count)
        self.lse = place("lse", 4 * count if rows.lse is None else rows.lse.numpy(), writable=rows.lse is None)
        self.flag = place("flag", np.zeros(1, np.int32))

    def found(self, written: int) -> Found:
        """written: columns of a row that the kernel may write"""
        after, rows = self.memory.content("logits"), len(self.rows.logits)
        assert (after[: self.shift] == self.before[: self.shift]).all()
        body, before = (bits[self.shift :].reshape(rows, -1) for bits in (after, self.before))
        width = 0 if self.rows.gradient is None else self.rows.gradient.itemsize
        assert (body[:, written * width :] == before[:, written * width :]).all(), "beyond the gradient of a row"
        gradient = None
        if self.rows.gradient is not None:
            bits = np.ascontiguousarray(body[:, : self.vocabulary * width])
            gradient = torch.from_numpy(bits).view(self.rows.gradient).view(rows, self.vocabulary)
        token, lse = (torch.from_numpy(self.memory.content(name).view(np.float32)) for name in ("token", "lse"))
        return Found(token, lse, int(self.memory.content("flag").view(np.int32)[0]), gradient)


def bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX; `run` calls it."""

    compiler: str
    source: str
    entry: str
    threads: int
    shared: int  # bytes that the launch gives
    cluster: int = 1  # blocks to a row
    left_out: tuple[int, ...] = ()  # lines of the PTX

    def program(self) -> Program:
        program = _program(self.source, self.entry, self.shared)
        return program.without(self.left_out) if self.left_out else program

    def run(self, rows: Rows, seed: int, stride: int | None = None, shift: int = 0, **options: Any) -> Found:
        vocabulary = rows.logits.shape[1]
        stride = stride or -(-vocabulary // 32) * 32
        buffers = Buffers(rows, stride, shift)
        pack = _triton_arguments if self.compiler == "triton" else _cuda_arguments
        arguments = pack(rows, buffers, self.program())
        blocks = len(rows.logits) * self.cluster
        run(self.program(), buffers.memory, arguments, blocks, self.threads, seed, cluster=self.cluster, **options)
        return buffers.found(stride if self.compiler == "triton" else vocabulary)


@cache
def _program(source: str, entry: str, shared: int) -> Program:
    return Program(source, entry, shared)


def triton_kernel(gradient: torch.dtype | None, extras: bool, known: bool, block: int, warps: int) -> Compiled:
    from l3m_kernels.triton_ops import ahead

    mode = "log-likelihood" if gradient is None else "gradient" + (", known lse" if known else "")
    name = f"{NAMES[gradient or torch.float32]}, {mode}" + (", bias, softcap" if extras else "")
    variant = next(v for v in ahead.variants() if v.kernel == "softmax_gradient" and v.name == name)
    constants = variant.constants | {"BLOCK": block}
    fields = {**vars(variant), "constants": constants, "warps": warps}
    compiled = ahead.compile_kernel(ahead.Variant(**fields), 90)
    (entry,) = entries(compiled.asm["ptx"])
    return Compiled("triton", compiled.asm["ptx"], entry, 32 * warps, compiled.metadata.shared)


def _triton_arguments(rows: Rows, buffers: Buffers, program: Program) -> list[bytes]:
    """Those that are no constants, in the order of the kernel's; two addresses of scratch memory at the end."""
    gradient_stride = 0 if rows.gradient is None else buffers.stride * 4 // rows.gradient.itemsize
    given: list[int | float | None] = [buffers.logits, buffers.stride]
    given += [buffers.logits if rows.gradient else None, gradient_stride, buffers.targets]
    given += [buffers.upstream if rows.gradient else None, buffers.bias or None]
    given += [buffers.token if rows.lse is None else None, buffers.lse, buffers.flag]
    given += [buffers.vocabulary, rows.softcap, 1 / rows.temperature]
    values = [value for value in given if value is not None]
    sizes = list(program.entry.parameters.values())
    values += [0] * (len(sizes) - len(values))
    forms = [
        "<f" if isinstance(value, float) else {4: "<i", 8: "<Q"}[size]
        for value, size in zip(values, sizes, strict=True)
    ]
    return [struct.pack(form, value) for form, value in zip(forms, values, strict=True)]


def cuda_ptx(folder: Path, source: Path) -> str:
    """Of all kernels of a file, for sm_90; nvcc must be here."""
    out = folder / "kernels.ptx"
    command = [str(NVCC), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-ptx", "-arch=sm_90", "-o", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return out.read_text()


def cuda_kernel(source: str, gradient: torch.dtype | None, aligned: bool, threads: int) -> Compiled:
    wanted = f"kernelILb{int(aligned)}ELb{int(gradient is not None)}E{CUDA_NAMES[gradient or torch.float32]}E"
    (entry,) = (name for name in entries(source) if wanted in name)
    return Compiled("nvcc", source, entry, threads, 0)


def cluster_kernel(source: str, gradient: torch.dtype | None, extras: bool, blocks: int, threads: int) -> Compiled:
    """Of the variants that hold the least of a row: 32 columns a thread."""
    dtype = CUDA_NAMES[gradient or torch.float32]
    wanted = f"kernelILi8ELb{int(extras)}ELb{int(gradient is not None)}E{dtype}E"
    (entry,) = (name for name in entries(source) if wanted in name)
    return Compiled("nvcc", source, entry, threads, 0, cluster=blocks)


def _cuda_arguments(rows: Rows, buffers: Buffers, program: Program) -> list[bytes]:
    """The struct `SoftmaxGradient` of csrc/cuda/softmax_gradient.h"""
    layout = struct.Struct("<QqqqQQQiiff?7xQQQQq")
    bias = CUDA_DTYPES[None if rows.bias is None else rows.bias.dtype]
    count, vocabulary = rows.logits.shape
    return [
        layout.pack(
            buffers.logits, buffers.stride, count, vocabulary, buffers.targets, buffers.upstream, buffers.bias,
            bias, CUDA_DTYPES[rows.gradient], rows.softcap, 1 / rows.temperature, rows.lse is not None,
            buffers.token, buffers.lse, buffers.flag, 0, 0,
        )
    ]  # fmt: skip


def excess(found: Found, rows: Rows) -> float:
    """By how much the worst number is beyond what rounding may do; at most 0 where all is right. NaNs must be where they belong."""
    vocabulary = rows.logits.shape[1]
    absent = (rows.targets < 0) | (rows.targets >= vocabulary)
    known, unit = rows.lse is not None, ULP
    targets = rows.targets.clamp(0, vocabulary - 1)
    token, lse, gradients = exact(rows.logits, targets, rows.upstream, rows.bias, rows.softcap, rows.temperature)
    biased = rows.logits.double() if rows.bias is None else rows.logits.double() + rows.bias.double()
    z = (rows.softcap * torch.tanh(biased / rows.softcap) if rows.softcap else biased) / rows.temperature
    whole = exact(z.clone(), targets, rows.upstream / rows.temperature, None, None, 1.0)[
        2
    ]  # the gradients before the softcap's slope
    if known:  # a target among other columns: -p everywhere
        every = torch.arange(vocabulary) == targets[:, None]
        slope = torch.cosh(biased / rows.softcap) ** -2 if rows.softcap else torch.ones_like(z)
        p = (rows.upstream.double() / rows.temperature)[:, None] * torch.softmax(z, 1)
        lost = absent[:, None] & every
        whole, gradients = torch.where(lost, -p, whole), torch.where(lost, -p * slope, gradients)
    else:
        token[absent] = lse[absent] = torch.nan
        gradients[absent & (rows.upstream != 0)] = torch.nan
    size = 1 + z.abs().amax(1) + lse.nan_to_num().abs()
    worst = [torch.tensor(-1.0)]

    def compare(mine, right, allowed):
        mine = mine.double()
        assert torch.equal(mine.isnan(), right.isnan())
        worst.append(((mine - right).abs() - allowed).nan_to_num(-1.0).max())

    if not known:
        assert found.flag == int(absent.any())
        compare(found.token, token, 8 * unit * size)
        compare(found.lse, lse, 8 * unit * size)
    if rows.gradient is not None:
        assert found.gradient is not None
        assert not found.gradient[rows.upstream == 0].any()
        right = gradients.to(rows.gradient).double() if rows.gradient != torch.float32 else gradients
        place = torch.finfo(rows.gradient).eps if rows.gradient != torch.float32 else 0.0
        smallest = torch.finfo(rows.gradient).smallest_normal * max(place, unit) * 2
        # exp of an argument of this size, a slope that is 1 - tanh^2, and where lse was rounded, that
        allowed = 16 * unit * size[:, None] * whole.abs() + place * right.abs() + smallest
        allowed = allowed + (2 * unit * size[:, None] * rows.upstream.abs()[:, None] / rows.temperature if known else 0)
        compare(found.gradient, right, allowed)
    return float(max(worst))


def second_pass_barriers(compiled: Compiled) -> list[int]:
    """Lines, from 1, of the barriers of the pass that overwrites: in a loop that loads and stores rows and no shared memory."""
    entry, found = compiled.program().entry, set()
    for index, instruction in enumerate(entry.instructions):
        if not instruction.name.startswith("bra"):
            continue
        start = compiled.program().steps[index].target
        body = entry.instructions[start : index + 1] if start is not None and start <= index else []
        names = [each.name for each in body]
        spaces = {".".join(name.split(".")[:2]) for name in names}
        if {"ld.global", "st.global"} <= spaces and not spaces & {"ld.shared", "st.shared"}:
            found |= {each.line for each in body if each.name.startswith("bar")}
    return sorted(found)


def barriers(compiled: Compiled) -> list[int]:
    return [each.line for each in compiled.program().entry.instructions if each.name.startswith("bar")]


def without(compiled: Compiled, lines: list[int]) -> Compiled:
    """The kernel with these lines of its PTX left out."""
    return replace(compiled, left_out=(*compiled.left_out, *lines))


def interpreted() -> bool:
    """Whether Triton's functions are for its interpreter in this process, and compile to nothing."""
    return os.environ.get("TRITON_INTERPRET") == "1"
