"""Packed weights give the products of the model's own, with its adapters, and leave the model as it was."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from l3ms.rollouts.packed_weights import packed_weights

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # peft, with transformers 5.23
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]
mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is a build without oneDNN")


@pytest.fixture(autouse=True)
def small_models_are_packed(monkeypatch):
    monkeypatch.setattr("l3ms.rollouts.packed_weights.LEAST_WEIGHTS", 0)


def adapted(model, seed=0, **config) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def both(model):
    """Logits of the model, and with its weights packed; the layers whose product was replaced."""
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = model(input_ids=IDS).logits
    with packed_weights(model, rows=3, steps=100):
        replaced = [name for name, module in model.named_modules() if "forward" in vars(module)]
        packed = model(input_ids=IDS).logits
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(input_ids=IDS).logits, own)
    return own, packed, replaced


@mkldnn
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2"])
def test_every_linear_layer_is_packed_and_says_the_same(make_model, kind):
    model = make_model(kind)
    own, packed, replaced = both(model)
    torch.testing.assert_close(packed, own, rtol=1e-5, atol=1e-5)
    assert replaced == [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]


@mkldnn
def test_adapters_are_in_the_packed_copy(make_model):
    model = adapted(make_model("Llama"), lora_dropout=0.5)
    with model.disable_adapter(), torch.no_grad():
        base = model.eval()(input_ids=IDS).logits
    own, packed, replaced = both(model)
    torch.testing.assert_close(packed, own, rtol=1e-5, atol=1e-4)
    assert (own - base).abs().max() > 0.1
    assert not any(name.endswith(("base_layer", "lora_A.default", "lora_B.default")) for name in replaced)


@mkldnn
def test_several_adapters_and_none(make_model):
    model = adapted(make_model("Llama"))
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                parameter.normal_()
    model.base_model.set_adapter(["default", "other"])
    own, packed, _ = both(model)
    torch.testing.assert_close(packed, own, rtol=1e-5, atol=1e-4)
    with model.disable_adapter():
        base, packed, _ = both(model)
    torch.testing.assert_close(packed, base, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(base, own, atol=0.1)


@mkldnn
@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_adapters_go_on_beside_the_packed_layer(make_model, config):
    own, packed, replaced = both(adapted(make_model("Llama"), **config))
    torch.testing.assert_close(packed, own, rtol=1e-5, atol=1e-4)
    assert not any(name.endswith("q_proj") for name in replaced)


@mkldnn
def test_what_an_adapter_has_learnt_is_not_rounded_away(make_model):
    """Of a weight of 16 bits: a change of less than half a unit in its last place."""
    model = adapted(make_model("Llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.01)
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.shape[0] > 3 and module.weight.shape[1] > 3:
            module.to(torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(64, 16).bfloat16()
    with torch.no_grad():
        model.eval()
        wanted = layer(x) - layer.base_layer(x)
        with packed_weights(model, rows=3, steps=100):
            found = layer(x) - layer.base_layer(x)
    assert wanted.abs().max() > 0
    assert (found - wanted).abs().max() <= wanted.abs().max() / 2


@mkldnn
def test_a_layer_that_others_watch_or_have_replaced_is_theirs(make_model):
    model = adapted(make_model("Llama"))
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj.lora_A["default"].register_forward_hook(lambda module, args, output: output * 0)
    attention.k_proj.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    attention.v_proj.register_forward_hook(lambda module, args, output: output - 1)
    with torch.no_grad():
        own = model.eval()(input_ids=IDS).logits
        with packed_weights(model, rows=3, steps=100):
            torch.testing.assert_close(model(input_ids=IDS).logits, own, rtol=1e-5, atol=1e-4)


def test_the_model_is_left_alone_where_packing_does_not_pay(make_model, monkeypatch):
    model = make_model("Llama")
    with monkeypatch.context() as patch:
        patch.setattr("l3ms.rollouts.packed_weights.LEAST_WEIGHTS", 1 << 30)
        with packed_weights(model, rows=9, steps=100):
            assert not any("forward" in vars(module) for module in model.modules())
    for options in ({"rows": 1, "steps": 100}, {"rows": 9, "steps": 1}):
        with packed_weights(model, **options):
            assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr("l3ms.rollouts.packed_weights.ROOM", 1e12)  # there is not as much memory
    with packed_weights(model, rows=9, steps=100):
        assert not any("forward" in vars(module) for module in model.modules())


@mkldnn
def test_an_error_leaves_the_model_as_it_was(make_model):
    model = make_model("Llama")
    with pytest.raises(ZeroDivisionError), packed_weights(model, rows=3, steps=100):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
