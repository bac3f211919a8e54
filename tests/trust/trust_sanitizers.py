"""G15: the native part under AddressSanitizer and UBSan (gcc, Linux): op suite, random calls on each path, planted faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from goals import ROOT
from native_builds import build, compile_again
from parts import Found, Part, Skipped

SANITIZERS = "address,undefined"
PATHS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
FUZZ = Path(__file__).with_name("sanitized_calls.py")
LARGE = 0.04  # of the random calls: with many tiles, as test_cpp_fuzz draws half of its own
# As `make test-sanitize`: oracle, hazards and shapes of the op, at the smaller sizes
SUITE = ("test_cpp_head.py", "test_cpp_fuzz.py", "test_ops_oracle.py", "test_ops_hazards.py", "test_ops_shapes.py")
CHOSEN = "cpp and not every_path and not (weighted and 1100)"
REPORT = re.compile(r".*(?:ERROR: AddressSanitizer|runtime error): .*")


@cache
def sanitized() -> Path:
    """-> what PYTHONPATH has to be; Skipped where there is no gcc with these sanitizers."""
    if not sys.platform.startswith("linux") or not _library("libasan.so"):
        raise Skipped("no gcc with AddressSanitizer here")
    return build("sanitized", L3M_SANITIZE=SANITIZERS)


def _library(name: str) -> str:
    """Its path, from the compiler, that has to be loaded before all others: Python knows nothing of sanitizers."""
    compiler = shutil.which("c++")
    if compiler is None:
        return ""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else ""


def run(site: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(site),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are no news
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so')}",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a sanitizer reports, or else the end of what was printed."""
    text = done.stdout + done.stderr
    report = REPORT.search(text)
    return report[0] if report else f"exit code {done.returncode}: {text.strip()[-250:]}"


def suite(seeds: range) -> Found:
    """A file of tests for each seed."""
    found, site = Found(), sanitized()
    for seed in seeds:
        name = SUITE[seed % 10_000_000]
        pytest = ("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", CHOSEN)
        done = run(site, *pytest, f"tests/kernels/{name}")
        found.cases += 1
        passed = re.search(r"(\d+) passed", done.stdout)
        found.figures[f"tests of {name}"] = int(passed[1]) if passed else 0
        if done.returncode or not passed:
            found.fail(f"{name}: {said(done)}")
    return found


def calls(path: str) -> Callable[[range], Found]:
    """Random calls, with the instructions of `path`."""

    def part(seeds: range) -> Found:
        site = sanitized()
        done = run(site, str(FUZZ), str(seeds.start), str(len(seeds)), str(LARGE), L3M_CPU=path)
        if "L3M_CPU must be one of" in done.stderr:
            raise Skipped(f"this machine has no {path}")
        *begun, last = done.stdout.strip().split("\n")
        if done.returncode == 0 and last.startswith("{"):
            return Found.of(json.loads(last))
        found = Found(cases=len(begun) + 1)
        found.fail(f"seed {last}: {said(done)}")
        return found

    return part


# (what, file, the text behind which it is planted, the fault, the set of instructions, what has to be reported)
PLANTED = (
    ("a read behind the end of the hidden states", "csrc/cpu/kernels.cpp",
     "double dot(const T* a, const T* b, int64_t count) {\n", "  if (double(widened(a[count])) == 0.123) return 0;\n",
     "AddressSanitizer"),
    ("a write before the beginning of a buffer", "csrc/cpu/kernels.cpp",
     "                  const Transform<Acc>& t, bool slope) {\n", "  sums[-1] = Acc(0);\n", "AddressSanitizer"),
    ("a shift by more than the width", "csrc/cpu/kernels.cpp",
     "                  const Transform<Acc>& t, bool slope) {\n", "  if ((int32_t(1) << (columns + 31)) == 77) return;\n",
     "runtime error: shift exponent"),
    ("a signed overflow", "csrc/cpu/kernels.cpp",
     "                  const Transform<Acc>& t, bool slope) {\n", "  if (int32_t(2147483647 - 1) + int32_t(columns) == 77) return;\n",
     "runtime error: signed integer overflow"),
    ("memory that was freed", "csrc/cpu/barrier_weights.cpp",
     "  const int64_t R = problem.reward_count;\n",
     "  const double* gone = std::vector<double>(64, 1.0).data();\n  if (gone[R] == 0.5) return;\n", "AddressSanitizer"),
    ("an index behind the end of a vector", "csrc/cpu/barrier_weights.cpp",
     "  std::vector<double> root_mean_square(R);\n", "  root_mean_square.data()[R] = 0.0;\n", "AddressSanitizer"),
)  # fmt: skip
TRIAL = """
import torch, l3m_kernels as l
hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
l.log_likelihood(hidden, weight, torch.arange(5), torch.tensor([0, 5]), backend="cpp")
bounds = l.Bounds.of([(0, 1.0, 0.5, 1.0, 0.0, 0.0, 1.0)])
l.barrier_weights(torch.rand(6, 1).double(), l.initial_state(1), bounds, 0.1, backend="cpp")
print("nothing was reported")
"""


def planted(seeds: range) -> Found:
    """A fault for each seed: in the build of the others, with one file compiled again."""
    found = Found()
    site = sanitized()
    clean = run(site, "-c", TRIAL, L3M_CPU="generic")
    if clean.returncode or "nothing was reported" not in clean.stdout:
        raise RuntimeError(f"without a planted fault: {said(clean)}")
    for seed in seeds:
        what, file, behind, fault, wanted = PLANTED[seed % 10_000_000]
        with tempfile.TemporaryDirectory() as folder:
            faulty = compile_again("sanitized", (file, behind, behind + fault), Path(folder), only="generic")
            done = run(faulty, "-c", TRIAL, L3M_CPU="generic")
        found.cases += 1
        if done.returncode == 0 or wanted not in said(done):
            found.fail(f"{what}: wanted {wanted}, got {said(done)}")
    return found


def on_a_gpu(seeds: range) -> Found:
    import torch

    tool = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available() or tool is None:
        raise Skipped("no CUDA device, or no compute-sanitizer, here")
    found = Found()
    for _ in seeds:
        command = [
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:xdist",
            "tests/gpu/test_gpu_head.py",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found.cases += 1
        if done.returncode:
            found.fail((done.stdout + done.stderr)[-250:])
    return found


def parts() -> list[Part]:
    return [
        Part("op suite", suite, len(SUITE), piece=1, seconds=120, limit=7200),
        *(Part(f"random calls: {path}", calls(path), 5_000, piece=1000, seconds=90, limit=7200) for path in PATHS),
        Part("planted faults", planted, len(PLANTED), seconds=60),
        Part("compute-sanitizer", on_a_gpu, 1, seconds=120),
    ]
