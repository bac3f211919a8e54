"""Responses are drawn from the model's own distribution, and scored where they were drawn."""

import itertools
import math

import pytest
import torch

import l3ms
from l3ms.rollouts.prompts import encode_prompt


def roll(model, tokenizer, prompts, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return l3ms.rollout(model, tokenizer, prompts, **{"chat_template": False, **options})


def probabilities(model, ids, temperature=1.0):
    """(V,) of the next token."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0, -1].double()
    return (logits / temperature).softmax(-1)


def chi_square(counts, expected):
    """sum (O - E)^2 / E, and the 99.9% quantile of its distribution (Wilson-Hilferty)."""
    statistic = float(((counts - expected).square() / expected).sum())
    k = len(expected) - 1
    return statistic, k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


@pytest.fixture
def five_tokens(make_model):
    """A vocabulary of 5: <pad>, <eos>, <unk>, a, b."""
    return make_model("Llama", vocab_size=5, gain=2.0, seed=3)


# What a model's own generation settings may bring, and a gradient of the sampled distribution must not have.
LEAKS = [
    {},
    {"top_k": 1, "top_p": 0.2, "temperature": 0.1, "do_sample": False},
    {"min_p": 0.6, "typical_p": 0.2, "epsilon_cutoff": 0.3, "eta_cutoff": 0.3, "top_h": 0.1},
    {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
    {"suppress_tokens": [1, 3], "begin_suppress_tokens": [4], "bad_words_ids": [[0]]},
    {"min_new_tokens": 2, "min_length": 9},
    {"forced_eos_token_id": 1, "forced_bos_token_id": 2},
    {"sequence_bias": [[[3], 9.0]], "exponential_decay_length_penalty": (0, 5.0)},
    {"num_beams": 3, "num_return_sequences": 2, "guidance_scale": 4.0},
    {"max_length": 3, "max_time": 0.0},
    {"stop_strings": ["a"], "token_healing": True},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
]


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: "+".join(leak) or "none")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampled_distribution_is_the_softmax_of_the_logits(five_tokens, tokenizer, leak, temperature):
    """Every response of two tokens, counted: pi(y1) pi(y2 | y1), an EOS closes. Nothing of the model's own settings leaks in."""
    draws = 600
    for name, value in leak.items():
        setattr(five_tokens.generation_config, name, value)
    responses = roll(five_tokens, tokenizer, ["a"] * draws, max_new_tokens=2, temperature=temperature).completion_ids()
    assert len(responses) == draws
    expected = {}
    first = probabilities(five_tokens, [3], temperature)
    expected[(1,)] = first[1]
    for token in (0, 2, 3, 4):
        for after, p in enumerate(probabilities(five_tokens, [3, token], temperature)):
            expected[(token, after)] = first[token] * p
    assert set(map(tuple, responses)) <= expected.keys()
    table = sorted(expected, key=lambda key: -expected[key])
    wanted = draws * torch.stack([expected[key] for key in table])
    counts = torch.tensor([float(sum(tuple(r) == key for r in responses)) for key in table], dtype=torch.float64)
    rare = int((wanted >= 8).sum())  # the rest is one class
    wanted, counts = (torch.cat([x[:rare], x[rare:].sum()[None]]) for x in (wanted, counts))
    statistic, limit = chi_square(counts, wanted)
    assert statistic < limit


def test_temperature_and_seed_change_what_is_drawn(five_tokens, tokenizer):
    prompts = ["a"] * 300
    warm, cold, again = (
        roll(five_tokens, tokenizer, prompts, seed=seed, temperature=t, max_new_tokens=1)
        for seed, t in ((0, 1.0), (0, 0.05), (0, 1.0))
    )
    assert torch.equal(warm.labels, again.labels)
    for labels, temperature in ((cold.labels, 0.05), (warm.labels, 1.0)):
        wanted = probabilities(five_tokens, [3], temperature)
        best, p = wanted.argmax(), float(wanted.max())
        drawn = float((labels[:, 1] == best).double().mean())
        assert abs(drawn - p) < 4 * math.sqrt(p * (1 - p) / len(prompts)) + 1e-6


# ---- what comes back ----


@pytest.fixture
def responses(make_model, tokenizer):
    model = make_model(seed=1)
    prompts = ["a", "b c d e", "def name ( a )", "f f"] * 6
    return model, prompts, roll(model, tokenizer, prompts, max_new_tokens=6)


def test_responses_end_at_eos_and_truncated_ones_have_not_ended(responses):
    _, _, out = responses
    ids = out.completion_ids()
    for tokens, length, ended in zip(ids, out.lengths.tolist(), out.ended.tolist(), strict=True):
        assert len(tokens) == length
        assert 1 not in tokens[:-1]
        assert ended == (tokens[-1] == 1)
        assert ended or length == 6
    assert out.ended.any()
    assert not out.ended.all()
    assert out.lengths.dtype == torch.int64
    assert out.ended.dtype == torch.bool


def test_labels_cover_exactly_the_response_and_padding_is_on_the_right(responses, tokenizer):
    _, prompts, out = responses
    assert len(out) == len(prompts)
    assert out.prompts == prompts
    for row, prompt in enumerate(prompts):
        asked = tokenizer(prompt)["input_ids"]
        answered = out.completion_ids()[row]
        end = len(asked) + len(answered)
        assert out.input_ids[row, :end].tolist() == asked + answered
        assert out.labels[row].tolist() == [-100] * len(asked) + answered + [-100] * (out.labels.shape[1] - end)
        assert out.attention_mask[row].tolist() == [1] * end + [0] * (out.labels.shape[1] - end)
        assert out.input_ids[row, end:].eq(0).all()
    assert out.attention_mask[:, -1].any()  # no wider than the longest


def test_the_count_of_scored_tokens_is_known_on_the_host(responses):
    _, _, out = responses
    assert out.host_lengths == out.lengths.tolist()
    assert out.scored == int((out.labels[:, 1:] != -100).sum())
    assert out.scored_in(slice(1, 3)) == int(out.lengths[1:3].sum())
    for rows in (slice(1, 3), [2, 0]):
        inputs = out.inputs(rows)
        width = int(out.attention_mask[rows].sum(1).max())
        for name in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(inputs[name], out[name][rows][:, :width])
        assert inputs["scored"] == int(out.lengths[rows].sum())
    made = {name: value for name, value in vars(out).items() if name not in ("host_lengths", "host_widths")}
    assert l3ms.Rollout(**made).host_widths == out.host_widths
    assert l3ms.Rollout(**made).host_lengths == out.host_lengths  # by hand, from samples of one's own


def test_completions_are_the_decoded_responses(responses, tokenizer):
    _, _, out = responses
    for text, tokens in zip(out.completions, out.completion_ids(), strict=True):
        assert text == tokenizer.decode([t for t in tokens if t > 2])


def test_a_rollout_is_a_mapping_of_what_a_forward_takes(responses):
    model, _, out = responses
    assert out["input_ids"] is out.input_ids
    assert model(**{name: out[name] for name in ("input_ids", "attention_mask", "labels")}).loss.isfinite()


def test_the_fused_heads_likelihood_is_that_of_the_models_own_logits_while_sampling(make_model, tokenizer):
    """Left padding while sampling, right padding in training: the same log pi(y), here recomputed one response at a time without any."""
    model = l3ms.fuse_head(make_model("Gemma2", seed=2, final_logit_softcapping=3.0))
    prompts = ["a", "b c d e", "def name ( a )", "f f"]
    out = roll(model, tokenizer, prompts, max_new_tokens=5, temperature=0.8)
    fused = model(
        input_ids=out.input_ids,
        attention_mask=out.attention_mask,
        labels=out.labels,
        seq_weight=torch.ones(4),
        temperature=0.8,
    )
    assert torch.equal(fused.length, out.lengths)
    for row, prompt in enumerate(prompts):
        ids, total = tokenizer(prompt)["input_ids"], 0.0
        for token in out.completion_ids()[row]:
            total += probabilities(model, ids, 0.8)[token].log().item()
            ids = [*ids, token]
        assert fused.sequence[row].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, None, 100])
