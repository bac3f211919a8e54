"""Where an iteration's time and memory go: `L3MTrainer` on the real model beside a plain loop that holds its logits.

    python experiments/real/phases.py --rounds 6

Both take turns in one process, on the same model, task batch, prompts and (for the gradient of the constraint) responses. The plain loop is
what one writes without this library: `generate`, then (B, L, V) logits, log_softmax and gather, backward, clip, AdamW. Its step has a
learning rate of 0; its gradients are taken where ours were, and their norms are compared.

Writes phases.json and phases.md. The peak of a phase is the high-water mark of the resident set (Linux: /proc), less the model and all else
that is resident before the iteration.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import l3ms
from experiments import inputs
from experiments.presenting import markdown
from experiments.real import task
from l3ms.benchmark.memory import CLEAR, ENVIRONMENT, STATUS, resident
from l3ms.config.data import DataConfig
from l3ms.config.train import LoraConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.model.losses import scored_lengths, shift
from l3ms.runs.data import encode, load_examples
from l3ms.runs.models import load_model
from l3ms.training import constraint_step
from l3ms.training import trainer as training
from l3ms.training.arguments import L3MConfig

PHASES = ("sampling", "constraint", "task", "rest")
NAMES = {
    "sampling": "sampling",
    "constraint": "constraint's backward",
    "task": "task's backward",
    "rest": "steps and all else",
}
WAYS = {"l3ms": "l3ms", "plain": "plain loop, logits held"}


class Clock:
    """Seconds and peak bytes of the phases of an iteration. What it does itself stands between two phases and is not counted."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, dict[str, float]]] = []
        self.phase: str | None = None

    def begin(self) -> None:
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        self.base = resident("VmRSS")
        self.iterations.append({name: {"seconds": 0.0, "bytes": 0.0} for name in PHASES})
        self.switch("rest")

    def switch(self, name: str | None) -> str | None:
        """Into another phase; -> the one that has ended."""
        now = time.perf_counter()
        before = self.phase
        if before is not None:
            found = self.iterations[-1][before]
            found["seconds"] += now - self.started
            found["bytes"] = max(found["bytes"], resident("VmHWM") - self.base)
        self.phase = name
        CLEAR.write_text("5")
        self.started = time.perf_counter()
        return before

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        before = self.switch(name)
        yield
        self.switch(before)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.inside(name):
                return function(*args, **kwargs)

        return timed


