"""What a checkpoint says is refused where a run cannot go on with it, and taken where it can."""

import json
import os
import types
from pathlib import Path

import pytest
import torch
from checkpoint_folders import write
from transformers import TrainerCallback

from l3ms.training import checkpoints
from l3ms.training.checkpoint_contents import misfit_of_optimizer, unreadable

STATE = {
    "global_step": 2, "max_steps": 4, "epoch": 0.5, "train_batch_size": 4, "stateful_callbacks": {"TrainerControl": {}},
    "log_history": [{"step": 1, "loss": 1.0}],
}  # fmt: skip
PROGRESS = {"prompts": {"taken": 12, "rows": 24, "seed": 0, "world": 1}, "averaged": 0, "data": {}}


def said(folder, state=None, progress=None, name="checkpoint-2", taken=6):
    folder = folder / name
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({**STATE, **(state or {})}))
    (folder / "l3m.json").write_text(json.dumps({**PROGRESS, **(progress or {})}))
    return unreadable(folder, taken)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"name": "checkpoint-best"}, None),
        ({"name": "checkpoint-3"}, "trainer_state.json: global_step is 2"),
        ({"taken": 4}, None),  # constraint_batch_size is smaller now
        ({"progress": {"prompts": None}}, None),  # of a stream
        ({"progress": {"prompts": None, "data": {"a": {"taken": 3}}}}, None),
        ({"progress": {"data": {"a": {"taken": 10**9}}}}, "l3m.json: 1000000000 prompts cannot be taken in 2 iterations"),
        *(({"state": {"log_history": [{"step": 1, "eval_m": value}]}}, None) for value in ([0.1, 0.2], True, {"a": 1.0})),
        *(
            ({"state": {"log_history": [{"step": 1, name: [1.0]}]}}, f"trainer_state.json: log_history holds a {[name]} that is no number")
            for name in ("loss", "time/task", "l3m/mu")
        ),
    ],
)  # fmt: skip
def test_contents(tmp_path, changes, line):
    assert said(tmp_path, **changes) == line


def test_moments_have_the_shape_of_their_parameter_in_optimizers_that_are_known():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2)
    assert misfit_of_optimizer(optimizer, state) == "optimizer.state.0.exp_avg is not of its parameter's shape"
    assert (
        misfit_of_optimizer(
            types.SimpleNamespace(base=optimizer, **vars(optimizer), state_dict=optimizer.state_dict), state
        )
        is not None
    )
    other = type("LowRank", (torch.optim.AdamW,), {"__module__": "galore"})([weight])
    assert misfit_of_optimizer(other, state) is None


def test_what_is_written_into_one_before_it_is_sealed_again_belongs_to_it(tmp_path):
    folder = write(tmp_path, 1)
    sealed = (folder / "manifest.json").stat()
    checkpoints.seal_again(folder)
    assert (folder / "manifest.json").stat() == sealed
    (folder / "deep" / "notes.txt").write_text("x")
    (folder / "a").write_bytes(b"other")
    later = sealed.st_mtime_ns + 1
    os.utime(folder / "a", ns=(later, later))
    checkpoints.seal_again(folder)
    assert checkpoints.problem(folder) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    (folder / "a").write_bytes(b"later")
    assert checkpoints.problem(folder) == "a is not what was written"


class Notes(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "notes.txt").write_text("x")


def test_what_a_callback_writes_belongs_to_the_checkpoint(make_model, train, tmp_path):
    trainer, _ = train(make_model(), solver="none", max_steps=1, save_strategy="steps", save_steps=1, start=False)
    trainer.add_callback(Notes())
    trainer.train()
    assert trainer._wrong(tmp_path / "checkpoint-1") is None
    assert json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())["files"]["notes.txt"]["bytes"] == 1