def test_batches_keep_the_order(make_model, tokenizer, batch_size):
    model = make_model(seed=1)
    prompts = [" ".join(p) for p in itertools.product("ab", "cd", "ef")]
    out = roll(model, tokenizer, prompts, max_new_tokens=4, batch_size=batch_size)
    assert len(out) == 8
    assert [tokenizer.decode(ids[:3]) for ids in out.input_ids] == prompts


def test_messages_go_through_the_chat_template(make_model, tokenizer):
    messages = [{"role": "user", "content": "a b"}]
    ids = encode_prompt(tokenizer, messages)
    assert tokenizer.decode(ids) == "user : a b assistant :"
    out = roll(make_model(seed=1), tokenizer, [messages, "c d"], max_new_tokens=3)
    assert out.input_ids[0, : len(ids)].tolist() == ids
    assert out.prompts == [messages, "c d"]
    assert out.completions[0][0]["role"] == "assistant"
    assert isinstance(out.completions[0][0]["content"], str)
    assert isinstance(out.completions[1], str)


def test_prompt_ids_are_taken_as_they_are(make_model, tokenizer):
    out = roll(make_model(seed=1), tokenizer, ["shown", "only"], prompt_ids=[[5, 6, 7], [8]], max_new_tokens=3)
    assert out.prompts == ["shown", "only"]
    assert out.input_ids[0, :3].tolist() == [5, 6, 7]
    assert out.input_ids[1, 0] == 8
    assert (out.labels != -100).sum(1).tolist() == out.lengths.tolist()


def test_an_eos_that_the_tokenizer_adds_to_prompts_is_taken_off(tokenizer):
    class Closing:
        eos_token_id = 1

        def __call__(self, text):
            return {"input_ids": [*tokenizer(text)["input_ids"], 1]}

    assert encode_prompt(Closing(), "a b") == [3, 4]


