"""Scores of a sequence classifier against the same model called on one text at a time, whatever the batch."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from classifiers import classifier

import l3ms
from l3ms.constraints.reward_model import RewardModelError

PROMPTS = ["a b", "def name ( )", "c", "a b c d e f"]
ANSWERS = ["c", "a a b c d <eos>", "<eos>", "b c d e f f e d"]


def alone(model, tokenizer, texts, head=0):
    """One text at a time, no padding."""
    scores = []
    for text in texts:
        with torch.no_grad():
            scores.append(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, head].item())
    return scores


@pytest.mark.parametrize("pad", [0, None], ids=["pad", "no-pad"])
@pytest.mark.parametrize("kind", ["Bert", "Llama", "Qwen2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_score_does_not_depend_on_the_batch(tokenizer, kind, pad, batch_size):
    model = classifier(kind, pad_token_id=pad)
    constraint = l3ms.RewardModel("r", model, tokenizer=tokenizer, head=2, batch_size=batch_size, min=0.0)
    texts = [prompt + " " + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    found = constraint.values(PROMPTS, [f" {answer}" for answer in ANSWERS], [1] * 4)
    expected = alone(model, tokenizer, texts, head=2)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2
    assert model.config.pad_token_id == pad  # as it was


def test_the_context_of_roberta_is_shorter_than_its_table_of_positions(tokenizer):
    """Positions are counted from behind the padding's: one with 16 and a padding token of 3 takes 12 tokens."""
    model = classifier("Roberta", pad_token_id=3, max_position_embeddings=16)
    texts = ["a b c d " * count for count in (2, 3, 9)]
    found = l3ms.RewardModel("r", model, tokenizer=tokenizer, min=0.0).values(texts, [""] * 3, [1] * 3)
    assert all(value is not None and math.isfinite(value) for value in found)
    at_limit = l3ms.RewardModel("r", model, tokenizer=tokenizer, min=0.0, max_length=12)
    assert at_limit.values(texts, [""] * 3, [1] * 3) == found
    with pytest.raises(RewardModelError, match="at most the model's context of 12 tokens, got 13"):
        l3ms.RewardModel("r", model, tokenizer=tokenizer, min=0.0, max_length=13).values(texts, [""] * 3, [1] * 3)


