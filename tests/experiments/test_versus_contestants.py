"""The contestants of the comparison, each with its own library, and their judge, on a tiny model."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments.versus.cell import run as run_cell
from experiments.versus.filtered_sft import with_mean, within
from experiments.versus.task import Tally, Task
from experiments.versus.trl_grpo import length_reward


def test_rows_are_kept_by_length():
    lengths = [30, 10, 20, 14, 40]
    assert within(lengths, 12, 20) == [2, 3]
    assert with_mean(lengths, 18.5) == [0, 1, 2, 3]  # 40 goes: the mean of the others is 18.5
    assert with_mean(lengths, 30) == [0, 2, 4]  # the shortest go
    assert with_mean(lengths, 9) == []


def test_the_reward_is_the_distance_of_a_response_to_the_range():
    tally = Tally()
    reward = length_reward(Task(model="m", train="t", held_out="h", min=12, max=16), tally)
    assert reward(completion_ids=[[0] * n for n in (5, 12, 16, 30)], prompts=[]) == [-0.5, 0, 0, -1]
    assert (tally.tokens, tally.log) == (63, [{"iteration": 1, "length": 15.75}])


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict[str, Any]:
    """A Llama of 5,000 parameters, and a task of words, as messages."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("versus")
    words = ("<pad>", "<eos>", "<unk>", "user", "assistant", ":", "a", "b", "c", "d", "e", "f")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    chat = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} {% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=chat
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.ndim > 1
            ):  # larger than at an initialisation: distributions far from uniform, which adapters can move
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{a} {b} {c}"}],
            "completion": [{"role": "assistant", "content": " ".join([a] * n)}],
        }
        for n, (a, b, c) in enumerate(((a, b, c) for a in "abc" for b in "abcdef" for c in "de"), 1)
    ]
    for name, part in (("train", rows[:24]), ("held_out", rows[24:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    return {
        "model": str(folder / "model"), "train": str(folder / "train.jsonl"), "held_out": str(folder / "held_out.jsonl"),
        "min": 2.0, "max": 12.0, "iterations": 2, "batch_size": 2, "responses": 4, "max_new_tokens": 8, "lora_r": 2, "max_length": 48,
    }  # fmt: skip


def trained(folder: Path, task: dict[str, Any], module: str, setting: dict[str, Any]) -> tuple[dict, dict]:
    folder.mkdir()
    judge = {"samples": 12, "delta": 0.1, "looks": 2}
    values = {"module": module, "setting": setting, "task": Task(**task).as_dict(), "after": None, "judge": judge}
    (folder / "cell.json").write_text(json.dumps(values))
    run_cell(folder)
    found, judged = (json.loads((folder / f"{name}.json").read_text()) for name in ("trained", "result"))
    assert (folder / found["weights"] / "adapter_model.safetensors").is_file()
    assert judged["samples"] == judged["prompts"] == 12
    assert judged["level_of_each"] == 0.975
    assert 1 <= judged["lower"] <= judged["length"]["mean"] <= judged["upper"] <= 8
    assert judged["sampled_tokens"] == pytest.approx(12 * judged["length"]["mean"])
    assert judged["perplexity"] > 1
    return found, judged


def moved(folder: Path) -> bool:
    """Whether the adapters were trained: they begin with a zero in each product."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    return all(bool(value.any()) for name, value in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("module", "setting"),
    [("l3m", {}), ("l3m", {"scale": 2}), ("lagrangian", {"dual_rate": 2}), ("filtered_sft", {"target": 6})],
)  # fmt: skip
def test_ours_train_and_are_judged(module, setting, task, tmp_path):
    found, _ = trained(tmp_path / "cell", task, module, setting)
    assert moved(tmp_path / "cell" / found["weights"])
    if module == "filtered_sft":
        assert found["sampled_tokens"] == 0
        assert found["log"][0]["mean_length"] <= 6
    else:
        assert len(found["log"]) == 2
        ran = yaml.safe_load((tmp_path / "cell" / "work" / "config.yaml").read_text())
        assert ran["constraints"][0]["scale"] == setting.get("scale")
        assert found["sampled_tokens"] == round(4 * sum(row["length"] for row in found["log"]))
        assert 8 <= found["sampled_tokens"] <= 64


@pytest.mark.parametrize(
    "setting", [{"multiplier_learning_rate": 0.5}, {"multiplier_learning_rate": 0.5, "kp": 4.0}], ids=str
)
def test_cooper_trains_and_is_judged(setting, task, tmp_path):
    pytest.importorskip("cooper", reason='cooper is not installed: pip install ".[versus]"')
    # No mean of 8 tokens at most reaches 9: the multiplier of that bound grows, the other stays 0
    found, _ = trained(tmp_path / "cell", {**task, "min": 9.0}, "cooper_loop", setting)
    assert moved(tmp_path / "cell" / found["weights"])
    lower, upper = zip(*(row["multipliers"] for row in found["log"]), strict=True)
    assert 0 < lower[0] < lower[1]
    assert upper == (0, 0)
    unit = (9 + 12) / 2
    assert lower[0] == pytest.approx(0.5 * (9 - found["log"][0]["length"]) / unit)


def test_the_surrogate_has_the_gradient_of_the_mean_length(task):
    pytest.importorskip("peft")
    from experiments.versus.cooper_loop import mean_length
    from experiments.versus.task import quiet
    from l3ms.config.train import LoraConfig
    from l3ms.model.averaging import trained as parameters_of
    from l3ms.rollouts.sampling import rollout
    from l3ms.runs.models import load_model

    torch.manual_seed(1)
    tokenizer, model = load_model(task["model"], dtype="float32", lora=LoraConfig(r=2), console=quiet())
    responses = rollout(model, tokenizer, ["a b c", "b c d", "c d e", "a d e"], max_new_tokens=6)
    parameters = [parameter for _, parameter in parameters_of(model)]
    got = torch.autograd.grad(mean_length(model, responses), parameters)
    logits = model(input_ids=responses.input_ids, attention_mask=responses.attention_mask).logits[:, :-1]
    labels = responses.labels[:, 1:]
    tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    lengths = responses.lengths.float()
    others = (lengths.sum() - lengths) / 3
    wanted = torch.autograd.grad(((lengths - others) * tokens.sum(1)).mean(), parameters)
    assert any(bool(part.any()) for part in wanted)
    torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that TRL still uses
def test_trl_trains_and_is_judged(task, tmp_path):
    pytest.importorskip("trl", reason='trl is not installed: pip install ".[versus]"')
    found, _ = trained(tmp_path / "sft", task, "trl_sft", {})
    start = tmp_path / "sft" / found["weights"]
    assert moved(start)
    assert found["sampled_tokens"] == 0
    for name, setting, own in (
        ("with", {"penalty": 1.0}, task),
        ("after", {"beta": 0.1}, {**task, "start": str(start)}),
    ):
        found, _ = trained(tmp_path / name, own, "trl_grpo", {**setting, "generations": 2})
        weights = tmp_path / name / found["weights"]
        assert moved(weights)
        assert not list(weights.glob("ref*"))
        assert len(found["log"]) == 2
        assert found["sampled_tokens"] == round(4 * sum(row["length"] for row in found["log"]))
    with pytest.raises(ValueError, match="penalty is for a training from the base model"):
        trained(tmp_path / "neither", task, "trl_grpo", {"beta": 0.1})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("package", "module", "setting"),
    [
        ("cooper", "cooper_loop", {"multiplier_learning_rate": 2.0}),
        ("trl", "trl_grpo", {"penalty": 4.0, "generations": 4}),
    ],
)
def test_they_steer(package, module, setting, task, tmp_path):
    """Responses of 7 tokens in the mean come down to a range of [2, 3]: no contestant is there to lose."""
    pytest.importorskip(package, reason=f'{package} is not installed: pip install ".[versus]"')
    wanted = {"min": 2.0, "max": 3.0, "iterations": 40, "learning_rate": 1e-2, "responses": 16}
    (tmp_path / "work").mkdir()
    log = (
        importlib.import_module(f"experiments.versus.{module}")
        .train(Task(**{**task, **wanted}), setting, tmp_path / "work")
        .log
    )
    lengths = [row["length"] for row in log]
    assert sum(lengths[:4]) / 4 > 6
    assert sum(lengths[-10:]) / 10 < 4


def test_a_setting_that_a_contestant_does_not_have_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="setting: beta is none of scale, smoothing, warmup, mu_end"):
        trained(tmp_path / "cell", task, "l3m", {"beta": 1})
