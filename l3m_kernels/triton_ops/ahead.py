"""Every kernel with every committed configuration, compiled without a GPU, and what each needs: registers, spills, shared memory."""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from l3m_kernels.triton_ops.barrier import barrier_weights_kernel
from l3m_kernels.triton_ops.configs import ELEMENTS, FILTERED, PRODUCT, RESPONSES, ROWS, SEQUENCES, for_rows
from l3m_kernels.triton_ops.product import product_kernel
from l3m_kernels.triton_ops.scale import scale_kernel
from l3m_kernels.triton_ops.sequence_sums import sequence_sums_kernel
from l3m_kernels.triton_ops.softmax_gradient import softmax_gradient_kernel

# Compute capability -> shared memory that a block may ask for, in bytes (CUDA C++ programming guide, "Technical Specifications").
ARCHITECTURES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
KERNELS: dict[str, Any] = {
    "softmax_gradient": softmax_gradient_kernel,
    "sequence_sums": sequence_sums_kernel,
    "barrier_weights": barrier_weights_kernel,
    "product": product_kernel,
    "scale": scale_kernel,
}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel."""

    kernel: str
    name: str
    types: dict[str, str]  # of the arguments that are not constants
    constants: dict[str, Any]
    warps: int
    fp_fusion: bool
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16; pointers always are
    main: bool = False
    registers: int | None = None  # at most

    @property
    def block(self) -> int:
        return self.constants["BLOCK"]


@dataclass(frozen=True)
class Compiled:
    variant: Variant
    architecture: int
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block

    @property
    def shared_limit(self) -> int:
        return ARCHITECTURES[self.architecture]

    @property
    def problem(self) -> str | None:
        if self.spilled:
            return f"spills {self.spilled} bytes a thread"
        if self.shared > self.shared_limit:
            return f"wants {self.shared} bytes of shared memory, a block has {self.shared_limit}"
        return None


def variants() -> Iterator[Variant]:
    yield from _softmax_variants()
    for index in ("i32", "i64"):
        types = {"token_ptr": "*fp32", "targets_ptr": "*i64", "cu_seqlens_ptr": f"*{index}", "sequence_ptr": "*fp64"}
        types |= {"length_ptr": "*i64", "tokens": "i32", "ignore_index": "i32"}
        constants = {"BLOCK": SEQUENCES.block}
        yield Variant("sequence_sums", index, types, constants, SEQUENCES.warps, True, main=index == "i64")
    yield from _barrier_variants()
    for accumulate in (False, True):
        types = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32"}
        types |= dict.fromkeys(("rows", "columns", "depth"), "i32")
        types |= {f"{name}_{axis}": "i32" for name in ("a", "b", "out") for axis in ("row", "column")}
        constants = {"ACCUMULATE": accumulate, "BLOCK": PRODUCT.block, "DEPTH": PRODUCT.depth}
        name = "added to" if accumulate else "written"
        yield Variant("product", name, types, constants, PRODUCT.warps, True, main=accumulate)
    for dtype in ("fp32", "bf16", "fp16"):
        types = {"values_ptr": f"*{dtype}", "factor_ptr": "*fp32", "count": "i64"}
        yield Variant("scale", dtype, types, {"BLOCK": ELEMENTS.block}, ELEMENTS.warps, True, main=dtype == "bf16")


def _softmax_variants() -> Iterator[Variant]:
    for largest, _ in ROWS:
        for dtype in ("fp32", "bf16", "fp16"):
            for mode in ("log-likelihood", "gradient", "gradient, known lse"):
                for extras in (False, True):
                    gradient, known = mode != "log-likelihood", mode == "gradient, known lse"
                    config = for_rows(largest or 1 << 17, wide=gradient and dtype == "fp32")
                    types = {"logits_ptr": "*fp32", "stride": "i32", "targets_ptr": "*i64", "lse_ptr": "*fp32"}
                    types |= {"flag_ptr": "*i32", "vocabulary": "i32", "softcap": "fp32", "inverse_temperature": "fp32"}
                    types["gradient_stride"] = "i32"
                    if gradient:
                        types |= {"gradient_ptr": f"*{dtype}", "upstream_ptr": "*fp32"}
                    if extras:
                        types["bias_ptr"] = f"*{dtype}"
                    if not known:
                        types["token_ptr"] = "*fp32"
                    constants = {"CAPPED": extras, "KNOWN_LSE": known, "BLOCK": config.block}
                    name = f"{dtype}, {mode}" + (", bias, softcap" if extras else "")
                    aligned = ("stride", "gradient_stride")  # V itself need not be
                    main = mode == "gradient" and extras
                    yield Variant(
                        "softmax_gradient", name, types, constants, config.warps, True, aligned=aligned, main=main
                    )


def _barrier_variants() -> Iterator[Variant]:
    doubles = ("rewards", "norm", "state", "bounds", "mu", "s", "multiplier", "total", "violation", "estimate")
    types = {f"{name}_ptr": "*fp64" for name in (*doubles, "stderr", "new_state")}
    types |= {"index_ptr": "*i64", "seq_weight_ptr": "*fp32", "smoothing_bits": "i64"}
    types |= dict.fromkeys(("sequences", "rewards", "constraints"), "i32")
    for rewards, constraints in ((1, 2), (4, 8), (16, 32)):
        for sums in (False, True):
            given = types | ({"sums_ptr": "*fp64"} if sums else {})
            for config, leave_one_out in itertools.product((RESPONSES, FILTERED), (True, False)):
                constants = {
                    "COLUMNS": 5 if config is RESPONSES else 23,
                    "LEAVE_ONE_OUT": leave_one_out,
                    "R": rewards,
                    "K": constraints,
                    "BLOCK": config.block,
                }
                name = f"R={rewards} K={constraints}" + (", sums" if sums else "")
                name += ("" if config is RESPONSES else ", trend") + ("" if leave_one_out else ", moving average")
                main = not sums and leave_one_out
                limit = config.registers
                yield Variant(
                    "barrier_weights", name, given, constants, config.warps, False, main=main, registers=limit
                )


def compile_one(variant: Variant, architecture: int) -> Compiled:
    """What a variant needs on sm_<architecture>.

    Raises:
        whatever Triton raises where a kernel does not compile.
    """
    compiled = compile_kernel(variant, architecture)
    registers, spilled = _resources(compiled.asm["ptx"], architecture, variant.fp_fusion)
    return Compiled(variant, architecture, registers, spilled, compiled.metadata.shared)


def compile_kernel(variant: Variant, architecture: int) -> Any:
    """Triton's `CompiledKernel` for sm_<architecture>, `asm["ptx"]` among it; Triton keeps what it compiled in its cache."""
    kernel = KERNELS[variant.kernel]
    names = kernel.arg_names
    constants = variant.constants | {
        name: None for name in names if name not in variant.types and name not in variant.constants
    }
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = (*variant.aligned, *(name for name, kind in variant.types.items() if kind.startswith("*")))
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": variant.warps, "enable_fp_fusion": variant.fp_fusion, "maxnreg": variant.registers}
    return triton.compile(source, target=target, options=options)


def _resources(ptx: str, architecture: int, fp_fusion: bool) -> tuple[int, int]:
    """-> registers, and bytes spilled, of a thread: what Triton's assembler says, which Triton itself asks for on a GPU only."""
    assembler = knobs.nvidia.ptxas
    if architecture >= 100:  # before Triton 3.6 one assembler was for all
        assembler = getattr(knobs.nvidia, "ptxas_blackwell", assembler)
    target = f"sm_{architecture}a" if architecture >= 90 else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [assembler.path, "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        command += [] if fp_fusion else ["--fmad=false"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", text), re.search(r"(\d+) bytes spill stores", text)
    assert registers is not None, text
    assert spilled is not None, text
    return int(registers[1]), int(spilled[1])
