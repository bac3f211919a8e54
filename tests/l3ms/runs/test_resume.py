"""`l3ms train --resume`: a run that was ended, however and wherever, goes on and is the run that was not, bit for bit."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from namespaces import in_a_namespace
from resumed_runs import CONFIGS, assert_same, interrupted, project, report, rows, train
from transformers import TrainerControl, TrainerState, TrainingArguments

from l3ms.runs import executing as run
from l3ms.runs import resuming
from l3ms.training import checkpoints

SAME_THREADS = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of another split have other bits


def one_line(capsys):
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """A run that nobody interrupted, and its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=17, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))
    config = project(tmp_path_factory.mktemp("whole") / "project", tokenizer, model)
    assert train(config) == 0
    return config, config.parent / "out"


def test_a_run_that_is_going_on_is_left_alone(whole, tmp_path, capsys, monkeypatch):
    config, out, ends, real = whole[0], tmp_path / "out", [], run.save_weights

    def meanwhile(*arguments):
        ends.extend(train(config, "--output", out, option) for option in ("--resume", "--overwrite"))
        return real(*arguments)

    monkeypatch.setattr(run, "save_weights", meanwhile)
    assert train(config, "--output", out) == 0
    assert ends == [2] * 4  # weights, and their average
    assert capsys.readouterr().err.count(f"a run in {out} is going on in another process") == 4
    assert_same(out, whole[1])
    monkeypatch.undo()
    assert train(config, "--output", out, "--resume") == 0  # it is finished


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n != "several" else n for n in CONFIGS],
)
def test_every_kind_of_run_goes_on(tmp_path, tokenizer, make_model, name):
    configs = [project(tmp_path / part, tokenizer, make_model(), **CONFIGS[name]) for part in ("whole", "stopped")]
    assert train(configs[0]) == 0
    interrupted(configs[1], 8)
    out = configs[1].parent / "out"
    assert [path.name for path in checkpoints.checkpoints(out / "checkpoints")] == ["checkpoint-6", "checkpoint-3"]
    assert train(configs[1], "--resume") == 0
    assert_same(out, configs[0].parent / "out")


