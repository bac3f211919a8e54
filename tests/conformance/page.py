"""`docs/conformance.md`, from the results of a run."""

from collections.abc import Sequence
from typing import NamedTuple

import peft
import torch
import transformers
from architectures import SETTINGS

VERDICTS = ("right", "refused", "not built", "wrong", "crash")


class Result(NamedTuple):
    name: str
    group: str  # architecture or adapter
    verdict: str  # one of VERDICTS
    why: str  # but of "right"


def written(results: Sequence[Result]) -> str:
    groups = ("architecture", "adapter")
    counts = [
        [sum(result.group == group and result.verdict == verdict for result in results) for verdict in VERDICTS]
        for group in groups
    ]
    lines = [
        "# Conformance",
        "",
        "Written by `make conformance`, not by hand: every causal-LM architecture that the installed transformers maps, built tiny in",
        "float32, and a tiny Llama with every adapter type of the installed peft. Each is compared with its own logits: loss and gradients",
        "of the fused head (with what the model adds to its own loss, a router loss), the distribution that responses are sampled from,",
        "both half-steps of an iteration of `L3MTrainer`.",
        "",
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}.",
        "",
        "| | of | " + " | ".join(VERDICTS) + " |",
        "|---|---:" + "|---:" * len(VERDICTS) + "|",
    ]
    for group, row in zip(groups, counts, strict=True):
        lines.append(f"| {group}s | {sum(row)} | " + " | ".join(map(str, row)) + " |")
    lines += [
        "",
        "*right*: equal to what its own logits give, within 1e-3. *refused*: one line, before anything is computed. *not built*: it",
        "cannot be made tiny here, or its own forward fails as a causal language model. *wrong*, *crash*: faults of this package.",
    ]
    lines += ["", "| | set here |", "|---|---|", *(f"| {name} | {_cell(what)} |" for name, what in SETTINGS.items())]
    for group in groups:
        of_group = [result for result in results if result.group == group]
        lines += ["", f"## {group.capitalize()}s"]
        for verdict in VERDICTS:
            found = [result for result in of_group if result.verdict == verdict]
            if not found:
                continue
            lines += ["", f"### {verdict.capitalize()}", ""]
            if verdict == "right":
                lines += _wrapped([f"`{result.name}`" for result in found])
            else:
                lines += ["| | why |", "|---|---|"]
                lines += [f"| `{result.name}` | {_cell(result.why)} |" for result in found]
    return "\n".join(lines) + "\n"


def _wrapped(names: Sequence[str]) -> list[str]:
    """Lines of at most 140 characters."""
    lines = [""]
    for i, name in enumerate(names):
        part = name + ("," if i < len(names) - 1 else "")
        if lines[-1] and len(lines[-1]) + 1 + len(part) > 140:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
