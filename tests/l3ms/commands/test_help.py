"""`--help` shows what was written, brackets too, and wrong arguments end with one line that says what would be right."""

import re
import subprocess
import sys

import pytest
import typer
from cli_projects import one_line

from l3ms.commands import bench, certify, check, demo, train
from l3ms.commands.command_line import app, main
from l3ms.config.run_config import list_fields

TEXTS = {name: module.HELP for name, module in
         {"train": train, "demo": demo, "check": check, "certify": certify, "bench": bench}.items()}  # fmt: skip


def words(text):
    return " ".join(text.replace("\b", "").replace("[bold]", "").replace("[/bold]", "").split())


@pytest.fixture
def helped(capsys, monkeypatch):
    """helped(command) -> its help, unwrapped"""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")

    def show(*command):
        assert main([*command, "--help"]) == 0
        return words(capsys.readouterr().out)

    return show


@pytest.mark.parametrize("command", TEXTS)
def test_help_is_shown_word_for_word(helped, command):
    shown = helped(command)
    assert words(TEXTS[command]) in shown
    if command == "train":
        assert "words: [thank you, thanks], min: 0.3}" in shown
        for field, default in list_fields():
            assert f"--{field.replace('_', '-')} {default}" in shown
        assert "--train.betas [0.5, 0.95]" in shown


@pytest.mark.parametrize("command", [*TEXTS, "plot"])
def test_help_of_options_is_shown_word_for_word(helped, command):
    shown = helped(command)
    for option in typer.main.get_command(app).commands[command].params:  # pyright: ignore[reportAttributeAccessIssue]
        if getattr(option, "help", None):
            assert words(option.help) in shown  # pyright: ignore[reportAttributeAccessIssue]


def test_help_of_all(helped):
    shown = helped()
    assert all(re.search(rf"│ {command} ", shown) for command in [*TEXTS, "plot"])


WRONG = {
    "trian run.yaml": "No such command 'trian'. Did you mean 'train'? (see l3ms --help)",
    "train": "Missing argument 'CONFIG'. (see l3ms train --help)",
    "train run.yaml --iteratons 3": "--iteratons (Possible options: --iterations) (see l3ms train --help)",
    "train run.yaml --seed abc": "for '--seed': Input should be a valid integer, unable to parse string as an integer, got 'abc'",
    "check run.yaml --samples 1": "for '--samples': Input should be greater than or equal to 2, got '1' (see l3ms check --help)",
    "check run.yaml --sample 4": "--sample (Possible options: --samples)",
    "certify out --prize": "--prize (Possible options: --prices, --probes) (see l3ms certify --help)",
    "certify out --weights best": "--weights: must be average or last, got 'best'",
    "plot out more": "Got unexpected extra argument(s) (more) (see l3ms plot --help)",
    "demo --min abc": "for '--min': Input should be a valid number, unable to parse string as a number, got 'abc'",
    "bench --ful": "--ful (Possible options: --full) (see l3ms bench --help)",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    assert WRONG[arguments] in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_check_takes_the_fields_as_flags(project, capsys):
    assert main(["check", str(project / "run.yaml"), "--constraints.0.max", "3"]) == 2
    assert "constraints.0.min: must be below max" in one_line(capsys)
    assert main(["check", str(project / "run.yaml"), "--train.iteratons", "3"]) == 2
    assert "train.iteratons: unknown field; did you mean iterations?" in one_line(capsys)
    assert main(["check", str(project / "run.yaml"), "--model", "./gone"]) == 2
    assert "model: no such folder: " in one_line(capsys)


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_wrong_yaml_is_refused_before_torch_is_imported(tmp_path, command):
    (tmp_path / "run.yaml").write_text("model: a\noutput: out\ndata: {train: rows.jsonl}\ntrain: {iteratons: 3}\n")
    program = (
        "import sys; from l3ms.commands.command_line import main; "
        f"print(main([{command!r}, 'run.yaml']), {{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 set()", done.stderr
    assert "train.iteratons: unknown field; did you mean iterations?" in done.stderr
