"""Whatever a model does with padding, positions and caches, its responses come from the distribution that its forward scores."""

import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig

import l3ms
from l3ms.rollouts import shrinking, transformers_engine, ways

SPECIAL: dict[str, Any] = {"vocab_size": 17, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [3, 4, 5], [15]]


def small(kind, **given) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "Bart": lambda: transformers.BartConfig(
            d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24, dropout=0.0, **SPECIAL
        ),
        "Bert": lambda: transformers.BertConfig(**SMALL, **SPECIAL, **given),
        "Roberta": lambda: transformers.RobertaConfig(**SMALL, **SPECIAL, is_decoder=True),
        "Rwkv": lambda: transformers.RwkvConfig(
            hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, intermediate_size=24, **SPECIAL
        ),
        "Mamba": lambda: transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **SPECIAL),
    }
    config = made[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                    module.weight.normal_(0.0, 0.4)
    return model.eval()


def chosen(model, tokenizer):
    return ways.way_of(model.eval(), tokenizer, 0)


# ---- which way ----


@pytest.mark.parametrize(
    ("kind", "way"), [("Bart", "equal lengths"), ("Rwkv", "forward"), ("Roberta", "forward"), ("Mamba", "padded")]
)
def test_a_model_is_sampled_in_the_first_way_that_agrees(tokenizer, kind, way):
    assert chosen(small(kind), tokenizer).kind == way


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2"])
def test_decoders_stay_padded_and_shrink(make_model, tokenizer, kind):
    assert chosen(make_model(kind, gain=2.0), tokenizer) == ways.Way("padded", shrink=True, together=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Llama", "Bart"])
def test_16_bits_change_no_way(make_model, tokenizer, kind, dtype):
    """Their rounding is no other distribution, and a wrong position is one."""
    model = make_model("Llama") if kind == "Llama" else small(kind)
    assert chosen(model.to(dtype), tokenizer).kind == ("padded" if kind == "Llama" else "equal lengths")


def test_an_encoder_is_refused_in_one_line(tokenizer):
    model = small("Bert")
    with pytest.raises(ValueError, match=r"^rollout: BertLMHeadModel sees later tokens.*is_decoder=True") as refused:
        l3ms.rollout(model, tokenizer, ["a"], max_new_tokens=2)
    assert "\n" not in str(refused.value)
    assert chosen(small("Bert", is_decoder=True), tokenizer).kind == "padded"


def test_it_is_tried_once_and_draws_nothing(make_model, tokenizer):
    model, seen = make_model("Llama"), []
    torch.manual_seed(3)
    before = torch.get_rng_state()
    chosen(model, tokenizer)
    assert torch.equal(before, torch.get_rng_state())
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    chosen(model, tokenizer)
    assert seen == []
    model.double()
    chosen(model, tokenizer)  # another dtype is another computation
    assert seen


def test_a_short_context_is_tried_in_its_length(make_model, tokenizer):
    assert chosen(make_model("GPT2", n_positions=14), tokenizer).kind == "padded"


# ---- how ----


@pytest.mark.parametrize("kind", ["Bart", "Rwkv", "Roberta", "Mamba"])
def test_responses_have_the_probabilities_that_the_forward_gives(tokenizer, kind):
    """Many draws of the first token behind prompts of unlike lengths, counted."""
    model, draws = small(kind), 400
    torch.manual_seed(0)
    prompts = PROMPTS[:3] * draws
    out = l3ms.rollout(model, tokenizer, ["a"] * len(prompts), prompt_ids=prompts, max_new_tokens=1)
    answers = [ids[0] for ids in out.completion_ids()]
    for row, prompt in enumerate(PROMPTS[:3]):
        assert out.input_ids[row, : len(prompt)].tolist() == prompt  # responses are with their prompts
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].double().softmax(-1)
        count = Counter(answers[row::3])
        counted = torch.tensor([count[token] / draws for token in range(17)], dtype=torch.float64)
        assert float((counted - wanted).abs().sum() / 2) < 0.11  # 17 tokens, 400 draws: 0.08 on average at most


def test_batches_of_one_length_keep_the_order_of_rows():
    assert list(transformers_engine._batches(PROMPTS, 2, equal=True)) == [[0, 4], [1, 5], [2], [3]]
    assert list(transformers_engine._batches(PROMPTS, 4, equal=False)) == [[0, 1, 2, 3], [4, 5]]


def test_ended_rows_leave_a_sampling_by_forwards(tokenizer):
    model, seen = small("Roberta"), []
    chosen(model, tokenizer)
    model.register_forward_pre_hook(lambda m, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    torch.manual_seed(0)
    out = l3ms.rollout(model, tokenizer, ["a"] * 24, prompt_ids=PROMPTS * 4, max_new_tokens=12)
    assert seen[0] == 24 > seen[-1]
    assert sum(seen) == sum(out.host_lengths)


def test_options_of_generate_are_refused_where_it_is_not_used(tokenizer):
    with pytest.raises(ValueError, match=r"RobertaForCausalLM is not sampled by generate.*leave out use_cache"):
        l3ms.rollout(small("Roberta"), tokenizer, ["a"], max_new_tokens=2, use_cache=False)


# ---- caches that lose no rows ----


@pytest.mark.parametrize("cache", [None, DynamicCache(), object()], ids=["none", "empty", "another"])
def test_a_cache_without_keys_is_not_gone_on_with(cache):
    assert not shrinking.selects(cache)


def test_layers_that_hold_nothing_or_unlike_lengths_are_not_gone_on_with():
    keys = torch.zeros(2, 1, 3, 4)
    cache = DynamicCache()
    cache.update(keys, keys, 0)
    assert shrinking.selects(cache)
    cache.update(keys[:, :, :2], keys[:, :, :2], 1)
    assert not shrinking.selects(cache)


def test_states_are_left_behind_when_rows_leave():
    model, prompts = small("Mamba"), [[5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16]]
    config = GenerationConfig(do_sample=False, max_new_tokens=14, eos_token_id=[1, 3, 5, 9], pad_token_id=0)
    whole, shrunk = (
        shrinking.sample(model, prompts, 0, [1, 3, 5, 9], config, shrink=shrink) for shrink in (False, True)
    )
    assert whole == shrunk
    assert len(set(map(len, whole))) > 1


# ---- outside of autocast ----


def wrapped_by_accelerate(model) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # of the tests before, which had another precision

    return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)


def test_sampling_is_outside_of_autocast_and_the_training_inside(make_model, tokenizer):
    model: Any = wrapped_by_accelerate(make_model())
    seen = []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        out = l3ms.rollout(model, tokenizer, ["a", "b c"], max_new_tokens=3)
    assert seen
    assert not any(seen)
    seen.clear()
    model(input_ids=out.input_ids, attention_mask=out.attention_mask)
    assert seen == [True]


def test_a_model_that_runs_in_autocast_only_stays_in_it(make_model, tokenizer):
    model = make_model()
    model.lm_head.to(torch.bfloat16)
    model = wrapped_by_accelerate(model)
    out = l3ms.rollout(model, tokenizer, ["a", "b c"], max_new_tokens=3)
    assert len(out) == 2
    assert isinstance(model.forward, types.MethodType)
    assert model(input_ids=out.input_ids).logits.dtype == torch.float32  # as accelerate left it
