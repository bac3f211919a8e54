"""`l3ms` under torchrun, by hand and under `accelerate launch`: one rank writes and speaks, all agree, and what ends one ends all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import broken_ranks
import launches
import pytest
import resumed_runs
from resumed_runs import assert_same, rows

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
TRAIN = {"iterations": 5, "save_steps": 3, "agree_every": 2, "timeout": 120}


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer):
    """-> run.yaml of a run of two seconds, with two constraints, all that a run writes, and samples before it."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=17, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))
    other = {"train": "other.jsonl", "chat_template": False}
    return resumed_runs.project(
        tmp_path_factory.mktemp("ranks") / "project", tokenizer, model, train=TRAIN, logging={"tensorboard": True},
        evaluate={"samples": 17, "batch_size": 8, "initial": True},
        constraints=[
            {"type": "length", "min": 2, "max": 5},
            {"type": "data_nll", "name": "other", "max": 2.0, "batch_size": 4, "data": other},
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def launched(project, tmp_path_factory):
    """What two ranks of one torchrun have said and left: of each command (exit codes, stdout, stderr, each by rank)."""
    folder = tmp_path_factory.mktemp("said")
    out, resumed, bad = project.parent / "out", project.parent / "resumed", project.parent / "bad"
    memory = {"BROKEN": "memory:1"}
    commands: dict[str, Any] = {
        "train": [["train", project], {}],
        "memory": [["train", project, "--output", resumed], memory],
        "resume": [["train", project, "--output", resumed, "--resume"], {}],
        "full": [["train", project, "--output", project.parent / "full"], {"BROKEN": "full:1"}],
        "certify": [["certify", out, "--samples", 21], {}],
        "again": [["train", project], {}],
        "bad": [["train", project, "--output", bad, "--train.iterations", 0], {}],
        "differ": [[["train", project, "--output", bad, "--seed", seed] for seed in (1, 2)], {}],
        "bench": [["bench"], {}],
    }
    plan = {"folder": str(folder), "commands": list(commands.values())}
    (folder / "plan.json").write_text(json.dumps(plan, default=str))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", launches.__file__, str(folder / "plan.json")],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for number, name in enumerate(commands):
        ranks = [json.loads((folder / f"{number}-{rank}.json").read_text()) for rank in range(2)]
        found[name] = tuple([rank[key] for rank in ranks] for key in ("code", "out", "err"))
    return found


def one_line(launched, name, code):
    """What both ranks together have written to stderr, when both have ended with `code`."""
    codes, _, errors = launched[name]
    text = "".join(errors)
    assert codes == [code, code], text
    lines = [line for line in text.splitlines() if not line.startswith("iteration 1: all")]
    assert len(lines) == 1, text
    return lines[0]


def test_two_ranks_write_one_run_and_one_speaks(launched, project):
    codes, said, errors = launched["train"]
    assert codes == [0, 0], errors
    assert "L3M 5/5" in said[0]
    assert "Report and picture" in said[0]
    assert said[1] == ""
    assert errors[1] == ""
    out = project.parent / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "tensorboard", "model", "average", "inputs.json", "report.json", "report.png",
        "certificate.json",
    }  # fmt: skip
    assert [row["iteration"] for row in rows(out)] == [1, 2, 3, 4, 5]
    assert len(list(out.glob("tensorboard/events*"))) == 1
    report = json.loads((out / "report.json").read_text())
    assert {report[name]["samples"] for name in ("initial", "last", "average")} == {17}
    assert report["average"]["constraints"]["other"]["samples"] == 5, "each held-out row once, not once per rank"


def test_what_ends_one_rank_ends_both_with_its_line(launched):
    """A rank that is out of memory in iteration 4: both end as it does, and it says so."""
    line = one_line(launched, "memory", 5)
    assert line.startswith("l3ms: rank 1: out of memory: wanted 3 GiB")


def test_a_disk_that_is_full_for_one_rank_leaves_no_half_of_a_checkpoint(launched, project):
    line = one_line(launched, "full", 5)
    assert line.startswith("l3ms: rank 1: the disk is full")
    assert {path.name for path in (project.parent / "full" / "checkpoints").iterdir()} == {
        "inputs.json",
        "initial.json",
    }


def test_a_run_of_two_ranks_is_resumed_bit_for_bit(launched, project):
    codes, said, errors = launched["resume"]
    assert codes == [0, 0], errors
    assert "Resuming at iteration 3" in said[0]
    (project.parent / "out" / "certificate.json").unlink(missing_ok=True)
    assert_same(project.parent / "resumed", project.parent / "out")


def test_a_certificate_is_of_the_samples_of_both(launched):
    codes, said, errors = launched["certify"]
    assert codes[0] == codes[1] in (0, 3, 4), errors
    assert "21 fresh responses to 21 held-out prompts" in said[0]
    assert said[1] == errors[1] == ""


def test_what_is_wrong_on_all_is_said_once(launched, project):
    assert "is not empty; choose another" in one_line(launched, "again", 2)
    assert one_line(launched, "bad", 2).endswith("train.iterations: must be greater than or equal to 1, got 0")
    assert "l3ms bench is for one process, got 2" in one_line(launched, "bench", 2)
    assert not (project.parent / "bad").exists()


def test_ranks_of_other_configurations_do_not_begin(launched):
    assert one_line(launched, "differ", 2).endswith("seed: is 2 on rank 1, and 1 on the others")


# ---- what ends one rank, in processes that were started by hand ----

SAID = {
    "version": (5, "rank 1 runs l3m_kernels 9.9.9, and the others "),
    "data": (2, "data.train: has other contents on rank 1 than on the others"),
    "rows": (2, "data.train: has other contents on rank 1 than on the others"),
    "memory": (5, "rank 1: out of memory: wanted 3 GiB"),
    "reward": (2, "rank 1: constraint 'polite': no luck"),
    "nan": (1, "rank 1: RuntimeError: the probabilities of the next token are not finite"),
    "drift": (5, "iteration 4: rank 1 in model.embed_tokens.weight differs from the other ranks"),
    "multiplier": (5, "iteration 4: rank 1 in the multipliers differs from the other ranks"),
    "stuck": (5, "rank 1 (process "),
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_broken_rank_ends_all_and_is_named(world, project, tmp_path):
    plan = {what: ["train", str(project), "--output", str(tmp_path / what), "--train.timeout", "10"] for what in SAID}
    code = (
        "import json, sys, launches; launches.load()\n"
        f"for what, arguments in {plan!r}.items():\n"
        f"    launch = launches.Launch({world}, arguments, {str(tmp_path / 'said')!r}, {{'BROKEN': f'{{what}}:1'}}.items())\n"
        "    launch.wait(90); launch.end()\n"
        "    print(json.dumps([what, launch.codes, launch.errors()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [what for what, _, _ in found] == list(SAID)
    for what, codes, errors in found:
        wanted, said = SAID[what]
        lines = [line for line in errors.splitlines() if line.startswith("l3ms: ")]
        assert set(codes.values()) == {wanted}, (what, codes, errors)
        assert len(lines) == 1, errors
        assert said in lines[0], (what, lines)
        assert "Traceback" not in errors
    assert broken_ranks.AT % TRAIN["agree_every"] == 0


@pytest.mark.slow
def test_killed_and_stopped_ranks(project, tmp_path):
    """20 kills and 5 stops at random places, of 2 and of 4 ranks: the others end in time and name it; resumed, the bits are the same."""
    import killed_ranks

    command = [sys.executable, killed_ranks.__file__, str(project), str(tmp_path / "killed"), "20", "5", "0", "2,4"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "killed" / "found.json").read_text())
    assert len(found) == 25
    for row in found:
        others = {rank: code for rank, code in row["codes"].items() if int(rank) != row["rank"]}
        assert len(others) == row["world"] - 1
        assert set(others.values()) == {5}, row
        assert f"rank {row['rank']}" in row["said"], row
        assert set(row["resumed"].values()) == {0}, row
        assert row["same"] is True, row
        assert max(row["seconds"].values()) < killed_ranks.TIMEOUT + 10, row


@pytest.mark.slow
def test_another_number_of_ranks_does_not_go_on(project, tmp_path):
    code = (
        "import json, launches; launches.load()\n"
        f"arguments = ['train', {str(project)!r}, '--output', {str(tmp_path / 'out')!r}]\n"
        f"for world, more in ((2, ['--train.save-steps', '3']), (3, ['--resume'])):\n"
        f"    launch = launches.Launch(world, arguments + more, {str(tmp_path / 'said')!r}, "
        "({'BROKEN': 'memory:1'} if world == 2 else {}).items())\n"
        "    launch.wait(90); launch.end()\n"
        "    print(json.dumps([launch.codes, launch.errors()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    [_, (codes, errors)] = [json.loads(line) for line in done.stdout.splitlines()]
    assert set(codes.values()) == {2}, errors
    assert "is one of 2 processes and this is one of 3" in errors


@pytest.mark.slow
def test_accelerate_launches_it(project, tmp_path):
    """It says `--multi-gpu` for processes on CPUs as well."""
    command = ["-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes", "2", "-m", "l3ms"]
    options = ["--output", str(tmp_path / "out"), "--train.iterations", "2"]
    done = subprocess.run(
        [sys.executable, *command, "train", str(project), *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report and picture") == 1
    refused = [
        *command[:2],
        "--mixed-precision",
        "bf16",
        *command[2:],
        "train",
        str(project),
        "--output",
        str(tmp_path / "other"),
    ]
    done = subprocess.run([sys.executable, *refused], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert done.stderr.count("l3ms: ") == 1
    assert "train.autocast: accelerate launch asks for bf16" in done.stderr


@pytest.mark.slow
def test_two_machines_share_a_folder(project, tmp_path):
    """Two launchers of one rank each, as on two machines."""
    port, out = launches.free_port(), tmp_path / "out"

    def node(number):
        place = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
        command = [
            "-m",
            "torch.distributed.run",
            *place,
            "--master-port",
            str(port),
            "-m",
            "l3ms",
            "train",
            str(project),
        ]
        return subprocess.Popen(
            [sys.executable, *command, "--output", str(out), "--train.iterations", "2"],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    nodes = [node(0), node(1)]
    said = [process.communicate(timeout=300) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    assert "Report and picture" in said[0][0]
    assert said[1][0] == ""
    assert Path(out / "report.png").exists()
