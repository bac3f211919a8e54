"""Two tasks of one model: the docstring for a signature, which it has learnt, and the signature for a docstring, which it is to learn.

The start is the demo's base after plain fine-tuning on the first. The bound is what the start loses on held-out rows of that task, plus
`ALLOWED` nats per token. With `--model` and `--data` the start is that model, the task that data, and what is kept are the docstrings.
"""

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import inputs
from experiments.data_files import json_lines
from l3ms.config.run_config import load_config
from l3ms.measuring.evaluation import task_perplexity
from l3ms.runs.data import Example, encode
from l3ms.runs.executing import train

ALLOWED = 0.1  # nats per token, of forgetting
ITERATIONS = 150  # of the first fine-tuning


def prepare(output: Path, arguments: inputs.Arguments) -> dict[str, Any]:
    key = {
        "model": arguments.model,
        "data": str(arguments.data),
        "rows": arguments.rows,
        "seed": arguments.seed,
        "allowed": ALLOWED,
    }
    values = inputs.read_done(output, key)
    if values is None:
        docstrings = inputs.prepare(output / "docstrings", inputs.Arguments(rows=arguments.rows, seed=arguments.seed))
        if arguments.data is not None:
            task = inputs.prepare(output / "task", arguments)
        else:
            task = {side: _turn(Path(docstrings[side]), output / f"{side}.jsonl") for side in ("train", "held_out")}
            task["model"] = _first_task(docstrings, output / "start")
        start = _loss(task["model"], Path(docstrings["held_out"]))
        kept = {"kept": docstrings["train"], "kept_held_out": docstrings["held_out"]}
        values = {**task, **kept, "start": start, "bound": round(start + ALLOWED, 4)}
        inputs.write_done(output, key, values)
    return values


def _turn(source: Path, target: Path) -> str:
    """The rows with prompt and completion exchanged."""
    rows = map(json.loads, json_lines(source))
    inputs.write_rows(
        target, ({"prompt": f"{row['completion']}\n", "completion": row["prompt"].rstrip("\n")} for row in rows)
    )
    return str(target)


def _first_task(values: dict[str, Any], output: Path) -> str:
    """The base, fine-tuned on the docstrings: the folder of the averaged weights."""
    fields = {
        "model": values["model"], "output": str(output), "data.train": values["train"], "data.evaluation": values["held_out"],
        "train.iterations": ITERATIONS,
    }  # fmt: skip
    config = load_config(Path(__file__).with_name("start.yaml"), list(fields.items()))
    console = Console()
    console.print("The start: plain fine-tuning on the first task")
    train(config, overwrite=True, console=console)
    return str(output / "average")


def _loss(model: str, rows: Path, limit: int = 1024) -> float:
    """Mean over rows of the loss per token, nats: what `data_nll` measures."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model)
    examples = [Example(row["prompt"], row["completion"]) for row in map(json.loads, json_lines(rows)[:limit])]
    encoded = encode(examples, tokenizer, max_length=inputs.MAX_TOKENS)
    return math.log(task_perplexity(network, encoded.rows, pad_token_id=tokenizer.pad_token_id or 0))
