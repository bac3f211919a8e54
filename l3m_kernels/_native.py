"""Loads the compiled part, `l3m_kernels._C`, if it was built and built against the torch that is running.

The C++ interface of torch is not stable between releases: a library compiled against another torch may crash or compute
nonsense. So what `setup.py` recorded in `_build.json` is compared with the running torch before the library is touched.
"""

import functools
import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

FOLDER = Path(__file__).resolve().parent
# A fresh virtual environment may have a setuptools that is too old, and without build isolation pip does not look.
INSTALL = 'pip install "setuptools>=77" cmake ninja && pip install --no-build-isolation --no-deps'


class NativeStatus(NamedTuple):
    module: ModuleType | None  # l3m_kernels._C; importing it registers its ops with torch
    reason: str  # what it was built with, or why there is none and the command that adds it
    no_cuda: str | None  # why it has no CUDA kernels, or None
    architectures: tuple[str, ...] = ()  # of its CUDA kernels, as CMake names them: 90-real, 120-virtual


def _missing(why: str) -> NativeStatus:
    source = FOLDER.parent
    where, what = ("", f"-e {source}") if (source / "setup.py").exists() else (", in the source tree", ".")
    reason = f"{why}; to build it{where}: {INSTALL} {what}"
    return NativeStatus(None, reason, f"built without CUDA: {reason}")


def _unusable(why: str) -> NativeStatus:
    status = _missing(why)
    warnings.warn(f"l3m_kernels runs without its native part: {status.reason}", RuntimeWarning, stacklevel=2)
    return status


def _identity(version: str, git_version: str, cxx11_abi: bool) -> str:
    """One string per C++ interface: without +cpu or +cu130, because the builds of one release share theirs."""
    return f"{version.partition('+')[0]} (git {git_version[:12]}, C++11 ABI {'on' if cxx11_abi else 'off'})"


def _major(cuda: str | None) -> str | None:
    return cuda and cuda.partition(".")[0]


@functools.cache
def load() -> NativeStatus:
    """The native module or why there is none. Warns, once, if there is one that cannot be used.

    Raises:
        ImportError: the environment variable L3M_CPU names instructions that this machine does not have. They were asked for, so
            nothing else runs instead.
    """
    try:
        record = json.loads((FOLDER / "_build.json").read_text())
    except FileNotFoundError:
        return _missing("not built: this source tree was never installed")
    if "cpu" not in record["built"]:
        return _missing(f"not built: {record['missing']['cpu']}")
    built = record["torch"]
    then = _identity(built["version"], built["git_version"], built["cxx11_abi"])
    now = _identity(torch.__version__, torch.version.git_version or "", torch.compiled_with_cxx11_abi())
    if then != now:
        return _unusable(f"built against torch {then}, running torch {now}")
    cuda = "cuda" in record["built"]
    if cuda and _major(built["cuda"]) != _major(torch.version.cuda):
        return _unusable(f"built for CUDA {built['cuda']}, running torch has {torch.version.cuda or 'no CUDA'}")
    try:
        module = importlib.import_module("._C", __package__)
    except ImportError as error:
        return _unusable(f"l3m_kernels._C does not load: {error}")
    try:
        path = module.cpu_path()
    except RuntimeError as error:
        raise ImportError(str(error)) from None
    no_cuda = None if cuda else f"built without CUDA: {record['missing']['cuda']}"
    nvcc = f"nvcc {record['nvcc']['version']} for {', '.join(record['nvcc']['architectures'])}" if cuda else no_cuda
    how = f"{record['compiler']} as C++{built['cpp_standard']} ({nvcc})"
    architectures = tuple(record["nvcc"]["architectures"]) if cuda else ()
    return NativeStatus(module, f"built against torch {then} by {how}, runs on {path}", no_cuda, architectures)


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a GPU has machine code of these: of its generation and not newer, or from intermediate code of any that is not newer."""
    for name in architectures:
        number, _, kind = name.partition("-")
        specific = number[-1] in "af"  # of one GPU, or of its family from it on
        digits = number.rstrip("af")
        built = int(digits[:-1]), int(digits[-1])
        if kind == "virtual" and not specific:
            if built <= capability:
                return True
        elif built == capability or (built[0] == capability[0] and built < capability and not number.endswith("a")):
            return True
    return False
