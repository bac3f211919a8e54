"""The demo from end to end, at a size that takes seconds: what it leaves behind, and what it refuses."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from l3ms.config.run_config import load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo import base
from l3ms.demo.run import main
from l3ms.demo.settings import Settings
from l3ms.verdicts.certifying import certify
from l3ms.verdicts.options import CertifyOptions

RECIPE = base.Recipe(
    vocab_size=400,
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=32,
    steps=5,
    batch_size=2,
    block=32,
    warmup_steps=2,
    max_files=200,
)
SETTINGS = Settings(iterations=5, batch_size=4, max_new_tokens=12, max_length=120, samples=8, shown=2)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("L3M_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_report_and_folder(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    console = Console(width=100, record=True, file=io.StringIO())
    returned = main(4, 6, 3, folder, settings=SETTINGS, recipe=RECIPE, console=console)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == returned["seed"] == 3
    assert report["bounds"] == {"min": 4, "max": 6}
    assert report["seconds"] > 0
    assert report["skipped_steps"] == 0
    assert 0 < report["mu_end"] <= 1
    assert report["base_from_cache"] is False
    for key in ("sft", "last", "average"):
        summary = report[key]
        low, high = summary["length"]["ci95"]
        assert low <= summary["length"]["mean"] <= high
        assert (
            summary["length"]["p5"] <= summary["length"]["p50"] <= summary["length"]["p95"] <= SETTINGS.max_new_tokens
        )
        assert 0 <= summary["ended"] <= 1
        assert 1 < summary["perplexity"] < math.inf
        assert summary["samples"] == SETTINGS.samples
    for name, lines in (("metrics.jsonl", 5), ("sft.jsonl", 5)):
        assert len((folder / name).read_text(encoding="utf-8").splitlines()) == lines
    assert (folder / "report.png").stat().st_size > 10_000
    for name in ("sft", "model", "average"):
        assert load_file(folder / name / "model.safetensors")
    text = console.export_text()
    for wanted in ("SFT", "L3M averaged", "perplexity", "report.json"):
        assert wanted in text

    certificate = certify(folder, CertifyOptions(samples=16), console=console)
    assert certificate["samples"] == 16
    assert certificate["constraints"][0]["min"] == 4
    assert load_config(folder / "config.yaml").train.iterations == SETTINGS.iterations

    with pytest.raises(ConfigError, match=r"output: .* is not empty"):
        main(4, 6, 3, folder, settings=SETTINGS, recipe=RECIPE, console=console)
    again = main(4, 6, 3, folder, overwrite=True, settings=SETTINGS, recipe=RECIPE, console=console)
    assert again["base_from_cache"] is True
    for key in ("sft", "last", "average"):  # the same seed, the same numbers
        assert again[key]["length"]["mean"] == report[key]["length"]["mean"]
        assert again[key]["perplexity"] == report[key]["perplexity"]


@pytest.mark.parametrize(
    ("low", "high", "field"),
    [(16, 12, "min"), (math.nan, 16, "min"), (12, math.inf, "max"), (0, 5, "min"), (5, 1000, "max")],
)
def test_refused_bounds(low: float, high: float, field: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        main(low, high, 0, tmp_path / "out", settings=SETTINGS, recipe=RECIPE)
    assert not (tmp_path / "out").exists()
    assert not cache.exists()


def test_a_seed_that_no_run_takes_is_refused_before_anything_is_made(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").touch()
    with pytest.raises(ConfigError, match=r"^seed: must be from 0 to 4294967295, got 4294967296"):
        main(2, 8, 2**32, tmp_path, True, settings=SETTINGS, recipe=RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
