"""What is reported of a model: length statistics, perplexity and fresh samples, each against a direct computation."""

import json
import math
import statistics

import pytest
import torch

import l3ms
from l3ms.measuring.evaluation import evaluate, exp, groups_of, half_width, length_statistics, ratio, task_perplexity


@pytest.fixture
def rows():
    """Twelve prompts of 1-4 tokens with responses of 1-6, in the trainer's form; the last response token is EOS (1)."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(12):
        prompt = torch.randint(3, 17, (1 + number % 4,), generator=generator).tolist()
        response = [*torch.randint(3, 17, (number % 6,), generator=generator).tolist(), 1]
        made.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response, "prompt": "def name"})
    return made


def test_length_statistics_against_a_direct_computation():
    lengths = [3, 5, 5, 8, 13, 21, 2, 1, 9, 30]
    ended = [True] * 9 + [False]
    half = 1.959964 * statistics.stdev(lengths) / math.sqrt(10)
    result = length_statistics(lengths, ended)
    assert result["samples"] == 10
    assert result["ended"] == pytest.approx(0.9)
    length = result["length"]
    assert length["mean"] == pytest.approx(9.7)
    assert length["ci95"] == pytest.approx([9.7 - half, 9.7 + half])
    assert length["p50"] == statistics.median(lengths)
    hundredths = statistics.quantiles(lengths, n=100, method="inclusive")
    assert (length["p5"], length["p95"]) == pytest.approx((hundredths[4], hundredths[94]))
    assert json.loads(json.dumps(result)) == result
    assert length_statistics(torch.tensor(lengths), torch.tensor(ended)) == result


def test_responses_to_one_prompt_count_as_one_where_they_are_alike():
    few, keys = [3.0, 5.0, 8.0, 13.0], ["a", "b", "c", "d"]
    once = half_width(few, keys)
    assert once == pytest.approx(1.959964 * statistics.stdev(few) / 2)
    assert half_width(few * 9, keys * 9) == pytest.approx(once)
    assert half_width(few * 9) < once / 2
    assert half_width(few, ["a"] * 4) == pytest.approx(once)  # of this prompt alone
    assert half_width([1.0]) == half_width([]) == math.inf


def test_rows_of_one_prompt_and_repeated_rows_depend_on_each_other():
    def row(prompt, answer):
        return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}

    def keys(rows):
        return groups_of(l3ms.DataNLL("other", rows, max=1.0), ["not", "these"])

    answers = [row([3, 4], [5]), row([3, 4], [6]), row([3, 5], [5]), row([3, 5], [5])]
    first, second, third, fourth = keys(answers)
    assert first == second != third == fourth
    texts = [row([2], [5, 6]), row([2], [7]), row([2], [5, 6])]  # behind a BOS token
    assert [keys(texts)[0] == key for key in keys(texts)] == [True, False, True]
    assert len(set(keys([row([3, 4], [n]) for n in range(5, 9)]))) == 4  # of one prompt alone
    begun = [row([n % 2], [5, n]) for n in range(6)]  # texts without BOS: their first token
    assert len(set(keys(begun))) == 6
    assert keys(answers[:1] * 3) == [0, 1, 2]


def test_responses_to_one_prompt_alone_are_independent():
    length = l3ms.Length(max=9)
    assert groups_of(length, ["a", "b", "a"]) == ["a", "b", "a"]
    assert groups_of(length, ["a", "a", "a"]) == [0, 1, 2]


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = -torch.rand(2000, 200, generator=generator).log_() * 20  # skewed, as lengths are; mean 20
    intervals = [length_statistics(row, torch.ones(200))["length"]["ci95"] for row in samples]
    assert 0.92 < statistics.mean(low <= 20 <= high for low, high in intervals) < 0.97


def test_a_ratio_of_means_leaves_out_what_has_no_value():
    values, lengths = [4.0, None, 1.0, math.nan, math.inf], [2, 9, 6, 7, 5]
    found = ratio(values, lengths)
    assert (found[1], str(found[3]), found[4]) == (None, "nan", math.inf)
    assert (found[0], found[2]) == pytest.approx((4 / 4 - 5 / 8 * (2 / 4 - 1), 1 / 4 - 5 / 8 * (6 / 4 - 1)))
    assert statistics.mean(value for value in found[::2][:2] if value) == pytest.approx(5 / 8)
    assert ratio([3.0, 6.0], [1, 2]) == pytest.approx([3.0, 3.0])  # each token alike
    assert ratio([None, math.inf], [1, 2]) == [None, math.inf]


def test_one_response_has_no_interval_and_none_is_an_error():
    assert length_statistics([7], [True])["length"]["ci95"] == [-math.inf, math.inf]
    with pytest.raises(ValueError, match="no responses"):
        length_statistics([], [])


def test_task_perplexity_against_a_direct_computation(make_model, rows):
    model = make_model().eval()
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        scored = [t for t, label in enumerate(row["labels"]) if label != -100]
        log_probabilities = [logits[t - 1].log_softmax(-1)[row["input_ids"][t]].item() for t in scored]
        losses.append(-statistics.mean(log_probabilities))
    expected = math.exp(statistics.mean(losses))
    assert expected > 1.5
    assert task_perplexity(model, rows) == pytest.approx(expected, rel=1e-5)
    assert task_perplexity(model, rows, batch_size=5) == pytest.approx(expected, rel=1e-5)


def test_task_perplexity_weighs_sequences_not_tokens_and_skips_what_is_not_scored(make_model, rows):
    model = make_model().eval()
    short, long = rows[0], rows[5]
    assert len([label for label in long["labels"] if label != -100]) > 1
    both = task_perplexity(model, [short, long])
    assert both == pytest.approx(math.sqrt(task_perplexity(model, [short]) * task_perplexity(model, [long])), rel=1e-5)
    unscored = {**long, "labels": [-100] * len(long["labels"])}
    assert task_perplexity(model, [short, unscored, long]) == pytest.approx(both, rel=1e-5)
    for nothing in ([], [unscored]):
        with pytest.raises(ValueError, match="scored"):
            task_perplexity(model, nothing)


def test_task_perplexity_leaves_the_model_as_it_was(make_model, rows):
    model = make_model().train()
    task_perplexity(model, rows)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_samples_once_per_row_and_is_reproducible(make_model, tokenizer, rows):
    model = make_model(vocab_size=len(tokenizer))
    before = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    first = evaluate(
        model, tokenizer, rows, max_new_tokens=8, seed=1, batch_size=5, progress=lambda *news: seen.append(news)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert len(first.lengths) == len(first.completions) == 12
    assert set(first.summary) == {"length", "ended", "perplexity", "samples"}
    assert set(first.summary["length"]) == {"mean", "ci95", "p5", "p50", "p95"}
    assert first.summary["samples"] == 12
    assert first.summary["length"]["mean"] == pytest.approx(statistics.mean(first.lengths))
    assert first.summary["perplexity"] == task_perplexity(model, rows)
    assert evaluate(model, tokenizer, rows, max_new_tokens=8, seed=1, batch_size=5) == first
    assert evaluate(model, tokenizer, rows, max_new_tokens=8, seed=2, batch_size=5).lengths != first.lengths


@pytest.mark.parametrize("ends", [True, False])
def test_length_counts_eos_and_a_truncated_response_never_counts_as_ended(make_model, tokenizer, rows, ends):
    model = make_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    bias = torch.zeros(len(tokenizer))
    bias[1] = 50.0 if ends else -50.0
    torch.nn.init.zeros_(model.lm_head.weight)  # with the bias, the same distribution everywhere
    model.lm_head.bias = torch.nn.Parameter(bias)
    result = evaluate(model, tokenizer, rows, max_new_tokens=6, seed=0)
    assert result.lengths == [1 if ends else 6] * len(rows)
    assert result.summary["ended"] == (1.0 if ends else 0.0)
    assert not ends or result.completions == [""] * len(rows)


def test_a_perplexity_beyond_floats_is_inf(make_model, rows):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(2000)
    assert task_perplexity(model, rows) == math.inf
    assert exp(709.0) < math.inf == exp(710.0)
    assert math.isnan(exp(math.nan))
