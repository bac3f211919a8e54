"""What all rows of a batch begin with goes through the model once, and loss and gradient stay those of whole rows."""

import pytest
import torch
from torch import nn
from training_runs import rows as plain_rows

import l3ms
from l3ms.training import beginnings
from l3ms.training.importance_weights import policy_log_likelihood

BEGINNING = [11, 12, 13, 14, 3, 4]
ROWS = [([5, 6, 7], [8, 1]), ([8], [9, 10, 4, 1]), ([9, 10], [1]), ([11, 12, 13], [3, 4, 5, 6, 1])]  # prompt, response


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft's


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Of models that are large enough elsewhere."""
    monkeypatch.setattr(beginnings, "is_large", lambda model: True)
    monkeypatch.setattr(beginnings, "LEAST", 1)


def batch(rows=ROWS, beginning=BEGINNING):
    sequences = [([*beginning, *prompt], response) for prompt, response in rows]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    shape = len(rows), width
    ids, mask, labels = (
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, -100),
    )
    for row, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[row, :length], mask[row, :length] = torch.tensor([*prompt, *response]), 1
        labels[row, len(prompt) : length] = torch.tensor(response)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "scored": sum(len(row[1]) for row in rows)}


def tokens_of(model, call):
    """-> what the call returns, and how many tokens went through the model in it."""
    seen = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda module, given: seen.append(given[0].numel()))
    out = call()
    handle.remove()
    return out, sum(seen)


def gradient(model, out):
    model.zero_grad(set_to_none=True)
    out.loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compared(model, inputs, **options):
    """-> whether the beginning went through once; everything is as with whole rows."""
    l3ms.fuse_head(model)
    model.train()
    weight = torch.tensor([0.5, -0.25, 1.0, 0.125])[: len(inputs["labels"])]
    whole = model(**inputs, seq_weight=weight, use_cache=False, **options)
    expected = gradient(model, whole)
    beginnings.forward(model, inputs, seq_weight=weight, **options)  # tried
    found, tokens = tokens_of(model, lambda: beginnings.forward(model, inputs, seq_weight=weight, **options))
    torch.testing.assert_close(found.token, whole.token, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sequence, whole.sequence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=1e-5)
    assert found.length.equal(whole.length)
    assert (gradient(model, found) - expected).norm() < 1e-5 * expected.norm()
    count = len(BEGINNING)
    assert tokens in (inputs["input_ids"].numel(), inputs["input_ids"].numel() - (len(weight) - 1) * count)
    return tokens < inputs["input_ids"].numel()


OPT = {"word_embed_proj_dim": 16, "ffn_dim": 24, "dropout": 0.0}
KINDS = {"Llama": {}, "GPT2": {}, "OPT": OPT, "Gemma2": {}, "Mixtral": {}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradient_are_those_of_whole_rows(make_model, kind, lora):
    model = make_model(kind, **KINDS[kind])
    if lora:
        import peft

        conv = kind == "GPT2"
        options = {"target_modules": ["c_attn"] if conv else ["q_proj", "v_proj"], "fan_in_fan_out": conv}
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))
    assert compared(model, batch(), temperature=0.7, auxiliary=False)
    assert compared(model, batch())


def test_models_whose_state_goes_on_otherwise_get_whole_rows(make_model):
    assert not compared(make_model("Mistral", sliding_window=5), batch())
    assert compared(make_model("Mistral", sliding_window=50), batch())


def test_what_a_model_adds_of_all_its_tokens_needs_them(make_model):
    model = make_model("Mixtral", output_router_logits=True)
    assert not compared(model, batch())
    assert not compared(model, batch(), auxiliary=False)  # it counts them there too


@pytest.mark.parametrize("change", ["dropout", "attention", "checkpointing", "double", "16 bits"])
def test_whole_rows_where_a_forward_draws_or_is_another(make_model, change):
    model = make_model("Llama", attention_dropout=0.5 if change == "attention" else 0.0)
    l3ms.fuse_head(model)
    model.train()
    if change == "dropout":
        model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj, nn.Dropout(0.1))
    if change == "checkpointing":
        model.gradient_checkpointing_enable()
    if change in ("double", "16 bits"):
        model.to(torch.float64 if change == "double" else torch.bfloat16)
    inputs, weight = batch(), torch.ones(4)
    _, tokens = tokens_of(model, lambda: beginnings.forward(model, inputs, seq_weight=weight))
    assert tokens == inputs["input_ids"].numel()
    if change in ("dropout", "attention"):
        model.eval()
        beginnings.forward(model, inputs, seq_weight=weight)
        _, tokens = tokens_of(model, lambda: beginnings.forward(model, inputs, seq_weight=weight))
        assert tokens < inputs["input_ids"].numel()


def test_noise_whose_size_is_by_the_length_gets_whole_rows_also_after_an_evaluation(make_model):
    model, inputs, weight = make_model("Llama"), batch(), torch.ones(4)
    l3ms.fuse_head(model)
    model.get_input_embeddings().neftune_noise_alpha = 5.0  # the Trainer sets it, whose hook draws while it trains
    for training in (False, True):
        model.train(training)
        beginnings.forward(model, inputs, seq_weight=weight)
        _, tokens = tokens_of(model, lambda: beginnings.forward(model, inputs, seq_weight=weight))
        assert (tokens == inputs["input_ids"].numel()) is training


def test_each_mode_is_tried(make_model, monkeypatch):
    model, tried = make_model("Llama"), []
    l3ms.fuse_head(model)
    monkeypatch.setattr(beginnings, "_tried", lambda model, *_: tried.append(model.training))
    for training in (False, True, True):
        beginnings.forward(model.train(training), batch(), seq_weight=torch.ones(4))
    assert tried == [False, True]


def test_whole_rows_where_positions_are_others_beyond_a_width(make_model):
    def limit(**rope):
        return beginnings._limit(make_model("Llama", rope_parameters={"rope_theta": 1e4, **rope}).config)

    assert limit(rope_type="default") == float("inf")
    assert limit(rope_type="dynamic", factor=2.0) == 64
    kinds = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"original_max_position_embeddings": 8}}
    config = make_model("Llama").config
    config.rope_parameters = kinds
    assert beginnings._limit(config) == 8
    del kinds["sliding_attention"]
    assert beginnings._limit(config) == 64


def test_an_activated_adapter_gets_whole_rows(make_model):
    """Its invocation may lie across the end of what is shared: nothing would be found of it then."""
    import peft

    options = {"alora_invocation_tokens": BEGINNING[-2:], "init_lora_weights": False}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    assert not compared(peft.get_peft_model(make_model("Llama"), config), batch())


def test_a_cache_that_carries_no_gradient_is_found_out(make_model, monkeypatch):
    from transformers.cache_utils import DynamicCache

    repeated = DynamicCache.batch_repeat_interleave

    def cut(self, count):
        repeated(self, count)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", cut)
    assert not compared(make_model("Llama"), batch())


def test_what_is_shared_ends_before_what_is_scored():
    assert beginnings._count(batch()) == len(BEGINNING)
    same = [([5], [8, 1]), ([5], [8, 1])]
    # the last token of the prompts scores the first of the responses
    assert beginnings._count(batch(same)) == len(BEGINNING)
    assert beginnings._count(batch([([5, 6], [8, 1]), ([5, 7], [8, 1])], [])) == 1
    assert beginnings._count(batch([([], [8, 1]), ([], [9, 1])], [4])) == 0
    assert beginnings._count(batch(beginning=[])) == 0
    assert beginnings._count(batch(ROWS[:1])) == 0


def test_a_training_is_that_with_whole_rows(make_model, train, monkeypatch):
    data = [
        {**row, "input_ids": [*BEGINNING, *row["input_ids"]], "labels": [*[-100] * len(BEGINNING), *row["labels"]]}
        for row in plain_rows()
    ]
    found = []
    for on in (True, False):
        monkeypatch.setattr(beginnings, "_could", beginnings._could if on else lambda *arguments: False)
        trainer, recorder = train(make_model(), data=data, max_steps=3)
        policy_log_likelihood(trainer, trainer.last_rollout)  # in evaluation it is tried once more
        seen = tokens_of(trainer.model, lambda trainer=trainer: policy_log_likelihood(trainer, trainer.last_rollout))
        found.append((recorder.weights, *seen))
    (ours, said, tokens), (theirs, expected, all_tokens) = found
    assert tokens < all_tokens
    torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)
