"""What a run will take: from a few of its iterations, by phase, and from where the lengths of its responses will go.

Sampling is most of the time, and goes with the lengths. A batch takes `a * longest + b * tokens` seconds: so many steps, and in each the
rows that have not ended. a and b are fitted to the batches that were sampled. Where the lengths go is known: to those of the data, moved
to the nearer bound on their mean. They are taken to get there in the first third of the run, in a straight line, and to keep a longer tail
than the data have, which is what the longest of a batch comes from.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from l3ms.config.run_config import RunConfig
from l3ms.constraints.constraint import Constraint
from l3ms.constraints.single_answers import is_mean_length
from l3ms.ranks.group import of_first, world
from l3ms.training.phase_summary import seconds_of
from l3ms.training.phases import peak_memory
from l3ms.training.trainer import L3MTrainer
from l3ms.verdicts.prices import nonnegative_least_squares

ITERATIONS = 12  # that are timed at most, after one that warms up; fewer where they take longer than SECONDS
SECONDS = 30.0
LEAST = 3
APPROACH = 1 / 3  # of a run, in which the lengths become what they will be
WRITTEN = 1 << 28  # bytes, that show how fast the disk is


class Sampled(NamedTuple):
    """A batch of responses."""

    lengths: list[int]
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Of the run. Seconds, but for the last three."""

    iteration: float  # with responses as long as now
    settled: float  # with responses as long as they are expected to become
    tokens: float  # in a response, then
    response: float  # to sample and measure one, now
    loading: float
    training: float  # all iterations
    training_as_now: float  # if the responses stay as long as they are
    evaluation: float
    saving: float  # of checkpoints, and of the models in the end
    phases: dict[str, float]  # of an iteration, now
    memory: int  # bytes, the largest resident size of the process so far: model, optimizer, an iteration
    optimizer: int  # bytes of its state, part of `memory` on a CPU
    device_memory: int | None  # bytes, the most that was allocated on the GPU


class _Iterations(transformers.TrainerCallback):
    """The lengths of each iteration's responses; ends the training when enough are timed."""

    def __init__(self, trainer: L3MTrainer, seconds: float):
        self.trainer, self.seconds = trainer, seconds
        self.lengths: list[list[int]] = []
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.trainer.last_rollout
        self.lengths.append([] if found is None else list(found.host_lengths))
        if len(self.lengths) == 1:
            self._start = time.monotonic()
        elif len(self.lengths) > LEAST and of_first(lambda: time.monotonic() - self._start > self.seconds):
            control.should_training_stop = True  # on all ranks after the same iteration


