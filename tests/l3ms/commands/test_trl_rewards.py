"""A reward function that asks for what TRL gives, from the trial call to the certificate: the state is of the run it belongs to."""

import json

import pytest
import yaml
from cli_projects import one_line
from run_folders import strict_json

from l3ms.commands.command_line import main

FUNCTIONS = """
import math

def asks(prompts, completions, trainer_state, log_extra, log_metric, **columns):
    log_metric("rows", len(prompts))
    log_metric("nothing", math.nan)
    log_extra("rows", list(range(len(prompts))))
    return [trainer_state.global_step / max(trainer_state.max_steps, 1)] * len(prompts)

def divides(prompts, completions, **columns):
    return [1 / 0 for _ in prompts]

def late(prompts, completions, **columns):
    return [1 / 0 if len(prompts) == 8 else 1.0 for _ in prompts]
"""


@pytest.fixture
def constrained(project, monkeypatch):
    """constrained(name): run.yaml with that function as its constraint."""
    monkeypatch.chdir(project)
    (project / "rewards.py").write_text(FUNCTIONS)

    def write(name):
        values = yaml.safe_load((project / "run.yaml").read_text())
        values["constraints"] = [{"type": "function", "name": "mine", "function": f"rewards.py:{name}", "min": 0.5}]
        (project / "run.yaml").write_text(yaml.safe_dump(values))
        return project / "out"

    return write


def test_from_the_trial_call_to_the_certificate(constrained, capsys):
    out = constrained("asks")
    assert main(["check", "run.yaml", "--allow-code", "--samples", "8"]) == 0, capsys.readouterr().err
    assert main(["train", "run.yaml", "--allow-code"]) == 0, capsys.readouterr().err
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["rewards/rows"] for line in lines] == [8.0] * 5
    assert (
        strict_json(out / "report.json")["average"]["constraints"]["mine"]["mean"] == 1.0
    )  # of the end of the training
    assert main(["certify", "out", "--samples", "16", "--allow-code"]) in (0, 4), capsys.readouterr().err
    assert strict_json(out / "certificate.json")["constraints"][0]["mean"] == 1.0


def test_what_a_function_raises_is_one_line_with_its_name(constrained, capsys):
    constrained("divides")
    assert main(["train", "run.yaml", "--allow-code"]) == 2
    assert "constraints.0.function: raised ZeroDivisionError on a trial call: " in one_line(capsys)
    constrained("late")
    assert main(["train", "run.yaml", "--allow-code"]) == 1
    assert "constraint 'mine': late: division by zero" in capsys.readouterr().err
