"""What of a prompt the model sees, and what of a response the rewards see."""

import pytest
import torch

import l3ms
from l3ms.rollouts.prompts import encode_prompt
from l3ms.runs.data import Example, encode

TURN = [{"role": "user", "content": "a b"}]


def drawn(model, tokenizer, prompts, **options):
    torch.manual_seed(0)
    return l3ms.rollout(model, tokenizer, prompts, max_new_tokens=4, **options)


@pytest.fixture
def plain(tokenizer):
    """Without a chat template."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    return other


def test_a_text_goes_through_the_chat_template_as_from_a_yaml_file(make_model, tokenizer):
    out = drawn(make_model(), tokenizer, ["a b", TURN])
    (row,) = encode([Example("a b", "c")], tokenizer, max_length=32).rows
    head = encode_prompt(tokenizer, TURN)
    assert row["input_ids"][: len(head)] == head
    for i in range(2):
        assert out.input_ids[i, : len(head)].tolist() == head
        assert out.prompts[i] == TURN == row["prompt"]
        assert out.completions[i][0]["role"] == "assistant"


def test_it_stays_plain_where_that_is_asked_for_or_there_is_no_template(make_model, tokenizer, plain):
    for out in (
        drawn(make_model(), tokenizer, ["a b"], chat_template=False),
        drawn(make_model(), plain, ["a b"]),
    ):
        assert out.input_ids[0, :2].tolist() == tokenizer("a b")["input_ids"]
        assert out.prompts == ["a b"]
        assert isinstance(out.completions[0], str)


def test_given_tokens_leave_the_prompts_as_they_are(make_model, tokenizer):
    out = drawn(make_model(), tokenizer, ["a b"], prompt_ids=[[5, 6]])
    assert out.prompts == ["a b"]
    assert out.input_ids[0, :2].tolist() == [5, 6]


def test_special_tokens_are_there_on_request(make_model, tokenizer):
    model = make_model(seed=1)
    prompts = ["a", "b", "c"] * 10
    out, kept = (drawn(model, tokenizer, prompts, chat_template=False, special_tokens=s) for s in (False, True))
    assert out.completion_ids() == kept.completion_ids()
    whole = [tokenizer.decode(ids) for ids in out.completion_ids()]
    assert out.raw_completions == kept.raw_completions == kept.completions == whole
    assert any("<eos>" in text for text in whole)
    assert not any("<eos>" in text for text in out.completions)


def test_a_reward_that_names_them_gets_them(make_model, tokenizer):
    out = drawn(make_model(seed=1), tokenizer, ["a"] * 10)

    def closed(prompts, completions, raw_completions):
        return [float(text.endswith("<eos>")) for text in raw_completions]

    rewards = out.rewards([l3ms.Constraint("closed", closed, min=0.5)])["closed"]
    assert rewards == [float(done) for done in out.ended]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reward_of_texts_is_told_of_messages(make_model, tokenizer, asynchronous):
    def short(prompts, completions, **columns):
        return [float(len(text.split())) for text in completions]

    async def later(prompts, completions, **columns):
        return short(prompts, completions)

    constraint = l3ms.Constraint("short", later if asynchronous else short, max=3)
    out = drawn(make_model(), tokenizer, ["a"])
    with pytest.raises(
        AttributeError, match=r"constraint 'short'.*no attribute 'split'; prompts and completions are lists of messages"
    ):
        out.rewards([constraint])
    with pytest.raises(AttributeError, match=r"are lists of messages here, since the model has a chat template"):
        constraint.rewards(out.prompts, out.completions, [1])


def test_a_reward_of_texts_that_fails_on_texts_is_not(make_model, tokenizer):
    def broken(prompts, completions, **columns):
        raise TypeError("no luck")

    with pytest.raises(TypeError, match=r"constraint 'short': broken: no luck$"):
        drawn(make_model(), tokenizer, ["a"], chat_template=False).rewards([l3ms.Constraint("short", broken, max=3)])
