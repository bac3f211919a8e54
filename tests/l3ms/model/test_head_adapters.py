"""Adapters of PEFT on the head, and wrappers of PEFT around the model: exact whichever came first, or refused by name."""

import copy
from typing import Any

import peft
import pytest
import torch
from fused_heads import assert_fused_is_own, batch, trained

import l3ms

TIED = {"tie_word_embeddings": True}


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **options})


def adalora(**options):
    settings = {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj"]}
    return peft.AdaLoraConfig(task_type="CAUSAL_LM", **(settings | options))  # type: ignore[arg-type]


ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (lora(lora_alpha=7), {}),
    "rslora": (lora(use_rslora=True, lora_alpha=7), {}),
    "lora-bias": (lora(lora_bias=True), {}),
    "lora-tied": (lora(), TIED),
    "lora-both-ends": (lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), TIED),
    "saved": (lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), {}),
    "saved-tied": (lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), TIED),
    "tokens": (lora(target_modules=["q_proj"], trainable_token_indices=[5, 6, 9]), TIED),
    "tokens-of-the-head": (
        peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=[5, 6], task_type="CAUSAL_LM"),
        {},
    ),
    "adaption-prompt": (peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2), {}),
    "prefix": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), {}),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]


def adapted(model, config):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return trained(peft.get_peft_model(model, copy.deepcopy(config)))


@pytest.mark.parametrize("fuse_first", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_whichever_came_first(make_model, name, fuse_first):
    """Also without a second call of fuse_head after the adapter."""
    config, options = ADAPTERS[name]
    plain = adapted(make_model(**options), config)
    model: Any = make_model(**options)
    if fuse_first:
        l3ms.fuse_head(model)
    model = adapted(model, config)
    if not fuse_first:
        l3ms.fuse_head(model)
    assert_fused_is_own(model, plain)
    l3ms.fuse_head(model)
    if name != "lora-both-ends":  # torch cannot copy what peft shares there
        assert_fused_is_own(copy.deepcopy(model), plain)


@pytest.mark.parametrize("name", ["lora", "saved", "tokens"])
def test_merged_and_disabled(make_model, name):
    config, options = ADAPTERS[name]
    plain, model = (adapted(make_model(**options), config) for _ in range(2))
    l3ms.fuse_head(model)
    base = make_model(**options)
    inputs, weights = batch()
    with model.disable_adapter(), torch.no_grad():
        out = model(**inputs, seq_weight=weights, use_cache=False)
        logits = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    first = logits.log_softmax(-1)[0, 1, inputs["labels"][0, 2]]
    torch.testing.assert_close(out.token[0, 1], first, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    with torch.no_grad():
        merged = model(**inputs, seq_weight=weights, use_cache=False).token
        logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(merged[0, 1], logits.log_softmax(-1)[0, 1, inputs["labels"][0, 2]], rtol=1e-4, atol=1e-4)


def test_dropout_on_the_heads_adapter_is_that_of_its_own_forward(make_model):
    model = adapted(make_model(), lora(target_modules=["lm_head"], lora_dropout=0.5))
    l3ms.fuse_head(model)
    inputs, weights = batch()
    model.train()
    torch.manual_seed(3)
    out = model(**inputs, seq_weight=weights, use_cache=False)
    torch.manual_seed(3)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    first = logits.log_softmax(-1)[0, 1, inputs["labels"][0, 2]]
    torch.testing.assert_close(out.token[0, 1], first.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        peft.LoHaConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
        adalora(target_modules=["lm_head"]),
    ],
    ids=["dora", "loha", "adalora"],
)
def test_other_adapters_on_the_head_are_refused_before_and_after(make_model, config):
    with pytest.raises(
        ValueError, match=r"fuse_head: LlamaForCausalLM has an adapter on lm_head that is not supported"
    ):
        l3ms.fuse_head(adapted(make_model(), config))
    model = make_model()
    l3ms.fuse_head(model)
    model = adapted(model, config)
    inputs, weights = batch()
    with pytest.raises(ValueError, match="adapter on lm_head that is not supported"):
        model(**inputs, seq_weight=weights, use_cache=False)
    with pytest.raises(ValueError, match="adapter on lm_head that is not supported"):
        l3ms.fuse_head(model)
    assert torch.isfinite(model(**inputs).loss)  # as before


# ---- AdaLoRA's regulariser ----


def regulariser(model):
    """peft's, at its weight of 0.5: the mean over the A and B of |P P^T - I|."""
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((square - torch.eye(len(square))).norm())
    return 0.5 * torch.stack(norms).mean()


@pytest.mark.parametrize("fuse_first", [False, True])
def test_adalora_regularises_a_mean_once_and_nothing_else(make_model, fuse_first):
    model: Any = make_model()
    if fuse_first:
        l3ms.fuse_head(model)
    model = adapted(model, adalora())
    l3ms.fuse_head(model)
    inputs, weights = batch()
    expected = regulariser(model)
    assert expected > 0.1
    lengths = torch.tensor([4.0, 2.0, 7.0])
    call = {**inputs, "use_cache": False}

    def gradient(loss):
        return torch.autograd.grad(loss, model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"])[0]

    mean = 1 / (3 * lengths)
    with_it = model(**call, seq_weight=mean)
    without = model(**call, seq_weight=mean, auxiliary=False)
    torch.testing.assert_close(with_it.loss - without.loss, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_it.auxiliary, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient(with_it.loss) - gradient(without.loss), gradient(expected), rtol=1e-4, atol=1e-5
    )
    half = model(**call, seq_weight=mean / 2).loss
    torch.testing.assert_close(half, with_it.loss / 2)
    assert model(**call, seq_weight=torch.zeros(3)).loss == 0
    signed = model(**call, seq_weight=weights)
    assert signed.loss == model(**call, seq_weight=weights, auxiliary=False).loss
    whole = model(**call, seq_weight=weights, auxiliary=True).loss
    torch.testing.assert_close(whole - signed.loss, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_step_of_the_trainer_adds_it_once(make_model, train):
    """To its mean, however many micro-batches that is cut into; the constraints' half-step is without."""
    losses = []
    for parts in (1, 2):
        model, calls = adapted(make_model(), adalora(deltaT=1000)), []

        def record(module, args, kwargs, calls=calls):
            if "seq_weight" in kwargs and module.training:
                calls.append(kwargs.get("auxiliary"))

        model.register_forward_pre_hook(record, with_kwargs=True)
        trainer, _ = train(
            model, max_steps=1, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts
        )
        assert calls[:parts] == [None] * parts
        assert set(calls[parts:]) == {False}
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # as it is logged
