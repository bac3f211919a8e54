"""`train.autocast`: bfloat16 activations, on a CPU too; and what is proven of the head is proven before the first iteration."""

import io
import json

import pytest
import torch
from resumed_runs import project, train
from rich.console import Console
from transformers.models.llama.modeling_llama import LlamaMLP

from l3ms.config.run_config import load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.model import autocasting, heads
from l3ms.runs import arguments, loading
from l3ms.runs import executing as run


@pytest.fixture
def proofs(monkeypatch):
    """Of heads, by when they were made: whether an iteration had begun."""
    found, begun = [], []
    prove, average = heads.prove, run.L3MTrainer.average_weights

    def proven(*arguments):
        found.append(bool(begun))
        return prove(*arguments)

    def averaged(self):
        begun.append(1)
        return average(self)

    monkeypatch.setattr(heads, "prove", proven)
    monkeypatch.setattr(run.L3MTrainer, "average_weights", averaged)
    return found


@pytest.mark.parametrize(("device", "lora"), [("auto", None), ("cpu", {"r": 2})])
def test_a_run_with_autocast_comes_to_its_report(tmp_path, tokenizer, make_model, capsys, proofs, device, lora):
    """In bfloat16 the fused head and the model's own differ by what a wrong head would: a proof is made outside of it, and early."""
    seen = []

    def look(module, args, output):
        if torch.is_grad_enabled():
            seen.append(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: look(module, args, output) if isinstance(module, LlamaMLP) else None
    )
    try:
        changes = {"device": device, "autocast": True, "lora": lora, "iterations": 2}
        config = project(tmp_path / "project", tokenizer, make_model(), train=changes)
        assert train(config) == 0, capsys.readouterr().err
    finally:
        handle.remove()
    assert set(seen) == {torch.bfloat16}
    report = json.loads((config.parent / "out" / "report.json").read_text())
    assert report["average"]["perplexity"] > 1
    assert proofs
    assert not any(proofs), "a head was proven when an iteration had begun"


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("given", [{"autocast": True}, {"dtype": "bfloat16"}, {}])
def test_a_cpu_without_products_of_bfloat16_says_that_it_is_slow(
    tmp_path, tokenizer, make_model, monkeypatch, given, products
):
    config = load_config(project(tmp_path / "project", tokenizer, make_model(), train={"device": "cpu", **given}))
    monkeypatch.setattr(loading, "has_bfloat16_products", lambda: products)
    file = io.StringIO()
    loading.load_run(config, console=Console(file=file, width=200))
    said = "".join(f"train.{name}: {str(value).lower()} is slow on this CPU" for name, value in given.items())
    heard = file.getvalue()
    assert ("is slow" in heard) == bool(given and not products)
    assert products or said in heard


def test_the_question_is_one_that_torch_answers():
    """Of a private operator: gone, every run on a CPU would fail."""
    assert autocasting.has_bfloat16_products() in (False, True)


def test_a_device_without_bfloat16_is_refused_by_field(tmp_path, tokenizer, make_model, monkeypatch):
    config = load_config(
        project(tmp_path / "project", tokenizer, make_model(), train={"device": "auto", "autocast": True})
    )
    monkeypatch.setattr(arguments.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"does not compute in bfloat16; leave it out, or set train.device: cpu"
    ) as caught:
        arguments.training_arguments(config)
    assert caught.value.field == "train.autocast"
