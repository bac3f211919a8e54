"""What the harmlessness experiment starts from, made once: a base model, its task rows, and two reward models of different pairs.

From preference pairs alone: the conversations are split by prompt, a byte-level BPE tokenizer and a small Llama learn the text of the
training side (about 75 s on one core), and two reward models, initialised from that base, learn one half of the training pairs each. The
first is the constraint's; the second only looks on: where the first one's score rises and the second one's does not, the reward is hacked.

The task is to reply as the data does, chosen and rejected replies alike: its own harmlessness is then about that of an average reply, 0.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers import AutoTokenizer

from experiments.data_files import fingerprint
from experiments.harmlessness.pairs import (
    Pair,
    data_path,
    messages,
    prompt_text,
    read_pairs,
    shorten,
    split,
    without,
)
from experiments.harmlessness.train_reward_model import Settings, summary, train_reward_model
from experiments.inputs import Arguments, read_done, write_done, write_rows
from l3ms.demo import base, corpus
from l3ms.runs.progress import progress_bar

HELD_OUT = 0.3  # of the conversations: a certificate counts prompts
# Characters at most: of the task (a batch costs its longest row), and of what the reward models learn. With replies of up to 600 instead of
# 240 characters there are 1,474 pairs instead of 935, and one model of all of them is right on 0.613 of the same held-out pairs, not 0.591.
SMALL = {"prompt": 240, "reply": 240}  # with the model that is made here
JUDGED = {"prompt": 240, "reply": 600}
LARGE = {"prompt": 4000, "reply": 2000}  # both, with --model
RECIPE = base.Recipe()  # 1.07M parameters
FINE_TUNED = Settings(learning_rate=1e-5, epochs=2, max_length=1024)  # reward models from --model


@dataclass(frozen=True)
class Plan:
    """What is made of the pairs, beside the split by prompt: the task's rows, and the reward models."""

    model: str | None  # where the run and its reward models start; None: a base that is made of the training side
    task: dict[str, int]  # characters at most of a "prompt" and a "reply", of the rows that are replied to
    judged: dict[str, int]  # the same of what the reward models learn
    reward_model: Settings

    def key(self) -> dict[str, Any]:
        """What its files depend on, besides the data."""
        return {
            "model": self.model,
            "recipe": dataclasses.asdict(RECIPE),
            "reward_model": dataclasses.asdict(self.reward_model),
            "characters": [self.task, self.judged] if self.task != self.judged else [self.task],
        }


def prepare(output: Path, arguments: Arguments) -> dict[str, Any]:
    """The inputs of the experiment, as `make_inputs` writes them.

    Raises:
        ConfigError: no data, or data that hold no preference pairs.
    """
    own = Plan(None, SMALL, JUDGED, Settings())
    given = Plan(arguments.model, LARGE, LARGE, FINE_TUNED)
    return make_inputs(output, data_path(arguments.data), own if arguments.model is None else given, arguments.rows)


def make_inputs(output: Path, data: Path, plan: Plan, rows: int) -> dict[str, Any]:
    """Write base/ (where the plan has no model), train.jsonl, held_out.jsonl, reward_model/ and second_opinion/ to `output`, unless they
    are there for the same data and plan.

    Returns {"model", "train", "held_out", "reward_model", "second_opinion"}.
    """
    key = {"data": fingerprint(data), "rows": rows, **plan.key()}
    done = read_done(output, key)
    if done is not None:
        return done
    console = Console()
    transformers.logging.disable_progress_bar()
    read = read_pairs(data)
    sides = split(read.pairs, HELD_OUT)
    train, held_out = (shorten(side, **plan.task) for side in sides)
    train = without(train, held_out)
    pairs = without(shorten(sides[0], **plan.judged), held_out)
    console.print(
        f"{len(read.pairs)} pairs of replies to one prompt ({read.uneven + read.unanswered} more hold none); short enough: "
        f"{len(train)} to train on, {len(held_out)} held out; the reward models learn from {len(pairs)}",
        highlight=False,
        soft_wrap=True,
    )
    output.mkdir(parents=True, exist_ok=True)
    model = plan.model or str(_make_base(sides[0], output / "base", console))
    template = bool(getattr(AutoTokenizer.from_pretrained(model), "chat_template", None))
    for name, kept in (("train", train), ("held_out", held_out)):
        written = [row for pair in kept for row in task_rows(pair, template)]
        write_rows(output / f"{name}.jsonl", written[:rows])
    values = {"model": model, "train": str(output / "train.jsonl"), "held_out": str(output / "held_out.jsonl")}
    halves = split(pairs, 0.5, seed=1)
    for seed, (name, half) in enumerate(zip(("reward_model", "second_opinion"), halves, strict=True)):
        values[name] = str(output / name)
        mark = output / "trained" / name  # a call that is ended after the first one goes on with the second
        if read_done(mark, key) is not None:
            continue
        settings = dataclasses.replace(plan.reward_model, seed=seed)
        report = train_reward_model(model, half, held_out, output / name, settings, console)
        console.print(f"{name.replace('_', ' ')}: {summary(report)}", highlight=False, soft_wrap=True)
        mark.mkdir(parents=True, exist_ok=True)
        write_done(mark, key, {})
    write_done(output, key, values)
    return values


def task_rows(pair: Pair, template: bool) -> list[dict[str, Any]]:
    """Two rows of task data: both replies to the prompt; conversations where the tokenizer has a template for them."""
    replies = (pair.chosen, pair.rejected)
    if template:
        return [{"messages": messages([*pair.prompt, ("assistant", reply)])} for reply in replies]
    return [{"prompt": prompt_text(pair.prompt), "completion": f" {reply}"} for reply in replies]


def reward_model_reports(inputs: Path) -> dict[str, dict[str, Any]]:
    """What the two reward models were worth on held-out pairs."""
    return {
        name: json.loads((inputs / name / "reward_model.json").read_text(encoding="utf-8"))
        for name in ("reward_model", "second_opinion")
    }


def _make_base(pairs: Sequence[Pair], folder: Path, console: Console) -> Path:
    """Tokenizer and model of the demo's recipe, from the conversations of both replies as running text."""
    texts = [
        corpus.Pair(prompt_text(pair.prompt), f" {reply}") for pair in pairs for reply in (pair.chosen, pair.rejected)
    ]
    tokenizer = base.train_tokenizer(texts, RECIPE)
    with progress_bar(console, "base model") as advance:
        model = base.pretrain(texts, tokenizer, RECIPE, lambda stage, done, total, note: advance(done, total))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
