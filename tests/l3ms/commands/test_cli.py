"""`l3ms` as a user would run it, and break it: whole runs on a tiny checkpoint; bad input is one line, exit 2, no file."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_projects import TEMPLATE, l3ms, losses, one_line
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from l3ms.commands.command_line import main
from l3ms.commands.ending import explain
from l3ms.runs import executing as run
from l3ms.runs import folder as run_folder
from l3ms.training.phase_summary import summary


def test_train_writes_the_whole_run_and_can_be_repeated(project, checkpoint, capsys):
    evaluate = ("--evaluate.initial", "true", "--logging.tensorboard", "true")
    assert l3ms(project / "run.yaml", "--iterations", 4, *evaluate) == 0, capsys.readouterr().err
    out = project / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "model", "average", "inputs.json", "report.json", "report.png",
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    wanted = {"loss", "learning_rate", "l3m/mu", "l3m/skipped_steps", "l3m/truncated"}
    assert wanted | {
        f"constraints/length/{key}" for key in ("estimate", "stderr", "batch_mean", "lambda", "slack")
    } <= set(rows[0])
    assert list(out.glob("tensorboard/events*"))

    report = json.loads((out / "report.json").read_text())
    assert report["bounds"] == {"min": 4, "max": 9}
    assert report["skipped_steps"] == 0
    assert report["time"] == summary(rows)
    for name in ("initial", "last", "average"):
        length = report[name]["length"]
        assert report[name]["samples"] == sum(length["histogram"]) == 16
        assert length["ci95"][0] <= length["mean"] <= length["ci95"][1]
        assert 1 <= length["p5"] <= length["p50"] <= length["p95"] <= 16
        assert 0 <= report[name]["ended"] <= 1
        assert report[name]["perplexity"] > 1
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")

    for name in ("model", "average"):
        assert (out / name / "model.safetensors").exists()
        assert json.loads((out / name / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert (
            AutoTokenizer.from_pretrained(out / name).get_vocab()
            == AutoTokenizer.from_pretrained(checkpoint).get_vocab()
        )
    last = AutoModelForCausalLM.from_pretrained(out / "model")
    start = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.equal(last.lm_head.weight, start.lm_head.weight)

    said = capsys.readouterr()
    assert said.err == ""
    assert "180 rows to train on, 20 held out" in said.out
    assert "L3M 4/4  loss" in said.out
    assert "sampling, averaged weights: 16/16\n" in said.out
    assert "in [4, 9]" in said.out
    assert "L3M averaged" in said.out

    assert l3ms(out / "config.yaml", "--output", project / "again") == 0
    assert losses(project / "again") == losses(out)
    (out / "report.png").unlink()
    assert main(["plot", str(out)]) == 0
    assert (out / "report.png").exists()


def test_train_on_messages_with_adapters_and_rewards(project, checkpoint, capsys):
    chat = project / "chat"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, chat_template=TEMPLATE)
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    turns = [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "beta"}]
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, turns[1], *turns], "answer": i} for i in range(40)]
    (project / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ("--model", chat, "--iterations", 2, "--train.lora.r", 2, "--train.schedule", "cosine", "--allow-code")
    short = f'{{type: function, name: short, function: "{project}/rewards.py:short", min: 0.5}}'
    assert l3ms(project / "run.yaml", *flags, "--constraints.1", short) == 0
    assert (project / "out/average/adapter_model.safetensors").exists()
    report = json.loads((project / "out/report.json").read_text())
    assert [item["name"] for item in report["constraints"]] == ["length", "short"]
    assert f"Running code for constraint short: {project}/rewards.py" in capsys.readouterr().out


def test_plain_fine_tuning(project, capsys):
    assert l3ms(project / "run.yaml", "--train.solver", "none", "--iterations", 2, "--constraints", "[]") == 0
    said = capsys.readouterr().out
    assert said.count("SFT averaged") == 2  # in the table, and above the examples
    assert "L3M" not in said
    report = json.loads((project / "out/report.json").read_text())
    assert (report["mu_end"], report["bounds"]) == (None, {"min": None, "max": None})


def test_output_is_refused_then_overwritten_and_other_files_stay(project, capsys):
    out = project / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "metrics.jsonl").write_text("old")
    assert l3ms(project / "run.yaml") == 2
    assert one_line(capsys).startswith(f"l3ms: output: {out} is not empty")
    assert (out / "metrics.jsonl").read_text() == "old"
    assert l3ms(project / "run.yaml", "--overwrite", "--iterations", 1) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert len(losses(out)) == 1
    assert l3ms(project / "run.yaml", "--overwrite", "--model", out / "model") == 2
    assert "model is read from it" in one_line(capsys)
    assert (out / "model").exists()


def reward(name):
    value = f'{{type: function, name: mine, function: "rewards.py:{name}", min: 0.5}}'
    return ["--constraints", f"[{value}]", "--allow-code"]


def test_rewards_that_are_not_finite_are_dropped_where_the_file_says_so(project, capsys, monkeypatch):
    monkeypatch.chdir(project)
    arguments = [project / "run.yaml", *reward("gaps"), "--iterations", 2]
    assert l3ms(*arguments) == 2
    assert "constraint 'mine': gaps: row 0 is nan" in capsys.readouterr().err
    assert l3ms(*arguments, "--train.nonfinite", "drop") == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (project / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["constraints/mine/dropped"] > 0
    report = json.loads((project / "out" / "report.json").read_text())
    assert report["average"]["constraints"]["mine"]["mean"] == pytest.approx(0.6)
    assert report["average"]["constraints"]["mine"]["samples"] == 12


# (arguments after the file, what the line must begin with or hold)
BAD = [
    (["--train.iteratons", "3"], "train.iteratons: unknown field; did you mean iterations?"),
    (["--iteratons", "3"], "--iteratons"),
    (["--iterations", "many"], "--iterations"),
    (["--iterations", "-3"], "train.iterations: "),
    (["--train.learning-rate"], "train.learning_rate: the flag --train.learning-rate needs a value"),
    (["--train.learning-rate", "--seed"], "needs a value"),
    (
        ["--train.iterations", "3", "--iterations", "2"],
        "train.iterations: is given twice, by --iterations and by --train.iterations",
    ),
    (
        ["--iterations", "2", "--train", "{iterations: 3}"],
        "train.iterations: is given twice, by --iterations and by --train: ",
    ),
    (["--constraints.0.min", "10"], "constraints.0.min: must be below max"),
    (["--constraints.0.max", ".nan"], "constraints.0.max: must be a finite number"),
    (["--data.train", "gone.jsonl"], "data.train: no such file: "),
    (["--data.train", "empty.jsonl"], "data.train: "),
    (["--data.train", "torn.jsonl"], "torn.jsonl, line 3: is not JSON"),
    (["--model", "./gone"], "model: no such folder: "),
    (["--model", "."], "model: cannot load"),
    (["--train.max-new-tokens", "96"], "train.max_new_tokens: must be below the model's context of 96 tokens"),
    (["--data.max-length", "2"], "data.train: no prompt fits"),
    (["--train.batch-size", "500"], "train.batch_size: "),
    (["--train.lora.target-modules", "[nothing]"], "train.lora: "),
    (["--output", "rows.jsonl"], "output: "),
    (["--output", "rows.jsonl/out"], "output: "),
    (reward("vowels")[:-1], "constraints.0.function: "),
    (["--trust-remote-code", "true"], "trust_remote_code: "),
    (reward("one"), "constraints.0.function: constraint 'mine': one must return one number per response"),
    (reward("nan"), "constraints.0.function: "),
    (reward("text"), "constraints.0.function: "),
    (reward("number"), "constraints.0.function: "),
    (reward("broken"), "constraints.0.function: raised RuntimeError on a trial call: no luck"),
    (reward("vowel"), "constraints.0.function: "),
    (
        ["--constraints.0", '{type: function, name: mine, function: "quits.py:f", min: 0.5}', "--allow-code"],
        "raised SystemExit: usage: rewards.py FILE",
    ),
    (reward("constant"), "constraints.0.function: "),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=range(len(BAD)))
def test_bad_input_is_one_line_and_nothing_is_written(project, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(project)
    (project / "empty.jsonl").write_text("\n")
    (project / "torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "compl')
    before = sorted(project.rglob("*"))
    assert l3ms("run.yaml", *arguments) == 2
    line = one_line(capsys)
    assert words in line
    if words.endswith(": "):
        assert line.startswith(f"l3ms: {words}")
    assert [
        path for path in sorted(project.rglob("*")) if path.suffix != ".pyc" and "__pycache__" not in str(path)
    ] == before


def test_missing_and_broken_file(project, capsys):
    assert l3ms(project / "gone.yaml") == 2
    assert "gone.yaml: no such file" in one_line(capsys)
    (project / "run.yaml").write_text("model: a\nmodel: b\n")
    assert l3ms(project / "run.yaml") == 2
    assert "line 2: key 'model' is given twice" in one_line(capsys)
    assert main(["train"]) == 2
    assert "CONFIG" in one_line(capsys)
    assert main(["plot", str(project)]) == 2
    assert "metrics.jsonl" in one_line(capsys)
    assert main(["trian"]) == 2
    assert "train" in one_line(capsys)


def test_reward_that_breaks_during_the_run(project, monkeypatch, capsys):
    """The trial call passes; the first batch of 8 does not."""
    monkeypatch.chdir(project)
    assert l3ms("run.yaml", *reward("later")) == 2
    assert "later must return one number per response, wanted 8, got 3" in one_line(capsys)
    assert l3ms("run.yaml", *reward("later"), "--overwrite", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_says_what_was_kept(project, monkeypatch, capsys):
    half_step = run.L3MTrainer.constraint_half_step
    calls = []

    def stop_at_three(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        half_step(self)

    monkeypatch.setattr(run.L3MTrainer, "constraint_half_step", stop_at_three)
    assert l3ms(project / "run.yaml") == 130
    assert "interrupted; kept: 2 iterations in" in one_line(capsys)
    assert len(losses(project / "out")) == 2
    assert main(["plot", str(project / "out")]) == 0


def test_full_disk_is_one_line_and_leaves_no_half(project, monkeypatch, capsys):
    def full(self, folder, **_):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    for checkpoints, extra in (("1", {"checkpoints", "inputs.json"}), ("null", {"checkpoints", "inputs.json"})):
        arguments = ("--iterations", 1, "--overwrite", "--train.save-steps", checkpoints)
        assert l3ms(project / "run.yaml", *arguments) == 5
        assert "the disk is full" in one_line(capsys)
        assert {path.name for path in (project / "out").rglob("*")} == {"config.yaml", "metrics.jsonl", *extra}


def test_what_cannot_be_written_is_the_environment_whichever_library_says_so(tmp_path):
    from safetensors.torch import save_file

    writers = {
        "os error": lambda: save_file({}, tmp_path / "gone" / "x"),
        "written": lambda: torch.save([0], "/dev/full"),
    }
    for said, write in writers.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            write()
        assert not isinstance(caught.value, OSError)
        line, code = explain(caught.value)
        assert (code, said in line) == (5, True), line


def test_help_and_version_are_quick_and_teach():
    code = (
        "import sys; from l3ms.commands.command_line import main;"
        " codes = [main([*words, '--help']) for words in ([], ['train'], ['demo'])];"
        "codes += [main([]), main(['--version'])];"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'datasets'} & set(sys.modules);"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "l3ms demo",
        "constraints:",
        "--constraints.0.max 60",
        "--train.lora.target-modules",
        "--min",
        "report.png",
    ):
        assert words in done.stdout


def test_artefact_names_cover_what_a_run_writes():
    assert {"config.yaml", "metrics.jsonl", "model", "average", "report.json", "report.png"} < set(run_folder.ARTEFACTS)
