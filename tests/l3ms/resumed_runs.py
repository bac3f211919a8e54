"""What the tests of `l3ms train --resume` share: a project whose run takes a second, runs that are stopped, and how two are compared."""

import json
from pathlib import Path

import pytest
from run_folders import write_project
from safetensors.torch import load_file
from training_runs import timeless

from l3ms.commands.command_line import main
from l3ms.runs import executing as run

TRAIN = {"iterations": 10, "batch_size": 4, "constraint_batch_size": 4, "learning_rate": 1e-2, "max_new_tokens": 8,
         "device": "cpu", "save_steps": 3, "average_fraction": 0.6}  # fmt: skip
OTHER = [
    {"prompt": "a b", "completion": "c d e"},
    {"prompt": "b", "completion": "f f"},
    {"prompt": "d", "completion": "a"},
]

# Top-level fields of runs of every kind
CONFIGS = {
    "several": {
        "constraints": [
            {"type": "length", "threshold": 4, "max": 0.5},
            {"type": "data_nll", "name": "other", "max": 2.0, "batch_size": 4, "data": {"train": "other.jsonl", "chat_template": False}},
            {"type": "data_nll", "name": "kept", "relative": True, "max": 0.1, "batch_size": 2, "data": {"train": "other.jsonl"}},
            {"type": "kl", "max": 0.5},
        ],
        "train": {"gradient_accumulation": 2, "half_steps": "joint"},
    },
    "adapters": {"train": {"lora": {"r": 2, "dropout": 0.1}}},
    "dual_ascent": {"train": {"solver": "dual_ascent", "schedule": "cosine"}},
    "muon": {"train": {"optimizer": "muon", "optimizer_options": {"ns_steps": 3}}},
    "augmented_lagrangian": {"train": {"solver": "augmented_lagrangian"}},
    "penalty": {"train": {"solver": "penalty", "clipping": "separate"}},
    "none": {"constraints": [], "train": {"solver": "none"}},
}  # fmt: skip


def project(folder, tokenizer, model, **changes):
    """A project whose run takes a second or two. -> its run.yaml"""
    folder.mkdir(exist_ok=True)
    (folder / "other.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in OTHER * 5))
    values = {
        "constraints": [{"type": "length", "min": 2, "max": 5}],
        "watch": {"every": 4, "window": 3, "held_out_every": 3, "held_out_samples": 8, "humps_max": None},
    }
    return write_project(
        folder, tokenizer, model, **{**values, **changes, "train": {**TRAIN, **changes.get("train", {})}}
    )


def train(config, *arguments):
    return main(["train", str(config), *map(str, arguments)])


def rows(out: Path):
    """What was logged, but for the time it took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    return timeless(lines)


def report(out: Path):
    values = json.loads((out / "report.json").read_text())
    return {key: value for key, value in values.items() if key not in ("seconds", "time")}


def assert_same(out: Path, expected: Path) -> None:
    """Weights, their average, the log and the report: the same bits."""
    for part in ("model", "average"):
        [file] = [path.name for path in (expected / part).glob("*.safetensors")]
        ours, theirs = (load_file(folder / part / file) for folder in (out, expected))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert rows(out) == rows(expected)
    assert report(out) == report(expected)
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}


class Stopped(BaseException):
    """In place of a signal, where the test stays in one process."""


def stop_in_half_step(monkeypatch, at: int) -> None:
    half_step, calls = run.L3MTrainer.average_weights, []

    def stopping(self):
        calls.append(1)
        if len(calls) == at:
            raise Stopped
        half_step(self)

    monkeypatch.setattr(run.L3MTrainer, "average_weights", stopping)


def interrupted(config, at: int, *arguments) -> None:
    """The run of `config`, until iteration `at`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_half_step(patch, at)
        with pytest.raises(Stopped):
            train(config, *arguments)
