"""Whole runs on data of every shape: what a run folder says of it is read again, by --resume, certify and a second run."""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from cli_projects import TEMPLATE, l3ms, losses, one_line
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from l3ms.commands.command_line import main
from l3ms.config.run_config import load_config
from l3ms.runs.loading import load_run


@pytest.fixture
def parts(project):
    """The project's rows in several files."""
    lines = (project / "rows.jsonl").read_text().splitlines(keepends=True)
    (project / "data").mkdir()
    (project / "data" / "1.jsonl").write_text("".join(lines[:80]))
    (project / "data" / "2.jsonl").write_text("".join(lines[80:160]))
    (project / "rest.jsonl.gz").write_bytes(gzip.compress("".join(lines[160:]).encode()))
    return project


def set_data(project, **data):
    values = yaml.safe_load((project / "run.yaml").read_text())
    (project / "run.yaml").write_text(yaml.safe_dump(values | {"data": data}))


def test_a_list_with_a_glob_is_the_run_of_the_one_file(parts, capsys):
    assert l3ms(parts / "run.yaml", "--output", parts / "one") == 0
    set_data(parts, train=["data/*.jsonl", "rest.jsonl.gz"])
    assert l3ms(parts / "run.yaml") == 0, capsys.readouterr().err
    out = parts / "out"
    assert losses(out) == losses(parts / "one")
    assert yaml.safe_load((out / "config.yaml").read_text())["data"]["train"] == [
        f"{parts}/data/*.jsonl", f"{parts}/rest.jsonl.gz",
    ]  # fmt: skip
    assert l3ms(parts / "run.yaml", "--resume") == 0
    assert l3ms(out / "config.yaml", "--output", parts / "again") == 0
    assert losses(parts / "again") == losses(out)
    assert main(["certify", str(out), "--samples", "16"]) in (0, 3, 4)
    said = capsys.readouterr()
    assert said.err == ""
    assert "in the training data" not in said.out


def test_an_evaluation_file_among_those_that_are_trained_on_is_told(parts, capsys):
    """Of the run and of the data of a constraint, before anything is trained."""
    data = {"train": "data/*.jsonl", "evaluation": "data/2.jsonl"}
    set_data(parts, **data)
    values = yaml.safe_load((parts / "run.yaml").read_text())
    values["constraints"].append({"type": "data_nll", "name": "other", "data": data, "max": 9})
    (parts / "run.yaml").write_text(yaml.safe_dump(values))
    load_run(load_config(parts / "run.yaml"), console=Console(width=200))
    said = capsys.readouterr().out
    index = len(values["constraints"]) - 1
    for field in ("data.evaluation", f"constraints.{index}.data.evaluation"):
        assert f"\n{field}: 80 of 80 prompts are in the training data: not held out" in f"\n{said}"


def test_files_of_a_list_are_not_overwritten(parts, capsys):
    out = parts / "out"
    (out / "model").mkdir(parents=True)
    (parts / "data" / "1.jsonl").rename(out / "model" / "1.jsonl")
    (parts / "data" / "link.jsonl").symlink_to(out / "model" / "1.jsonl")
    set_data(parts, train=["rest.jsonl.gz", "data/*.jsonl"])
    assert l3ms(parts / "run.yaml", "--overwrite") == 2
    assert "would be overwritten, but data.train.2 is read from it" in one_line(capsys)
    assert (out / "model" / "1.jsonl").exists()


def test_tables_say_nothing_on_stderr(project, capfd):
    rows = [json.loads(line) for line in (project / "rows.jsonl").read_text().splitlines()]
    (project / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    )
    set_data(project, train="rows.csv")
    assert l3ms(project / "run.yaml", "--iterations", 1) == 0
    assert capfd.readouterr().err == ""
    (project / "rows.csv").write_text("prompt,completion\na,b,c\n")
    assert l3ms(project / "run.yaml", "--overwrite") == 2
    assert "rows.csv, line 2: wanted 2 fields" in one_line(capfd)


def test_tools_and_calls_of_a_chat_model(project, checkpoint, capsys):
    """Sampled from the prompt as it was trained on, tools included."""
    chat = project / "chat"
    template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + TEMPLATE.replace(
        "{{ message.content }}",
        "{{ message.content or '' }}{% for c in message.tool_calls or [] %}{{ c.function.name }}(){% endfor %}",
    )
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(chat)
    AutoTokenizer.from_pretrained(checkpoint, chat_template=template).save_pretrained(chat)
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, call], "tools": [{"name": "f"}], "ended": 1}
        for i in range(40)
    ]
    (project / "rows.json").write_text(json.dumps(rows))
    set_data(project, train="rows.json")
    assert l3ms(project / "run.yaml", "--model", chat, "--iterations", 1) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().out.split())
    assert "data.train: left out, since reward functions are given something else by these names: ended" in said
    assert "dropped" not in said
    report = json.loads((project / "out" / "report.json").read_text())
    assert report["examples"][0]["prompt"].endswith("?")


def test_texts_as_a_data_constraint(project, capsys):
    (project / "texts.jsonl").write_text("".join(f'{{"text": "alpha beta {i}"}}\n' for i in range(20)))
    nll = {"type": "data_nll", "name": "old", "data": {"train": "texts.jsonl", "evaluation_share": 0.5}, "max": 20}
    values = yaml.safe_load((project / "run.yaml").read_text())
    (project / "run.yaml").write_text(yaml.safe_dump(values | {"constraints": [*values["constraints"], nll]}))
    assert l3ms(project / "run.yaml", "--iterations", 1) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "model: its chat template is none: line 1: "),
        (
            "{{ raise_exception('no system turns') }}",
            "rows.jsonl, line 1: the chat template refuses it: no system turns",
        ),
        (
            "hello",
            "data.train: no row can be trained on: the chat template does not render the answer behind its prompt",
        ),
        ("{{ nothing }}", "data.train: no prompt has any tokens"),
    ],
)
def test_bad_templates_are_one_line(project, checkpoint, capsys, template, words):
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(project / "chat")
    AutoTokenizer.from_pretrained(checkpoint, chat_template=template).save_pretrained(project / "chat")
    assert l3ms(project / "run.yaml", "--model", project / "chat") == 2
    assert words in one_line(capsys)
    assert not (project / "out").exists()
    assert (
        l3ms(project / "run.yaml", "--model", project / "chat", "--data.chat-template", "false", "--iterations", 1) == 0
    )


def test_a_file_that_is_no_checkpoint_says_how_it_becomes_one(project, capsys):
    (project / "base.gguf").write_bytes(b"GGUF")
    assert l3ms(project / "run.yaml", "--model", project / "base.gguf") == 2
    line = one_line(capsys)
    assert line.startswith("l3ms: model: a GGUF file is for inference")
    assert str(project / "base.gguf") in line
    assert "from l3ms.model.gguf_files import convert; convert(" in line  # tests/l3ms/model/test_gguf_files.py runs it
    assert l3ms(project / "run.yaml", "--model", project / "rows.jsonl") == 2
    assert "model: is a file, wanted the folder of a checkpoint" in one_line(capsys)
    assert not Path(project / "out").exists()
