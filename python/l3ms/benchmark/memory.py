"""Memory: the peak beyond inputs and returned gradients, of one contestant in a fresh process.

Measured and not computed: the resident set before the call, and its high-water mark after it (Linux keeps both in /proc, and lets a
process reset its own mark). A first call on tiny tensors loads libraries; compiled contestants are called in full first. Buffers that a
contestant keeps for the next call count as its own.

    python -m l3ms.benchmark.memory '{"contestant": "eager", "case": {...}, "threads": 2}'
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from l3ms.benchmark.contestant import prepare
from l3ms.benchmark.contestants import contestants
from l3ms.benchmark.inputs import Source
from l3ms.benchmark.shapes import Case, Shape

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Seconds for start, inputs and one call; a compiled contestant has its compiler to wait for as well. torch 2.13's chunked head takes many
# minutes for bf16 and V = 151936, most of it inside a single operation that nothing but the end of its process can stop.
LIMIT, LIMIT_COMPILED = 100, 400
# Freed blocks go back to the system at once: what is resident is what is held.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class NotMeasured(Exception):
    """Why there is no number."""


class TooSlow(NotMeasured):
    """One call took so long that timing it is out of the question."""


def measure(name: str, case: Case, threads: int, seed: int = 0, limit: float = LIMIT) -> int:
    """Bytes at the peak of one call of a contestant, beyond its inputs and what it returns.

    Raises:
        TooSlow: the process was ended after `limit` seconds.
        NotMeasured: why not.
    """
    if not STATUS.exists():
        raise NotMeasured("reads the peak from /proc, which this system does not have")
    spec = {
        "contestant": name,
        "threads": threads,
        "seed": seed,
        "case": [case.op, *case.shape, case.dtype, case.masked],
    }
    command = [sys.executable, "-W", "ignore", "-m", "l3ms.benchmark.memory", json.dumps(spec)]
    try:
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise TooSlow(f"one call took more than {limit:g} s in a process of its own") from None
    if done.returncode:
        killed = "killed, as when memory is exhausted" if done.returncode < 0 else ""
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise NotMeasured(killed or last[0][:160])
    return json.loads(done.stdout.splitlines()[-1])


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM the most since the mark was reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def peak(run: Any, batch: Any) -> int:
    """Bytes that `run(batch)` holds at its peak, without the tensors that it returns."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    before = resident("VmRSS")
    CLEAR.write_text("5")
    found = run(batch)
    return max(resident("VmHWM") - before - sum(tensor.nbytes for tensor in found), 0)


def _child(spec: dict[str, Any]) -> int:
    torch.set_num_threads(spec["threads"])
    op, *sizes, dtype, masked = spec["case"]
    case = Case(op, Shape(*sizes), dtype, masked)
    contestant = contestants()[spec["contestant"]]
    tiny = Case(op, Shape(32, 16, 64), dtype, masked)
    if not contestant.compiled:
        prepare(contestant, tiny)(Source(tiny, spec["seed"], likely=False).draw(0))
    run, batch = prepare(contestant, case), Source(case, spec["seed"], likely=False).draw(0)
    if contestant.compiled:
        run(batch)
    return peak(run, batch)


if __name__ == "__main__":
    print(_child(json.loads(sys.argv[1])))
