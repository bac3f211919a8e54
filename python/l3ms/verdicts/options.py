"""What `l3ms certify` can be asked for, and what it refuses before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from l3ms.config.named_files import check_readable, check_writable
from l3ms.config.yaml_reader import ConfigError
from l3ms.verdicts.declaring import Range

FOLDERS = {"average": "average", "last": "model"}  # of a run, by --weights
PROBES, LEAST_PROBES = 512, 32


@dataclass(frozen=True)
class CertifyOptions:
    """What `l3ms certify` was asked for."""

    weights: str = "average"  # or last
    samples: int | None = None
    delta: float = 0.05  # probability that any verdict is wrong
    prompts: Path | None = None  # JSONL, instead of the held-out rows of the run; a path as a text is taken too
    seed: int = 0
    method: str = "auto"
    ranges: Mapping[str, Range] | None = None  # of rewards, by constraint
    json: Path | None = None  # default: RUN/certificate.json
    allow_code: bool = False
    prices: bool = False
    probes: int | None = None  # responses for the prices, and as many task rows; default: 512
    engine: str | None = None  # transformers: the model samples itself; default: what the run was sampled by

    def __post_init__(self) -> None:
        for name in ("samples", "seed", "probes"):
            value = getattr(self, name)
            if not (isinstance(value, int) or (value is None and name != "seed")):
                raise ConfigError(f"--{name}", f"must be a whole number, got {value!r}")
        for name in ("prompts", "json"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        if self.weights not in FOLDERS:
            raise ConfigError("--weights", f"must be average or last, got {self.weights!r}")
        if self.engine not in (None, "transformers"):
            raise ConfigError("--engine", f"must be transformers, or left out for the run's own, got {self.engine!r}")
        if not 1e-12 <= self.delta < 1:  # quantiles closer to 1 are beyond float64
            raise ConfigError("--delta", f"must be at least 1e-12 and below 1, got {self.delta:g}")
        if self.samples is not None and self.samples < 2:
            raise ConfigError("--samples", f"must be at least 2, got {self.samples}")
        if self.method not in ("auto", "bernstein", "t"):
            raise ConfigError("--method", f"must be auto, bernstein or t, got {self.method!r}")
        for name, (low, high) in (self.ranges or {}).items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError("--range", f"wanted NAME=LOW,HIGH with LOW below HIGH, got {name}={low:g},{high:g}")
        if self.probes is not None and not self.prices:
            raise ConfigError("--probes", "are for the prices: add --prices, or leave it out")
        if self.probes is not None and self.probes < LEAST_PROBES:
            raise ConfigError("--probes", f"must be at least {LEAST_PROBES}, got {self.probes}")
        if self.prompts is not None:
            check_readable("--prompts", self.prompts)
        if self.prices and self.prompts is not None:
            raise ConfigError("--prices", "are those of the run's own task, on its held-out rows; leave out --prompts")
        if self.json is not None:
            check_writable("--json", self.json)


def asked(options: CertifyOptions) -> dict[str, Any]:
    """By the flag, what ranks must have been given alike."""
    values = {f"--{item.name}": getattr(options, item.name) for item in fields(options)}
    return {
        name: {key: list(pair) for key, pair in value.items()} if isinstance(value, Mapping) else str(value)
        for name, value in values.items()
    }
