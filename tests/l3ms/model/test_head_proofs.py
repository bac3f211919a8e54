"""What `fuse_head` proves, what it refuses, through which call, and that it leaves the model as it was."""

import copy
import types
from typing import Any

import accelerate
import pytest
import torch
import transformers
from fused_heads import assert_fused_is_own, batch

import l3ms

SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 40,
}


def refusal(model):
    before, attributes = type(model), set(vars(model))
    with pytest.raises(ValueError, match=r"^fuse_head: ") as caught:
        l3ms.fuse_head(model)
    assert type(model) is before
    assert set(vars(model)) == attributes
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---- refused by name ----


def test_encoder_decoders():
    sizes: dict[str, Any] = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    heads: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=40, **sizes, **heads))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    )
    assert refusal(bart).startswith("fuse_head: BartForConditionalGeneration is an encoder-decoder")
    assert refusal(t5).startswith("fuse_head: T5ForConditionalGeneration is an encoder-decoder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_see_later_tokens(dtype):
    config = transformers.BertConfig(**SMALL, is_decoder=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        masked = transformers.BertForMaskedLM(config).to(dtype)
    assert "BertForMaskedLM is not causal" in refusal(masked)
    causal = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True)).to(dtype)
    l3ms.fuse_head(causal)


def test_padding_that_is_seen(make_model):
    model = make_model()
    plain = type(model)

    class Counting(plain):
        def forward(self, input_ids: Any = None, attention_mask=None, **kwargs):
            width = input_ids.shape[1]
            shift = torch.arange(width)[None] + (8 - width)
            return super().forward(input_ids=(input_ids + shift) % 17, attention_mask=attention_mask, **kwargs)

    model.__class__ = Counting
    assert "Counting gives other logits with padding on the right than without" in refusal(model)


def test_rounding_that_a_model_amplifies_is_not_taken_for_padding(make_model):
    """SmolLM2-135M moves its logits by 2e-5 of their size between two shapes of a batch, and where an embedding is an ulp elsewhere."""
    model = make_model()

    def chaotic(_: Any, args: Any, out: Any) -> Any:
        return out + 1e-4 * torch.sin(1e7 * out)

    model.model.norm.register_forward_hook(chaotic)
    l3ms.fuse_head(model)


def test_heads_that_are_no_product(make_model):
    model = make_model()

    class Halved(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) / 2

    head = Halved(16, 17, bias=False)
    model.set_output_embeddings(head)
    assert "has no plain linear output head (got Halved)" in refusal(model)


def test_a_head_whose_forward_was_replaced(make_model):
    model = make_model()
    head = model.get_output_embeddings()
    head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight) * 1.02
    assert "changes its logits in a way that the fused head does not know" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_percent_are_seen_in_16_bits(make_model, dtype):
    """0.25 + 0.25 |log p| let them through, of logits at 30."""
    model = make_model().to(dtype)
    head = model.get_output_embeddings()
    head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight) * 1.05
    assert "changes its logits" in refusal(model)
    del head.forward
    l3ms.fuse_head(model)


def test_a_forward_that_was_wrapped_before(make_model):
    model = make_model()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as torch.compile(model.forward)
    assert "LlamaForCausalLM has a forward of its own; call fuse_head first" in refusal(model)


@pytest.mark.parametrize("seen", [True, False])
def test_a_forward_that_was_put_in_its_place_since(make_model, seen):
    """As a kernel library does to a model that is there: neither a call nor another proof takes it for the fused one."""
    model = l3ms.fuse_head(make_model())
    plain = transformers.LlamaForCausalLM.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: plain(self, *args, **kwargs), model)
    if seen:
        with pytest.raises(ValueError, match=r"^fuse_head: .*LlamaForCausalLM has a forward of its own"):
            l3ms.fuse_head(model)
    inputs, weights = batch()
    with pytest.raises(ValueError, match="LlamaForCausalLM has a forward of its own"):
        model(**inputs, seq_weight=weights)


def test_hooks_on_the_head_since(make_model):
    """One that looks on is proven again; one that changes what comes out is refused, and both are by a call before that."""
    model = l3ms.fuse_head(make_model())
    head: Any = model.get_output_embeddings()
    inputs, weights = batch()
    seen = []
    for hook, harmful in (
        (lambda module, given, out: seen.append(out.shape), False),
        (lambda *given: given[2].sin(), True),
    ):
        handle = head.register_forward_hook(hook)
        with pytest.raises(ValueError, match="call fuse_head again"):
            model(**inputs, seq_weight=weights)
        if harmful:
            with pytest.raises(ValueError, match=r"^fuse_head: "):
                l3ms.fuse_head(model)
        else:
            l3ms.fuse_head(model)
            model(**inputs, seq_weight=weights)
        handle.remove()
        l3ms.fuse_head(model)
        model(**inputs, seq_weight=weights)
    assert seen


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Gemma2", lambda model: setattr(model.config, "final_logit_softcapping", 1.0)),
        ("Cohere", lambda model: setattr(model, "logit_scale", 2.0)),
    ],
)
def test_a_cap_or_scale_of_now(make_model, kind, change):
    model, plain = l3ms.fuse_head(make_model(kind)), make_model(kind)
    for one in (model, plain):
        change(one)
    assert_fused_is_own(model, plain)


