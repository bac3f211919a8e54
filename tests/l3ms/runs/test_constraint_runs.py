"""`l3ms train` with every kind of constraint; what is wrong with one is one line naming its field, exit 2, and no file."""

import json

import pytest
import torch
import yaml
from cli_projects import l3ms, one_line
from training_runs import timeless
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from l3ms.config.run_config import ConfigError, RunConfig
from l3ms.constraints.constraint import Constraint
from l3ms.runs.constraints import try_rewards


@pytest.fixture
def judge(project, checkpoint):
    """A classifier with two outputs and random weights, for the tokens of the policy."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, num_labels=2, **sizes)  # pyright: ignore[reportCallIssue]
    folder = project / "judge"
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def general(project, rows=40):
    lines = [json.dumps({"prompt": f"delta {i}:", "completion": "eta theta"}) for i in range(rows)]
    (project / "general.jsonl").write_text("\n".join(lines))


def write(project, constraints, **train):
    values = yaml.safe_load((project / "run.yaml").read_text())
    values["constraints"] = constraints
    values["train"] |= train
    (project / "run.yaml").write_text(yaml.safe_dump(values))
    return project / "run.yaml"


def logged(project, folder="out"):
    rows = [json.loads(line) for line in (project / folder / "metrics.jsonl").read_text().splitlines()]
    return timeless(rows)


SEVERAL = [
    {"type": "length", "min": 4, "max": 9},
    {"type": "length", "name": "short", "threshold": 12, "max": 0.2},
    {"type": "reward_model", "name": "harmless", "model": "judge", "head": 1, "squash": "tanh", "min": 0.1},
    {"type": "data_nll", "name": "general", "data": {"train": "general.jsonl"}, "max": 5.0, "batch_size": 4},
    {
        "type": "data_nll",
        "name": "kept",
        "data": {"train": "general.jsonl"},
        "relative": True,
        "max": 0.1,
        "scale": 0.1,
    },
    {"type": "kl", "max": 0.5},
    {"type": "reward", "name": "ends", "reward": "ends_with_eos", "min": 0.9},
    {"type": "reward", "name": "greek", "reward": "contains", "words": ["alpha", "beta"], "threshold": 0.5, "min": 0.1},
    {"type": "function", "name": "vowels", "function": "rewards.py:vowels", "min": 0.2},
]


def test_every_kind_at_once(project, judge, capsys):
    general(project)
    assert l3ms(write(project, SEVERAL, iterations=3), "--allow-code") == 0, capsys.readouterr().err
    rows = logged(project)
    assert len(rows) == 3
    names = [item.get("name", item["type"]) for item in SEVERAL]
    for name in names:
        for key in ("estimate", "stderr", "lambda", "slack"):
            assert isinstance(rows[-1][f"constraints/{name}/{key}"], float), name
    assert all(0 <= row[f"constraints/{name}/estimate"] <= 1 for row in rows for name in ("short", "ends", "greek"))
    assert rows[0]["constraints/harmless/stderr"] > 0
    report = json.loads((project / "out/report.json").read_text())
    for part in ("last", "average"):
        found = report[part]["constraints"]
        assert set(found) == set(names)
        assert found["general"]["samples"] == 4  # a tenth of the prompts is held out
        assert 4 < found["general"]["mean"] < 8
        assert abs(found["harmless"]["mean"]) <= 1
        assert found["short"]["samples"] == 16
    # What was resolved reads back and gives the same run.
    again = project / "again"
    assert l3ms(project / "out/config.yaml", "--output", again, "--allow-code") == 0, capsys.readouterr().err
    assert logged(project, "again") == rows


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # of peft
def test_a_divergence_with_adapters_is_from_the_model_under_them(project, monkeypatch, capsys):
    loaded = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(a) or real(*a, **k))
    path = write(project, [{"type": "kl", "max": 0.01}], iterations=3, learning_rate=0.05)
    assert l3ms(path, "--train.lora.r", 2) == 0, capsys.readouterr().err
    assert len(loaded) == 1
    estimates = [row["constraints/kl/estimate"] for row in logged(project)]
    assert estimates[0] != 0  # after the first task half-step


def test_a_run_with_data_alone_samples_nothing(project, monkeypatch, capsys):
    general(project)
    data = [{"type": "data_nll", "name": "general", "data": {"train": "general.jsonl"}, "max": 3.0}]

    def refuse(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr("l3ms.training.constraint_step.rollout", refuse)
    assert l3ms(write(project, data), "--iterations", 3) == 0, capsys.readouterr().err
    rows = logged(project)
    assert "l3m/truncated" not in rows[0]
    assert rows[0]["constraints/general/estimate"] > rows[-1]["constraints/general/estimate"]


@pytest.mark.parametrize(("rows", "told"), [(6, True), (9, False)])
def test_rows_of_a_constraint_that_may_be_learnt_by_heart_are_told(project, capsys, rows, told):
    """3 half-steps of 8 rows: of 5 and of 8, since a tenth is held out, and one row at least."""
    general(project, rows)
    data = [{"type": "data_nll", "name": "general", "data": {"train": "general.jsonl"}, "max": 3.0}]
    assert l3ms(write(project, data), "--iterations", 3) == 0, capsys.readouterr().err
    out = " ".join(capsys.readouterr().out.split())
    text = "constraints.0: 3 half-steps of 8 go 5 times through its 5 rows, which may be learnt by heart"
    assert (text in out) == ("learnt by heart" in out) == told


def item(kind, **fields):
    return {"type": kind, "name": "x", **fields}


NLL = {"type": "data_nll", "name": "x", "max": 2.0}
DATA = {"data": {"train": "rows.jsonl"}}
# (constraint, the field that the line must begin with, words it must hold)
BAD = [
    (item("length", min=0.4, max=9, threshold=5), "max", "must be in [0, 1]"),
    (item("length", min=0.4, threshold=17), "threshold", "must be at most train.max_new_tokens (16)"),
    (item("length", min=4, quantile=5), "quantile", "must be less than 1, got 5"),
    (item("length", min=4, max=9, quantile=0.5), "quantile", "takes min or max, not both"),
    (item("length", min=0.9, threshold=4, quantile=0.5), "quantile", "and threshold are two ways to bound a share"),
    (item("length", min=17, quantile=0.05), "min", "must be at most train.max_new_tokens (16)"),
    (item("length", max=0.5, quantile=0.95), "max", "must be at least 1 token"),
    (item("length", quantile=0.5, monitor=True), "quantile", "a monitor of a share has a threshold"),
    (item("length", min=4, quantile=0.05, margin=0.1), "margin", "must leave room for a share"),
    (item("length", min=4, max=9, threshold=4), "min", "takes a quantile instead of a threshold"),
    (NLL | DATA | {"quantile": 0.5}, "quantile", "unknown field"),
    (NLL | DATA | {"reference": "policy"}, "reference", "is what a relative loss is measured from"),
    (NLL | DATA | {"relative": True, "reference": "./gone"}, "reference", "cannot be loaded"),
    (NLL | DATA | {"relative": True, "reference": "small"}, "reference", "vocabulary of 280 tokens, got 50"),
    (item("reward", reward="contain", min=0.5), "reward", "'contains'"),
    (item("reward", reward="contains", min=0.5), "words", "is required by contains"),
    (item("reward", reward="contains", words=[], min=0.5), "words", "at least 1 item"),
    (item("reward", reward="readability", n=2, min=0.5), "n", "is no option of readability"),
    (item("reward", reward="matches", pattern="(a", min=0.5), "pattern", "must be a regular expression, got '(a'"),
    (item("reward", reward="distinct_n", n=0, min=0.5), "n", "greater than or equal to 1"),
    (item("reward", reward="distinct_n", unit="letters", min=0.5), "unit", "'words' or 'tokens'"),
    (item("length", min=4, max=9, margin=3), "margin", "less than half of the range"),
    (item("reward_model", model="gone/", min=0), "model", "cannot load"),
    (item("reward_model", model="./gone", min=0), "model", "no such folder"),
    (item("reward_model", model="policy", min=0), "model", "must be a trained classifier"),
    (item("reward_model", model="judge", head=2, min=0), "head", "must be one of the 2 outputs, 0 to 1, got 2"),
    (item("reward_model", model="judge", head=-1, min=0), "head", "greater than or equal to 0"),
    (item("reward_model", model="judge", squash="relu", min=0), "squash", "'tanh' or 'sigmoid'"),
    (item("reward_model", model="judge", chat_template=True, min=0), "chat_template", "tokenizer has none"),
    (item("reward_model", model="judge", chat_template="always", min=0), "chat_template", "'auto', True or False"),
    (item("reward_model", model="judge", max_length=129, min=0), "max_length", "context of 128 tokens"),
    (item("reward_model", model="judge", trust_remote_code=True, min=0), "trust_remote_code", "unknown field"),
    (item("kl", max=1.0, reference="./gone"), "reference", "cannot be loaded"),
    (item("kl", max=1.0, reference="small"), "reference", "vocabulary of 280 tokens, got 50"),
    (item("kl", max=0.5, per_token=True, threshold=1), "per_token", "is for a mean"),
    (item("kl", max=-0.0, min=1), "min", "must be below max"),
    (NLL, "data", "is required"),
    (NLL | {"data": {"train": "gone.jsonl"}}, "data.train", "no such file"),
    (NLL | {"data": {"train": "empty.jsonl"}}, "data.train", "holds no rows"),
    (NLL | {"data": {"train": "torn.jsonl"}}, "data.train", "line 2: is not JSON"),
    (NLL | {"data": {"train": "rows.jsonl", "max_length": 2}}, "data.train", "no prompt fits in 1 tokens"),
    (NLL | {"data": {"train": "rows.jsonl", "evaluation": "empty.jsonl"}}, "data.evaluation", "holds no rows"),
    (NLL | {"data": {"train": "rows.jsonl"}, "threshold": 1.0}, "threshold", "unknown field"),
    (NLL | {"data": {"trian": "rows.jsonl"}}, "data.trian", "did you mean train"),
]


@pytest.mark.parametrize(("constraint", "field", "words"), BAD, ids=[f"{n}-{case[1]}" for n, case in enumerate(BAD)])
def test_a_bad_constraint_is_one_line_and_nothing_is_written(
    project, checkpoint, judge, monkeypatch, capsys, constraint, field, words
):  # fmt: skip
    monkeypatch.chdir(project)
    (project / "empty.jsonl").write_text("\n")
    (project / "torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl')
    if constraint.get("model") == "policy":
        constraint = constraint | {"model": str(checkpoint)}
    if constraint.get("reference") == "small":
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        model.resize_token_embeddings(50)
        model.save_pretrained(project / "small")
    path = write(project, [{"type": "length", "max": 9}, constraint])
    before = sorted(project.rglob("*"))
    assert l3ms(path) == 2
    line = one_line(capsys)
    assert line.startswith(f"l3ms: constraints.1.{field}: "), line
    assert words in line
    assert sorted(project.rglob("*")) == before


def test_a_policy_without_padding_or_end_and_prompts_beyond_its_context(project, checkpoint, capsys):
    """Padding alone is replaced by the end token."""
    bare = project / "bare"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(bare)
    assert l3ms(project / "run.yaml", "--model", bare) == 2
    assert one_line(capsys).startswith("l3ms: model: the tokenizer of")
    rows = [{"prompt": f"{i} " + "alpha " * 96, "completion": "beta"} for i in range(20)]
    (project / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert l3ms(project / "run.yaml") == 2
    assert one_line(capsys).startswith("l3ms: data.train: no prompt fits in 80 tokens")
    assert not (project / "out").exists()


def test_held_out_rows_without_a_column_that_a_reward_needs_are_found_before_the_training(checkpoint):
    def graded(prompts, completions, answer, **_):
        return [float(value) for value in answer]

    config = RunConfig.model_validate({
        "model": "a", "output": "b", "data": {"train": "c.jsonl", "evaluation": "d.jsonl"},
        "constraints": [{"type": "function", "name": "graded", "function": "e.py:graded", "min": 0.5}],
    })  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    row = {"prompt": "alpha", "input_ids": [3, 4, 1], "labels": [-100, 4, 1]}
    calls = (config, [Constraint("graded", graded, min=0.5)], tokenizer, [row | {"answer": 1}])
    for held_out in ([row], [row | {"answer": "one"}]):
        with pytest.raises(ConfigError, match=r"^data\.evaluation: with the held-out rows constraints\.0\.function "):
            try_rewards(*calls, held_out)
    try_rewards(*calls, [row | {"answer": 0}])