# One process is told of all the runs, and each of them is a fork of it: imports are most of what a run takes.
KILLED = """
import gc, os, signal, sys
import torch
from l3ms.training import checkpoints
from l3ms.runs import report, executing as run
from l3ms.commands.command_line import main
places = {
    "step": (run.L3MTrainer, "average_weights", 8), "first": (checkpoints, "_flush", 5), "seal": (checkpoints, "_flush", 20),
    "average": (run, "save_weights", 2), "report": (run, "write_report", 1), "picture": (report, "plot_run", 1),
}
torch.set_num_threads(int(sys.argv[1]))
gc.freeze()
for where, (owner, name, at) in places.items():
    child = os.fork()
    if child == 0:
        whole, calls = getattr(owner, name), []
        def killed(*arguments, **options):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments, **options)
        setattr(owner, name, killed)
        try:
            main(["train", sys.argv[2], "--output", os.path.join(sys.argv[3], where)])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, where
"""


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory):
    """A folder with a run for each place where it was killed."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(torch.get_num_threads()), str(whole[0]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=SAME_THREADS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("first", "has no checkpoint to resume from: beginning anew"),
        ("seal", "Resuming at iteration 3, from "),
        ("step", "Resuming at iteration 6, from "),
        ("average", "Resuming at iteration 10, from "),
        ("report", "Resuming at iteration 10, from "),
        ("picture", " is finished."),
    ],
)
def test_a_killed_run_goes_on(whole, killed, capsys, where, said):
    config, expected = whole
    out = killed / where
    assert train(config, "--output", out, "--resume") == 0
    assert said in capsys.readouterr().out.replace("\n", " ")
    assert_same(out, expected)


@pytest.mark.slow
def test_a_run_killed_thirty_times_is_the_run_that_was_not(whole, tmp_path):
    """At random moments, each time gone on with; a run of its own after each that has come to its end."""
    config, expected = whole
    command = [sys.executable, "-m", "l3ms", "train", str(config), "--resume", "--output"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "timed")], check=True, capture_output=True, env=SAME_THREADS)
    needed, picks, kills, runs = time.monotonic() - start, random.Random(0), 0, 0
    while kills < 30:
        out = tmp_path / f"out-{runs}"
        with subprocess.Popen(
            [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=SAME_THREADS
        ) as process:
            try:
                process.wait(picks.uniform(0.4, 1.05) * needed)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                continue
            assert process.stderr is not None
            assert process.returncode == 0, process.stderr.read()
        assert_same(out, expected)
        runs += 1
    subprocess.run([*command, str(out)], check=True, capture_output=True, env=SAME_THREADS)
    assert_same(out, expected)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(whole, tmp_path, capsys):
    config, expected = whole
    out = tmp_path / "out"
    interrupted(config, 8, "--output", out)
    newest = out / "checkpoints" / "checkpoint-6"
    os.truncate(newest / "optimizer.safetensors", 100)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "sec')  # half a line
    assert train(config, "--output", out, "--resume") == 0
    said = capsys.readouterr().out
    assert f"{newest} is not used: optimizer.safetensors is not what was written" in said
    assert f"Resuming at iteration 3, from {out / 'checkpoints' / 'checkpoint-3'}" in said
    assert_same(out, expected)


def test_a_checkpoint_has_no_pickle(whole, tmp_path):
    config, _ = whole
    out = tmp_path / "out"
    interrupted(config, 5, "--output", out)
    files = {path.name for path in (out / "checkpoints" / "checkpoint-3").rglob("*")}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja"}
    assert {"model.safetensors", "optimizer.json", "optimizer.safetensors", "scheduler.json", "random.json", "watch.json",
            "trainer_state.json", "l3m.json", "manifest.json"} <= files  # fmt: skip


def test_without_checkpoints_it_begins_anew(whole, tmp_path, capsys):
    config, expected = whole
    out = tmp_path / "out"
    interrupted(config, 8, "--output", out, "--train.save-steps", "null")
    assert not checkpoints.checkpoints(out / "checkpoints")
    assert train(config, "--output", out, "--resume") == 0
    assert "beginning anew" in capsys.readouterr().out
    assert_same(out, expected)


def test_a_finished_run_stays_as_it_is_and_an_empty_folder_begins(whole, tmp_path, capsys):
    config, expected = whole
    out = tmp_path / "out"
    out.mkdir()
    assert train(config, "--output", out, "--resume") == 0
    assert_same(out, expected)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert train(config, "--output", out, "--resume") == 0
    assert capsys.readouterr().out == f"The run in {out} is finished.\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_run_is_found_where_it_was_moved_to_and_may_be_evaluated_otherwise(whole, tmp_path):
    config, expected = whole
    interrupted(config, 8, "--output", tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert train(moved / "config.yaml", "--output", moved, "--resume", "--evaluate.samples", 32) == 0
    assert report(moved)["average"]["samples"] == 32
    assert rows(moved) == rows(expected)


def test_checkpoints_are_saved_as_often_as_is_asked_for_now():
    args, before = TrainingArguments(save_steps=1), TrainerState(save_steps=50)  # as it comes from a checkpoint
    resuming.SavedAsNow().on_train_begin(args, before, TrainerControl())
    assert before.save_steps == 1


@pytest.fixture
def stopped(tmp_path, tokenizer, make_model):
    config = project(tmp_path / "project", tokenizer, make_model())
    interrupted(config, 5)
    return config


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--train.learning-rate", "1e-3", "train.learning_rate: is 0.001, but was 0.01 when the run in "),
        ("--seed", "1", "seed: is 1, but was 0 when"),
        ("--iterations", "20", "train.iterations: is 20, but was 10 when"),
        ("--constraints.0.max", "6", "constraints.0.max: is 6.0, but was 5.0 when"),
        ("--constraints.1", "{type: kl, max: 3}", "constraints.1."),
        ("--train.lora.r", "4", "train.lora"),
        ("--data.evaluation-share", "0.4", "data.evaluation_share: is 0.4, but was 0.5 when"),
        ("--overwrite", None, "resume: --resume goes on with a run and --overwrite replaces it: choose one"),
    ],
)
def test_another_configuration_is_refused(stopped, capsys, flag, value, said):
    before = {path: path.stat().st_mtime_ns for path in stopped.parent.rglob("*")}
    assert train(stopped, "--resume", flag, *([] if value is None else [value])) == 2
    assert said in one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in stopped.parent.rglob("*")} == before


def test_other_data_and_other_weights_under_the_same_name_are_refused(stopped, capsys, tokenizer, make_model):
    data = stopped.parent / "rows.jsonl"
    text = data.read_text()
    lines = text.splitlines()
    data.write_text("\n".join([*lines[:-1], json.dumps({"prompt": "a", "completion": "b"})]))
    assert train(stopped, "--resume") == 2
    assert "data.train: is not what the run was begun with" in one_line(capsys)
    data.write_text(text)
    make_model(seed=1).save_pretrained(stopped.parent / "base")
    assert train(stopped, "--resume") == 2
    assert "model: is not what the run was begun with" in one_line(capsys)


def test_a_folder_of_something_else_is_refused(stopped, tmp_path, capsys):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("1")
    assert train(stopped, "--resume", "--output", other) == 2
    assert "output:" in one_line(capsys)
    out = stopped.parent / "out"
    (out / "config.yaml").write_text("{")
    assert train(stopped, "--resume") == 2
    assert "resume:" in one_line(capsys)
    (out / "config.yaml").write_text(yaml.safe_dump({}))
    assert train(stopped, "--resume") == 2
    assert "resume:" in one_line(capsys)


def test_one_of_several_processes_is_refused_where_it_is_not_said_which(whole, tmp_path, monkeypatch, capsys):
    """Each of them would write to the one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(whole[0], "--output", tmp_path / "out") == 2
    assert "RANK is not set: start the processes with torchrun or accelerate launch" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_that_it_can_be_resumed(whole, tmp_path, monkeypatch, capsys):
    config, _ = whole

    half_step = run.L3MTrainer.constraint_half_step
    calls = []

    def at_five(self):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        half_step(self)

    monkeypatch.setattr(run.L3MTrainer, "constraint_half_step", at_five)
    assert train(config, "--output", tmp_path / "out") == 130
    text = one_line(capsys)
    assert "kept: 4 iterations in" in text
    assert f"--resume goes on from {tmp_path / 'out' / 'checkpoints' / 'checkpoint-3'}" in text


