"""Each example runs, tiny. Those for one process are called here; those for several in `several_processes.py`, all in one launch."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def test_each_is_short_enough_to_be_read():
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert scripts
    assert {path.name: count for path in scripts if (count := len(path.read_text().splitlines())) > 80} == {}


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning(project, checkpoint):
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(EXAMPLES / "lightning_loop.py"),
        str(checkpoint),
        "rows.jsonl",
        "4",
        "9",
        "6",
        "16",
    ]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'constraints/length/lambda': " in done.stdout


def test_dpo_tells_pairs_apart(here, checkpoint, capsys):
    rows = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()[:8]]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "kappa " * 5} for row in rows]
    (here / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    example("dpo_loop").main(checkpoint, "pairs.jsonl", iterations=8, rate=1e-2)
    assert "100% of the last pairs told apart" in capsys.readouterr().out


def test_rloo_and_its_bound(here, checkpoint, capsys):
    example("rloo_loop").main(checkpoint, "rows.jsonl", low=4, high=9, iterations=3, new_tokens=16)
    assert "'constraints/length/lambda': " in capsys.readouterr().out


def test_grpo(here, checkpoint, capsys):
    example("grpo_loop").main(checkpoint, "rows.jsonl", iterations=2, new_tokens=16)
    assert capsys.readouterr().out.startswith("reward ")


def test_accelerate(here, checkpoint, capsys):
    example("accelerate_loop").main(checkpoint, "rows.jsonl", low=4, high=9, iterations=2, new_tokens=16, cpu=True)
    assert "'constraints/length/lambda': " in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_trls_trainers(here, checkpoint, capsys, kind):
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "pad_token": "</s>"}))
    example("trl_trainers").main(
        kind, checkpoint, "rows.jsonl", low=4, high=9, iterations=2, new_tokens=16, use_cpu=True, bf16=False
    )
    assert "'constraints/length/lambda': " in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore")  # its own
def test_three_lines_of_grpo_and_a_certificate(here, checkpoint, capsys):
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "pad_token": "</s>"}))
    verdict = example("trl_certified").main(checkpoint, "rows.jsonl", "rows.jsonl", most=2, iterations=2, new_tokens=16)
    assert verdict.verdict == "VIOLATED"  # after 2 iterations, far above its bound
    assert "at most 2: VIOLATED" in capsys.readouterr().out


def test_the_notebook_trains_certifies_and_plots(here, checkpoint, monkeypatch, capsys):
    """Its cells, one after the other; a Jupyter is not needed for that."""
    for name, value in {
        "MODEL": checkpoint,
        "ROWS": "rows.jsonl",
        "LONGEST": 16,
        "ITERATIONS": 4,
        "MPLBACKEND": "Agg",
    }.items():
        monkeypatch.setenv(name, str(value))
    notebook = json.loads((EXAMPLES / "train_certify_plot.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # nothing of the machine where it was last run
            exec("".join(cell["source"]), names)
    assert names["verdict"].verdict == "VIOLATED"  # after 4 iterations, far above its bound
    assert "VIOLATED: mean " in capsys.readouterr().out
    assert (here / "run.png").stat().st_size > 10_000


class Scores(http.server.BaseHTTPRequestHandler):
    """The share of vowels of each text."""

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        self.server.asked.append(len(texts))  # type: ignore[attr-defined]
        body = json.dumps({"scores": [sum(map(text.count, "aeiou")) / max(len(text), 1) for text in texts]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


def test_a_reward_over_http(here, checkpoint, capsys):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scores) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        example("reward_service").main(
            checkpoint, "rows.jsonl", f"http://127.0.0.1:{server.server_port}", iterations=2, new_tokens=16
        )
        server.shutdown()
        assert server.asked == [8, 8]  # type: ignore[attr-defined]
    assert "'constraints/service/estimate': " in capsys.readouterr().out


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, checkpoint):
    """-> what each example for several processes printed on two."""
    from cli_projects import WORDS

    folder = tmp_path_factory.mktemp("ranks")
    rows = [{"prompt": f"{WORDS[i % 8]} {i}:", "completion": " ".join(WORDS[i % 4 :][:4])} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    script = Path(__file__).with_name("several_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, str(script), str(checkpoint), "rows.jsonl"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "printed.json").read_text())


def test_a_loop_under_ddp_and_the_same_under_fsdp2(on_two_ranks):
    assert on_two_ranks["ddp"]["constraints/length/lambda"] > 0
    assert on_two_ranks["ddp"].keys() == on_two_ranks["fsdp2"].keys()
    for name, value in on_two_ranks["ddp"].items():
        assert on_two_ranks["fsdp2"][name] == pytest.approx(value, abs=2e-3), name


@pytest.mark.parametrize("name", ["trainer", "tensor_parallel"])
def test_on_several_processes(on_two_ranks, name):
    assert on_two_ranks[name]["constraints/length/lambda"] > 0


def test_accelerate_reads_the_configuration_for_fsdp2():
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(EXAMPLES / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