class Timed(l3ms.L3MTrainer):
    """The trainer as it is; its clock runs, and what the plain loop needs of the iteration is kept."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.clock = clock
        self.norms: dict[str, float] = {}
        self.weights_at: dict[str, list[Tensor]] = {}  # the adapters that a gradient is of

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.task_batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        with self.clock.inside("task"):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.keep_norm("task")
        return loss

    def keep_norm(self, name: str) -> None:
        before = self.clock.switch(None)
        self.norms[name] = gradient_norm(trained(self.policy))
        self.weights_at[name] = [parameter.detach().clone() for parameter in trained(self.policy)]
        self.clock.switch(before)


class Turns(transformers.TrainerCallback):
    """After each iteration of the trainer one of the plain loop, on the same batch and prompts."""

    def __init__(self, clock: Clock, plain: Clock, console: Console):
        self.clock, self.plain, self.console = clock, plain, console
        self.trainer: Any = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.weights: Tensor | None = None  # of the responses, as the constraints have given them
        self.tokens: list[dict[str, int]] = []
        self.differences: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.switch(None)
        norms, sampled = self._plain_iteration()
        ours = self.trainer.norms
        self.differences.append({name: abs(norms[name] / ours[name] - 1) for name in ours if ours[name] > 0})
        self.tokens.append({"l3ms": int(self.trainer.last_rollout.lengths.sum()), "plain": sampled})
        self.console.print(f"iteration {state.global_step} of {args.max_steps}", highlight=False)

    def _plain_iteration(self) -> tuple[dict[str, float], int]:
        trainer, clock = self.trainer, self.plain
        model, parameters = trainer.policy, trained(trainer.policy)
        self.optimizer = self.optimizer or torch.optim.AdamW(parameters, lr=0.0, betas=(0.5, 0.95), weight_decay=0.0)
        norms = {}
        clock.begin()
        model.train()
        with _at(parameters, trainer.weights_at["task"]), clock.inside("task"):
            batch = trainer.task_batch
            length = scored_lengths(shift(batch["labels"])).clamp(min=1)
            plain_backward(model, batch, 1 / (length * len(length)))
        norms["task"] = self._step(parameters)
        with clock.inside("sampling"), torch.random.fork_rng(devices=[]):
            responses = plain_sampling(model, trainer)
        model.train()
        with _at(parameters, trainer.weights_at["constraint"]), clock.inside("constraint"):
            found = trainer.last_rollout
            size = trainer.args.per_device_train_batch_size
            for start in range(0, len(found), size):
                part = slice(start, start + size)
                width = int(found.attention_mask[part].sum(1).max())
                texts = {name: getattr(found, name)[part, :width] for name in ("input_ids", "attention_mask", "labels")}
                assert self.weights is not None
                plain_backward(model, texts, self.weights[part])
        norms["constraint"] = self._step(parameters)
        clock.switch(None)
        return norms, responses

    def _step(self, parameters: Sequence[Tensor]) -> float:
        """-> the norm before clipping."""
        assert self.optimizer is not None
        norm = float(clip_grad_norm_(parameters, 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


@contextmanager
def _at(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters as they were; afterwards as they are."""
    now = [parameter.detach().clone() for parameter in parameters]
    torch._foreach_copy_([parameter.data for parameter in parameters], list(values))  # pyright: ignore[reportPrivateImportUsage]
    yield
    torch._foreach_copy_([parameter.data for parameter in parameters], now)  # pyright: ignore[reportPrivateImportUsage]


def plain_backward(model: Any, batch: dict[str, Tensor], seq_weight: Tensor) -> None:
    """-sum_n w_n log pi(y_n|x_n), of logits (B, L, V) that are there as a whole."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = shift(batch["labels"])  # (B, L)
    chosen = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    likelihood = chosen.masked_fill(targets == -100, 0.0).sum(1)
    (-(seq_weight.to(likelihood) * likelihood).sum()).backward()


@torch.no_grad()
def plain_sampling(model: Any, trainer: Any) -> int:
    """`generate` for the prompts of the trainer's responses, as many tokens at most. -> tokens sampled, the end tokens included."""
    model.eval()
    found, tokenizer = trainer.last_rollout, trainer.processing_class
    starts = [
        row[mask & (labels == -100)]
        for row, mask, labels in zip(found.input_ids, found.attention_mask.bool(), found.labels, strict=True)
    ]
    padded = tokenizer.pad(
        {"input_ids": [start.tolist() for start in starts]}, padding_side="left", return_tensors="pt"
    )
    out = model.generate(
        **padded, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=trainer.args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )[:, padded["input_ids"].shape[1] :]  # fmt: skip
    ended = (out == tokenizer.eos_token_id).cumsum(1)
    return int(((ended == 0) | ((ended == 1) & (out == tokenizer.eos_token_id))).sum())


def trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_norm(parameters: Sequence[Tensor]) -> float:
    return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())


