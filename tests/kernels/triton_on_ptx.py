"""Launches of a Triton kernel, `kernel[grid](...)` with tensors of a CPU: compiled for sm_90, and its PTX run."""

import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from ptx.memory import Memory
from ptx.program import Program
from ptx.running import GLOBAL, run
from ptx.text import entries
from torch import Tensor

from l3m_kernels.triton_ops import ahead

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.int32: "*i32", torch.int64: "*i64"}


class OnPtx:
    """Stands where a `triton.jit` function stood."""

    def __init__(self, name: str, seed: int = 0, inexact: int | None = None):
        """name: in `ahead.KERNELS`; seed: of the order of the warps"""
        self.name, self.seed, self.inexact = name, seed, inexact

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *arguments, **options: self._launch(grid[0], arguments, options)

    def _launch(self, blocks: int, arguments: tuple, options: dict[str, Any]) -> None:
        names = ahead.KERNELS[self.name].arg_names
        warps, fusion = options.pop("num_warps"), options.pop("enable_fp_fusion")
        registers = options.pop("maxnreg", None)
        given = dict(zip(names, arguments, strict=False)) | options
        assert given.keys() == set(names), given.keys() ^ set(names)
        # Pointers are compiled as aligned to 16 bytes. What is not is copied, and then only read.
        copied = {
            name: value.clone()
            for name, value in given.items()
            if isinstance(value, Tensor) and value.storage_offset() * value.itemsize % 16
        }
        given |= copied
        types, constants, aligned = {}, {}, []
        for name, value in given.items():
            kind = None if name in options else _type(value)
            if kind is None or (value is not True and kind[0] == "i" and value == 1):  # which Triton makes a constant
                constants[name] = value
            else:
                types[name] = kind
                if kind[0] == "i" and value % 16 == 0:
                    aligned.append(name)
        variant = (self.name, tuple(types.items()), tuple(constants.items()), warps, fusion, tuple(aligned), registers)
        program = _compiled(*variant)
        storages = {value.untyped_storage().data_ptr(): value for value in given.values() if isinstance(value, Tensor)}
        sizes = {at: tensor.untyped_storage().nbytes() for at, tensor in storages.items()}
        memory = Memory(GLOBAL, sum(-(-size // 256) * 256 + 256 for size in sizes.values()))
        read = {tensor.untyped_storage().data_ptr() for tensor in copied.values()}
        bases = {
            at: memory.place(str(at), _bytes(tensor), writable=at not in read)
            for at, tensor in storages.items()
            if sizes[at]
        }
        values = []
        for name in types:
            value = given[name]
            if isinstance(value, Tensor):
                at = value.untyped_storage().data_ptr()
                value = bases[at] + value.data_ptr() - at if value.numel() else 0
            values.append(value)
        sizes_of = list(program.entry.parameters.values())
        values += [0] * (len(sizes_of) - len(values))  # addresses of scratch memory, of which there is none
        packed = [
            struct.pack("<f" if isinstance(value, float) else {4: "<i", 8: "<q"}[size], value)
            for value, size in zip(values, sizes_of, strict=True)
        ]
        run(program, memory, packed, blocks, 32 * warps, self.seed, inexact=self.inexact)
        for at, tensor in storages.items():
            if sizes[at]:
                _bytes(tensor)[:] = memory.content(str(at))


def _type(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert value is None, value
    return None


def _bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's whole storage, and not a copy."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


@cache
def _compiled(kernel, types, constants, warps, fusion, aligned, registers) -> Program:
    variant = ahead.Variant(
        kernel, "", dict(types), dict(constants), warps, fusion, aligned=aligned, registers=registers
    )
    compiled = ahead.compile_kernel(variant, 90)
    (entry,) = entries(compiled.asm["ptx"])
    return Program(compiled.asm["ptx"], entry, compiled.metadata.shared)
