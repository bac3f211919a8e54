"""What the README says of the real model's demo, made from its report and from nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l3ms.runs.report import read_report

BEGIN, END = "<!-- demo-real: begin -->", "<!-- demo-real: end -->"
SHOWN = 3  # examples
ALT = "Mean length and share of single sentences entering their bounds, the multipliers, mu, the task loss, and the lengths after"


def publish(folder: Path, root: Path) -> None:
    """Report and picture of a finished demo go to docs/, and the README of the source tree in `root` says what they say.

    Raises:
        ConfigError: `folder` is no finished demo of the real model.
        ValueError: the README has no marks.
    """
    report = read_report(folder)
    text = section(report)
    for suffix in ("json", "png"):
        shutil.copyfile(folder / f"report.{suffix}", root / "docs" / f"demo-real.{suffix}")
    readme = root / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8"), text), encoding="utf-8")


def rewritten(readme: str, text: str) -> str:
    """The README with `text` between its marks."""
    begin, end = readme.find(BEGIN), readme.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"README.md: wanted {BEGIN} and {END}, in this order")
    return f"{readme[: begin + len(BEGIN)]}\n{text}\n{readme[end:]}"


def section(report: Mapping[str, Any]) -> str:
    """Picture, what came of it, and some of the responses."""
    sft, ours, bounds = report["sft"], report["average"], report["bounds"]
    minutes, threads = report["seconds"] / 60, report["threads"]
    text = (
        f"*`make demo-real`: SmolLM2-135M learns to write Python docstrings that must be {bounds['min']:g} to {bounds['max']:g} tokens "
        f"long on average{_form(report)}. Plain fine-tuning (SFT) writes {_found(report, sft)}; the constrained one "
        f"{_found(report, ours)}, at {ours['perplexity'] / sft['perplexity']:.2f} times its perplexity. {minutes:.0f} minutes on "
        f"{threads} thread{'s' * (threads > 1)} of a CPU ([report](docs/demo-real.json)).*"
    )
    rows = [("signature", "SFT", "constrained"), ("---",) * 3]
    rows += [(f"`{row['prompt']}`", _cell(row["sft"]), _cell(row["average"])) for row in report["examples"][:SHOWN]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"![{ALT}](docs/demo-real.png)\n\n{text}\n\n{table}"


def _form(report: Mapping[str, Any]) -> str:
    return {"sentence": ", and nine of ten one sentence", "plain": ", in plain English"}.get(report["format"], "")


def _found(report: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    length = f"{summary['length']['mean']:.1f} tokens"
    if report["format"] == "sentence":
        return f"{length} and {summary['constraints']['sentence']['mean']:.0%} single sentences"
    if report["format"] == "plain":
        return f"{length} with a reading ease of {summary['constraints']['readability']['mean']:.0f}"
    return length


def _cell(response: str) -> str:
    """What a model wrote, as text of a table and nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(response.split()))