def test_padding_is_on_the_right_whatever_the_tokenizer_does(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.pad_token = "left", None
    model = classifier("Llama")
    found = l3ms.RewardModel("r", model, tokenizer=tokenizer, min=0.0).values(PROMPTS, [""] * 4, [1] * 4)
    assert found == pytest.approx(alone(model, tokenizer, PROMPTS), abs=1e-5)


def test_conversations_go_through_the_chat_template(tokenizer):
    model = classifier()
    chat = [[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]]
    answer = [[{"role": "assistant", "content": "c d"}]]
    templated = "system : a user : b assistant : c d"

    def value(prompts, answers, template):
        reward = l3ms.RewardModel("r", model, tokenizer=tokenizer, chat_template=template, min=0.0)
        return reward.values(prompts, answers, [1])

    assert value(chat, answer, "auto") == pytest.approx(alone(model, tokenizer, [templated]), abs=1e-6)
    assert value(chat, answer, False) == pytest.approx(alone(model, tokenizer, ["a b c d"]), abs=1e-6)
    assert value(["b"], [" c d"], "auto") == pytest.approx(alone(model, tokenizer, ["b c d"]), abs=1e-6)
    turn = "user : b assistant : c d"
    assert value(["b"], ["c d"], True) == pytest.approx(alone(model, tokenizer, [turn]), abs=1e-6)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    plain = l3ms.RewardModel("r", model, tokenizer=bare, min=0.0)
    assert plain.values(chat, answer, [1]) == pytest.approx(alone(model, tokenizer, ["a b c d"]), abs=1e-6)
    with pytest.raises(RewardModelError, match="chat_template is true, but the reward model's tokenizer has none"):
        l3ms.RewardModel("r", model, tokenizer=bare, chat_template=True, min=0.0)


@pytest.mark.parametrize("template", [True, False])
def test_contents_in_parts_or_without_a_text_are_scored_as_texts(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    score: Any = l3ms.RewardModel("r", classifier(), tokenizer=tokenizer, min=0.0).function
    answer = [{"role": "assistant", "content": "c"}]
    whole = score._tokens([{"role": "user", "content": "a b"}], answer)
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert score._tokens([{"role": "user", "content": parts}], answer) == whole
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    user = {"role": "user", "content": "a"}
    assert score._tokens([user, call], answer) == score._tokens([user, {"role": "assistant", "content": ""}], answer)


def test_a_long_text_keeps_its_end(tokenizer):
    model = classifier()
    reward = l3ms.RewardModel("r", model, tokenizer=tokenizer, max_length=3, min=0.0)
    assert reward.values(["a b c d"], [" e f name"], [1]) == pytest.approx(
        alone(model, tokenizer, ["e f name"]), abs=1e-6
    )
    assert tokenizer.truncation_side == "right"
    beyond = l3ms.RewardModel("r", model, tokenizer=tokenizer, min=0.0)  # the context has 32 tokens
    long = " ".join(["a"] * 40 + ["b"] * 31)
    assert beyond.values([long], [" c"], [1]) == pytest.approx(
        alone(model, tokenizer, [" ".join(["b"] * 31 + ["c"])]), abs=1e-6
    )


def test_squashed_scores_modes_and_gradients(tokenizer):
    model = classifier()
    raw = alone(model, tokenizer, PROMPTS)
    model.train()
    for squash, function in (("tanh", torch.tanh), ("sigmoid", torch.sigmoid)):
        reward = l3ms.RewardModel("r", model, tokenizer=tokenizer, squash=squash, min=0.0)  # pyright: ignore[reportArgumentType]
        found = reward.values(PROMPTS, [""] * 4, [1] * 4)
        assert found == pytest.approx(function(torch.tensor(raw, dtype=torch.float64)).tolist(), abs=1e-5)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    chance = l3ms.RewardModel("r", model, tokenizer=tokenizer, threshold=sorted(raw)[1] + 1e-4, min=0.5)
    assert sum(chance.rewards(PROMPTS, [""] * 4, [1] * 4)) == 2  # type: ignore[arg-type]


def test_a_checkpoint_is_loaded_when_it_is_needed(tokenizer, tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = l3ms.RewardModel("r", tmp_path, head=1, min=0.0)
    assert reward.function.model is None  # type: ignore[union-attr]
    expected = alone(model, tokenizer, PROMPTS, head=1)
    assert reward.values(PROMPTS, [""] * 4, [1] * 4) == pytest.approx(expected, abs=1e-5)
    again = pickle.loads(pickle.dumps(reward))
    assert again.function.model is None
    assert again.values(PROMPTS, [""] * 4, [1] * 4) == pytest.approx(expected, abs=1e-5)
    assert copy.deepcopy(reward).function is reward.function
    assert str(tmp_path) in reward.where


def test_what_does_not_fit_is_one_line_naming_the_argument(tokenizer, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    classifier().save_pretrained(tmp_path / "bare")
    loaded = classifier()
    for options, named in (
        ({"model": "./gone"}, "model cannot load './gone'"),
        ({"model": tmp_path / "gone"}, "model must be a checkpoint, no such folder"),
        ({"model": tmp_path / "policy"}, "model must be a trained classifier"),
        ({"model": tmp_path / "bare"}, "model cannot load the tokenizer"),
        ({"model": loaded}, "tokenizer is required"),
        ({"model": torch.nn.Linear(2, 2), "tokenizer": tokenizer}, "model must be a sequence classifier, got Linear"),
        ({"model": loaded, "tokenizer": tokenizer, "head": 3}, "head must be one of the 3 outputs, 0 to 2, got 3"),
        ({"model": loaded, "tokenizer": tokenizer, "head": -1}, "head must be at least 0"),
        ({"model": loaded, "tokenizer": tokenizer, "max_length": 33}, "max_length must be at most the model's context"),
        ({"model": loaded, "tokenizer": tokenizer, "max_length": 1}, "max_length must be at least 2"),
        ({"model": loaded, "tokenizer": tokenizer, "batch_size": 0}, "batch_size must be at least 1"),
        ({"model": loaded, "tokenizer": tokenizer, "squash": "relu"}, "squash must be tanh, sigmoid or None"),
        (
            {"model": loaded, "tokenizer": tokenizer, "chat_template": "no"},
            "chat_template must be 'auto', True or False",
        ),
    ):
        with pytest.raises(RewardModelError) as error:
            l3ms.RewardModel("r", min=0.0, **options).load()  # pyright: ignore[reportArgumentType]
        assert str(error.value).startswith(named), str(error.value)
        assert "\n" not in str(error.value)


def test_a_language_model_is_no_classifier(tokenizer, make_model):
    reward = l3ms.RewardModel("r", make_model(), tokenizer=tokenizer, min=0.0)
    with pytest.raises(
        RewardModelError, match=r"model must be a sequence classifier, LlamaForCausalLM returns \(1, 2, 17\)"
    ):
        reward.values(["a"], [" b"], [1])
