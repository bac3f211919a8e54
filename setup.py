"""Finds torch, reads L3M_BUILD, calls CMake. Sources and flags are in CMakeLists.txt, the rest is in pyproject.toml.

L3M_BUILD=auto  compile what can be compiled here and record why the rest cannot (default)
L3M_BUILD=off   compile nothing
L3M_BUILD=cpu   compile the C++ ops or fail
L3M_BUILD=cuda  compile the CUDA ops too or fail; a GPU is not asked for

L3M_SANITIZE=address,undefined  compile with these sanitizers of the compiler, for `make test-sanitize`

CUDA_HOME, TORCH_CUDA_ARCH_LIST  where nvcc is and what it compiles for, as in torch.utils.cpp_extension

What happened is written to l3m_kernels/_build.json, which `python -m l3m_kernels` reads.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "off", "cpu", "cuda")
NO_TORCH = "torch was not importable at build time (an isolated build does not see it)"
# A virtual environment that is not activated has cmake and ninja here, and PATH does not say so.
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


class NotBuilt(Exception):
    """Why a native part was not compiled."""


def find_torch() -> tuple[dict, list[str]]:
    """-> what to record of torch, and what CMake has to know about it."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        raise NotBuilt(NO_TORCH) from error
    except Exception as error:  # a broken torch fails to import in many ways
        raise NotBuilt(f"torch failed to import: {error}") from error
    standard = re.search(r"C\+\+ Version: 20(\d\d)", torch.__config__.show())
    if standard is None:
        raise NotBuilt("torch.__config__.show() does not tell the C++ standard that torch was compiled with")
    record = {
        "version": str(torch.__version__),
        "git_version": torch.version.git_version,
        "cuda": torch.version.cuda,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "cpp_standard": int(standard[1]),
    }
    settings = {
        "CMAKE_CXX_STANDARD": standard[1],
        "L3M_TORCH_INCLUDE_DIRS": ";".join(cpp_extension.include_paths()),
        "L3M_TORCH_LIBRARY_DIRS": ";".join(cpp_extension.library_paths()),
        "L3M_TORCH_CXX11_ABI": str(int(record["cxx11_abi"])),
    }
    return record, [f"-D{name}={value}" for name, value in settings.items()]


def find_nvcc(cuda: str | None) -> str:
    """-> the path of an nvcc whose major version is that of torch's CUDA."""
    if cuda is None:
        raise NotBuilt("torch is a build without CUDA")
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, SEARCH_PATH]))
    if nvcc is None:
        raise NotBuilt(f"nvcc was not found in CUDA_HOME or on PATH (torch has CUDA {cuda})")
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace", check=False)
    release = re.search(r"release (\d+)\.\d+", done.stdout)
    if release is None:
        raise NotBuilt(f"{nvcc} --version does not tell its version")
    if release[1] != cuda.partition(".")[0]:
        raise NotBuilt(f"{nvcc} is of CUDA {release[0].split()[1]}, torch of CUDA {cuda}: the major versions differ")
    return nvcc


def run_cmake(*arguments: str) -> None:
    cmake = shutil.which("cmake", path=SEARCH_PATH)
    if cmake is None:
        raise NotBuilt("cmake was not found")
    command = [cmake, *arguments]
    print(*command, flush=True)
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": SEARCH_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    print(done.stdout, flush=True)
    if done.returncode:
        first_error = re.search(r"(CMake Error|.*error:).*(\n.*){0,7}", done.stdout)
        summary = " ".join(first_error[0].split())[:300] if first_error else "no error message"
        raise NotBuilt(f"cmake failed with exit code {done.returncode}: {summary}")


class CMakeBuild(build_ext):
    """Builds l3m_kernels._C where it can be built, and l3m_kernels/_build.json always."""

    def run(self) -> None:
        mode = os.environ.get("L3M_BUILD", "auto")
        if mode not in MODES:
            raise SystemExit(f"L3M_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
        package = (ROOT if self.editable_mode or self.inplace else Path(self.build_lib).resolve()) / "l3m_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_C.*"):
            stale.unlink()
        record = {"requested": mode, "torch": None, "compiler": None, "nvcc": None, "built": [], "missing": {}}
        try:
            if mode == "off":
                raise NotBuilt("L3M_BUILD=off was set at build time")
            record["torch"], settings = find_torch()
            if not self.compile_cuda(record, settings, package):
                record["compiler"] = self.compile(record["torch"]["version"], settings, package)
                record["built"].append("cpu")
        except NotBuilt as reason:
            if mode in ("cpu", "cuda"):
                raise SystemExit(f"L3M_BUILD={mode}: {reason}") from reason
            record["missing"]["cpu"] = str(reason)
            record["missing"].setdefault("cuda", str(reason))
            print(f"l3m_kernels is built without its native part: {reason}", file=sys.stderr)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def compile_cuda(self, record: dict, settings: list[str], package: Path) -> bool:
        """Both native parts, or False and the reason in the record."""
        try:
            if record["requested"] == "cpu":
                raise NotBuilt("L3M_BUILD=cpu was set at build time")
            nvcc = find_nvcc(record["torch"]["cuda"])
            settings = [*settings, "-DL3M_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            record["compiler"] = self.compile(record["torch"]["version"], settings, package, "-cuda")
        except NotBuilt as reason:
            if record["requested"] == "cuda":
                raise
            record["missing"]["cuda"] = str(reason)
            return False
        version, *architectures = (self.folder / "cuda.txt").read_text().strip().split(";")
        record["nvcc"] = {"version": version, "architectures": architectures}
        record["built"] += ["cpu", "cuda"]
        return True

    def compile(self, torch_version: str, settings: list[str], package: Path, suffix: str = "") -> str:
        """-> the compiler. One folder per Python and torch: objects made with other headers are never reused."""
        sanitize = os.environ.get("L3M_SANITIZE", "")
        name = f"cmake-{sys.implementation.cache_tag}-torch-{torch_version}{suffix}" + ("-sanitize" if sanitize else "")
        self.folder = folder = ROOT / "build" / name
        generator = ["-G", "Ninja"] if shutil.which("ninja", path=SEARCH_PATH) else []
        settings = ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}", *settings]
        if sanitize:
            settings.append(f"-DL3M_SANITIZE={sanitize}")
        run_cmake("-S", str(ROOT), "-B", str(folder), "--fresh", *generator, *settings)
        run_cmake("--build", str(folder), "--parallel")
        run_cmake("--install", str(folder), "--prefix", str(package))
        return (folder / "compiler.txt").read_text().strip()

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The extension is named so that the wheel is tagged for this Python and platform; what is in it is CMake's business.
setup(ext_modules=[Extension("l3m_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
