"""No response grows beyond the positions of its model, or to where RoPE would score it otherwise than it was sampled."""

import pytest

import l3ms
from l3ms.rollouts.positions import limits

HALF = [1.0] * 4
LONG = {"rope_type": "longrope", "short_factor": HALF, "long_factor": [4.0] * 4, "factor": 4.0, "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 20}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
CASES = [
    ("Llama", {"rope_parameters": LONG}, 20, "beyond 20 tokens its longrope RoPE scores all of a row otherwise"),
    ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}, 24, "beyond 24 tokens its dynamic RoPE"),
    ("GPT2", {"n_positions": 16}, 16, "the model has 16 positions"),
    ("OPT", {"max_position_embeddings": 16, "ffn_dim": 24, "word_embed_proj_dim": 16}, 16, "the model has 16 pos"),
    ("Roberta", {"max_position_embeddings": 16, "is_decoder": True}, 15, "the model has 15 positions"),
]


@pytest.mark.parametrize(("kind", "settings", "most", "words"), CASES, ids=[f"{c[0]} {c[2]}" for c in CASES])
def test_a_response_may_fill_the_positions_and_no_more(make_model, tokenizer, kind, settings, most, words):
    model = make_model(kind, **settings)
    prompts = ["a", "a b c d e f"]
    l3ms.rollout(model, tokenizer, prompts, max_new_tokens=most - 6, chat_template=False)
    wanted = rf"rollout: prompts\[1\] has 6 tokens and its response max_new_tokens={most - 5}, and {words}"
    with pytest.raises(ValueError, match=wanted):
        l3ms.rollout(model, tokenizer, prompts, max_new_tokens=most - 5, chat_template=False)


def test_tokens_of_a_learned_prompt_count(make_model, tokenizer):
    model = make_model("GPT2", n_positions=16)
    model.active_peft_config = type("Prompt", (), {"num_virtual_tokens": 5})()
    with pytest.raises(ValueError, match="has 1 tokens, 5 virtual ones and its response max_new_tokens=11"):
        l3ms.rollout(model, tokenizer, ["a"], max_new_tokens=11, chat_template=False)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_a_rope_that_is_the_same_at_every_length_has_none(make_model, kind):
    more = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 20}}
    rope = {
        "rope_type": kind,
        "rope_theta": 1e4,
        **({} if kind == "default" else {"factor": 4.0}),
        **more.get(kind, {}),
    }
    assert not list(limits(make_model("Llama", rope_parameters=rope)))
