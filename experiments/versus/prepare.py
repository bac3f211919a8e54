"""What the contestants start from: the model and the docstrings of `l3ms demo --model real`, or a model and a task of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import inputs
from l3ms.demo import real, real_model
from l3ms.demo.comparison import drawn
from l3ms.demo.corpus import Pair

HELD_OUT = 2000  # rows, at most


def prepare(output: Path, arguments: inputs.Arguments, *, yes: bool, console: Console) -> dict[str, Any]:
    """Write `train.jsonl` and `held_out.jsonl` to `output`, unless they are there for the same arguments.

    `yes`: the real model may be downloaded. Returns {"model", "train", "held_out"}.
    """
    if arguments.model is not None or arguments.data is not None:
        return inputs.prepare(output, arguments)
    key = {"model": real_model.SMOLLM2.sha256, "rows": arguments.rows, "seed": arguments.seed}
    values = inputs.read_done(output, key)
    model = str(real_model.prepare(yes=yes, console=console))
    if values is None or values["model"] != model:
        output.mkdir(parents=True, exist_ok=True)
        values = {"model": model, **write(output, *real.pairs(), arguments)}
        inputs.write_done(output, key, values)
    return values


def write(output: Path, train: Sequence[Pair], held_out: Sequence[Pair], arguments: inputs.Arguments) -> dict[str, str]:
    """Both files, of rows drawn with the seed."""
    found = {}
    for name, pairs, limit in (("train", train, arguments.rows), ("held_out", held_out, HELD_OUT)):
        path = output / f"{name}.jsonl"
        rows = drawn(pairs, limit, arguments.seed)
        inputs.write_rows(path, ({"prompt": pair.prompt, "completion": pair.response} for pair in rows))
        found[name] = str(path)
    return found
