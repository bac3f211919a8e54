"""What `rollout` is given is honoured, or refused in one line; nothing of a model's own settings is sampled by."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import l3ms


def roll(model, tokenizer, prompts, **options):
    torch.manual_seed(0)
    return l3ms.rollout(model, tokenizer, prompts, **{"chat_template": False, "max_new_tokens": 4, **options})


# ---- options of generate ----


@pytest.mark.parametrize("option", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
def test_how_it_is_computed_changes_no_response(make_model, tokenizer, option):
    model, prompts = make_model(seed=1), ["a", "b c d", "e f"]
    assert torch.equal(roll(model, tokenizer, prompts, **option).labels, roll(model, tokenizer, prompts).labels)


SET = {"do_sample": False, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "eos_token_id": 5, "num_beams": 2}
CHANGING = {
    **{"min_p": 0.2, "typical_p": 0.5, "suppress_tokens": [1], "bad_words_ids": [[1]], "forced_eos_token_id": 1},
    **{"num_return_sequences": 2, "guidance_scale": 1.5, "min_new_tokens": 3, "max_length": 2, "max_time": 0.0},
    **{"stop_strings": ["x"], "watermarking_config": {}, "cache_config": {}, "output_scores": True},
}
UNKNOWN = {"max_tokens": 2, "top_pp": 0.1, "tools": [], "chat_template_kwargs": {}, "generation_config": None}
OPTIONS = [
    *[({name: value}, f"rollout: {name} is set by rollout") for name, value in SET.items()],
    *[({name: value}, f"rollout: {name} would change what is sampled") for name, value in CHANGING.items()],
    *[({name: value}, f"rollout: {name}: no argument of rollout") for name, value in UNKNOWN.items()],
    ({"cache_implementation": "quantized"}, "cache_implementation='quantized' samples another distribution"),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=[words for _, words in OPTIONS])
def test_what_would_sample_something_else_is_refused(make_model, tokenizer, options, words):
    with pytest.raises(ValueError, match=f"^rollout: .*{words.removeprefix('rollout: ')}"):
        roll(make_model(), tokenizer, ["a"], **options)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 0.1, "top_k": 1},
        {"suppress_tokens": [0, 2, 3], "min_new_tokens": 4},
        {"num_beams": 2, "no_repeat_ngram_size": 1},
    ],
)
def test_settings_of_a_wrapper_are_not_sampled_by(make_model, tokenizer, own):
    """peft gives those of its wrapper to the model inside."""
    import peft

    inner = make_model("Llama", vocab_size=5, gain=2.0, seed=3)
    expected = roll(inner, tokenizer, ["a"] * 20)
    model: Any = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    inside, settings = inner.generation_config, GenerationConfig(eos_token_id=1, **own)
    model.generation_config = settings
    assert torch.equal(roll(model, tokenizer, ["a"] * 20).labels, expected.labels)
    assert model.generation_config is settings
    assert inner.generation_config is inside


# ---- arguments ----


def test_tokens_of_prompts_may_be_arrays(make_model, tokenizer):
    model, wanted = make_model(seed=1), [[5, 6], [7, 8]]
    expected = roll(model, tokenizer, ["a", "b"], prompt_ids=wanted)
    for ids in ([np.array(row) for row in wanted], torch.tensor(wanted), list(map(tuple, wanted))):
        assert torch.equal(roll(model, tokenizer, ["a", "b"], prompt_ids=ids).input_ids, expected.input_ids)
    with pytest.raises(ValueError, match=r"rollout: prompt_ids\[0\] must be token ids, got \[1.5\]"):
        roll(model, tokenizer, ["a"], prompt_ids=[[1.5]])
    with pytest.raises(ValueError, match=r"rollout: prompts\[0\] has no tokens"):
        roll(model, tokenizer, ["a"], prompt_ids=[np.array([], dtype=int)])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("red", {}, "prompts must be a list of texts or conversations, got 'red'"),
        ({"role": "user", "content": "a"}, {}, "prompts must be a list of texts or conversations"),
        ([{"role": "user", "content": "a"}], {}, r"prompts\[0\] must be a text or a list of messages"),
        (["a", 3], {}, r"prompts\[1\] must be a text or a list of messages, got 3"),
        (["a"], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (["a"], {"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ([], {}, "prompts must not be empty"),
        (["a", ""], {}, r"prompts\[1\] has no tokens"),
        (["a"], {"temperature": 0.0}, "temperature and max_new_tokens must be positive"),
        (["a"], {"temperature": math.nan}, "temperature and max_new_tokens must be positive, got nan"),
        (["a"], {"temperature": "warm"}, "temperature must be a number and max_new_tokens a whole one, got 'warm' and"),
        (
            ["a"],
            {"max_new_tokens": 2.5},
            r"temperature must be a number and max_new_tokens a whole one, got 1\.0 and 2\.5",
        ),
        (
            ["a"],
            {"prompt_ids": [[3, 99]]},
            r"prompts\[0\] has the token 99, which is not in the model's vocabulary of 17",
        ),
        (["a"], {"prompt_ids": [[-1]]}, r"prompts\[0\] has the token -1"),
        (7, {}, "prompts must be a list of texts or conversations, got 7"),
        (["a"], {"max_new_tokens": 0}, "temperature and max_new_tokens must be positive, got 1.0 and 0"),
        (["a"], {"temperature": math.inf}, "temperature and max_new_tokens must be positive, got inf"),
    ],
)
def test_what_is_no_argument_is_one_line(make_model, tokenizer, prompts, options, words):
    with pytest.raises(ValueError, match=f"^rollout: {words}"):
        roll(make_model(), tokenizer, prompts, **options)


def test_what_is_wrapped_is_told_from_what_is_inside(make_model, tokenizer):
    class Processor:
        tokenizer: Any

    with pytest.raises(ValueError, match=r"model must be a transformers causal LM, got DataParallel: give its .module"):
        roll(torch.nn.DataParallel(make_model()), tokenizer, ["a"])
    processor = Processor()
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer of transformers, got Processor$"):
        roll(make_model(), processor, ["a"])
    processor.tokenizer = tokenizer
    with pytest.raises(ValueError, match=r"got Processor: give its .tokenizer"):
        roll(make_model(), processor, ["a"])


def test_a_padding_token_beyond_the_embeddings_is_named(make_model, tokenizer):
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match="padding token 17 is not in the model's vocabulary of 17: enlarge"):
        roll(make_model(), padded, ["a", "b c"])


def test_prompts_may_be_a_column_of_a_table_or_any_iterable(make_model, tokenizer):
    for prompts in (np.array(["a", "b c"]), iter(["a", "b c"])):
        assert len(l3ms.rollout(make_model(), tokenizer, prompts, max_new_tokens=2)) == 2  # type: ignore[arg-type]


def test_a_model_whose_weights_are_damaged_is_said_to_be(make_model, tokenizer):
    model = make_model()
    torch.nn.init.constant_(model.get_output_embeddings().weight, math.nan)
    with pytest.raises(
        ValueError, match=r"^rollout: LlamaForCausalLM has logits that are not finite on ordinary tokens"
    ):
        l3ms.rollout(model, tokenizer, ["a"], max_new_tokens=2)


def test_a_tokenizer_without_eos_is_refused(make_model, tokenizer):
    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match="has no EOS token"):
        l3ms.rollout(make_model(), Endless(), ["a"])
