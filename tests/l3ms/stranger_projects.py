"""The project that bad input and hostile artefacts are tried in: run.yaml, models, a run that has ended, one that goes on."""

import json
import shutil
from pathlib import Path

import torch
import yaml
from resumed_runs import Stopped
from run_folders import write_project

from l3ms.commands.command_line import main
from l3ms.runs import executing as run

SMALL = {
    "iterations": 4,
    "batch_size": 4,
    "constraint_batch_size": 4,
    "max_new_tokens": 6,
    "device": "cpu",
    "average_fraction": 0.9,
}


def write(place: Path, tokenizer, model, monkeypatch) -> Path:
    """`place/template`, a copy of which is to be used at `place/project`: paths in the runs lead there. -> the template"""
    from transformers import LlamaForSequenceClassification

    project = place / "project"
    project.mkdir(parents=True)
    evaluate = {"samples": 4, "batch_size": 4, "initial": False}
    options = {"rows": 40, "train": SMALL, "evaluate": evaluate}
    write_project(project, tokenizer, model, **options)
    values = yaml.safe_load((project / "run.yaml").read_text())
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(type(model.config)(**model.config.to_dict() | {"num_labels": 1}))
    classifier.save_pretrained(project / "classifier")
    tokenizer.save_pretrained(project / "classifier")
    (project / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    function = {"type": "function", "name": "f", "function": "evil.py:f", "min": 1}
    (project / "with_reward.yaml").write_text(yaml.safe_dump(values | {"constraints": [function]}))
    (project / "victim").write_text("precious")
    (project / "precious").mkdir()
    (project / "precious" / "file").write_text("precious")
    assert main(["train", str(project / "run.yaml"), "--output", str(project / "finished")]) == 0
    begun = values | {"output": "begun", "train": SMALL | {"save_steps": 1}}
    (project / "begun.yaml").write_text(yaml.safe_dump(begun))
    _stop(project / "begun.yaml", monkeypatch)
    assert {path.name for path in (project / "begun" / "checkpoints").iterdir()} >= {"checkpoint-2", "checkpoint-3"}
    assert json.loads((project / "finished" / "report.json").read_text())
    shutil.copytree(project, place / "template")
    return place / "template"


def _stop(config: Path, monkeypatch) -> None:
    """Run until the last iteration."""
    step, calls = run.L3MTrainer.average_weights, []

    def stopping(self):
        calls.append(1)
        if len(calls) == SMALL["iterations"]:
            raise Stopped
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.L3MTrainer, "average_weights", stopping)
        try:
            main(["train", str(config)])
        except Stopped:
            return
    raise AssertionError("the run has ended")
