"""What `l3ms certify` can be asked for, and what it refuses before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from l3ms.config.named_files import check_readable, check_writable
from l3ms.config.yaml_reader import ConfigError
from l3ms.verdicts.certificates import Range

FOLDERS = {"average": "average", "last": "model"}  # of a run, by --weights


@dataclass(frozen=True)
class CertifyOptions:
    """What `l3ms certify` was asked for."""

    weights: str = "average"  # or last
    samples: int | None = None
    delta: float = 0.05  # probability that any verdict is wrong
    prompts: Path | None = None  # JSONL, instead of the held-out rows of the run
    seed: int = 0
    method: str = "auto"
    ranges: Mapping[str, Range] | None = None  # of rewards, by constraint
    json: Path | None = None  # default: RUN/certificate.json
    allow_code: bool = False
    prices: bool = False
    probes: int = 512  # responses for the prices, and as many task rows
    engine: str | None = None  # transformers: the model samples itself; default: what the run was sampled by

    def __post_init__(self) -> None:
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
