"""Rows that have ended leave the batch, and nothing of what the others say changes."""

import pytest
import torch
from transformers import GenerationConfig

from l3ms.rollouts import shrinking

MODELS = {
    "Llama": {},
    "GPT2": {},  # absolute positions
    "Qwen2": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": 5},  # a cache that does not select rows
}
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [3, 4], [15], [16, 5], [7, 7, 8], [4, 9]]


@pytest.fixture
def batches():
    """Sizes of the batches that a model's forward has seen."""
    seen = []

    def watch(model):
        model.register_forward_pre_hook(
            lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
        )
        return seen

    return watch


def greedy(model, shrink, end=(1, 3, 5), most=24, prompts=PROMPTS):
    config = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=list(end), pad_token_id=0)
    return shrinking.sample(model.eval(), prompts, 0, end, config, shrink=shrink)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_responses_are_those_of_the_whole_batch(make_model, batches, kind, seed):
    model = make_model(kind, seed=seed, gain=4.0, **MODELS[kind])
    whole = greedy(model, shrink=False)
    seen = batches(model)
    assert greedy(model, shrink=True) == whole
    assert max(map(len, whole)) > min(map(len, whole))
    assert seen[0] == len(PROMPTS)
    assert seen[-1] < len(PROMPTS)


def test_every_response_is_closed_or_full(make_model):
    model, most = make_model("Llama", gain=2.0), 12
    config = GenerationConfig(do_sample=True, max_new_tokens=most, eos_token_id=[1, 3], pad_token_id=0)
    torch.manual_seed(0)
    for response in shrinking.sample(model.eval(), PROMPTS * 4, 0, [1, 3], config):
        assert len(response) == most or response[-1] in (1, 3)
        assert not set(response[:-1]) & {1, 3}


@pytest.mark.parametrize("case", ["asked", "prefix"])
def test_the_batch_stays_whole_where_it_must(make_model, batches, case):
    """Asked for; a learned prefix is put before every call's tokens. (Ranks with parts of one model: `test_sharded_models.py`.)"""
    model = make_model("Llama", gain=4.0)
    if case == "prefix":
        model.active_peft_config = type("Prefix", (), {"is_prompt_learning": True})()
    seen = batches(model)
    greedy(model, shrink=case != "asked")
    assert set(seen) == {len(PROMPTS)}


def test_all_end_at_once(make_model, batches):
    """No second call with nothing in it."""
    model = make_model("Llama")
    seen = batches(model)
    assert greedy(model, shrink=True, end=range(17)) == greedy(model, shrink=False, end=range(17))
    assert seen == [len(PROMPTS)] * 2
