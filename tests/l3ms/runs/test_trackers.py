"""Trackers of a run: what they are told, what they get of it, and that they neither change a run nor end one. The real ones where they
are installed, and a stand-in for wandb."""

import json
import logging
import types
from pathlib import Path
from typing import Any

import fake_wandb
import pytest
import yaml
from cli_projects import l3ms, losses, one_line
from rich.console import Console

from l3ms.config.run_config import ConfigError, load_config
from l3ms.runs import tracker_kinds, trackers

TABLES = {"completions": 3, "completions_every": 2}


def configured(project, /, **logging):
    path = project / "run.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "logging": {"tensorboard": False, **logging}}))
    return path


def log(out: Path):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- what is taken ----


def test_the_trackers_are_those_of_transformers():
    from transformers.integrations import integration_utils

    from l3ms.config.trackers import NAMES

    assert sorted(NAMES) == sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    assert set(tracker_kinds.KINDS) <= set(NAMES)


@pytest.mark.parametrize(
    ("logging", "said"),
    [
        ({"report_to": "wanbd"}, "logging.report_to: unknown tracker 'wanbd'; did you mean wandb?"),
        ({"report_to": ["wandb", "comet"]}, "logging.report_to: unknown tracker 'comet'; did you mean comet_ml?"),
        ({"report_to": ["wandb", "none"]}, "logging.report_to: 'none' stands alone, got wandb, none"),
        ({"report_to": "tensorboard"}, "logging.report_to: names tensorboard, and logging.tensorboard is false"),
        ({"report_to": ["mlflow", "dagshub"]}, "logging.report_to: names mlflow and dagshub"),
        ({"tags": ["a"]}, "logging.tags: is for trackers, and logging.report_to names none"),
        ({"tags": ["a,b"], "report_to": "wandb"}, "logging.tags.0: "),
        ({"report_to": ["wandb", "trackio"], "tags": ["a"]}, "logging.tags: cannot be told to trackio (no tags there)"),
        ({"report_to": "dvclive", "run_name": "a"}, "logging.run_name: cannot be told to dvclive (no name of a run"),
        ({"report_to": ["azure_ml", "flyte"], "project": "a"}, "logging.project: cannot be told to azure_ml, flyte"),
        ({"report_to": "comet_ml", "completions": 3}, "logging.completions: needs a tracker with tables"),
        ({"report_to": 3}, "logging.report_to: "),
    ],
)
def test_what_a_tracker_cannot_be_told_is_refused(project, logging, said):
    with pytest.raises(ConfigError) as error:
        load_config(configured(project, **logging))
    assert str(error.value).startswith(said)


def test_a_name_stands_for_a_list_and_none_for_no_tracker(project):
    def of(**logging):
        return load_config(configured(project, **logging)).logging.trackers

    assert of(report_to="wandb") == of(report_to=["wandb", "wandb"]) == ["wandb"]
    assert of() == of(report_to="none") == of(report_to=["none"]) == of(report_to=[]) == []
    assert of(report_to="all", tags=["a"]) == ["all"]


def test_all_are_those_that_are_installed(project, monkeypatch):
    found = ["dagshub", "mlflow", "tensorboard", "wandb"]
    monkeypatch.setattr(trackers.integration_utils, "get_available_reporting_integrations", lambda: list(found))
    assert trackers.names_of(load_config(configured(project, report_to="all")).logging) == ["dagshub", "wandb"]
    found[:] = ["codecarbon", "wandb"]
    with pytest.raises(ConfigError, match=r"^logging.tags: cannot be told to codecarbon"):
        trackers.names_of(load_config(configured(project, report_to="all", tags=["a"])).logging)


def test_a_missing_package_is_refused_before_a_file_is_written(project, monkeypatch, capsys):
    monkeypatch.setattr(tracker_kinds.integration_utils, "is_clearml_available", lambda: False)
    assert l3ms(project / "run.yaml", "--logging.report-to", "clearml") == 2
    assert "logging.report_to: clearml cannot be used here" in (said := one_line(capsys))
    assert "pip install clearml" in said
    assert not (project / "out").exists()


# ---- a run, with a stand-in ----


def test_a_run_is_told_whole_and_is_the_same(project, monkeypatch, capsys):
    wandb = fake_wandb.install(monkeypatch)
    assert l3ms(project / "run.yaml", "--output", project / "plain") == 0
    config = configured(project, report_to="wandb", project="lengths", tags=["short", "v 2"], **TABLES)
    assert l3ms(config) == 0, capsys.readouterr().err
    out = project / "out"
    assert losses(out) == losses(project / "plain")

    [run] = wandb.runs
    assert run.options == {"project": "lengths", "name": "out", "tags": ["short", "v 2"]}
    assert json.loads((out / "trackers.json").read_text()) == {"wandb": {"id": "run0"}}
    known = wandb.config
    assert (known["constraints.0.max"], known["train.iterations"], known["logging.tags"]) == (9, 5, ["short", "v 2"])

    lines = [line for line in wandb.lines if "train/loss" in line]
    for row, line in zip(log(out), lines, strict=True):
        assert line.pop("train/global_step") == row.pop("iteration")
        del row["seconds"]
        assert {name.removeprefix("train/"): value for name, value in line.items()} == row
        assert {"l3m/mu", "learning_rate", "constraints/length/estimate", "watch/length/p50"} <= row.keys()

    tables = {line["train/global_step"]: line["completions"] for line in wandb.lines if "completions" in line}
    assert list(tables) == [1, 3, 5]
    assert tables[3]["columns"] == ["iteration", "prompt", "completion", "tokens", "ended", "reward/length"]
    for iteration, prompt, completion, tokens, ended, reward in tables[3]["data"]:
        assert (iteration, tokens) == (3, reward)
        assert prompt.endswith(":")
        assert isinstance(completion, str)
        assert isinstance(ended, bool)
    assert len(tables[3]["data"]) == 3

    report = json.loads((out / "report.json").read_text())
    for model in ("last", "average"):
        found = {name: run.summary[f"report/{model}/{name}"] for name in ("length", "perplexity")}
        assert found == {"length": report[model]["length"]["mean"], "perplexity": report[model]["perplexity"]}
    assert wandb.ended == [0]


