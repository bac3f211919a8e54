"""The reference of a divergence is the model as it is when the training starts, whatever its adapters are."""

import peft
import pytest
import torch
import transformers

import l3ms

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning"
)  # peft, with transformers 5.23

KINDS = {
    "lora": {},
    "random": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "saved module": {"modules_to_save": ["norm"]},
    "trained": {},
}


def adapted(model, kind):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"], **KINDS[kind])
        made = peft.get_peft_model(model, settings)
        if kind == "trained":
            change(made)
    return made


@torch.no_grad()
def change(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def log_likelihood(model, out):
    logits = model(input_ids=out.input_ids, attention_mask=out.attention_mask).logits[:, :-1].double()
    targets = out.labels[:, 1:]
    token = logits.log_softmax(-1).gather(-1, targets[..., None].clamp(min=0))[..., 0]
    return (token * (targets != -100)).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_is_0_at_the_start_and_right_after_it(make_model, tokenizer, kind):
    model = adapted(make_model(), kind).eval()
    constraint = l3ms.KL(max=5.0)
    constraint.prepare(model)
    out = l3ms.rollout(model, tokenizer, ["a b"] * 8, max_new_tokens=6)
    start = log_likelihood(model, out)
    assert constraint.measure(out, model) == pytest.approx([0.0] * 8, abs=1e-5)
    change(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    right = log_likelihood(model, out) - start
    assert right.abs().max() > 0.1
    assert constraint.measure(out, model) == pytest.approx(right.tolist(), abs=1e-3)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_model_under_the_adapters_by_its_name_is_loaded_where_an_adapter_changed_it(
    make_model, tokenizer, tmp_path
):
    import transformers

    make_model().save_pretrained(tmp_path)
    for kind in ("lora", "trained", "pissa"):
        model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), kind).eval()
        constraint = l3ms.KL(max=5.0, reference=str(tmp_path))
        constraint.prepare(model)
        out = l3ms.rollout(model, tokenizer, ["a b"] * 4, max_new_tokens=6)
        right = log_likelihood(model, out) - log_likelihood(make_model().eval(), out)
        assert constraint.measure(out, model) == pytest.approx(right.tolist(), abs=1e-3), kind


def test_another_model_than_the_one_that_was_prepared_is_refused(make_model, tokenizer):
    model = adapted(make_model(), "trained")
    constraint = l3ms.KL(max=5.0)
    constraint.prepare(model)
    out = l3ms.rollout(model, tokenizer, ["a b"] * 2, max_new_tokens=4)
    wider = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"])
    with pytest.raises(ValueError, match="reference is the model with its first adapters, and this one has no whole"):
        constraint.measure(out, peft.get_peft_model(make_model(), wider))


@pytest.mark.parametrize("kind", [None, "lora", "trained"])
def test_each_training_is_measured_from_its_own_start(make_model, tokenizer, kind, caplog):
    first, second = (make_model(seed=seed) if kind is None else adapted(make_model(seed=seed), kind) for seed in (0, 1))
    constraint = l3ms.KL(max=5.0)
    constraint.prepare(first)
    out = l3ms.rollout(second, tokenizer, ["a b"] * 4, max_new_tokens=6)
    constraint.prepare(second)
    assert "reference is another model now" in caplog.text
    assert constraint.measure(out, second) == pytest.approx([0.0] * 4, abs=1e-5)
    change(second)
    constraint.prepare(second)  # a trainer that is made once more, of the same model
    assert max(map(abs, constraint.measure(out, second))) > 0.01  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference is the start of another model's training by now"):
        constraint.measure(out, first)
    constraint.prepare(first)
    constraint.measure(out, first)


def test_a_reference_that_was_given_stays(make_model, caplog):
    given = make_model(seed=3)
    constraint = l3ms.KL(max=5.0, reference=given)
    for seed in (0, 1):
        constraint.prepare(make_model(seed=seed))
    assert constraint.reference_model is given
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_base_that_is_trained_beside_its_adapters_is_no_reference(make_model, tokenizer, tmp_path, bias):
    """peft trains the biases under an adapter with bias="all", and leaves them as they are where it is disabled."""
    make_model(attention_bias=True).save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], bias=bias)
    model = peft.get_peft_model(base, settings).eval()
    constraint = l3ms.KL(max=5.0, reference=tmp_path)
    constraint.prepare(model)
    assert (constraint.reference_model is None) == (bias == "none")
    plain = make_model(attention_bias=True).eval()
    change(model)
    out = l3ms.rollout(model, tokenizer, ["a b"] * 8, max_new_tokens=6)
    right = log_likelihood(model, out) - log_likelihood(plain, out)
    assert constraint.measure(out, model) == pytest.approx(right.tolist(), abs=1e-4)
    if bias == "none":
        model.get_output_embeddings().requires_grad_(True)
        with pytest.raises(
            ValueError, match=r"without its adapters, and .*lm_head\.weight is trained too: give reference="
        ):
            constraint.measure(out, model)
