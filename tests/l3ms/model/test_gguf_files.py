"""A GGUF file becomes a checkpoint: every weight, the tokenizer, nothing that says it is quantised; the line that a user is told runs."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from l3ms.config.yaml_reader import ConfigError
from l3ms.model import gguf_files
from l3ms.model.gguf_files import convert

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")


@pytest.fixture
def tiny(tmp_path):
    from tiny_gguf import write_gguf

    path = tmp_path / "it's tiny.gguf"
    return path, write_gguf(path)


@needs_gguf
def test_the_checkpoint_has_what_the_file_has(tiny, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, written = tiny
    state = torch.random.get_rng_state()
    convert(path, tmp_path / "checkpoint")
    assert torch.equal(torch.random.get_rng_state(), state)
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for name, place in {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    }.items():  # fmt: skip
        torch.testing.assert_close(
            saved[f"{place}.weight"], torch.from_numpy(written[f"{name}.weight"]), rtol=0, atol=0
        )
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    ids = tokenizer("Return the names.", return_tensors="pt")["input_ids"]
    assert torch.equal(read(ids).logits, model(ids).logits)
    assert "quantization_config" not in json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert tokenizer.padding_side == "left"
    assert (tokenizer.eos_token, model.generation_config.eos_token_id) == ("<|im_end|>", 1)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@needs_gguf
def test_the_line_that_refuses_one_says_what_works(tiny, tmp_path):
    from rich.console import Console

    from l3ms.runs.models import load_model

    path, _ = tiny
    with pytest.raises(ConfigError, match=r"^model: a GGUF file is for inference") as refused:
        load_model(str(path), dtype="float32", console=Console())
    command = str(refused.value)[str(refused.value).index("python -c ") :].rpartition(" (needs")[0]
    program, *arguments = shlex.split(command)
    assert program == "python"
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=here, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    load_model(str(tmp_path / "checkpoint"), dtype="float32", console=Console())


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    from l3ms.extras import missing

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError) as failed:
        gguf_files.convert(tmp_path / "x.gguf", tmp_path / "checkpoint")
    assert missing("it", failed.value) == (
        'it needs gguf, which is not installed: pip install ".[real]" in the source tree brings it'
    )
    assert not (tmp_path / "checkpoint").exists()
