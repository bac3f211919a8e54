"""Both vLLM engines against one that checks what it is asked for. `make test-vllm` runs the real one."""

import copy
import http.client
import io
import sys
import urllib.request

import fake_vllm
import pytest
import torch
from engines import script_model

import l3ms
from l3ms.rollouts.vllm_weights import gaps, save_policy

PROMPTS = ["a", "b c d e", "f f"] * 4


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def fake(monkeypatch, tokenizer):
    """fake(**kind) -> the module, installed."""
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    def install(**kind):
        made = fake_vllm.module(tokenizer, **kind)
        monkeypatch.setitem(sys.modules, "vllm", made)
        return made

    return install


def roll(model, tokenizer, engine, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return l3ms.rollout(model, tokenizer, PROMPTS, max_new_tokens=6, chat_template=False, engine=engine, **options)


def gap(model, out):
    """Mean |difference| between the engine's numbers and the model's own."""
    ids = [row[row_mask.bool()].tolist() for row, row_mask in zip(out.input_ids, out.attention_mask, strict=True)]
    answers = out.completion_ids()
    prompts = [row[: len(row) - len(answer)] for row, answer in zip(ids, answers, strict=True)]
    pairs = zip(answers, out.ended.tolist(), out.engine_log_likelihood, strict=True)
    found = gaps(model, prompts, [l3ms.Response(*pair) for pair in pairs], out.temperature)
    return float(torch.cat(found).abs().mean())


# ---- in the process ----


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_has_the_policys_weights_at_each_sampling_and_leaves_the_process_as_it_was(
    fake, make_model, tokenizer, temperature
):
    module, model = fake(), make_model(seed=1).train()
    engine = l3ms.VllmEngine(max_model_len=64)
    threads, drawn = torch.set_num_threads, []
    for _ in range(3):
        torch.manual_seed(5)
        out = l3ms.rollout(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=temperature, engine=engine)
        assert gap(model, out) < 1e-5
        drawn.append(torch.rand(()).item())
        script_model(model)
    assert len(set(drawn)) == 1  # of the global generator the seeds are drawn, and nothing else
    assert torch.set_num_threads is threads
    assert torch.get_default_dtype() == torch.float32
    assert model.training
    (llm,) = module.made
    assert llm.options == {
        "dtype": "float32", "use_tqdm_on_load": False, "max_model_len": 64, "gpu_memory_utilization": 0.3, "enable_sleep_mode": False,
    }  # fmt: skip
    assert llm.calls.count("reload") == 2


def test_responses_come_of_the_seed_and_of_no_other(fake, make_model, tokenizer):
    fake()
    engine, model = l3ms.VllmEngine(), make_model(seed=1)
    one, same, other = (roll(model, tokenizer, engine, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.labels, same.labels)
    assert one.completion_ids() != other.completion_ids()


def test_it_sleeps_between_samplings_where_that_is_asked_for(fake, make_model, tokenizer):
    module, model = fake(), make_model(seed=1)
    engine = l3ms.VllmEngine(enable_sleep_mode=True)
    roll(model, tokenizer, engine)
    roll(model, tokenizer, engine, batch_size=6, update=False)
    (llm,) = module.made
    assert llm.asleep
    assert llm.calls == ["generate", "sleep 1"] * 4  # a proof, a sampling, and two batches


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft, with transformers 5.23
def test_adapters_are_merged_into_a_copy(fake, make_model, tokenizer):
    import peft

    fake()
    base = make_model(seed=1)
    weights = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    engine = l3ms.VllmEngine()
    for _ in range(2):
        assert gap(model, roll(model, tokenizer, engine)) < 1e-5
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    kept = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora" not in name}
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    assert any("lora_" in name for name, _ in model.named_parameters())


def test_a_vllm_that_keeps_other_weights_is_refused_or_seen_in_the_gap(fake, make_model, tokenizer):
    fake(deaf=True)
    engine, model = l3ms.VllmEngine(), make_model(seed=1)
    roll(model, tokenizer, engine)
    script_model(model)
    with pytest.raises(ValueError, match=r"vllm: its log-likelihoods are .* nats per token from the model's"):
        roll(model, tokenizer, engine)
    assert gap(model, roll(model, tokenizer, engine)) > 0.1  # the third and later are in the log


def test_a_head_that_is_the_embeddings_is_packed_anew_or_refused(fake, make_model, tokenizer):
    module, model = fake(), make_model(seed=1, tie_word_embeddings=True)
    engine = l3ms.VllmEngine()
    for _ in range(2):
        assert gap(model, roll(model, tokenizer, engine)) < 1e-5
        script_model(model)
    assert module.made[0].calls.count("packed") == 1
    with pytest.raises(ValueError, match="of which a vLLM server on a CPU keeps an old copy"):
        roll(model, tokenizer, l3ms.VllmServerEngine("http://127.0.0.1:9"))


def test_an_old_vllm_is_refused(fake, make_model, tokenizer):
    fake(old=True)
    engine, model = l3ms.VllmEngine(), make_model(seed=1)
    roll(model, tokenizer, engine)
    with pytest.raises(ValueError, match=r"vllm: 0\.0\.fake cannot take new weights"):
        roll(model, tokenizer, engine)


def test_no_vllm_is_said_in_one_line(monkeypatch, make_model, tokenizer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="vllm is not installed; docs"):
        roll(make_model(), tokenizer, l3ms.VllmEngine())


@pytest.mark.parametrize("option", ["model", "generation_config", "logprobs_mode", "seed", "enable_prefix_caching"])
def test_options_that_would_sample_something_else_are_refused(option):
    with pytest.raises(ValueError, match=f"vllm: {option} is not an option"):
        l3ms.VllmEngine(**{option: "x"})


def test_several_ranks_want_a_server(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start a server"):
        l3ms.VllmEngine()


def test_a_temperature_that_vllm_does_not_honour_is_refused(fake, make_model, tokenizer):
    fake()
    with pytest.raises(ValueError, match=r"temperature must be at least 0\.01"):
        roll(make_model(seed=1), tokenizer, l3ms.VllmEngine(), temperature=0.001)


def test_a_head_that_is_not_the_architectures_is_refused(make_model, tokenizer, tmp_path):
    model = make_model(seed=1)
    model.lm_head = torch.nn.Linear(16, 17, bias=True)
    with pytest.raises(ValueError, match=r"vllm: lm_head\.bias: the model has \(17,\), a LlamaForCausalLM .* has none"):
        save_policy(l3ms.VllmEngine(), model, tmp_path)
    model = make_model(seed=1)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="the model's head is its embeddings"):
        save_policy(l3ms.VllmEngine(), model, tmp_path)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_learned_prefix_is_refused(make_model, tmp_path):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="a learned prefix cannot be merged"):
        save_policy(l3ms.VllmEngine(), peft.get_peft_model(make_model(), config), tmp_path)


# ---- a server ----


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_server_has_the_policys_weights_at_each_sampling(make_model, tokenizer, tmp_path, temperature):
    model = make_model(seed=1)
    with fake_vllm.server(tokenizer, make_model(seed=4)) as (url, asked_for):
        engine = l3ms.VllmServerEngine(url, folder=tmp_path if temperature == 1.0 else None)
        for _ in range(2):
            one, same = (roll(model, tokenizer, engine, temperature=temperature) for _ in range(2))
            assert torch.equal(one.labels, same.labels)
            assert gap(model, one) < 1e-5
            script_model(model)
    at = asked_for.index("/reset_prefix_cache")
    assert asked_for[at - 1] == "/collective_rpc"
    assert asked_for.count("/reset_prefix_cache") == 4
    assert (tmp_path / "model.safetensors").exists() == (temperature == 1.0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"dev": False}, "it has no /collective_rpc: start it with VLLM_SERVER_DEV_MODE=1"),
        ({"deaf": True}, "nats per token from the model's"),
        ({"at_temperature": False}, "start it with --logprobs-mode processed_logprobs"),
        ({"token_ids": False}, "its answers have no token_ids"),
        ({"ends_at": 4}, "it ended a response at a token that is no end token"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_server_that_was_started_otherwise_is_refused(make_model, tokenizer, kind, words):
    with fake_vllm.server(tokenizer, make_model(seed=4, gain=3.0), **kind) as (url, _):
        with pytest.raises(ValueError, match=words) as caught:
            roll(make_model(seed=1), tokenizer, l3ms.VllmServerEngine(url), temperature=0.6)
        assert str(caught.value).startswith(f"vllm at {url}: ")


def test_a_server_that_is_not_there_is_named(make_model, tokenizer):
    with pytest.raises(ValueError, match=r"vllm at http://127\.0\.0\.1:9: cannot be reached"):
        roll(make_model(), tokenizer, l3ms.VllmServerEngine("http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="url must begin with http"):
        l3ms.VllmServerEngine("localhost:8000")


def test_what_answers_otherwise_is_named(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^vllm at http://127\.0\.0\.1:abc: is no address of a server, .*nonnumeric port"
    ):
        l3ms.VllmServerEngine("http://127.0.0.1:abc")._post("/v1/completions", {})

    def answers(text):
        monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **options: io.BytesIO(text))

    answers(b"<html>hello</html>")
    with pytest.raises(ValueError, match=r"^vllm at http://there:80: /v1/models answered no JSON, so .*: <html>hello"):
        l3ms.VllmServerEngine("http://there:80")._model()

    def garbled(*args, **options):
        raise http.client.BadStatusLine("SSH-2.0")

    monkeypatch.setattr(urllib.request, "urlopen", garbled)
    with pytest.raises(ValueError, match=r"^vllm at http://there:80: .*speaks no HTTP .*SSH-2"):
        l3ms.VllmServerEngine("http://there:80")._model()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("there", [True, False])
def test_of_several_ranks_the_first_gives_the_weights_and_all_hear_what_went_wrong(
    monkeypatch, make_model, tokenizer, rank, there
):
    calls = []

    def broadcast(values, source, device):
        calls.append("broadcast")
        assert source == 0
        if rank == 1:
            values[0] = None if there else ValueError("said on rank 0")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    with fake_vllm.server(tokenizer, make_model(seed=4)) as (url, asked_for):
        engine = l3ms.VllmServerEngine(url if there else "http://127.0.0.1:9")
        if there:
            engine.update(make_model(seed=1))
        else:
            with pytest.raises(ValueError, match="cannot be reached" if rank == 0 else "said on rank 0"):
                engine.update(make_model(seed=1))
    assert calls == ["barrier", "broadcast"]
    assert ("/collective_rpc" in asked_for) == (there and rank == 0)