def test_unwrapped_of_mixed_precision(make_model, tmp_path):
    """accelerate goes through everything that is around a forward, not through the fused one."""
    model = l3ms.fuse_head(make_model())
    inputs, weights = batch()
    expected = model(**inputs, seq_weight=weights).sequence
    args = transformers.TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to=[])
    prepared: Any = transformers.Trainer(model, args).accelerator.prepare_model(model)
    assert not torch.equal(prepared(**inputs, seq_weight=weights).sequence, expected)
    alone = accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    assert torch.equal(alone(**inputs, seq_weight=weights).sequence, expected)


# ---- through what will be called ----


def test_hooks_of_accelerate(make_model):
    plain, model = make_model(), make_model()
    cpu: Any = "cpu"  # not torch's: accelerate would take the rest as to be offloaded
    devices: Any = {"model": cpu, "lm_head": cpu}
    accelerate.dispatch_model(model, device_map=devices, main_device=cpu, force_hooks=True)
    l3ms.fuse_head(model)
    assert_fused_is_own(model, plain)


def test_hooks_of_accelerate_that_bring_the_weights(make_model):
    plain, model = make_model().eval(), make_model().eval()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.get_output_embeddings().weight.is_meta
    l3ms.fuse_head(model)
    inputs, weights = batch()
    out = model(**inputs, seq_weight=weights, use_cache=False)
    logits = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    first = logits.log_softmax(-1)[0, 1, inputs["labels"][0, 2]]
    torch.testing.assert_close(out.token[0, 1], first.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks
def test_a_compiled_model(make_model):
    plain, model = make_model(), make_model()
    compiled: Any = torch.compile(model, backend="eager")
    assert l3ms.fuse_head(compiled) is model
    inputs, weights = batch()
    expected = l3ms.fuse_head(plain)(**inputs, seq_weight=weights, use_cache=False)
    for _ in range(2):
        out = compiled(**inputs, seq_weight=weights, use_cache=False)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_calls_that_cannot_be_right(make_model):
    model = l3ms.fuse_head(make_model())
    inputs, weights = batch()
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        model(**inputs, seq_weight=weights, logits_to_keep=2)
    with pytest.raises(ValueError, match="seq_weight weighs labels"):
        model(input_ids=inputs["input_ids"], seq_weight=weights)


# ---- as it was ----


def test_the_model_is_as_it_was(make_model):
    model = make_model("GPT2", resid_pdrop=0.1).train()
    model.transformer.h[1].eval()
    model.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def count(module, args, kwargs):
        module.calls += 1
        module.last = args

    model.register_forward_pre_hook(count, with_kwargs=True)
    model.get_output_embeddings().weight.grad = torch.ones(17, 16)
    before = [m.training for m in model.modules()]
    hooks = len(model._forward_pre_hooks), len(model.get_output_embeddings()._forward_pre_hooks)
    names = set(vars(model))
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    random = torch.get_rng_state()
    l3ms.fuse_head(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == before
    assert (len(model._forward_pre_hooks), len(model.get_output_embeddings()._forward_pre_hooks)) == hooks
    ours = {"_l3m_backend", "_l3m_after", "_l3m_proven", "_l3m_found", "_l3m_foreign"}
    assert set(vars(model)) - names == ours
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(model.get_output_embeddings().weight.grad, torch.ones(17, 16))


def test_a_proof_is_of_one_state(make_model):
    """Not made again while nothing has changed; made again after the configuration has."""
    model: Any = make_model("Gemma2", final_logit_softcapping=2.0)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    l3ms.fuse_head(model)
    count = len(calls)
    assert 5 <= count <= 12
    l3ms.fuse_head(model)
    assert len(calls) == count
    model.config.final_logit_softcapping = 1.0
    l3ms.fuse_head(model)
    assert len(calls) == 2 * count
    assert_fused_is_own(model, make_model("Gemma2", final_logit_softcapping=1.0))


def test_the_default_dtype_of_new_tensors_is_no_matter(make_model):
    model = make_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        l3ms.fuse_head(model)
    finally:
        torch.set_default_dtype(torch.float32)