def measure(values: dict[str, Any], rounds: int, console: Console, threads: int) -> dict[str, Any]:
    """`rounds` iterations of both, after one of each that is left out."""
    torch.set_num_threads(threads)
    transformers.set_seed(0)
    lora = LoraConfig(r=8, alpha=16)
    tokenizer, model = load_model(values["model"], dtype="float32", lora=lora, console=console)
    examples, _ = load_examples(DataConfig(train=values["train"], evaluation=values["held_out"], limit=400), seed=0)
    rows = encode(examples, tokenizer, max_length=128).rows
    clock, plain = Clock(), Clock()
    turns = Turns(clock, plain, console)
    with tempfile.TemporaryDirectory() as unused:
        args = L3MConfig(
            output_dir=unused, max_steps=rounds + 1, per_device_train_batch_size=4, constraint_batch_size=8,
            max_new_tokens=task.MOST_TOKENS, learning_rate=3e-4,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Timed(
            model,
            args,
            constraints=[l3ms.Length(12, 16)],
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[turns],
            clock=clock,
        )
        turns.trainer = trainer
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.create_optimizer()
        with _watched(trainer, turns, clock):
            trainer.train()
    return {
        "l3ms": clock.iterations[1:], "plain": plain.iterations[1:], "tokens": turns.tokens[1:], "differences": turns.differences[1:],
        "model": Path(values["model"]).name, "threads": threads, "machine": platform.machine(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


@contextmanager
def _watched(trainer: Timed, turns: Turns, clock: Clock) -> Iterator[None]:
    """The phases of the constraint's half-step, which are inside of it."""
    optimizer: Any = trainer.l3m_optimizer
    observe = optimizer.observe

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        turns.weights = found = observe(*args, **kwargs)
        return found

    def backward(*args: Any, **kwargs: Any) -> Any:
        with clock.inside("constraint"):
            found = constraint_step.constraint_backward(*args, **kwargs)
        trainer.keep_norm("constraint")
        return found

    with (
        mock.patch.object(constraint_step, "rollout", clock.around("sampling", constraint_step.rollout)),
        mock.patch.object(training, "constraint_backward", backward),
        mock.patch.object(optimizer, "observe", observed),
    ):
        yield


def table(found: dict[str, Any]) -> str:
    header = ("", *(f"{words}: {what}" for what in ("seconds", "peak MB") for words in WAYS.values()))
    rows = []
    for name in (*PHASES, "iteration"):
        seconds = [
            f"{statistics.median(_total(item, name, 'seconds', sum) for item in found[way]):.2f}" for way in WAYS
        ]
        peaks = [
            f"{statistics.median(_total(item, name, 'bytes', max) for item in found[way]) / 1e6:.0f}" for way in WAYS
        ]
        rows.append((NAMES.get(name, "iteration"), *seconds, *peaks))
    tokens = [statistics.fmean(item[way] for item in found["tokens"]) for way in WAYS]
    worst = max(value for item in found["differences"] for value in item.values())
    return (
        f"# An iteration by phase: {found['model']}\n\n{markdown(header, rows)}\n"
        f"Medians of {len(found['l3ms'])} iterations of each, taking turns, {found['threads']} thread(s), float32 with LoRA r = 8: "
        f"4 task rows, 8 responses of at most {task.MOST_TOKENS} tokens. Peak: resident memory beyond that before the iteration. "
        f"Tokens sampled: {tokens[0]:.0f} and {tokens[1]:.0f}. The norms of both gradients differ by {worst:.1e} at most, relatively: "
        "it is the same work.\n"
    )


def _total(item: dict[str, dict[str, float]], name: str, what: str, join: Callable[[list[float]], float]) -> float:
    return join([item[phase][what] for phase in PHASES]) if name == "iteration" else item[name][what]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id, instead of the model of l3ms demo --model real")
    parser.add_argument("--data", type=Path, help="JSONL of prompt and completion, instead of the docstrings")
    parser.add_argument("--yes", action="store_true", help="the model may be downloaded")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("out/experiments/real/phases"))
    given = parser.parse_args(arguments)
    if not STATUS.exists():
        print("phases: reads the peak from /proc, which this system does not have", file=sys.stderr)
        return 2
    try:
        values = task.prepare(given.output / "inputs", inputs.Arguments(given.model, given.data, 400, yes=given.yes))
        found = measure(values, given.rounds, Console(), given.threads)
    except ConfigError as error:
        print(f"phases: {error}", file=sys.stderr)
        return 2
    (given.output / "phases.json").write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")
    (given.output / "phases.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        # The allocator reads it when a process starts: freed blocks go back at once, what is resident is what is held
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    raise SystemExit(main())
