"""What GPUs can do, with the source of every number: the rates that `roofline` divides by.

No program reaches a datasheet's rates. An H200 was measured: 80% of its datasheet's rate of products (large ones, of random numbers) and
90% of its bandwidth (a copy, bytes read and written). The others are taken to reach the same shares of theirs, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

REACHED_RATE, REACHED_BANDWIDTH = 0.80, 0.90


class Number(NamedTuple):
    value: float
    source: str


@dataclass(frozen=True)
class Gpu:
    title: str
    rates: Mapping[str, Number]  # dtype of the operands -> FLOP/s of large products; fp32 is not tf32
    bandwidth: Number  # byte/s of device memory
    multiprocessors: Number
    capability: Number

    @property
    def clusters(self) -> bool:
        """Whether blocks can read each other's shared memory."""
        return self.capability.value >= 9.0

    def sources(self, *dtypes: str) -> list[str]:
        """A line for each number, and each of the dtypes (none: all)."""
        kinds = dtypes or tuple(self.rates)
        rates = [f"{self.rates[t].value / 1e12:.3g} TFLOP/s {t}: {self.rates[t].source}" for t in kinds]
        return [
            *rates,
            f"{self.bandwidth.value / 1e12:.3g} TB/s: {self.bandwidth.source}",
            f"{self.multiprocessors.value:.0f} multiprocessors: {self.multiprocessors.source}",
            f"compute capability {self.capability.value}: {self.capability.source}",
        ]

    def with_rates(self, rate: float | None, bandwidth: float | None) -> Gpu:
        """The same with the caller's own FLOP/s, of every dtype, and byte/s."""
        rates = self.rates if rate is None else dict.fromkeys(self.rates, Number(rate, "given by --rate"))
        own = self.bandwidth if bandwidth is None else Number(bandwidth, "given by --bandwidth")
        return replace(self, rates=rates, bandwidth=own)


def _share(percent: float, value: float, unit: float, sheet: str, remark: str = "") -> Number:
    return Number(value * unit * percent, f"{percent:.0%} of the {value:g} in {sheet}{remark}")


def _of(
    title: str, sheet: str, half: float, single: float, bandwidth: float, multiprocessors: Number, capability: float
) -> Gpu:
    """half, single: TFLOP/s without sparsity, bandwidth: TB/s, as the datasheet prints them."""
    rates = {dtype: _share(REACHED_RATE, half, 1e12, sheet, ", dense") for dtype in ("bf16", "fp16")}
    rates["fp32"] = _share(REACHED_RATE, single, 1e12, sheet, ", outside the tensor cores")
    memory = _share(REACHED_BANDWIDTH, bandwidth, 1e12, sheet)
    return Gpu(title, rates, memory, multiprocessors, Number(capability, "CUDA C++ Programming Guide"))


_MEASURED = "measured on an H200 with torch 2.11"
_H200 = _of(
    "NVIDIA H200", "NVIDIA's H200 datasheet, SXM", 989, 67, 4.8, Number(132, "read off the device"), 9.0,
)  # fmt: skip

GPUS: dict[str, Gpu] = {
    "h200": replace(
        _H200,
        rates={
            "bf16": Number(790e12, f"{_MEASURED}: products of 8192 x 8192 random numbers, 769 to 798; 989 in its datasheet"),
            "fp16": Number(790e12, "as bf16, to which its datasheet gives the same rate"),
            "fp32": _H200.rates["fp32"],
        },
        bandwidth=Number(4.3e12, f"{_MEASURED}: a copy of 4.3 GB, bytes read and written; 4.8 in its datasheet"),
    ),
    "h100": _of(
        "NVIDIA H100 SXM", "NVIDIA's H100 datasheet, SXM5", 989, 67, 3.35,
        Number(132, "NVIDIA's whitepaper on Hopper"), 9.0,
    ),
    "a100": _of(
        "NVIDIA A100 SXM", "NVIDIA's A100 datasheet, SXM 80 GB", 312, 19.5, 2.039,
        Number(108, "NVIDIA's whitepaper on Ampere"), 8.0,
    ),
    "b200": _of(
        "NVIDIA B200", "NVIDIA's HGX B200 datasheet, one GPU at 1000 W", 2250, 80, 8.0,
        Number(148, "public lists of specifications; NVIDIA prints none"), 10.0,
    ),
    "l40s": _of(
        "NVIDIA L40S", "NVIDIA's L40S datasheet", 362.05, 91.6, 0.864,
        Number(142, "its datasheet's 18,176 cores, 128 a multiprocessor"), 8.9,
    ),
}  # fmt: skip
