"""A whole iteration, taking turns: `L3MTrainer`'s, a plain loop's that holds its logits, TRL's SFT and GRPO steps.

`L3MTrainer` trains; after each of its iterations the others have theirs, on its task batch and its prompts. All learning rates are 0, so
that every round is the same work and gradients can be compared: those of the plain loop, which takes the weights that ours gave to its
responses, must be ours. The first round warms up, compares, and is not in the results.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

from l3ms.benchmark.contestant import reason
from l3ms.benchmark.iteration_results import IterationMeasurement, IterationResult
from l3ms.benchmark.memory import CLEAR, STATUS, resident
from l3ms.benchmark.plain_loop import PlainLoop, difference, trained
from l3ms.benchmark.trl_steps import WANTED, TrlSteps, own_model
from l3ms.config.train import LoraConfig
from l3ms.constraints.constraint import Length
from l3ms.runs.data import Example, encode
from l3ms.runs.models import load_model
from l3ms.training.arguments import L3MConfig
from l3ms.training.phase_summary import PHASES
from l3ms.training.phases import HostMarks, Phases
from l3ms.training.trainer import L3MTrainer

TITLES = {"l3ms": "l3ms, L3MTrainer", "plain": "plain loop, logits held", "trl": "TRL, SFT step and GRPO step"}
TOLERANCE = 1e-3  # of gradients, relative: the same mathematics, in float32


@dataclass(frozen=True)
class Work:
    """What all of them do."""

    name: str
    model: str  # folder or hub id
    pairs: Sequence[tuple[str, str]]  # prompt and response
    batch: int = 32  # task rows, and responses
    max_new_tokens: int = 64
    max_length: int = 128
    lora: int | None = None
    low: float = 12  # bounds on the mean length
    high: float = 16


class BenchClock(Phases):
    """The clock, stopped while the bench looks at memory and gradients; on a CUDA device the host waits at every mark."""

    def __init__(self, device: torch.device):
        self.stopped = 0.0
        self.before_step: Callable[[], None] | None = None
        self.on_device = device.type == "cuda"
        super().__init__(device, HostMarks(self._now))

    def _now(self) -> float:
        if self.on_device:
            torch.cuda.synchronize()
        return time.perf_counter() - self.stopped

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = self._now()
        yield
        self.stopped += self._now() - start

    def switch(self, name: str) -> str:
        if self.running and name == "optimizer" and self.before_step is not None:
            with self.pause():
                self.before_step()
        return super().switch(name)

    @contextmanager
    def iteration(self, into: IterationMeasurement) -> Iterator[None]:
        """Enters seconds, tokens and memory of what is done within."""
        self._base()
        self.begin()
        yield
        self.iterate()
        peak = self._peak()
        into.phases.append({name: self._sums[name] for name in PHASES})
        into.tokens.append(self._sampled)
        into.memory = peak if into.memory is None or peak is None else max(peak, into.memory)
        self.stop()

    def _base(self) -> None:
        gc.collect()
        if self.on_device:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif STATUS.exists():
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)
            self.before = resident("VmRSS")
            CLEAR.write_text("5")

    def _peak(self) -> int | None:
        if self.on_device:
            return torch.cuda.max_memory_allocated() - self.before
        return max(resident("VmHWM") - self.before, 0) if STATUS.exists() else None


class _Ours(L3MTrainer):
    """Keeps what the others need of an iteration."""

    task_batch: dict[str, Tensor]
    weights: Tensor

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.task_batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        return super().training_step(model, inputs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        found = super().create_optimizer(model)
        optimizer: Any = self.l3m_optimizer
        observe = optimizer.observe

        def observed(*args: Any, **kwargs: Any) -> Tensor:
            self.weights = observe(*args, **kwargs)
            return self.weights

        optimizer.observe = observed
        return found


class _Turns(transformers.TrainerCallback):
    """After each iteration of the trainer one of each other."""

    def __init__(self, measured: dict[str, IterationMeasurement], said: Callable[[str], None]):
        self.measured, self.said = measured, said
        self.trainer: Any = None
        self.clock: Any = None
        self.others: dict[str, Callable[[], None]] = {}
        self.gradients: dict[
            str, list[list[Tensor]]
        ] = {}  # of the first round, by contestant: of the task and of the constraint
        self._within: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.said("l3ms")
        self._begin("l3ms", state.global_step == 0, trained(self.trainer.policy))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end(state.global_step == 1)
        for name, iteration in list(self.others.items()):
            self.said(name)
            self._begin(name, state.global_step == 1, trained(self.trainer.policy))
            try:
                iteration()
            except Exception as error:  # of a peer
                if name == "plain":
                    raise
                self.measured[name].reason = reason(error)
                del self.others[name]
                self.clock.stop()
                continue
            self._end(state.global_step == 1)
        if state.global_step == 1:
            self._compare()

    def _begin(self, name: str, first: bool, parameters: Sequence[Tensor]) -> None:
        if first:
            kept = self.gradients.setdefault(name, [])
            self.clock.before_step = lambda: kept.append([p.grad.clone() for p in parameters if p.grad is not None])
        self._name, self._within = name, self.clock.iteration(self.measured[name])
        self._within.__enter__()

    def _end(self, first: bool) -> None:
        self._within.__exit__(None, None, None)
        self.clock.before_step = None
        if first:  # it has warmed up
            found = self.measured[self._name]
            found.phases, found.tokens, found.memory = [], [], None

    def _compare(self) -> None:
        ours, plain = self.gradients["l3ms"], self.gradients["plain"]
        found = self.measured["plain"]
        found.error = max(difference(b, a) for a, b in zip(ours, plain, strict=True))
        self.gradients = {}
        if not found.error <= TOLERANCE:
            raise RuntimeError(
                f"bench: gradients of the plain loop differ from ours by {found.error:.1e}, at most {TOLERANCE:.0e}: not the same work"
            )


def measure(
    work: Work,
    *,
    rounds: int,
    seed: int = 0,
    device: str = "cpu",
    contestants: Sequence[str] = tuple(TITLES),
    console: Console | None = None,
    said: Callable[[str], None] = lambda name: None,
) -> IterationResult:
    """`rounds` iterations of each contestant, after one of each that is left out. Ours and the plain loop always take part."""
    console = console or Console(quiet=True)
    transformers.set_seed(seed)
    lora = None if work.lora is None else LoraConfig(r=work.lora, alpha=2 * work.lora)
    tokenizer, model = load_model(work.model, dtype="float32", lora=lora, console=console)
    encoded = encode([Example(*pair) for pair in work.pairs], tokenizer, max_length=work.max_length).rows
    rows = [row for row in encoded if len(row["input_ids"]) <= work.max_length]
    measured = {
        name: IterationMeasurement(contestant=name, title=title, kind="ours" if name == "l3ms" else "peer")
        for name, title in TITLES.items()
        if name in (*contestants, "l3ms", "plain")
    }
    turns = _Turns(measured, said)
    with tempfile.TemporaryDirectory() as folder:
        args = L3MConfig(
            output_dir=folder, max_steps=rounds + 1, per_device_train_batch_size=work.batch, constraint_batch_size=work.batch,
            max_new_tokens=work.max_new_tokens, learning_rate=0.0, adam_beta1=0.5, adam_beta2=0.95, lr_scheduler_type="constant",
            report_to=[], save_strategy="no", use_cpu=device == "cpu", disable_tqdm=True, logging_strategy="no", seed=seed,
            dataloader_pin_memory=False, dataloader_drop_last=True, average_fraction=1e-9,
        )  # fmt: skip
        trainer = _Ours(
            model,
            args,
            constraints=[Length(work.low, work.high)],
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[turns],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.phases = turns.clock = clock = BenchClock(args.device)
        turns.trainer = trainer
        plain = PlainLoop(trainer.policy, tokenizer, work.max_new_tokens, clock)

        def plain_iteration() -> None:
            found: Any = trainer.last_rollout
            responses = {name: found[name] for name in ("input_ids", "attention_mask", "labels")}
            plain.iteration(trainer.task_batch, responses, trainer.weights)

        turns.others["plain"] = plain_iteration
        if "trl" in measured:
            try:
                measured["trl"].title = f"TRL {metadata.version('trl')}, SFT step and GRPO step"
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of theirs
                    trl = TrlSteps(
                        own_model(work.model, lora).to(args.device), tokenizer, batch=work.batch, max_new_tokens=work.max_new_tokens,
                        phases=clock, folder=Path(folder), cpu=device == "cpu",
                    )  # fmt: skip
                turns.others["trl"] = lambda: trl.iteration(trainer.task_batch, trainer.last_rollout.prompts)  # type: ignore[union-attr]
            except ImportError as error:
                measured["trl"].reason = f"not installed: pip install {WANTED} ({error})"
        trainer.train()
    return IterationResult(
        model=work.name, parameters=sum(p.numel() for p in model.parameters()), lora=work.lora, dtype="fp32", device=device,
        task_rows=work.batch, responses=work.batch, max_new_tokens=work.max_new_tokens, measurements=list(measured.values()),
    )  # fmt: skip