def test_an_interrupted_run_is_ended_as_such_and_gone_on_with(project, monkeypatch, capsys):
    wandb = fake_wandb.install(monkeypatch)

    def interrupt(values):
        if values["train/global_step"] == 4:
            raise KeyboardInterrupt

    wandb.broken = interrupt
    options = ("--logging.report-to", "wandb", "--train.save-steps", 2)
    assert l3ms(project / "run.yaml", *options) == 130
    assert wandb.ended == [130]
    wandb.broken = None
    assert l3ms(project / "run.yaml", *options, "--resume") == 0, capsys.readouterr().err
    assert "wandb goes on with its run run0\n" in capsys.readouterr().out
    assert wandb.runs[1].options == {"project": "huggingface", "name": "out", "id": "run0", "resume": "allow"}
    assert [line["train/global_step"] for line in wandb.lines if "train/loss" in line] == [1, 2, 3, 3, 4, 5]
    assert wandb.ended == [130, 0]


def test_one_that_does_not_begin_ends_the_run_before_it_writes(project, monkeypatch, capsys):
    wandb = fake_wandb.install(monkeypatch)

    def init(**_):
        raise RuntimeError("No API key\nconfigured")

    monkeypatch.setattr(wandb, "init", init)
    assert l3ms(project / "run.yaml", "--logging.report-to", "wandb") == 2
    assert one_line(capsys) == "l3ms: logging.report_to: wandb does not begin: No API key configured\n"
    assert not (project / "out").exists()


# ---- errors, and ranks ----


class Kind(tracker_kinds.Tracker):
    """Of a tracker whose lines fail where `broken` says so."""

    broken = staticmethod(lambda iteration: False)

    def _made(self):
        self.lines, self.outcomes = [], []
        return types.SimpleNamespace()

    def begin(self, *_, **__):
        pass

    def line(self, args, state, control, *, logs, **_):
        self.lines.append(state.global_step)
        if self.broken(state.global_step):
            raise ConnectionError("server\nis away")

    def end(self, outcome, *_, **__):
        self.outcomes.append(outcome)


@pytest.fixture
def running(project, monkeypatch):
    """running(broken) -> the lines that a tracker is given of 30 iterations, and its outcomes."""
    from transformers import TrainerControl, TrainerState

    def run(broken, error=None):
        monkeypatch.setattr(trackers, "KINDS", {"wandb": type("Broken", (Kind,), {"broken": staticmethod(broken)})})
        config = load_config(configured(project, report_to="wandb"))
        held = trackers.Trackers(config, begun=False, console=Console())
        policy = types.SimpleNamespace(device=__import__("torch").device("cpu"))
        args = types.SimpleNamespace(to_dict=dict)
        trainer = types.SimpleNamespace(
            state=TrainerState(), control=TrainerControl(), args=args, model=None, processing_class=None, policy=policy,
            last_rollout=None, sampled=False,
        )  # fmt: skip
        with held.running(trainer):
            held.begin()
            for iteration in range(1, 31):
                trainer.state.global_step = iteration
                held.on_log(args, trainer.state, trainer.control, logs={"loss": 1.0})
            if error is not None:
                raise error
        tracker: Any = held.trackers[0]
        return tracker.lines, tracker.outcomes

    return run


def test_one_that_fails_now_and_then_is_warned_of_once_and_at_the_end(running, caplog):
    with caplog.at_level(logging.WARNING):
        assert running(lambda iteration: iteration % 4 == 0) == (list(range(1, 31)), ["finished"])
    first, last = [record.getMessage() for record in caplog.records]
    assert first == "wandb has failed, and the run goes on without it: server is away"
    assert last.startswith("wandb has failed 7 times: what it shows of the run is not whole")


def test_one_that_fails_all_the_time_is_left_alone_and_ended_all_the_same(running, caplog):
    with caplog.at_level(logging.WARNING):
        assert running(lambda iteration: iteration > 3) == (list(range(1, 14)), ["finished"])
    assert "wandb has failed 10 times in a row, and is given no more" in [r.getMessage() for r in caplog.records]


@pytest.mark.parametrize(("error", "outcome"), [(ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_whatever_ends_a_run_ends_its_trackers(running, monkeypatch, error, outcome):
    ends = []
    monkeypatch.setattr(Kind, "end", lambda self, outcome, *_, **__: ends.append(outcome))
    with pytest.raises(type(error)):
        running(lambda iteration: False, error)
    assert ends == [outcome]


def test_ranks_beside_the_first_have_none(project, monkeypatch):
    monkeypatch.setattr(trackers, "KINDS", {"wandb": Kind})
    config = load_config(configured(project, report_to="wandb"))
    assert len(trackers.Trackers(config, begun=False, console=Console()).trackers) == 1
    monkeypatch.setattr(trackers, "is_first", lambda: False)
    assert trackers.Trackers(config, begun=False, console=Console()).trackers == []
