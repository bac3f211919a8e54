"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import l3m_kernels
from l3ms.benchmark import device
from l3ms.benchmark.peers import installed

# Instruction sets that decide how fast a matrix product is, as /proc/cpuinfo spells them.
ISA = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "asimd", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip


# The last of these that a machine has is in the name of its kind: two that call themselves AMD EPYC may differ by a factor of two.
WIDEST = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")


@dataclass(frozen=True, kw_only=True)
class Environment:
    date: str  # ISO, UTC, when the run began
    cpu: str
    gpu: str | None = None  # that was measured, where one was
    cuda: str | None = None  # of torch, likewise
    isa: list[str]
    cores: int
    memory_gib: float | None
    system: str
    python: str
    torch: str
    l3m_kernels: str
    backends: dict[str, str]  # of l3m_kernels: "available", or why not
    packages: dict[str, str]  # peers: version

    @property
    def device(self) -> str:
        """For a file name, one for each kind of machine: amd-epyc-avx512-bf16-2-cores."""
        text = self.gpu or _kind(self.cpu, self.isa, self.cores)
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")

    def same_software(self, other: Environment) -> bool:
        """Whether results may stand in one table."""
        return self == replace(other, date=self.date, memory_gib=self.memory_gib)


def describe(on: str = "cpu") -> Environment:
    """on: the device that is measured."""
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        cpu=cpu_name(),
        gpu=device.name() if on == "cuda" else None,
        cuda=torch.version.cuda if on == "cuda" else None,
        isa=_isa(),
        cores=_cores(),
        memory_gib=_memory(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        l3m_kernels=l3m_kernels.__version__,
        backends={row.name: row.missing or "available" for row in l3m_kernels.backends().backends},
        packages=installed(),
    )


def machine(cores: int | None = None) -> str:
    """The kind of this machine, "AMD EPYC, avx2, 1 core": `cores`, or those that this process may use."""
    return _kind(cpu_name(), _isa(), cores or _cores())


def _kind(cpu: str, isa: Sequence[str], cores: int) -> str:
    widest = [flag for flag in WIDEST if flag in isa][-1:]
    return ", ".join([cpu or "cpu", *widest, f"{cores} core{'s' * (cores != 1)}"])


def _isa() -> list[str]:
    flags = set(_cpuinfo("flags", "Features").split())
    return [flag for flag in ISA if flag in flags]


def cpu_name() -> str:
    """What the CPU calls itself."""
    if found := _cpuinfo("model name"):
        return found
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The first value of one of the keys in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), "")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