def test_every_end_token_of_the_model_ends_a_response(five_tokens, tokenizer):
    five_tokens.generation_config.eos_token_id = [1, 4]
    out = roll(five_tokens, tokenizer, ["a"] * 80, max_new_tokens=4)
    last = [tokens[-1] for tokens in out.completion_ids()]
    assert {1, 4} <= set(last)
    for tokens, ended in zip(out.completion_ids(), out.ended.tolist(), strict=True):
        assert not {1, 4} & set(tokens[:-1])
        assert ended == (tokens[-1] in (1, 4))
    five_tokens.generation_config.eos_token_id = 4
    again = roll(five_tokens, tokenizer, ["a"] * 80, max_new_tokens=4)
    assert torch.equal(out.labels, again.labels)  # the tokenizer's own ends responses in any case


def test_without_a_padding_token_eos_pads_and_is_not_scored(five_tokens, tokenizer):
    class Unpadded:
        pad_token_id, eos_token_id = None, 1
        batch_decode = staticmethod(tokenizer.batch_decode)

        def __call__(self, text):
            return tokenizer(text)

    five_tokens.generation_config.pad_token_id = five_tokens.config.pad_token_id = None
    out = roll(five_tokens, Unpadded(), ["a"] * 60, max_new_tokens=4)
    assert ((out.labels == 1).sum(1) == out.ended.long()).all()
    assert torch.equal(out.attention_mask.sum(1), 1 + out.lengths)


def broken(logits):
    raise LookupError("no token")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(make_model, tokenizer, monkeypatch, training):
    model = make_model().train(training)
    roll(model, tokenizer, ["a"], max_new_tokens=2)
    assert model.training == training
    monkeypatch.setattr("l3ms.rollouts.drawing.draw", broken)
    with pytest.raises(LookupError):
        roll(model, tokenizer, ["a"], max_new_tokens=2)
    assert model.training == training


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
@pytest.mark.parametrize("adapter", [False, True])
def test_the_models_own_settings_are_as_before(five_tokens, tokenizer, monkeypatch, adapter):
    import peft

    model, own = five_tokens, five_tokens.generation_config
    own.min_p, own.suppress_tokens, own.eos_token_id = 0.9, [0, 2, 3], [1, 4]
    expected = roll(model, tokenizer, ["a"] * 60, max_new_tokens=3)
    if adapter:  # one that changes nothing
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    out = roll(model, tokenizer, ["a"] * 60, max_new_tokens=3)
    assert torch.equal(out.labels, expected.labels)
    assert {0, 2, 3} & set(out.labels[:, 1].tolist())
    monkeypatch.setattr("l3ms.rollouts.drawing.draw", broken)
    with pytest.raises(LookupError):
        roll(model, tokenizer, ["a"], max_new_tokens=2)
    assert model.generation_config is five_tokens.generation_config is own
    assert own.min_p == 0.9


def test_dropout_is_off_while_sampling_and_no_graph_is_kept(make_model, tokenizer):
    model = make_model("Llama", vocab_size=5, gain=2.0, seed=3, attention_dropout=0.9).train()
    calm = make_model("Llama", vocab_size=5, gain=2.0, seed=3).eval()
    out, expected = (roll(m, tokenizer, ["a"] * 50, max_new_tokens=3) for m in (model, calm))
    assert torch.equal(out.labels, expected.labels)
    assert not out.input_ids.requires_grad


# ---- rewards ----


def test_rewards_get_what_trl_gives_them(responses):
    _, prompts, out = responses
    out.columns["topic"] = ["x"] * len(prompts)
    seen = {}

    def share(prompts, completions, completion_ids, topic):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, topic=topic)
        return [len(ids) / 6 for ids in completion_ids]

    rewards = out.rewards([l3ms.Constraint("share", share, min=0.5), l3ms.Length(max=4), l3ms.Constraint("nll", max=2)])
    assert rewards == {"share": (out.lengths / 6).tolist(), "length": out.lengths.double().tolist()} or rewards[
        "share"
    ] == pytest.approx((out.lengths / 6).tolist())
    assert rewards.keys() == {"share", "length"}  # the nll comes from elsewhere
    assert seen["prompts"] == prompts
    assert seen["completion_ids"] == out.completion_ids()
    assert seen["topic"] == ["x"] * len(prompts)


def test_a_bad_reward_names_function_and_row(responses):
    def broken(prompts, completions, **columns):
        return [0.0] * (len(prompts) - 1) + [math.nan]

    _, prompts, out = responses
    constraints = [l3ms.Constraint("r", broken, max=1)]
    base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=rf"constraint 'r': broken: row {len(prompts) - 1} is nan"):
        l3ms.L3MOptimizer(base, constraints).observe(out.rewards(constraints))
    weights = l3ms.L3MOptimizer(base, constraints, nonfinite="drop").observe(out.rewards(constraints))
    assert weights.isfinite().all()
