"""What all prompts begin with goes through the model once, and nothing of what is said changes."""

import pytest
import torch
from transformers import GenerationConfig

from l3ms.rollouts import shared_prefix, shrinking, ways
from l3ms.rollouts.drawing import Drawn

BEGINNING = [11, 12, 13, 14, 3, 4, 15, 16, 5, 7, 8, 9]
PROMPTS = [[*BEGINNING, *rest] for rest in ([5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [3, 4], [15], [16, 5], [9, 10])]


@pytest.mark.parametrize(
    ("prompts", "count"),
    [(PROMPTS, 12), ([[1, 2, 3], [1, 2, 3]], 2), ([[1, 2, 3], [1, 2]], 1), ([[1], [1, 2]], 0), ([[4, 1], [5, 1], [4, 1]], 0)],
)  # fmt: skip
def test_what_is_shared_ends_before_the_last_token_of_any(prompts, count):
    assert shared_prefix.shared(prompts) == count


def sampled(model, together, greedy):
    """-> responses, and the tokens that went through the model."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    config = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=[1, 3, 5], pad_token_id=0)
    torch.manual_seed(0)
    drawn = None if greedy else Drawn(1.0)
    responses = shrinking.sample(model.double().eval(), PROMPTS, 0, [1, 3, 5], config, drawn=drawn, together=together)
    handle.remove()
    return responses, sum(seen)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen2"])
@pytest.mark.parametrize("greedy", [True, False])
def test_responses_are_those_of_whole_prompts(make_model, kind, greedy):
    model = make_model(kind, gain=3.0)
    (whole, all_tokens), (together, tokens) = (sampled(model, on, greedy) for on in (False, True))
    assert together == whole
    assert len({len(response) for response in whole}) > 1
    assert tokens == all_tokens - (len(PROMPTS) - 1) * len(BEGINNING)


def test_it_is_tried_before_it_is_done(make_model, tokenizer, monkeypatch):
    """And left where it is not what is scored: a mask that shows the padding, a cache of another kind."""
    monkeypatch.setattr(ways, "is_large", lambda model: True)
    assert ways.way_of(make_model("Llama").eval(), tokenizer, 0) == ways.Way("padded", shrink=True, together=True)
    assert not ways.way_of(make_model("Mistral", sliding_window=5).eval(), tokenizer, 0).together

    def careless(*arguments):
        cache, ids, mask = shared_prefix.begun(*arguments)
        return cache, ids, torch.ones_like(mask)

    monkeypatch.setattr(ways, "begun", careless)
    assert ways.way_of(make_model("Llama").eval(), tokenizer, 0) == ways.Way("padded", shrink=True, together=False)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft's
def test_an_activated_adapter_gets_whole_prompts(make_model, tokenizer, monkeypatch):
    """It adds from its invocation on, which is looked for in each forward: across the end of what is shared it would not be found."""
    import peft

    monkeypatch.setattr(ways, "is_large", lambda model: True)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    plain = peft.get_peft_model(make_model("Llama"), peft.LoraConfig(**options)).eval()
    assert ways.way_of(plain, tokenizer, 0).together
    activated = peft.get_peft_model(
        make_model("Llama"), peft.LoraConfig(alora_invocation_tokens=[5, 6], **options)
    ).eval()
    assert ways.way_of(activated, tokenizer, 0) == ways.Way("padded", shrink=True, together=False)
