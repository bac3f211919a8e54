"""The CUDA kernels compile for every architecture without spilling; which nvcc and which architectures a build takes.

No GPU is needed: `python tests/build/test_cuda_build.py` prints the compiler's table of registers, spills and shared memory.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
CLUSTER = ROOT / "csrc" / "cuda" / "softmax_gradient_cluster.cu"
# Bytes of shared memory that a block can have without asking for more.
SHARED_MEMORY = 48 << 10
NVCC = shutil.which("nvcc")
FLAGS = {"barrier_weights": ["-fmad=false"]}  # as in CMakeLists.txt
BUILD_WHEEL = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
CUDA_TORCH = "import torch; torch.version.cuda = '13.0'; "
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not here: the CUDA kernels are not compiled")


class Kernel(NamedTuple):
    name: str
    architecture: int
    registers: int
    stack: int
    spilled: int  # bytes, stores and loads
    shared: int


def compile_cuda(source: Path, folder: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    """What ptxas says of each kernel of a file, per architecture."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-Wall,-Wextra",
        "-Xptxas",
        "-v",
    ]
    command += [
        *FLAGS.get(source.stem, ()),
        f"-I{ROOT / 'csrc'}",
        *targets,
        "-c",
        str(source),
        "-o",
        str(folder / "a.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = []
    for part in re.split(r"(?=Compiling entry function)", done.stderr)[1:]:
        name, number = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)", part)[0]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3])
        registers = int(re.findall(r"Used (\d+) registers", part)[0])
        shared = int((re.findall(r"(\d+) bytes smem", part) or [0])[0])
        found.append(Kernel(name, int(number), registers, stack, stores + loads, shared))
    return found


@needs_nvcc
@pytest.mark.parametrize(
    "architectures", [(90,), pytest.param((80, 100, 120), marks=pytest.mark.slow)], ids=["90", "the others"]
)
@pytest.mark.parametrize("source", [source for source in SOURCES if source != CLUSTER], ids=lambda path: path.stem)
def test_kernels_compile_and_spill_nothing(source, architectures, tmp_path):
    found = compile_cuda(source, tmp_path, architectures)
    assert {kernel.architecture for kernel in found} == set(architectures)
    assert len(found) == len(architectures) * {"barrier_weights": 1, "scale": 3, "softmax_gradient": 8}[source.stem]
    assert [kernel for kernel in found if kernel.spilled or kernel.stack or kernel.shared > SHARED_MEMORY] == []


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", [pytest.param(number, marks=pytest.mark.slow) for number in (80, 90, 100, 120)]
)
def test_rows_fit_the_registers_of_a_cluster(architecture, tmp_path):
    """Nothing spills, and two blocks of 512 threads share a multiprocessor's 65536 registers where they are to."""
    found = compile_cuda(CLUSTER, tmp_path, (architecture,))
    assert len(found) == 24
    assert [kernel for kernel in found if kernel.spilled or kernel.stack or kernel.shared > SHARED_MEMORY] == []
    for kernel in found:
        match = re.search(r"softmax_cluster_kernelILi(\d+)ELb[01]ELb([01])E(f?)", kernel.name)
        assert match is not None, kernel.name
        fp32_gradient = match[2] == "1" and match[3] == "f"
        two = int(match[1]) <= (8 if fp32_gradient else 10)
        assert kernel.registers <= (64 if two else 128), kernel