def test_what_the_watch_saw_before_is_in_the_report(tmp_path, tokenizer, make_model):
    """A rule that trips soon, and warns once; the resumed run neither forgets it nor warns again."""
    watch = {"window": 2, "ended_fall": 0.001, "distinct_2_fall": 0.001, "every": 0, "held_out_every": 0}
    changes = {"watch": {**watch, "on_trip": "warn"}, "train": {"max_new_tokens": 8, "save_steps": 6}}
    configs = [project(tmp_path / part, tokenizer, make_model(), **changes) for part in ("whole", "stopped")]
    assert train(configs[0]) == 0
    assert any(trip["iteration"] <= 6 for trip in report(configs[0].parent / "out")["tripped"])
    interrupted(configs[1], 9)
    assert train(configs[1], "--resume") == 0
    assert_same(configs[1].parent / "out", configs[0].parent / "out")


def test_a_disk_that_gets_full_leaves_a_checkpoint_to_go_on_from(whole, tmp_path, capfd):
    """On a file system with room for a checkpoint and a half: one line, exit 5, and after tidying up the run goes on."""
    config, expected = whole
    script = (
        'mount -t tmpfs -o size="$5" tmpfs "$1" && "$2" -m l3ms train "$3" --output "$1/out"; '
        'echo $? > "$4/code"; cp -r "$1/out" "$4/out"'
    )
    interrupted(config, 5, "--output", tmp_path / "measured")
    files = [path for path in (tmp_path / "measured").rglob("*") if path.is_file()]
    room = 3 * sum(-(-path.stat().st_size // 4096) * 4096 for path in files) // 2
    (tmp_path / "small").mkdir()
    command = ["sh", "-c", script, "sh", *map(str, (tmp_path / "small", sys.executable, config, tmp_path, room))]
    done = subprocess.run(in_a_namespace(*command), capture_output=True, text=True, timeout=120, env=SAME_THREADS)
    assert (tmp_path / "code").read_text() == "5\n", done.stderr
    (error,) = [
        line for line in done.stderr.splitlines() if "training goes on" not in line
    ]  # the watch may have its say
    assert "the disk is full" in error
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-3", "inputs.json"]
    assert train(config, "--output", out, "--resume") == 0
    assert f"Resuming at iteration 3, from {out}" in capfd.readouterr().out
    assert_same(out, expected)
