"""`train.attn_implementation`: what a run asks for is what its training and its certificate compute with, or a line says why not."""

import json
from typing import Any

import pytest
from resumed_runs import project, train
from rich.console import Console
from transformers import GptOssConfig, GptOssForCausalLM, LlamaModel

from l3ms.commands.command_line import main
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.models import load_model


@pytest.fixture
def computed(monkeypatch):
    """The attention of every forward of a policy."""
    found, forward = [], LlamaModel.forward

    def noted(self, *arguments, **options):
        found.append(self.config._attn_implementation)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LlamaModel, "forward", noted)
    return found


def loss(config):
    lines = [json.loads(line) for line in (config.parent / "out" / "metrics.jsonl").read_text().splitlines()]
    return next(line["loss"] for line in lines if "loss" in line)


def test_training_and_certificate_compute_with_what_was_asked_for(tmp_path, tokenizer, make_model, computed):
    losses = []
    for wanted, lora in ((None, None), ("eager", None), ("eager", {"r": 2})):
        changes = {"attn_implementation": wanted, "iterations": 2, "lora": lora}
        config = project(tmp_path / f"{len(losses)}", tokenizer, make_model(), train=changes)
        assert train(config) == 0
        assert main(["certify", str(config.parent / "out"), "--samples", "8", "--weights", "last"]) in (0, 3, 4)
        assert set(computed) == {wanted or "sdpa"}
        computed.clear()
        losses.append(loss(config))
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-4)] * 2


def test_what_is_not_installed_is_refused_before_a_hub_is_asked(tmp_path, tokenizer, make_model, capsys, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: pytest.fail("a hub"))
    config = project(tmp_path / "project", tokenizer, make_model(), train={"attn_implementation": "flash_attention_2"})
    assert train(config) == 2
    assert "train.attn_implementation: flash_attention_2 is not installed here" in capsys.readouterr().err
    assert not (config.parent / "out").exists()


def test_a_name_that_is_none_is_refused(tmp_path, tokenizer, make_model, capsys):
    for name in ("strange", "kernels-community/flash-attn", "paged|eager"):
        config = project(tmp_path / "project", tokenizer, make_model(), train={"attn_implementation": name})
        assert train(config) == 2
        assert "train.attn_implementation" in capsys.readouterr().err


def test_a_model_that_has_it_not_says_so(tmp_path, tokenizer):
    heads: dict[str, Any] = {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    config = GptOssConfig(vocab_size=len(tokenizer), **heads, **sizes)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"train.attn_implementation: sdpa is not for .*scaled_dot_product_attention"):
        load_model(str(tmp_path), dtype="float32", attn_implementation="sdpa", console=Console(quiet=True))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^model: cannot load"):
        load_model(str(tmp_path), dtype="float32", attn_implementation="eager", console=Console(quiet=True))
