"""What the tests of `l3ms train` share: a checkpoint, a folder as a user has it, and how the command is run there."""

import json
import random
from typing import Any

import pytest
import yaml

WORDS = ["alpha", "beta", "gamma", "delta", "eta", "theta", "iota", "kappa"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWARDS = """
import math

def vowels(prompts, completions, **kwargs):
    return [sum(map(text.count, "aeiou")) / max(len(text), 1) for text in completions]

def short(prompts, completions, answer, **kwargs):
    assert len(answer) == len(prompts) == len(completions)
    return [None if index % 4 == 0 else 1.0 for index, _ in enumerate(completions)]

def one(prompts, completions, **kwargs): return [1.0]
def nan(prompts, completions, **kwargs): return [math.nan] * len(completions)
def gaps(prompts, completions, **kwargs): return [math.nan if i % 4 == 0 else 0.6 for i, _ in enumerate(completions)]
def text(prompts, completions, **kwargs): return ["good"] * len(completions)
def number(prompts, completions, **kwargs): return 1.0
def broken(prompts, completions, **kwargs): raise RuntimeError("no luck")
def later(prompts, completions, **kwargs): return [1.0] * (len(completions) if len(completions) < 8 else 3)
constant = 3
"""
QUITS = "raise SystemExit('usage: rewards.py FILE')"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of 20,000 parameters with random weights, and a tokenizer without a padding token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"vocab_size": 300, "special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet}
    backend.train_from_iterator(WORDS * 9, trainers.BpeTrainer(show_progress=False, **options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=96, bos_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path, checkpoint):
    """A folder as a user has it: 200 rows, rewards.py and run.yaml; the run takes about a second."""
    picks = random.Random(0)
    rows = [
        {"prompt": f"{picks.choice(WORDS)} {i}:", "completion": " ".join(picks.choices(WORDS, k=6)), "answer": i}
        for i in range(200)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "quits.py").write_text(QUITS)
    values = {
        "model": str(checkpoint), "output": "out", "data": {"train": "rows.jsonl"},
        "constraints": [{"type": "length", "min": 4, "max": 9}],
        "train": {"iterations": 5, "batch_size": 4, "constraint_batch_size": 8, "learning_rate": 1e-3,
                  "max_new_tokens": 16},
        "evaluate": {"samples": 16, "batch_size": 16, "initial": False}, "logging": {"tensorboard": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def l3ms(*arguments):
    from l3ms.commands.command_line import main

    return main(["train", *map(str, arguments)])


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err
