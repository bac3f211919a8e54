"""Checkpoints of strangers: loading one runs nothing, unpickles nothing, waits on nothing, and fetches no code."""

import ast
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms
from l3ms.model.pretrained import load_tokenizer, load_whole

PACKAGE = Path(l3ms.__file__).parent


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder, **options):
    load_tokenizer(AutoTokenizer, folder, **options)
    return load_whole(AutoModelForCausalLM, folder, **options)


def test_only_one_place_calls_from_pretrained_and_says_what_may_run():
    calls = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                calls.append(path.name)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert named["trust_remote_code"] == "trust_remote_code"
    assert calls == ["pretrained.py"] * 2


def test_nothing_of_the_package_unpickles():
    loaders = {"load": {"torch", "pickle", "dill", "joblib", "marshal"}, "read_pickle": {"pd", "pandas"}}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id not in loaders.get(node.attr, ()), f"{path}: {node.value.id}.{node.attr}"


def test_a_checkpoint_is_what_was_saved(folder, make_model):
    again = load(folder)
    for (name, wanted), (_, found) in zip(make_model().named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(wanted, found), name


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin"])
def test_pickles_are_refused_with_the_way_out(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "canary")}))
    with pytest.raises(ValueError, match=r"is a pickle, and those are never loaded: save it again as safetensors"):
        load(folder)
    assert not (tmp_path / "canary").exists()


def test_a_pickle_beside_safetensors_is_not_read(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    load(folder)
    assert not (tmp_path / "canary").exists()


def test_a_pickle_that_a_json_names_is_refused(folder, tmp_path):
    (folder / "evil.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names 'evil.bin', which is a pickle"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    change(folder / "config.json", transformers_weights="evil.bin")
    with pytest.raises(ValueError, match=r"names 'evil.bin', which is a pickle"):
        load(folder)
    assert not (tmp_path / "canary").exists()


def test_code_in_a_folder_does_not_run_unless_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    body = f"import os; os.makedirs({str(tmp_path / 'canary')!r}, exist_ok=True)\n"
    (folder / "custom.py").write_text(
        f"{body}from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): model_type = 'of-a-stranger'\nclass M(LlamaForCausalLM): config_class = C\n"
    )
    auto = {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}
    change(folder / "config.json", auto_map=auto, model_type="of-a-stranger")
    with pytest.raises(ValueError, match=r"(?i)custom code"):
        load_whole(AutoModelForCausalLM, folder)
    assert not (tmp_path / "canary").exists()
    load_whole(AutoModelForCausalLM, folder, trust_remote_code=True)
    assert (tmp_path / "canary").exists()  # the canary can sing


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["stranger/kernel", "kernels-community/flash-attn:run", {"": "stranger/kernel"}])
def test_kernels_of_a_hub_are_refused(folder, key, value):
    change(folder / "config.json", **{key: value})
    with pytest.raises(ValueError, match=f"wants {key} .*, code from a hub"):
        load(folder)


@pytest.mark.parametrize("value", ["flash_attention_2", "paged|flash_attention_2", {"": "flash_attention_2"}])
def test_flash_attention_that_a_hub_would_be_asked_for_is_refused(folder, monkeypatch, value):
    """Where its package is not installed and `kernels` is, transformers fetches one of a hub."""
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: pytest.fail("a hub"))
    change(folder / "config.json", attn_implementation=value)
    with pytest.raises(ValueError, match=r"wants attn_implementation '(paged.)?flash_attention_2', code from a hub"):
        load(folder)


@pytest.mark.parametrize("value", ["deepgemm", "sonicmoe", {"text_config": "sonicmoe"}])
def test_experts_that_a_hub_would_be_asked_for_are_refused(folder, value):
    change(folder / "config.json", experts_implementation=value)
    with pytest.raises(ValueError, match=r"wants experts_implementation '.*', code from a hub"):
        load(folder)


def test_attention_of_torch_is_taken(folder):
    for value in ("eager", "sdpa", {"": "eager"}):
        change(folder / "config.json", attn_implementation=value)
        assert load(folder).config._attn_implementation in ("eager", "sdpa")
    change(folder / "generation_config.json", cache_implementation="static")
    assert load(folder).generation_config.cache_implementation == "static"


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "eetq"])
def test_quantized_weights_that_a_hub_would_be_asked_for_are_refused(folder, monkeypatch, method):
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: True)
    change(folder / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=rf"wants quant_method '{method}', .* fetches code from a hub"):
        load(folder)


def test_files_that_are_waited_on_are_refused(folder, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    change(folder / "tokenizer_config.json", vocab_file=str(tmp_path / "fifo"))
    with pytest.raises(ValueError, match=r"which is not a regular file"):
        load(folder)
    change(folder / "tokenizer_config.json", vocab_file="../fifo")
    with pytest.raises(ValueError, match=r"which is not a regular file"):
        load(folder)
    change(folder / "tokenizer_config.json", vocab_file=None)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"config.json is a FIFO, not a regular file"):
        load(folder)


def test_what_adapters_are_put_on_is_looked_at_too(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    )
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(ValueError, match=r"base/pytorch_model.bin is a pickle"):
        load_whole(AutoModelForCausalLM, adapter)
    change(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))  # a circle ends
    with pytest.raises((OSError, ValueError)):
        load_whole(AutoModelForCausalLM, adapter)


def test_a_json_that_is_nested_deeply_is_refused(folder):
    (folder / "config.json").write_text('{"a":' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises((ValueError, RecursionError)):
        load(folder)


def test_methods_of_a_configuration_are_no_settings(folder):
    """They would be in the way when it is used, and of `save_pretrained` that is after the training."""
    for name in ("config.json", "generation_config.json"):
        before = (folder / name).read_bytes()
        for key in ("save_pretrained", "to_dict", "__class__"):
            change(folder / name, **{key: "x"})
            with pytest.raises(ValueError, match=rf"{name} has '{key}', which is a method .* remove it"):
                load(folder)
            (folder / name).write_bytes(before)
    change(folder / "config.json", text_config={"get_text_config": 1})
    with pytest.raises(ValueError, match="'get_text_config', which is a method"):
        load(folder)


def test_an_adapter_does_not_name_a_module_to_import(folder, tmp_path, monkeypatch):
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    adapted = tmp_path / "adapted"
    adapted.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2, "target_modules": ["q_proj"]}
    named = {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"}
    (adapted / "adapter_config.json").write_text(json.dumps(settings | named))
    with pytest.raises(ValueError, match=r"has a megatron_config.*remove it"):
        load_whole(AutoModelForCausalLM, adapted)
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_whose_longest_text_is_no_number_is_refused(folder):
    change(folder / "tokenizer_config.json", model_max_length="x")
    with pytest.raises(ValueError, match="model_max_length must be a number of tokens, got 'x'"):
        load(folder)
