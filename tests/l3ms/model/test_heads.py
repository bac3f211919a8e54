"""The fused head inside transformers models: loss and gradients are those of the model's own logits; everything else is as before."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from fused_heads import assert_fused_is_own, assert_same_gradients, batch, gradients, own_logits
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import l3ms

# transformers 5.23 renames gradient checkpointing; peft and this file use the name that all of transformers 5 has.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

MODELS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0}),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "granite": ("Granite", {"logits_scaling": 2.5}),
    "gpt2": ("GPT2", {}),
    "gpt2-untied": ("GPT2", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients_are_those_of_the_models_own_logits(make_model, name, temperature):
    kind, config = MODELS[name]
    plain, model = make_model(kind, **config), make_model(kind, **config)
    assert l3ms.fuse_head(model) is model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in ("llama-tied", "qwen2", "gemma2", "cohere", "gpt2"))
    assert_fused_is_own(model, plain, temperature)


def test_the_count_of_scored_tokens(make_model):
    """Given, it reaches the op: the same loss, and a wrong one is refused."""
    model = l3ms.fuse_head(make_model())
    inputs, weights = batch()
    losses = [model(**inputs, seq_weight=weights, use_cache=False, scored=scored).loss for scored in (None, 13)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"scored must be 13, .* got 14"):
        model(**inputs, seq_weight=weights, use_cache=False, scored=14)


def test_bf16_and_autocast(make_model):
    plain, model = make_model(), make_model()
    l3ms.fuse_head(model)
    inputs, weights = batch()
    expected, _ = own_logits(plain, inputs, weights)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, seq_weight=weights, use_cache=False).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    half = l3ms.fuse_head(make_model().bfloat16())
    loss = half(**inputs, seq_weight=weights, use_cache=False).loss
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)


# ---- adapters, checkpointing, copies, files ----


def lora(model):
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:  # zero at the start
                    parameter.normal_(0, 0.3)
    return wrapped


@pytest.mark.parametrize("fuse_first", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_with_an_adapter_of_peft(make_model, name, fuse_first):
    kind, config = MODELS[name]
    plain = lora(make_model(kind, **config))
    model: Any = make_model(kind, **config)
    if fuse_first:
        l3ms.fuse_head(model)
        model = lora(model)
    else:
        model = lora(model)
        assert l3ms.fuse_head(model) is model.get_base_model()
    assert_fused_is_own(model, plain)
    assert model.get_base_model().get_output_embeddings().weight.grad is None  # frozen


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_with_gradient_checkpointing(make_model, kind):
    plain, model = make_model(kind), l3ms.fuse_head(make_model(kind))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_fused_is_own(model.train(), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2-untied"])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "save_on_cpu"])
def test_within_a_region_that_is_computed_again_or_kept_on_the_host(make_model, name, way):
    kind, config = MODELS[name]
    model = l3ms.fuse_head(make_model(kind, **config))
    inputs, weights = batch()
    embedded = {name: tensor for name, tensor in inputs.items() if name != "input_ids"} | {"use_cache": False}

    def loss(inputs_embeds):
        return model(inputs_embeds=inputs_embeds, **embedded, seq_weight=weights).loss

    def start():
        return model.get_input_embeddings()(inputs["input_ids"])

    expected = gradients(model, loss(start()))
    if way == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            found = loss(start())
    else:
        found = checkpoint(loss, start(), use_reentrant=way == "reentrant")
    assert_same_gradients(gradients(model, found), expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_pickled_model_is_fused(make_model, adapted):
    """Of a class that exists only while the program runs: torch.save(model), and processes that are handed one."""
    model: Any = lora(make_model("Gemma2")) if adapted else make_model("Gemma2")
    l3ms.fuse_head(model, backend="reference")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        inner = again.get_base_model() if adapted else again
        assert l3ms.fuse_head(again) is inner  # nothing left to do
        assert inner._l3m_backend == "reference"
        plain = lora(make_model("Gemma2")) if adapted else make_model("Gemma2")
        assert_fused_is_own(again, plain)
    assert type(again) is type(model)


def test_copies_are_fused_and_apart(make_model):
    model = l3ms.fuse_head(make_model())
    twin = copy.deepcopy(model)
    average = AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    average.update_parameters(model)
    bigger = make_model()
    with torch.no_grad():
        for parameter in bigger.parameters():
            parameter.mul_(1.5)
    assert_fused_is_own(twin, make_model())
    assert_fused_is_own(average.module, bigger)
    assert_fused_is_own(model, bigger)


def test_a_saved_model_is_the_architectures(make_model, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = l3ms.fuse_head(make_model())
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaForCausalLM
    assert isinstance(model, LlamaForCausalLM)
    assert_fused_is_own(l3ms.fuse_head(again), make_model())


def test_state_dict_is_unchanged(make_model):
    plain, model = make_model(), l3ms.fuse_head(make_model())
    assert model.state_dict().keys() == plain.state_dict().keys()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


# ---- ordinary calls ----


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_ordinary_calls_are_unchanged(make_model, name):
    kind, config = MODELS[name]
    plain = make_model(kind, **config).eval()
    model: Any = l3ms.fuse_head(make_model(kind, **config)).eval()
    inputs, _ = batch()
    theirs, ours = plain(**inputs), model(**inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    without = {k: v for k, v in inputs.items() if k != "labels"}
    assert torch.equal(model(inputs["input_ids"]).logits, plain(inputs["input_ids"]).logits)
    assert torch.equal(model(**without, logits_to_keep=2).logits, plain(**without, logits_to_keep=2).logits)
    prompt = {k: v[2:] for k, v in without.items()}
    kept = [m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*kept)
    assert "forward" not in vars(model.get_output_embeddings())


def test_the_head_is_as_before_after_an_error(make_model):
    model = l3ms.fuse_head(make_model())
    inputs, weights = batch()
    with pytest.raises(ValueError, match="seq_weight must be"):
        model(**inputs, seq_weight=weights[:2])
    assert "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(model(**inputs).logits, make_model()(**inputs).logits)


def test_a_forward_that_something_else_patched_is_kept(make_model):
    model = l3ms.fuse_head(make_model())
    head: Any = model.get_output_embeddings()
    calls = []
    patched = type(head).forward

    def counted(hidden):
        calls.append(1)
        return patched(head, hidden)

    head.forward = counted
    inputs, weights = batch()
    with pytest.raises(
        ValueError, match=r"another forward or hook than when it was fused \(.*counted.*\): call fuse_head again"
    ):
        model(**inputs, seq_weight=weights)
    l3ms.fuse_head(model)
    calls.clear()
    model(**inputs, seq_weight=weights)
    assert head.forward is counted
    assert not calls
    model(**inputs)
    assert len(calls) == 1


def test_fusing_twice_is_once_and_keeps_the_mode(make_model):
    model = make_model().train()
    kind = type(l3ms.fuse_head(model))
    assert type(l3ms.fuse_head(model)) is kind
    assert model.training
    assert kind.__name__ == "LlamaForCausalLM"
    assert not l3ms.fuse_head(make_model().eval()).training
    assert type(l3ms.fuse_head(make_model())) is kind  # one class for all


# ---- what cannot be fused ----


def test_a_model_that_changes_its_logits_otherwise_is_refused_and_left_as_it_was(make_model):
    model = make_model()
    cls = type(model)

    class Twisted(cls):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if out.logits is not None:
                out.logits = out.logits * 1.1
            return out

    model.__class__ = Twisted
    model.train()
    with pytest.raises(ValueError, match="Twisted changes its logits in a way"):
        l3ms.fuse_head(model)
    assert type(model) is Twisted
    assert model.training
    with pytest.raises(ValueError, match="changes its logits"):  # also the second time
        l3ms.fuse_head(model)


def test_other_things_are_refused(make_model):
    with pytest.raises(ValueError, match="wanted a transformers model, got Linear"):
        l3ms.fuse_head(torch.nn.Linear(2, 2))
    model = make_model()
    with pytest.raises(ValueError, match=r"LlamaModel has no plain linear output head"):
        l3ms.fuse_head(model.model)
