"""The demo of the real model, with a tiny one in its place: what it asks for, what it leaves behind, that the other commands know it."""

import dataclasses
import io
import json
import math
import re

import pytest
from rich.console import Console

from l3ms.config.run_config import RunConfig, load_config
from l3ms.config.yaml_reader import ConfigError
from l3ms.demo import base, real, real_model
from l3ms.demo.corpus import Pair
from l3ms.runs.report import plot_run
from l3ms.training.phase_summary import summary
from l3ms.verdicts.certifying import certify
from l3ms.verdicts.options import CertifyOptions

RECIPE = base.Recipe(vocab_size=400, hidden_size=16, layers=1, heads=2, intermediate_size=32, max_positions=128)
SETTINGS = dataclasses.replace(
    real.SETTINGS, iterations=3, batch_size=2, responses=4, max_new_tokens=8, max_length=128, samples=6, shown=2
)
CHAT = "{% for m in messages %}{{ m.content }}{{ '<|end|>' if m.role == 'assistant' else '\n' }}{% endfor %}"
NAMES = [
    f"{verb}_{noun}" for verb in ("sort", "count", "read", "merge") for noun in ("rows", "names", "files", "lines")
]
PAIRS = [
    Pair(real.asked(f"def {name}(a):"), f"Return the {name.replace('_', ' ')} of the given list.") for name in NAMES
]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The checkpoint that the demo finds in the place of the real one."""
    tokenizer = base.train_tokenizer(PAIRS, RECIPE)
    tokenizer.chat_template = CHAT
    base.new_model(RECIPE).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(real_model, "prepare", lambda **options: tmp_path / "tiny")
    monkeypatch.setattr(real, "pairs", lambda progress: (PAIRS[:12], PAIRS[12:]))
    return tmp_path / "tiny"


def test_report_and_folder(tiny, tmp_path):
    console = Console(width=140, file=io.StringIO(), record=True)
    folder = tmp_path / "out"
    report = real.main(3, 6, 1, folder, yes=True, settings=SETTINGS, console=console)
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [item["name"] for item in written["constraints"]] == ["length", "tokens", "sentence"]
    assert written["bounds"] == {"min": 3, "max": 6}
    for key in ("sft", "average"):
        assert report[key]["samples"] == 4  # of the held-out prompts there are no more
        assert 1 < report[key]["perplexity"] < math.inf
        assert 0 <= report[key]["constraints"]["sentence"]["mean"] <= 1
    assert "last" not in report  # costs minutes
    assert [sorted(row) for row in report["examples"]] == [["average", "initial", "prompt", "sft"]] * 2
    assert all(re.fullmatch(r"def \w+\(a\):", row["prompt"]) for row in report["examples"])
    seconds = report["seconds_per_iteration"]
    assert {name: sorted(phases) for name, phases in seconds.items()} == {
        "sft": ["optimizer", "other", "task"], "l3m": ["constraint", "optimizer", "other", "rewards", "sampling", "task"]
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == SETTINGS.iterations
    spent = sum(row[f"time/{phase}"] for row in rows for phase in seconds["l3m"])
    assert 0 < spent <= report["seconds"]
    assert spent == pytest.approx(3 * sum(seconds["l3m"].values()), abs=0.01)
    assert report["time"] == summary(rows)
    assert report["peak_memory_mib"] is None or report["peak_memory_mib"] > 50
    for name in ("sft", "model", "average"):
        assert (folder / name / "adapter_model.safetensors").exists()
    text = console.export_text()
    for wanted in (
        "12 docstrings to learn from, 4 held out",
        "SFT",
        "L3M averaged",
        "sentence",
        "before",
        "l3ms certify",
    ):
        assert wanted in text

    assert plot_run(folder).stat().st_size > 10_000
    certificate = certify(folder, CertifyOptions(samples=8), console=console)
    assert [item["name"] for item in certificate["constraints"]] == ["length", "tokens", "sentence"]
    train = load_config(folder / "config.yaml").train
    assert (train.iterations, train.lora and train.lora.r, train.device) == (3, real.SETTINGS.lora, "cpu")


def test_both_trainings_start_from_the_same_adapters(tiny, tmp_path):
    """The first task batch, before any step, has the same loss."""
    real.main(3, 6, 1, tmp_path / "out", yes=True, settings=SETTINGS, console=Console(file=io.StringIO()))
    first = [
        json.loads((tmp_path / "out" / name).read_text().splitlines()[0]) for name in ("sft.jsonl", "metrics.jsonl")
    ]
    assert first[0]["loss"] == first[1]["loss"]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("form", real.FORMATS)
def test_every_format_is_a_configuration(form):
    made = real.constraints(12, 16, form)
    values = {"model": "m", "output": "o", "data": {"train": "t.jsonl"}, "constraints": made, **real.SETTINGS.values(0)}
    config = RunConfig.model_validate(values)
    names = [item.name for item in config.constraints]
    assert names == ["length", "tokens", *{"sentence": ["sentence"], "plain": ["readability"], "none": []}[form]]


def test_an_unknown_format_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="--format: must be one of sentence, plain, none, got 'haiku'"):
        real.main(output=tmp_path / "out", form="haiku")


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("Return the names.", True),
        ("Join paths as os.path.join does, in Python 3.10.", True),
        ("Return the names", False),
        ("return the names.", False),
        ("Return the names. Sort them.", False),
        ("Is it a name? Yes.", False),
        ("Return the names.\n", False),
        ("Return\nthe names.", False),
        (".", False),
    ],
)
def test_what_one_sentence_is(text, one):
    assert bool(re.fullmatch(real.SENTENCE, text)) is one


GOOD = "Return the names of all files in the given folder, sorted by size."


@pytest.mark.parametrize(
    ("signature", "response", "kept"),
    [
        ("def names(folder):\n", GOOD, True),
        ("def _names(folder):\n", GOOD, False),
        (f"def names({'x' * 80}):\n", GOOD, False),
        ("def names(folder):\n", "Return the names of all.", False),  # short
        ("def names(folder):\n", GOOD + " " + GOOD + " " + GOOD, False),  # long
        ("def names(folder):\n", GOOD[:-1], False),  # breaks off
        ("def names(folder):\n", "x = {a_1: 2} + f(y_2) - g[3] where n0 >= m_1, k2 <= p_3, q4 == r_5.", False),
        ("def names(folder):\n", "Retournez tous les noms des fichiers du dossier indique, par taille.", False),
    ],
)
def test_what_is_worth_learning(signature, response, kept):
    found = real.worth_learning([Pair(signature, response)])
    assert found == ([Pair(f"{real.ASKED}{signature.strip()}", response)] if kept else [])
