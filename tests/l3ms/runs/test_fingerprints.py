"""`--resume` compares what a run starts from as a whole: weights, columns, both sides of the data, references, rewards, tokenizer."""

import datetime
import json

import pytest
import torch
from resumed_runs import interrupted, project, train
from safetensors.torch import load_file, save_file

from l3ms.runs import fingerprints

CONSTRAINTS = [
    {"type": "length", "min": 2, "max": 5},
    {"type": "kl", "reference": "reference", "max": 50},
    {"type": "function", "name": "even", "function": "rewards.py:even", "min": 0.01},
    {"type": "data_nll", "name": "other", "max": 20, "data": {"train": "other.jsonl", "chat_template": False}},
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=17, **sizes, **special))
    folder = tmp_path_factory.mktemp("begun") / "project"
    folder.mkdir()
    model.save_pretrained(folder / "reference")
    config = project(
        folder, tokenizer, model, constraints=CONSTRAINTS, train={"iterations": 4, "save_steps": 1}, watch=None
    )
    interrupted(config, 3, "--allow-code")
    return config


def last_number(path):
    """Another last number in the largest tensor: beyond the beginning of each."""
    found = load_file(path)
    name = max(found, key=lambda key: found[key].numel())
    found[name].reshape(-1)[-1] += 1e-3
    save_file(found, path, metadata={"format": "pt"})


def comment(path):
    path.write_text(path.read_text() + "# changed\n")


def column(path):
    """Another column in one row, of the side that is held out or not."""
    lines = path.read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"prompt": "a f"})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "change", "field"),
    [
        ("base/model.safetensors", last_number, "model"),
        ("reference/model.safetensors", last_number, "constraints.1.reference"),
        ("rewards.py", comment, "constraints.2.function"),
        ("rows.jsonl", column, "data.train"),
        ("other.jsonl", column, "constraints.3.data.train"),
    ],
)
def test_what_changed_is_named(begun, capsys, file, change, field):
    path = begun.parent / file
    before = path.read_bytes()
    change(path)
    try:
        assert train(begun, "--resume", "--allow-code") == 2
    finally:
        path.write_bytes(before)
    assert f"{field}: is not what the run was begun with: its contents have changed" in capsys.readouterr().err


def test_rows_are_compared_with_all_their_columns():
    row = {"input_ids": [1], "labels": [1], "prompt": "a", "answer": 3, "when": datetime.date(2020, 1, 1)}
    digest = fingerprints.of_rows([row])
    assert digest == fingerprints.of_rows([dict(reversed(row.items()))])
    for change in ({"answer": 4}, {"prompt": "b"}, {"when": datetime.date(2020, 1, 2)}, {"more": None}):
        assert fingerprints.of_rows([row | change]) != digest
    assert fingerprints.of_rows([row | {"x": object()}]) == fingerprints.of_rows([row | {"x": object()}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_a_model_counts(make_model, dtype):
    model = make_model().to(dtype)
    digest = fingerprints.of_model(model)
    assert digest == fingerprints.of_model(make_model().to(dtype))
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        before = flat[-1].clone()
        flat[-1] = torch.nextafter(before, before + 1) if dtype == torch.float32 else before * 1.01 + 0.01
        assert fingerprints.of_model(model) != digest
        flat[-1] = before
    assert fingerprints.of_model(model) == digest


def test_a_run_of_0_1_0_is_compared_as_0_1_0_did(tmp_path):
    from l3ms.config.yaml_reader import ConfigError
    from l3ms.runs.resuming import check_inputs, write_inputs

    write_inputs(tmp_path, {"model": "a", "data.train": "b"})
    check_inputs(tmp_path, {"format": 2, "model": "new"}, lambda: {"model": "a", "data.train": "b"})
    with pytest.raises(ConfigError, match=r"data\.train: is not what the run was begun with"):
        check_inputs(tmp_path, {"format": 2, "model": "new"}, lambda: {"model": "a", "data.train": "c"})
