"""G16: one process that trains under constraints for long, and makes what mishaps a long run has; its memory must not grow.

A step is an iteration: the task's half-step and the constraints', on responses of varying number and length. Now and then a reward is NaN,
a reward function fails, a gradient is infinite, a checkpoint is written, the optimizer is made anew, the model is read back.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from parts import Found, Part, Skipped

from l3ms.constraints.rewards import text_of

WARM_UP = 3000  # steps of a process, which are not counted: caches fill, malloc takes what it will need (after 1,000, still 1 MiB more)
SLOPE = 1.0  # MiB in 10,000 steps


def resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


async def later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in map(text_of, completions)]


def words(prompts, completions, **columns):
    return [sum(len(word) == 1 for word in text.split()) / 8 if text else None for text in map(text_of, completions)]


class Failing:
    """A reward service that is down now and then."""

    down = False

    async def __call__(self, prompts, completions, **columns):
        await asyncio.sleep(0)
        if self.down:
            raise ConnectionError("the service is down")
        return [float(text_of(completion).endswith("a")) for completion in completions]


class Soak:
    """A training in this process that goes on for as many steps as are asked for."""

    def __init__(self, folder: Path):
        import tiny_models
        from training_runs import rows
        from transformers.utils.logging import disable_progress_bar

        import l3ms
        from l3ms.model.averaging import WeightAverage
        from l3ms.model.batches import Collator

        torch.manual_seed(0)
        disable_progress_bar()
        self.folder, self.steps, self.mishaps = folder, 0, 0
        self.tokenizer, self.rows, self.collate = tiny_models.tokenizer(), rows(64), Collator(0)
        self.service = Failing()
        self.constraints = [
            l3ms.Length(min=2, max=6),
            l3ms.Constraint("words", words, max=0.6),
            l3ms.Constraint("later", later, max=12.0),
            l3ms.Constraint("service", self.service, min=0.05),
            l3ms.Constraint("seen", words, monitor=True),
            l3ms.KL(max=3.0),
            l3ms.DataNLL("general", self.rows[:16], max=4.0),
        ]
        self.average = WeightAverage()
        self.take(tiny_models.make_model(attn_implementation="eager"))

    def take(self, model: Any, state: Any = None) -> None:
        """Train `model`, from here on or from the optimizer's `state`."""
        import l3ms

        self.model = model.train()
        l3ms.fuse_head(model)
        self.constraints[5] = l3ms.KL(max=3.0)
        self.constraints[5].prepare(model)
        self.wrap(state)

    def wrap(self, state: Any = None) -> None:
        import l3ms

        base = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.5, 0.95))
        self.opt = l3ms.L3MOptimizer(base, self.constraints, clipping="adaptive", max_skipped=3)
        if state is not None:
            self.opt.load_state_dict(state)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda n: 1.0 / (1.0 + 1e-4 * n))

    def step(self) -> None:
        import l3ms
        from l3ms.model.losses import scored_lengths, shift, task_weights

        n = self.steps
        batch = self.collate([self.rows[(5 * n + k) % len(self.rows)] for k in range(2 + n % 5)])
        weights = task_weights(scored_lengths(shift(batch["labels"])))
        loss = self.model(**batch, seq_weight=weights).loss
        (loss * math.inf if n % 97 == 96 else loss).backward()
        self.move()

        prompts = [row["prompt"].replace("prompt", "user a b")[: 4 + n % 9] for row in self.rows[: 3 + n % 7]]
        rollout = l3ms.rollout(self.model, self.tokenizer, prompts, max_new_tokens=3 + n % 11, chat_template=n % 2 == 0)
        rewards = self.rewards(rollout, down=n % 41 == 40)
        if rewards is not None:
            if n % 53 == 52:
                self.refused(lambda: self.opt.observe({**rewards, "words": [math.nan] * len(rollout)}, rollout.lengths))
            weights = self.opt.observe(rewards, rollout.lengths)
            loss = self.model(**rollout.inputs(slice(None)), seq_weight=weights).loss
            kept = self.collate([self.rows[(n + k) % 16] for k in range(4)])
            (loss + self.opt.barrier_loss({"general": l3ms.sequence_nll(self.model, kept)})).backward()
            self.move()
        self.schedule.step()
        assert all(isinstance(value, float) for value in self.opt.metrics().values())
        self.steps += 1
        self.now_and_then(self.steps)

    def move(self) -> None:
        self.opt.step()
        self.opt.zero_grad()

    def rewards(self, rollout: Any, *, down: bool) -> Any:
        self.service.down = down
        if down:
            return self.refused(lambda: rollout.rewards(self.constraints, model=self.model))
        return rollout.rewards(self.constraints, model=self.model)

    def refused(self, call: Any) -> None:
        try:
            call()
        except Exception:
            self.mishaps += 1
            return
        raise AssertionError("what is wrong was taken")

    def now_and_then(self, n: int) -> None:
        if n % 10 == 0:
            self.average.update(self.model)
        if n % 50 == 0:
            self.checkpoint(n)
        if n % 100 == 0:
            copied = copy.deepcopy(self.opt)
            copied.load_state_dict(self.opt.state_dict())
        if n % 150 == 0:
            self.wrap(self.opt.state_dict())
        if n % 500 == 0:
            self.resume()

    def checkpoint(self, n: int) -> None:
        from l3ms.model.random_numbers import random_state
        from l3ms.training import checkpoints
        from l3ms.training.state_trees import save_tree

        partial = checkpoints.begin(self.folder)
        target = partial / f"checkpoint-{n}"
        self.model.save_pretrained(target)
        save_tree(target, "optimizer", self.opt.state_dict())
        save_tree(target, "random", random_state(torch.device("cpu")))
        checkpoints.seal(partial, target.name)
        checkpoints.rotate(self.folder, 2)

    def resume(self) -> None:
        from transformers import AutoModelForCausalLM

        from l3ms.training import checkpoints
        from l3ms.training.state_trees import load_tree

        newest, damaged = checkpoints.newest(self.folder)
        assert newest is not None
        assert not damaged
        model = AutoModelForCausalLM.from_pretrained(newest, attn_implementation="eager")
        self.take(model, load_tree(newest, "optimizer"))