def measure(
    config: RunConfig,
    trainer: L3MTrainer,
    rows: Sequence[dict[str, Any]],
    *,
    loading: float,
    evaluated: Sampled,
    response: float,
    folder: Path,
    seconds: float = SECONDS,
) -> Cost:
    """Train for a few iterations and reckon.

    Args:
        trainer: as that of the run, for `ITERATIONS` + 1 iterations at most, saving nothing.
        rows: that are trained on.
        evaluated: a batch of responses sampled for an evaluation, and the seconds of its sampling.
        response: seconds to sample and measure one of those.
        folder: where a part of the weights is written, to see how long it takes.
        seconds: for the iterations.
    """
    callback = _Iterations(trainer, seconds)
    trainer.add_callback(callback)
    trainer.train()
    timed = seconds_of(trainer.state.log_history)
    first, later = timed["iteration"][0], {name: values[1:] for name, values in timed.items()}
    mean = {name: statistics.fmean(values) for name, values in later.items()}
    lengths = callback.lengths[1:]
    sampled = [Sampled(*pair) for pair in zip(lengths, later["sampling"], strict=True) if pair[0]]
    rates = sampling_rates([*sampled, evaluated])

    most, train = config.train.max_new_tokens, config.train
    wanted = with_tail(expected_lengths(rows, trainer.constraints, most), most)
    settled = mean["iteration"]
    if sampled:
        prompt = statistics.fmean(sum(label == -100 for label in row["labels"]) for row in rows)
        now, then = (statistics.fmean(found) for found in ([length for batch in lengths for length in batch], wanted))
        settled += rates.of(batches(wanted, train.constraint_batch_size)) - mean["sampling"]
        settled += mean["constraint"] * ((prompt + then) / (prompt + now) - 1)
    more = max(first - mean["iteration"], 0.0)
    as_now = more + train.iterations * mean["iteration"]
    expected = more + train.iterations * (settled + APPROACH / 2 * (mean["iteration"] - settled))

    size, rest = config.evaluate.batch_size, max(response - rates.of([evaluated.lengths]) / len(evaluated.lengths), 0.0)
    each = [rates.of(batches(found, size)) / size + rest for found in (evaluated.lengths, wanted)]
    evaluation = config.evaluate.samples / world() * (config.evaluate.initial * each[0] + 2 * each[1])
    if config.watch is not None and config.watch.held_out_every and sampled:
        evaluation += (
            train.iterations // config.watch.held_out_every * config.watch.held_out_samples / world() * each[1]
        )

    state = trainer.optimizer.state if trainer.optimizer is not None else {}
    tensors = [value for values in state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    optimizer = sum(tensor.nbytes for tensor in tensors)
    weights = _kept(trainer.policy)
    checkpoints = 0 if train.save_steps is None else train.iterations // train.save_steps
    bytes_in_all = (2 + checkpoints) * sum(tensor.nbytes for tensor in weights) + checkpoints * optimizer
    return Cost(
        iteration=mean["iteration"],
        settled=settled,
        tokens=statistics.fmean(wanted),
        response=response,
        loading=loading,
        training=expected,
        training_as_now=as_now,
        evaluation=evaluation,
        saving=bytes_in_all * _seconds_per_byte(weights, folder),
        phases=mean,
        memory=peak_memory() or 0,
        optimizer=optimizer,
        device_memory=peak_memory(trainer.args.device) if trainer.args.device.type == "cuda" else None,
    )


class Rates(NamedTuple):
    """Seconds of sampling: of a step, and of a token in it."""

    step: float
    token: float

    def of(self, found: Iterable[Sequence[int]]) -> float:
        """The mean over batches of these lengths."""
        return statistics.fmean(self.step * max(lengths) + self.token * sum(lengths) for lengths in found)


def sampling_rates(sampled: Sequence[Sampled]) -> Rates:
    """By least squares of the relative errors, neither negative."""
    sizes = np.array([[max(lengths) / seconds, sum(lengths) / seconds] for lengths, seconds in sampled])
    return Rates(*map(float, nonnegative_least_squares(sizes.T @ sizes, -sizes.sum(0))))


def expected_lengths(rows: Sequence[dict[str, Any]], constraints: Sequence[Constraint], most: int) -> list[int]:
    """Of responses when the model has learned the data and meets the bounds on their mean; tokens, at least 1 and at most `most`."""
    lengths = [min(sum(label != -100 for label in row["labels"]), most) for row in rows]
    mean = wanted = statistics.fmean(lengths)
    for item in filter(is_mean_length, constraints):
        low, high = (-np.inf if item.low is None else item.low), (np.inf if item.high is None else item.high)
        wanted = float(np.clip(wanted, low, high))
    return [min(max(round(length * wanted / mean), 1), most) for length in lengths]


def with_tail(lengths: Sequence[int], most: int) -> list[int]:
    """And as many of an exponential distribution of the same mean: what a model writes that has learned how often it ends, and not when."""
    mean, count = statistics.fmean(lengths), len(lengths)
    tail = [-mean * math.log(1 - (index + 0.5) / count) for index in range(count)]
    return [*lengths, *(min(max(round(length), 1), most) for length in tail)]


def batches(lengths: Sequence[int], size: int, count: int = 64) -> list[list[int]]:
    """Of so many responses each, at random."""
    generator = random.Random(0)
    return [generator.choices(lengths, k=size) for _ in range(count)]


def _kept(model: Any) -> list[torch.Tensor]:
    """What is written of a model: the adapters, where it has some."""
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    return [p.detach() for p in trained or model.parameters()]


def _seconds_per_byte(weights: Sequence[torch.Tensor], folder: Path) -> float:
    """From writing some of them, on the disk of `folder`; 0 where there is no room."""
    chosen, size = {}, 0
    for index, tensor in enumerate(weights):
        if size >= WRITTEN:
            break
        chosen[str(index)] = tensor.flatten()[: (WRITTEN - size) // tensor.element_size() + 1].contiguous()
        size += chosen[str(index)].nbytes
    start = time.monotonic()
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            save_file(chosen, file.name)
    except OSError:
        return 0.0
    return (time.monotonic() - start) / size
