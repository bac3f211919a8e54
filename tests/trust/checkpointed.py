"""Trainers in the middle of a run, whose next checkpoint somebody ends the writing of: made once, and each case is a fork of them.

A `Run` has iterated three times: its checkpoints 1 to 3, and 4 as it is written when nobody interrupts, are what others are compared with.
"""

from __future__ import annotations

import atexit
import functools
import gc
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from forks import ended, forked
from peft import LoraConfig, get_peft_model
from rich.console import Console
from training_runs import rows, run
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

import l3ms
from l3ms.runs import resuming
from l3ms.training import checkpoints

AT, LAST = 3, 4  # the iteration whose checkpoint is in the making, and the last one of the run
OTHER_EACH_TIME = {"trainer_state.json", "training_args.json"}  # seconds, and where it is written

# What is there before, how many may be kept, and what is written
KINDS: dict[str, dict[str, Any]] = {
    "replacing": {"before": (3,)},
    "first": {"before": ()},
    "next": {"before": (1, 2)},
    "one kept": {"before": (2,), "limit": 1},
    "two kept": {"before": (1, 2), "limit": 2},
    "best kept": {"before": (1, 2), "limit": 2, "best": 1},
    "adapters": {"before": (2,), "lora": True},
    "weights in many files": {"before": (3,), "limit": 1, "shard": "2KB"},
}


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == AT


def temporary() -> Path:
    """A folder until this process ends; forks of it end otherwise."""
    made = Path(tempfile.mkdtemp(prefix="l3ms-trust-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def settle() -> None:
    """Before forks of this process: one that looks through all objects copies their pages, most of what it would take."""
    gc.collect()
    gc.freeze()


def quietly(act: Callable[[], Any], output: Path) -> int:
    """`act` in a process of its own, with its errors in a file. -> its exit code"""
    return ended(forked(act, output, failed=99))


def in_order(tree: Any) -> Any:
    """What `save_tree` has written, with the keys of its dictionaries sorted."""
    if isinstance(tree, list):
        return [in_order(item) for item in tree]
    if isinstance(tree, dict):
        return {key: sorted(in_order(item), key=str) if key == "dict" else in_order(item) for key, item in tree.items()}
    return tree


class Run:
    """Of one of `KINDS`."""

    def __init__(self, kind: str):
        torch.set_num_threads(1)
        disable_progress_bar()
        self.kind, self.options = kind, KINDS[kind]
        self.folder = temporary()
        self.whole = self.folder / "whole"
        self.writer = self._trainer()
        self.writer.add_callback(StopAt())
        set_seed(0)
        self.writer.train()
        self.reader = self._trainer()
        code = quietly(lambda: self._go_on(self.whole, None), self.folder / "said")
        assert code == 0, (self.folder / "said").read_text()
        self.digests = {step: self.digest(self.whole / f"checkpoint-{step}") for step in range(1, LAST + 1)}
        settle()

    def _trainer(self) -> Any:
        model = tiny_models.make_model(gain=0.3)
        if self.options.get("lora"):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                adapters = LoraConfig(
                    r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
                )
                model = get_peft_model(model, adapters)
        if "shard" in self.options:
            model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size=self.options["shard"])
        constraints = [l3ms.Length(min=2, max=5), l3ms.DataNLL("other", rows(8, seed=4), max=2.0, batch_size=2)]
        trainer, recorder = run(
            self.whole, tiny_models.tokenizer(), model, constraints=constraints, start=False, max_steps=LAST, optim="adamw_torch",
            save_strategy="steps", save_steps=1, average_fraction=0.8, learning_rate=1e-2,
        )  # fmt: skip
        for callback in (recorder, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(
            l3ms.Watch(
                held_out=rows(6, seed=3), held_out_every=2, held_out_samples=6, every=2, window=2, humps_max=None
            )
        )
        return trainer

    # ---- what a process of its own does ----

    def begin(self, place: Path) -> None:
        """What is there before."""
        place.mkdir(parents=True)
        for step in self.options["before"]:
            shutil.copytree(self.whole / f"checkpoint-{step}", place / f"checkpoint-{step}")

    def save(self, place: Path) -> None:
        """Write the checkpoint of iteration `AT`."""
        trainer = self.writer
        self._at(trainer, place, self.options.get("limit"))
        trainer._load_rng_state(str(self.whole / f"checkpoint-{AT}"))
        if "best" in self.options:
            trainer.state.best_global_step = self.options["best"]
        trainer._save_checkpoint(trainer.model, None)

    def _at(self, trainer: Any, place: Path, limit: int | None) -> None:
        trainer.args.output_dir, trainer.args.save_total_limit = str(place), limit

    def _go_on(self, place: Path, limit: int | None, last: int = LAST) -> None:
        self._at(self.reader, place, limit)
        self.reader.args.max_steps = last
        found = checkpoints.checkpoints(place)
        set_seed(0)
        self.reader.train(resume_from_checkpoint=bool(found))

    # ---- what is looked at afterwards ----

    def digest(self, folder: Path) -> dict[str, Any]:
        files = json.loads((folder / checkpoints.MANIFEST).read_text())["files"]
        found = {name: described for name, described in files.items() if name not in OTHER_EACH_TIME}
        # torch puts the keys of a group that was loaded in another order
        return found | {"optimizer.json": in_order(json.loads((folder / "optimizer.json").read_text()))}

    def check(self, place: Path, *, named: bool, to_the_end: bool = True) -> None:
        """The newest valid checkpoint is the one before or, if it was `named` surely, the new one; it is found, said, loaded, and gone on
        from: then what the process has left is gone."""
        found, damaged = checkpoints.newest(place)
        assert not damaged, damaged
        allowed = {AT} if named else {max(self.options["before"], default=0), AT}
        step = 0 if found is None else resuming.iteration(found)
        assert step in allowed, f"the newest is {found}, wanted {allowed}"
        said = io.StringIO()
        resuming.find(place.parent, Console(file=said, width=1000), self.reader.model, self.reader.taken_at_once)
        wanted = (
            f"Resuming at iteration {step}, from {found}"
            if step
            else "has no checkpoint to resume from: beginning anew"
        )
        assert wanted in said.getvalue(), said.getvalue()
        assert "is not used" not in said.getvalue(), said.getvalue()
        for folder in checkpoints.checkpoints(place):
            assert self.digest(folder) == self.digests[resuming.iteration(folder)], f"{folder} has other contents"
        limit = self.options.get("limit")
        code = quietly(lambda: self._go_on(place, limit, LAST if to_the_end else step or 1), place.parent / "said")
        assert code == 0, (place.parent / "said").read_text()[-2000:]
        if to_the_end:
            self.check_end(place, limit)

    def check_end(self, place: Path, limit: int | None) -> None:
        """Of the run that was gone on with: the same bits, and nothing else."""
        names = {path.name for path in place.iterdir()}
        assert all(checkpoints.NAME.fullmatch(name) for name in names), f"left: {names}"
        for name in names:
            assert checkpoints.problem(place / name) is None, name
        assert limit is None or len(names) <= limit + ("best" in self.options), names
        assert self.digest(place / f"checkpoint-{LAST}") == self.digests[LAST], "it ends with other bits"


@functools.cache
def of(kind: str) -> Run:
    return Run(kind)