class Readings:
    """Of this process, every tenth step: from the first after the warm-up, sums for a line of least squares."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="l3m-soak-")
        self.soak = Soak(Path(self.folder.name))
        self.first: tuple[float, int, int] | None = None

    def warm_up(self, steps: int) -> None:
        """What is rare comes often here: malloc has then seen the most that it will be asked for, as after some ten thousand steps."""
        while self.soak.steps < steps:
            self.soak.step()
            if self.soak.steps % 20 == 0:
                self.soak.checkpoint(self.soak.steps)
                self.soak.resume()
        self.first = (resident(), descriptors(), threads())

    def step(self, found: Found) -> None:
        assert self.first is not None
        before, held, running = self.first
        try:
            self.soak.step()
        except Exception as error:
            found.fail(f"step {self.soak.steps}: {type(error).__name__}: {error}")
            self.soak.steps += 1  # another one
        if (at := self.soak.steps) % 10:
            return
        x, y = at / 1e4, resident() - before
        for name, value in {"n": 1.0, "x": x, "y": y, "xx": x * x, "xy": x * y, "yy": y * y}.items():
            found.sums[name] = found.sums.get(name, 0.0) + value
        for what, here, there in (("descriptors", descriptors(), held), ("threads", threads(), running)):
            if here != there:
                found.fail(f"step {at}: {here} {what}, {there} after the warm-up")
        found.figures["MiB resident, at most"] = max(found.figures.get("MiB resident, at most", 0.0), resident())


_here: list[Readings] = []


def _readings(warm_up: int) -> Readings:
    if not Path("/proc/self/statm").exists():
        raise Skipped("no /proc here, which memory is read from")
    if not _here:
        _here.append(Readings())
    if _here[0].first is None:
        _here[0].warm_up(warm_up)
    return _here[0]


def steps(seeds: range) -> Found:
    """A case is a step."""
    found, readings = Found(), _readings(WARM_UP if len(seeds) >= 500 else 60)
    for _ in seeds:
        readings.step(found)
        found.cases += 1
    found.sums["steps"] = float(len(seeds))
    return found


def minutes(seeds: range) -> Found:
    """A case is a minute of the clock."""
    found, readings = Found(), _readings(WARM_UP)
    for _ in seeds:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            readings.step(found)
            found.sums["steps"] = found.sums.get("steps", 0.0) + 1
        found.cases += 1
    return found


def line(found: Found) -> None:
    """Memory over steps by least squares."""
    n, x, y, xx, xy = (found.sums.get(name, 0.0) for name in ("n", "x", "y", "xx", "xy"))
    found.figures["steps"] = round(found.sums.get("steps", 0.0))
    if n < 100:  # a slice: descriptors and threads alone
        return
    slope = (n * xy - x * y) / (n * xx - x * x)
    found.figures["MiB in 10,000 steps"] = slope
    found.measure(max(slope, 0.0) / SLOPE, "memory")
    if not slope < SLOPE:
        found.fail(f"memory grows by {slope:.3g} MiB in 10,000 steps, allowed are {SLOPE:g}")


def parts() -> list[Part]:
    return [
        # in one piece: a line through the memory of one process and of another that went on with it says nothing
        Part("soak", steps, 6000, slice=60, piece=6000, seconds=400, close=line),
        Part("two hours", minutes, 120, piece=120, seconds=7300, limit=12_000, close=line, asked=True),
    ]
