"""A run whose responses an engine samples, from the YAML to the certificate."""

import json

import yaml
from cli_projects import l3ms, one_line

from l3ms.commands.command_line import main

ENGINE = """
import copy
from l3ms.rollouts.engines import Response
from l3ms.rollouts.transformers_engine import TransformersEngine
from l3ms.rollouts.vllm_weights import gaps
from transformers import AutoTokenizer

class Mine:
    def __init__(self):
        self.tokenizer, self.model = AutoTokenizer.from_pretrained({checkpoint!r}), None
        self.tokenizer.pad_token = self.tokenizer.eos_token

    def update(self, model):
        self.model = copy.deepcopy(model)

    def sample(self, prompts, **asked):
        found = TransformersEngine(self.model, self.tokenizer).sample(prompts, **asked)
        nothing = [Response(r.tokens, r.ended, [0.0] * len(r.tokens)) for r in found]
        with open({calls!r}, "a") as file:
            file.write("sampled\\n")
        likely = gaps(self.model, prompts, nothing, asked["temperature"])
        return [Response(r.tokens, r.ended, (-x).tolist()) for r, x in zip(found, likely, strict=True)]

class Broken(Mine):
    def sample(self, prompts, **asked):
        return super().sample(prompts, **asked)[1:]

class Unable(Mine):
    def __init__(self):
        raise RuntimeError("no luck")

number = 3
"""


def write(project, checkpoint, name):
    calls = project / "calls"
    (project / "mine.py").write_text(
        ENGINE.replace("{checkpoint!r}", repr(str(checkpoint))).replace("{calls!r}", repr(str(calls)))
    )
    values = yaml.safe_load((project / "run.yaml").read_text())
    (project / "run.yaml").write_text(yaml.safe_dump(values | {"rollout": {"engine": f"mine.py:{name}"}}))
    return calls


def test_a_run_is_sampled_by_the_engine_of_its_file_and_so_is_its_certificate(project, checkpoint, capsys):
    calls = write(project, checkpoint, "Mine")
    assert l3ms(project / "run.yaml", "--allow-code") == 0
    rows = [json.loads(line) for line in (project / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["l3m/engine_gap"] < 1e-5 for row in rows] == [True] * 5
    assert len(calls.read_text().splitlines()) == 1 + 5 + 2  # a trial, the iterations, both evaluations
    calls.unlink()
    assert main(["certify", str(project / "out")]) == 2
    assert "rollout.engine: would import and run" in capsys.readouterr().err
    assert main(["certify", str(project / "out"), "--allow-code", "--samples", "32"]) in (0, 3, 4)
    certificate = json.loads((project / "out" / "certificate.json").read_text())
    assert certificate["engine"] == "Mine"
    assert any("sampled by Mine" in note for note in certificate["notes"])
    assert calls.exists()
    calls.unlink()
    assert main(["certify", str(project / "out"), "--engine", "transformers", "--samples", "32"]) in (0, 3, 4)
    assert json.loads((project / "out" / "certificate.json").read_text())["engine"] == "transformers"
    assert not calls.exists()
    capsys.readouterr()
    assert main(["certify", str(project / "out"), "--engine", "vllm"]) == 2
    assert "--engine: must be transformers" in one_line(capsys)


def test_check_samples_by_the_engine(project, checkpoint):
    calls = write(project, checkpoint, "Mine")
    assert main(["check", str(project / "run.yaml"), "--allow-code", "--samples", "8"]) == 0
    assert len(calls.read_text().splitlines()) >= 2


def test_an_engine_that_cannot_be_used_costs_no_run(project, checkpoint, capsys):
    for name, words in [
        ("Broken", "Broken: wanted one response per prompt, 1, got 0"),
        ("Unable", "no luck"),
        ("number", "wanted an object with sample"),
        ("Mien", "did you mean Mine?"),
    ]:
        write(project, checkpoint, name)
        assert l3ms(project / "run.yaml", "--allow-code") == 2
        line = one_line(capsys)
        assert "rollout.engine: " in line
        assert words in line
        assert not (project / "out").exists()
    assert l3ms(project / "run.yaml") == 2
    assert "--allow-code" in one_line(capsys)


def test_another_engine_is_another_run(project, checkpoint, capsys):
    values = yaml.safe_load((project / "run.yaml").read_text())
    values["train"] |= {"iterations": 2, "save_steps": 1}
    (project / "run.yaml").write_text(yaml.safe_dump(values))
    assert l3ms(project / "run.yaml") == 0
    write(project, checkpoint, "Mine")
    capsys.readouterr()
    assert l3ms(project / "run.yaml", "--allow-code", "--resume") == 2
    assert "rollout.engine: is " in one_line(capsys)
