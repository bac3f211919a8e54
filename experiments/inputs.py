"""What the cells of an experiment start from: a checkpoint folder and JSONL files, made once in the output folder.

Without `--model` it is the demo's base (`l3ms.demo.base`): a 1M-parameter Llama and signature/docstring pairs mined from the installed
packages. With it, the model is the user's and `--data` a JSONL file, of which a tenth of the rows is held out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.data_files import fingerprint, json_lines
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo.run import prepare_base

MAX_TOKENS = 128  # prompt and response; the rows that are longer (1%) are left out: a batch costs its longest row
HELD_OUT_SHARE = 0.1
DONE = "inputs.json"  # the placeholders' values, written last


@dataclass(frozen=True)
class Arguments:
    """What the command line said about the inputs, and how many rows the experiment wants."""

    model: str | None = None  # folder or hub id
    data: Path | None = None
    rows: int = 10_000  # to train on at most
    seed: int = 0  # of the choice of rows
    yes: bool = False  # what they want may be downloaded


def prepare(output: Path, arguments: Arguments) -> dict[str, Any]:
    """Write `train.jsonl`, `held_out.jsonl` (and `base/`) to `output`, unless they are there for the same arguments.

    Returns {"model", "train", "held_out"}: what an `experiment.yaml` may use as `${model}` and so on.
    """
    if (arguments.model is None) != (arguments.data is None):
        raise ConfigError("--data" if arguments.data is None else "--model", "--model and --data go together")
    try:
        data = None if arguments.data is None else fingerprint(arguments.data)
    except OSError as error:
        raise ConfigError("--data", f"{arguments.data} cannot be read: {error}") from None
    key = {"model": arguments.model, "data": data, "rows": arguments.rows, "seed": arguments.seed}
    values = read_done(output, key)
    if values is None:
        output.mkdir(parents=True, exist_ok=True)
        values = _own(output, arguments) if arguments.data is not None else _demo(output, arguments)
        write_done(output, key, values)
    return values


def _demo(output: Path, arguments: Arguments) -> dict[str, Any]:
    ready = prepare_base(None, Console())
    ready.model.save_pretrained(output / "base")
    ready.tokenizer.save_pretrained(output / "base")
    for name, pairs in (("train", ready.train_pairs), ("held_out", ready.held_out_pairs)):
        drawn = random.Random(arguments.seed).sample(pairs, min(len(pairs), 2 * arguments.rows))
        lengths = [len(ids) for ids in ready.tokenizer([pair.prompt + pair.response for pair in drawn])["input_ids"]]
        short = [pair for pair, length in zip(drawn, lengths, strict=True) if length < MAX_TOKENS]
        rows = ({"prompt": pair.prompt, "completion": pair.response} for pair in short[: arguments.rows])
        write_rows(output / f"{name}.jsonl", rows)
    return _values(output, str(output / "base"))


def _own(output: Path, arguments: Arguments) -> dict[str, Any]:
    assert arguments.data is not None
    assert arguments.model is not None
    try:
        lines = [line for line in json_lines(arguments.data) if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError("--data", f"{arguments.data} cannot be read: {error}") from None
    if len(lines) < 2:
        raise ConfigError("--data", f"{arguments.data} has {len(lines)} rows; some are to be held out")
    random.Random(arguments.seed).shuffle(lines)
    held_out = max(1, round(HELD_OUT_SHARE * len(lines)))
    for name, part in (("train", lines[held_out:][: arguments.rows]), ("held_out", lines[:held_out])):
        (output / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in part), encoding="utf-8")
    model = Path(arguments.model)
    return _values(output, str(model.resolve()) if model.is_dir() else arguments.model)


def _values(output: Path, model: str) -> dict[str, Any]:
    return {"model": model, "train": str(output / "train.jsonl"), "held_out": str(output / "held_out.jsonl")}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def read_done(output: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `write_done` has left for the same `key`; None where there is nothing, or something else.

    That of something else is removed: it is about to be made anew, and what a call leaves that is ended halfway is of neither.
    """
    try:
        written = json.loads((output / DONE).read_text(encoding="utf-8"))
        if written["for"] == key:
            return written["values"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    (output / DONE).unlink(missing_ok=True)
    return None


def write_done(output: Path, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    text = json.dumps({"for": key, "values": values}, indent=2)
    (output / DONE).write_text(f"{text}\n", encoding="utf-8")
