"""What models do to their logits and losses after the head, on the architectures that do something."""

from typing import Any

import pytest
import torch
from fused_heads import assert_fused_is_own, batch

import l3ms
from l3ms.constraints.data_nll import sequence_nll

MOE = {"num_local_experts": 4, "num_experts_per_tok": 1, "output_router_logits": True, "router_aux_loss_coef": 0.5}
BAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "attn_layer_indices": [1],
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MPT = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "logit_scale": 0.5}
LOGITS = {
    "scaled": ("HyperCLOVAX", {"logits_scaling": 1.7}, (None, 1 / 1.7)),
    "divided": ("Granite", {"logits_scaling": 2.5}, (None, 2.5)),
    "divided before the head": ("MiniCPM3", {**LATENT, "dim_model_base": 4, "num_key_value_heads": 2}, (None, 1.0)),
    "capped": ("RecurrentGemma", {"logits_soft_cap": 2.0, "lru_width": 16, "num_hidden_layers": 3}, (2.0, 1.0)),
    "capped by default": ("NanoChat", {}, (15.0, 1.0)),
    "its own scale not used": ("Mpt", MPT, (None, 1.0)),
}


@pytest.mark.parametrize("name", LOGITS)
def test_caps_and_scales_are_found(make_model, name):
    kind, config, (softcap, divisor) = LOGITS[name]
    plain, model = make_model(kind, **config).eval(), make_model(kind, **config).eval()
    l3ms.fuse_head(model)
    assert model._l3m_after.softcap == pytest.approx(softcap)
    assert model._l3m_after.divisor == pytest.approx(divisor)
    assert_fused_is_own(model, plain, temperature=0.7)


def with_hook(model, change):
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: change(out))
    return model


def test_a_cap_behind_a_scale_and_a_vocabulary_that_was_padded(make_model):
    def change(x):
        return (1.5 * torch.tanh(0.3 * x / 1.5))[..., :15]

    plain, model = (with_hook(make_model(), change) for _ in range(2))
    l3ms.fuse_head(model)
    after = model._l3m_after
    assert (after.softcap, after.divisor, after.columns) == (pytest.approx(5.0), pytest.approx(1 / 0.3), 15)
    inputs, weights = batch(15)
    logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    out = model(**inputs, seq_weight=weights, use_cache=False)
    first = logits.log_softmax(-1)[0, 1, inputs["labels"][0, 2]]
    torch.testing.assert_close(out.token[0, 1], first.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + torch.linspace(0, 1, x.shape[-1]).to(x),
        lambda x: x.roll(1, -1),
        lambda x: -x,
        lambda x: x.clamp(-40, 40),
        lambda x: x.index_fill(-1, torch.tensor([3]), torch.finfo(torch.float16).min),
        lambda x: x / x.norm(dim=-1, keepdim=True),
    ],
    ids=["bias", "permuted", "turned", "clamped", "masked", "normalised"],
)
def test_anything_else_is_refused_in_every_precision(make_model, change, dtype):
    model = with_hook(make_model().to(dtype), change)
    with pytest.raises(ValueError, match="fuse_head: LlamaForCausalLM changes its logits in a way"):
        l3ms.fuse_head(model)


def test_a_head_that_was_resized_since(make_model):
    plain, model = make_model(), l3ms.fuse_head(make_model())
    for one in (plain, model):
        torch.manual_seed(0)
        one.resize_token_embeddings(23)
    assert_fused_is_own(model, plain)


# ---- what a model adds to its own loss ----


@pytest.mark.parametrize("kind", ["Mixtral", "Bamba"])
def test_a_mean_over_tokens_is_the_models_own_loss(make_model, kind):
    """The router loss with `output_router_logits`, the z-loss of all positions: value and gradients."""
    config = MOE if kind == "Mixtral" else {**BAMBA, "z_loss_coefficient": 0.3}
    plain, model = make_model(kind, **config), make_model(kind, **config)
    l3ms.fuse_head(model)
    inputs, _ = batch()
    tokens = 13
    own = plain(**inputs, use_cache=False)
    out = model(**inputs, seq_weight=torch.full((3,), 1 / tokens), use_cache=False)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-5, atol=1e-5)
    assert out.auxiliary > 0.1
    own.loss.backward()
    out.loss.backward()
    theirs = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    bare = model(**inputs, seq_weight=torch.full((3,), 1 / tokens), use_cache=False, auxiliary=False)
    torch.testing.assert_close(out.loss - bare.loss, out.auxiliary, rtol=1e-5, atol=1e-5)
    assert bare.auxiliary is None


def test_sequence_nll_holds_it(make_model):
    model = l3ms.fuse_head(make_model("Mixtral", **MOE))
    inputs, _ = batch()
    lengths = torch.tensor([4.0, 2.0, 7.0])
    out = model(**inputs, seq_weight=1 / (3 * lengths), use_cache=False)
    values = sequence_nll(model, inputs)
    torch.testing.assert_close(values.mean(), out.loss)
    torch.testing.assert_close(values, -out.sequence / lengths + out.auxiliary)


def test_a_setting_of_the_call_is_heard(make_model):
    model: Any = l3ms.fuse_head(make_model("Mixtral", **{**MOE, "output_router_logits": False}))
    inputs, _ = batch()
    mean = torch.full((3,), 1 / 13)
    assert model(**inputs, seq_weight=mean, use_cache=False).auxiliary is None
    own = model(**inputs, output_router_logits=True).loss
    loss = model(**inputs, seq_weight=mean, use_cache=False, output_router_logits=True).loss
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-5)


def test_a_loss_of_ones_own_is_refused(make_model):
    model = make_model()
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM changes its logits in a way .* or its loss"):
        l3ms.fuse_head(model)
