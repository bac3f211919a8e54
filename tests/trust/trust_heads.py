"""G1: random calls of the fused head on a CPU, each path of instructions that this machine has, by every name that it is called."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from goals import ROOT
from parts import Found, Part, Skipped, each

LARGE = 0.03  # share of the cases whose rows or tokens are cut into several parts
PATHS = {  # of the native library: what Linux calls the instructions, cases
    "generic": ("", 16_000),
    "avx2": ("avx2", 16_000),
    "avx512": ("avx512bw", 20_000),
    "avx512_bf16": ("avx512_bf16", 20_000),
    "amx": ("amx_bf16", 20_000),
}


def instructions() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    except OSError:
        return set()


def native(path: str | None, threads: tuple[int, ...], large: float, seeds: range, offset: int) -> Found:
    """Of backend `cpp` on one path of instructions; None is the machine's own."""
    native_path(path)
    return _heads("cpp", threads, large, seeds, offset)


def native_path(path: str | None) -> None:
    """
    Raises:
        Skipped: the native library is not there, or runs on another path.
    """
    from l3m_kernels.backends import NATIVE

    if NATIVE.module is None:
        raise Skipped(f"the native library is not built here: {NATIVE.reason}")
    if path not in (None, NATIVE.module.cpu_path()):
        raise Skipped(f"this machine does not have the instructions {path}")


def _heads(backend: str, threads: tuple[int, ...], large: float, seeds: range, offset: int) -> Found:
    import torch
    from head_cases import Case
    from test_ops_oracle import check

    from l3m_kernels import set_workspace

    def fuzz(seed: int) -> float:
        draw = random.Random(-1 - seed)
        case = Case.hard(seed, large=draw.random() < large)
        set_workspace(draw.choice((case.workspace, 1, 1 << 18, 1 << 21, None)), low_memory=draw.random() < 0.3)
        torch.set_num_threads(draw.choice(threads))
        return check(backend, case, draw.choice(("log_likelihood", "weighted")))

    before = torch.get_num_threads()
    try:
        return each(fuzz, [seed + offset for seed in seeds])
    finally:
        torch.set_num_threads(before)
        set_workspace(None)


def drop_ins(seeds: range, offset: int) -> Found:
    from drop_in_fuzz import fuzz

    from l3m_kernels import set_workspace

    try:
        return each(lambda seed: fuzz(seed, random.Random(-1 - seed).random() < LARGE), [s + offset for s in seeds])
    finally:
        set_workspace(None)


def shared_out(seeds: range, offset: int) -> Found:
    """Two ranks that share the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "tests" / "kernels" / "parallel_fuzz.py"
        command = [sys.executable, str(script), folder, str(seeds.start + offset), str(len(seeds)), str(LARGE)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        path = Path(folder) / "found.json"
        found = json.loads(path.read_text()) if path.exists() else {}
    if done.returncode or len(found) != len(seeds):
        raise RuntimeError(f"{len(found)} of {len(seeds)} calls: {(done.stdout + done.stderr)[-300:]}")

    def of(seed: int) -> float:
        share = found[str(seed)]
        assert not isinstance(share, str), share
        return share

    return each(of, [seed + offset for seed in seeds])


def parts() -> list[Part]:
    found: list[Part] = []

    def part(name: str, run: Callable[..., Found], cases: int, seconds: float, **more) -> None:
        offset = 500_000 * len(found)  # no two parts draw the same cases
        found.append(Part(name, partial(run, offset=offset), cases, piece=4000, seconds=seconds, **more))

    here = instructions()
    for path, (flag, cases) in PATHS.items():
        environment = {"L3M_CPU": path} if not flag or flag in here else {}
        run = partial(native, path, (1,), LARGE)
        part(f"cpp {path}", run, cases, 130, environment=environment)
    many = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "passive"}
    part("cpp 1 to 7 threads", partial(native, None, (1, 2, 3, 7), 0.2), 4000, 200, environment=many)
    part("cpp", partial(native, None, (1,), LARGE), 0, 1, slice=200)
    part("reference", partial(_heads, "reference", (1,), LARGE), 14_000, 150, slice=100)
    part("drop_in", drop_ins, 6000, 40, slice=60)
    part("parallel 2 ranks", shared_out, 4000, 60)
    return found