@needs_nvcc
@pytest.mark.slow
def test_a_row_is_read_once(tmp_path):
    """Of 8, 10 or 16 vectors a thread as many loads of 128 bits, and an exponential an element, beside those of the sums."""
    command = [str(NVCC), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-ptx", "-arch=sm_90", str(CLUSTER)]
    subprocess.run([*command, "-o", str(tmp_path / "a.ptx")], check=True, capture_output=True)
    found = {}
    for entry in re.split(r"(?=\.entry )", (tmp_path / "a.ptx").read_text()):
        name = re.match(r"\.entry \S+softmax_cluster_kernelILi(\d+)ELb0ELb1E13__nv_bfloat16", entry)
        if name:
            found[int(name[1])] = (len(re.findall(r"ld\.global\.v4", entry)), entry.count("ex2.approx"))
    assert set(found) == {8, 10, 16}
    for vectors, (loads, exponentials) in found.items():
        assert loads == vectors
        assert exponentials <= 4 * vectors + 40


@needs_nvcc
def test_the_barrier_has_no_fused_multiply_add(tmp_path):
    """One would change bits; the compiler makes them unless it is told not to."""
    source = ROOT / "csrc" / "cuda" / "barrier_weights.cu"
    counts = []
    for flags in ([], FLAGS["barrier_weights"]):
        command = [str(NVCC), "-std=c++17", "-O3", *flags, f"-I{ROOT / 'csrc'}", "-ptx", "-arch=sm_90", str(source)]
        subprocess.run([*command, "-o", str(tmp_path / "a.ptx")], check=True, capture_output=True)
        counts.append((tmp_path / "a.ptx").read_text().count("fma.rn.f64"))
    assert counts[0] > 0
    assert counts[1] == 0
    assert "barrier_weights.cu PROPERTIES COMPILE_OPTIONS -fmad=false" in (ROOT / "CMakeLists.txt").read_text()


@needs_nvcc
def test_the_torch_side_compiles(tmp_path):
    """With the headers of this torch, which a CPU build has too, but for one that says how torch's CUDA part was linked."""
    from torch.utils import cpp_extension

    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in cpp_extension.include_paths())]
    flags = ["-std=c++20", "-Xcompiler", "-Wall,-Wextra,-Werror,-fsyntax-only", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    source = ROOT / "csrc" / "cuda_ops.cpp"  # nvcc hands it to the C++ compiler, with CUDA's headers
    command = [str(NVCC), *flags, *includes, "-c", str(source), "-o", str(tmp_path / "a.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("wanted", "nvcc", "found"),
    [
        (None, "13.0.88", "80-real;90-real;100-real;120-real;120-virtual"),
        (None, "12.8.61", "80-real;90-real;100-real;120-real;120-virtual"),
        (None, "12.6.20", "80-real;90-real;90-virtual"),
        ("9.0", "13.0", "90-real"),
        ("8.0;8.6 9.0a+PTX", "13.0", "80-real;86-real;90a-real;90a-virtual"),
        ("8.0, 12.0+PTX", "13.0", "80-real;120-real;120-virtual"),
    ],
)
def test_architectures(wanted, nvcc, found, tmp_path):
    assert architectures(wanted, nvcc, tmp_path) == (0, found)


def test_architectures_that_are_none(tmp_path):
    status, message = architectures("Hopper", "13.0", tmp_path)
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST must list numbers as 8.0;9.0+PTX, got Hopper" in " ".join(message.split())


def architectures(wanted: str | None, nvcc: str, folder: Path) -> tuple[int, str]:
    script = folder / "script.cmake"
    script.write_text(
        f"set(CMAKE_CUDA_COMPILER_VERSION {nvcc})\ninclude({ROOT}/cmake/cuda_architectures.cmake)\n"
        'l3m_cuda_architectures(found)\nmessage(NOTICE "${found}")\n'
    )
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment |= {} if wanted is None else {"TORCH_CUDA_ARCH_LIST": wanted}
    done = subprocess.run([str(cmake), "-P", str(script)], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("release", "message"),
    [
        (None, "L3M_BUILD=cuda: nvcc was not found in CUDA_HOME or on PATH (torch has CUDA 13.0)"),
        ("12.9", "nvcc is of CUDA 12.9, torch of CUDA 13.0: the major versions differ"),
        pytest.param("unknown", "nvcc --version does not tell its version", marks=pytest.mark.slow),
    ],
)
def test_an_nvcc_that_does_not_fit_is_refused_by_name(python, tree, no_nvcc, tmp_path, release, message):
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    if release:
        program = home / "bin" / "nvcc"
        program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        program.chmod(0o755)
    environment = {"PATH": no_nvcc, "CUDA_HOME": home, "CUDA_PATH": None}
    done = python("-c", CUDA_TORCH + BUILD_WHEEL, cwd=tree, L3M_BUILD="cuda", **environment)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]


def test_a_torch_without_cuda_is_refused_by_name(python, tree):
    done = python("-c", f"import torch; torch.version.cuda = None; {BUILD_WHEEL}", cwd=tree, L3M_BUILD="cuda")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "L3M_BUILD=cuda: torch is a build without CUDA"


@needs_nvcc
@pytest.mark.slow
def test_a_build_with_cuda_and_a_torch_without(python, tree, installed, tmp_path):
    """Everything compiles and links, against a stand-in for torch's CUDA library; a torch without CUDA is then told so."""
    stand_in = tmp_path / "lib"
    stand_in.mkdir()
    command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(stand_in / "libc10_cuda.so")]
    subprocess.run(command, check=True)
    environment = {"CXXFLAGS": "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "LDFLAGS": f"-L{stand_in}"}
    release = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout
    major = re.findall(r"release (\d+)\.", release)[0]
    torch_of = f"import torch; torch.version.cuda = '{major}.0'; "
    done = python("-c", torch_of + BUILD_WHEEL, cwd=tree, L3M_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0", **environment)
    assert done.returncode == 0, done.stderr
    site = installed()
    report = "import torch; torch.version.cuda = None; import l3m_kernels; print(l3m_kernels.backends())"
    done = python("-W", "ignore", "-c", report, cwd=site.parent, PYTHONPATH=site)
    assert f"built for CUDA {major}.0, running torch has no CUDA" in done.stdout, done.stderr
    assert "log_likelihood: reference on cpu" in done.stdout


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        for source in SOURCES:
            for kernel in compile_cuda(source, Path(where)):
                name = subprocess.run(["c++filt", kernel.name], capture_output=True, text=True).stdout
                short = re.sub(r"l3m::cuda::|\(anonymous namespace\)::|void |\(.*", "", name).strip()
                print(
                    f"sm_{kernel.architecture:<4} {short:<55} {kernel.registers:3} registers, "
                    f"{kernel.stack} B stack, {kernel.spilled} B spilled, {kernel.shared} B shared"
                )
