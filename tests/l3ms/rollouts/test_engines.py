"""An engine's answers become a rollout as the policy's own do, and what the policy cannot have said is refused by the engine's name."""

import math

import numpy as np
import pytest
import torch
from engines import Copying, script_model

import l3ms
from l3ms.rollouts.engines import Response, as_engine, check_responses
from l3ms.rollouts.transformers_engine import TransformersEngine

PROMPTS = ["a", "b c d e", "def name ( a )", "f f"] * 4


def roll(model, tokenizer, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return l3ms.rollout(model, tokenizer, PROMPTS, **{"max_new_tokens": 8, "chat_template": False, **options})


def assert_same(one, other):
    for name in ("input_ids", "attention_mask", "labels", "lengths", "ended"):
        assert torch.equal(one[name], other[name]), name
    for name in ("prompts", "completions", "raw_completions", "host_lengths", "temperature"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_models_own_engine_draws_what_the_model_draws(make_model, tokenizer, batch_size):
    model = make_model(seed=1)
    own = roll(model, tokenizer, batch_size=batch_size, temperature=0.8)
    engine = TransformersEngine(make_model(seed=5), tokenizer)  # another model, until it is updated
    assert_same(roll(model, tokenizer, engine=engine, batch_size=batch_size, temperature=0.8), own)
    assert engine.model is model
    assert own.engine_log_likelihood is None


def test_a_generator_of_ones_own_is_drawn_from_and_the_global_one_is_not(make_model, tokenizer):
    model = make_model(seed=1)
    stop = {"max_new_tokens": 6, "temperature": 1.0, "end": [1]}
    engine = TransformersEngine(model, tokenizer)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, same, other = (
        engine.sample([[3], [4, 5]] * 6, **stop, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_engine_is_updated_before_each_sampling_and_batches_go_one_by_one(make_model, tokenizer):
    engine, model = Copying(tokenizer), make_model(seed=1)
    out = roll(model, tokenizer, engine=engine, batch_size=10)
    assert engine.asked == ["update", "sample", "sample"]
    roll(model, tokenizer, engine=engine, update=False)
    assert engine.asked[3:] == ["sample"]
    assert out.engine_log_likelihood is not None
    assert list(map(len, out.engine_log_likelihood)) == out.host_lengths


def test_a_function_is_an_engine_and_must_know_the_policy_itself(make_model, tokenizer, caplog):
    model = make_model(seed=1)
    own = TransformersEngine(model, tokenizer)

    def policy(prompts, *, max_new_tokens, temperature, end, generator):
        stop = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return own.sample(prompts, **stop, end=end, generator=generator)

    assert_same(roll(model, tokenizer, engine=policy), roll(model, tokenizer))
    assert "policy is a function, so it must sample the policy as it is now" in caplog.text


@pytest.mark.parametrize("engine", [3, "vllm", TransformersEngine, type("Half", (), {"sample": lambda self: 0})()])
def test_what_is_no_engine_is_refused(engine):
    with pytest.raises(ValueError, match=r"^engine: "):
        as_engine(engine)


def test_options_of_generate_are_not_an_engines(make_model, tokenizer):
    with pytest.raises(ValueError, match="top_k: options are of transformers' generate, and Copying samples"):
        roll(make_model(), tokenizer, engine=Copying(tokenizer), top_k=3)


# ---- answers ----

GOOD = [Response([3, 4, 1], True, [-1.0, -2.0, 0.0]), Response([5, 6, 7], False, [-1.0, -0.1, -0.2])]
BAD = [
    (3, "wanted a list of Response, got int"),
    (GOOD[:1], "wanted one response per prompt, 2, got 1"),
    ([GOOD[0], [5, 6]], r"responses\[1\]: wanted an l3ms.Response"),
    ([GOOD[0], Response([], False)], r"responses\[1\]: wanted 1 to max_new_tokens=3 tokens, got 0"),
    ([GOOD[0], Response([5] * 4, False)], "wanted 1 to max_new_tokens=3 tokens, got 4"),
    ([GOOD[0], Response([5.5], False)], "tokens must be integers"),  # type: ignore[list-item]
    ([GOOD[0], Response([True], True)], "tokens must be integers"),
    ([GOOD[0], Response([17], False)], "token 17 is not in the model's vocabulary of 17"),
    ([GOOD[0], Response([-1], False)], "token -1 is not in the model's vocabulary"),
    ([GOOD[0], Response([5, 6], True)], "ended is True, and its last token 6 is no end token"),
    ([GOOD[0], Response([5, 1], False)], "ended is False, and its last token 1 is an end token"),
    ([GOOD[0], Response([1, 5], False)], "end token 1 stands at 0 of 2 tokens"),
    ([GOOD[0], Response([5] * 3, False, [-1.0, -1.0])], "wanted a log_likelihood for each of 3 tokens, got 2"),
    ([GOOD[0], Response([5, 1], True, [math.nan, 0.0])], "must be finite and at most 0, got nan"),
    ([GOOD[0], Response([5, 1], True, [0.9, 0.0])], "must be finite and at most 0, got 0.9"),
    ([GOOD[0], Response([5, 1], True, 3)], "log_likelihood must be numbers"),  # type: ignore[arg-type]
    (
        [GOOD[0], Response([5, 6], False)],
        r"responses\[1\]: was cut at 2 tokens, before max_new_tokens=3: raise .*max_model_len",
    ),
    ([GOOD[0], Response([5, 1], True)], "log_likelihood is there for 1 of 2 responses"),
]


def checked(found):
    return check_responses(Copying(None), found, count=2, max_new_tokens=3, end=[1], vocabulary=17)


@pytest.mark.parametrize(("found", "words"), BAD, ids=[words for _, words in BAD])
def test_an_answer_that_is_none_names_the_engine(found, words):
    with pytest.raises(ValueError, match=rf"^Copying: .*{words}") as caught:
        checked(found)
    assert "\n" not in str(caught.value)


def test_answers_become_plain_numbers():
    other = [Response(np.array(r.tokens), np.bool_(r.ended), torch.tensor(r.log_likelihood)) for r in GOOD]  # type: ignore[arg-type]
    found = checked(other)
    assert [r.tokens for r in found] == [r.tokens for r in GOOD]
    assert [type(r.tokens[0]) for r in found] == [int, int]
    assert found[1].log_likelihood == pytest.approx([-1.0, -0.1, -0.2])


# ---- a rollout of one's own ----


def test_a_rollout_from_tokens_is_the_sampled_one(make_model, tokenizer):
    sampled = roll(make_model(seed=1), tokenizer, temperature=0.7)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    pairs = zip(sampled.completion_ids(), sampled.ended.tolist(), strict=True)
    responses = [l3ms.Response(tokens, ended) for tokens, ended in pairs]
    columns = {"number": list(range(16))}
    made = l3ms.Rollout.from_tokens(tokenizer, PROMPTS, ids, responses, columns, temperature=0.7)
    assert_same(made, sampled)
    assert made.reward_columns()["number"] == columns["number"]
    seen = made.rewards([l3ms.Length(max=3)])["length"]
    assert seen == sampled.lengths.double().tolist()


@pytest.mark.parametrize(
    ("prompts", "ids", "responses", "words"),
    [
        (["a"], [[3]], [], "1 prompts, 1 prompt_ids, 0 responses"),
        ([], [], [], "0 prompts"),
        (["a"], [[]], [Response([3], False)], r"prompt_ids\[0\] has no tokens"),
        (["a"], [[3]], [Response([], False)], r"responses\[0\] has no tokens"),
    ],
)
def test_a_rollout_from_too_little_is_refused(tokenizer, prompts, ids, responses, words):
    with pytest.raises(ValueError, match=rf"Rollout\.from_tokens: .*{words}"):
        l3ms.Rollout.from_tokens(tokenizer, prompts, ids, responses)


def test_a_stale_copy_is_another_policy(make_model, tokenizer):
    """What the gap is for: the answers of old weights are well-formed."""
    model, engine = make_model(seed=1), Copying(tokenizer, updates=False)
    roll(model, tokenizer, engine=engine)
    before = engine.model
    script_model(model)
    roll(model, tokenizer, engine=engine)
    assert engine.model is before
