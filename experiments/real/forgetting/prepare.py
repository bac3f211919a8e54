"""Two tasks of the real model: docstrings, which it is to learn, and short instructions, on which its loss is to stay where it is.

The instructions are the seed tasks of Alpaca (or rows of that form): those that fit whole, dealt to two sides in the order of the model's
loss on them. So the mean loss of both sides is the same to some hundredths of a nat, and the bound, the start's mean plus `ALLOWED`, is as
tight for the rows of the training as for those that judge it. With a hundred rows at random it would not be.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import inputs
from experiments.data_files import data_file
from experiments.harmlessness.pairs import fingerprint
from experiments.real import task
from experiments.real.forgetting.losses import row_losses
from l3ms.config.yaml_reader import ConfigError

ALLOWED = 0.05  # nats per token, of forgetting
LOSSES = "kept_held_out_losses.json"  # of the start, row by row
WHERE_FROM = (
    'JSONL of {"instruction", "instances": [{"input", "output"}]}, for instance seed_tasks.jsonl of the public repository '
    "tatsu-lab/stanford_alpaca; name it by --data or L3M_ALPACA_DATA"
)


def prepare(output: Path, arguments: inputs.Arguments) -> dict[str, Any]:
    """{"model", "train", "held_out"} of the docstrings, {"kept", "kept_held_out", "start", "bound"} of the instructions.

    Raises:
        ConfigError: no instructions, or rows of another form.
    """
    data = data_file(arguments.data, "L3M_ALPACA_DATA", WHERE_FROM)
    rows = read_tasks(data)
    docstrings = dataclasses.replace(arguments, data=None)
    values = task.prepare(output / "docstrings", docstrings)
    key = {
        "model": values["model"],
        "data": fingerprint(data),
        "rows": arguments.rows,
        "seed": arguments.seed,
        "allowed": ALLOWED,
    }
    done = inputs.read_done(output, key)
    if done is not None:
        return done
    inputs.write_rows(output / "instructions.jsonl", rows)
    Console().print(f"The start's loss on {len(rows)} instructions")
    losses = row_losses(values["model"], output / "instructions.jsonl")
    sides = deal(rows, losses)
    for name, side in zip(("kept", "kept_held_out"), sides, strict=True):
        values[name] = str(output / f"{name}.jsonl")
        inputs.write_rows(output / f"{name}.jsonl", (row for row, _ in side))
    start = [loss for _, loss in sides[1]]
    (output / LOSSES).write_text(json.dumps(start), encoding="utf-8")
    values |= {"start": statistics.fmean(start), "start_of_kept": statistics.fmean(loss for _, loss in sides[0])}
    values["bound"] = round(values["start"] + ALLOWED, 4)
    inputs.write_done(output, key, values)
    return values


def read_tasks(path: Path) -> list[dict[str, str]]:
    """{"prompt", "completion"} of the first instance of each task. ConfigError naming the line for another form."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            instance = item["instances"][0]
            prompt = f"{item['instruction']}\n\n{instance['input']}".strip()
            rows.append({"prompt": prompt, "completion": instance["output"].strip()})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ConfigError("data", f"{path}, line {number}: wanted {WHERE_FROM}") from None
    return rows


def deal(
    rows: Sequence[Any], losses: Sequence[float | None]
) -> tuple[list[tuple[Any, float]], list[tuple[Any, float]]]:
    """(kept, held out), each of (row, loss): in the order of the losses to one side, twice to the other, twice to the first and so on.

    Rows without a loss are left out, and equal prompts go to one side alone: of several the first is taken.
    """
    unlike: dict[str, tuple[Any, float]] = {}
    for row, loss in zip(rows, losses, strict=True):
        if loss is not None:
            unlike.setdefault(row["prompt"], (row, loss))
    if len(unlike) < 4:
        raise ConfigError("data", f"has {len(unlike)} instructions that are short enough; at least 4 are wanted")
    ordered = sorted(unlike.values(), key=lambda item: item[1])
    ordered = ordered[: len(ordered) // 2 * 2]
    first = [item for index, item in enumerate(ordered) if index % 4 in (0, 3)]
    second = [item for index, item in enumerate(ordered) if index % 4 in (1, 2)]
    return first, second
