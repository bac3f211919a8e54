"""Preference pairs, the reward model that learns from them, and what the experiment makes of both: tiny models, planted preferences."""

import gzip
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch

from experiments.harmlessness import pairs as preference
from experiments.harmlessness.pairs import Pair
from experiments.harmlessness.scoring import score
from experiments.harmlessness.train_reward_model import (
    Settings,
    assess,
    bradley_terry_loss,
    freeze_below,
    main,
    share,
    standardise,
    train_reward_model,
)
from l3ms.config.yaml_reader import ConfigError

WORDS = ("what", "is", "it", "why", "yes", "no", "please", "well", "sure", "maybe")
HH = {
    "chosen": "\n\nHuman: what is it\n\nAssistant: yes\n\nHuman: why\n\nAssistant: well sure",
    "rejected": "\n\nHuman: what is it\n\nAssistant: yes\n\nHuman: why\n\nAssistant: no",
}
TURNS = (("user", "what is it"), ("assistant", "yes"), ("user", "why"))


def write(path: Path, rows: list) -> Path:
    """A file of rows; texts are lines as they are."""
    lines = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return path


# ---- reading ----


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_reads_conversations_as_text_as_messages_and_with_the_prompt_apart(tmp_path, name):
    messages = preference.messages(TURNS)
    sides = {"chosen": "well sure", "rejected": "no"}
    listed = {side: [*messages, {"role": "assistant", "content": reply}] for side, reply in sides.items()}
    apart = {"prompt": "\n\nHuman: what is it\n\nAssistant: yes\n\nHuman: why", **sides}
    read = preference.read_pairs(write(tmp_path / name, [HH, listed, "", apart, {"prompt": "why", **sides}]))
    whole = Pair(TURNS, "well sure", "no")
    assert read.pairs == [whole, whole, whole, Pair((("user", "why"),), "well sure", "no")]
    assert preference.prompt_text(TURNS) + " no" == HH["rejected"]


def test_pairs_without_two_replies_to_one_prompt_are_counted(tmp_path):
    other = HH | {"rejected": HH["rejected"].replace("what", "why")}
    silent = HH | {"rejected": HH["rejected"].removesuffix(" no")}
    cut = HH | {"chosen": "\n\nHuman: what is it"}
    read = preference.read_pairs(write(tmp_path / "pairs.jsonl", [HH, other, silent, cut]))
    assert (len(read.pairs), read.uneven, read.unanswered) == (1, 1, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: is not a line of JSON"),
        ("[]", "line 2: wanted an object with"),
        ({"chosen": "a"}, "line 2: wanted an object with"),
        (HH | {"chosen": 3}, "line 2: chosen must be a text, got int"),
        (HH | {"chosen": [{"role": "robot", "content": ""}]}, "line 2: chosen must be a text or a list of messages"),
        (HH | {"chosen": [{"role": "user"}]}, "line 2: chosen.content must be a text"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message):
        preference.read_pairs(write(tmp_path / "pairs.jsonl", [HH, row]))


def test_files_that_hold_no_pairs(tmp_path):
    with pytest.raises(ConfigError, match="holds no pair"):
        preference.read_pairs(write(tmp_path / "none.jsonl", []))
    cut = write(tmp_path / "cut.jsonl.gz", [HH] * 50)
    cut.write_bytes(cut.read_bytes()[:-12])
    with pytest.raises(ConfigError, match="cannot be read"):
        preference.read_pairs(cut)


def test_without_data_one_line_says_what_is_missing_and_where_it_can_be_had(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("L3M_HH_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"--data or L3M_HH_DATA"):
        preference.data_path(None)
    assert main(["--model", "m", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "anthropics/hh-rlhf" in told
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("L3M_HH_DATA", str(write(tmp_path / "pairs.jsonl", [HH])))
    assert preference.data_path(None) == tmp_path / "pairs.jsonl"


# ---- shortening and splitting ----


def test_shortening_keeps_the_last_turns_from_one_of_the_users_on():
    pair = Pair(TURNS, "well sure", "no")
    whole = len(preference.prompt_text(TURNS))
    assert preference.shorten([pair], prompt=whole, reply=9) == [pair]
    assert preference.shorten([pair], prompt=whole - 1, reply=9) == [pair._replace(prompt=TURNS[2:])]
    assert preference.shorten([pair], prompt=5, reply=9) == []
    assert preference.shorten([pair], prompt=whole, reply=8) == []


def test_no_prompt_is_on_both_sides():
    """Nor two that open alike."""
    generator = random.Random(0)
    found = []
    for number in range(200):
        opening = (("user", f"question {number % 60}"), ("assistant", "yes"))
        found.append(Pair((*opening, ("user", generator.choice(WORDS))), "a", "b"))
    train, held_out = preference.split(found, 0.25)
    assert {pair.prompt[0] for pair in train}.isdisjoint(pair.prompt[0] for pair in held_out)
    assert len(train) + len(held_out) == len(found)
    assert len(held_out) == 50
    assert preference.split(found, 0.25) == (train, held_out)
    assert preference.split(found, 0.25, seed=1) != (train, held_out)


def test_a_training_pair_whose_prompt_is_held_out_is_left_out():
    tail = (("user", "why"),)
    long = [Pair((("user", f"q{i}"), ("assistant", "yes"), *tail), "a", "b") for i in range(8)]
    train, held_out = preference.split(long, 0.5)
    train, held_out = (preference.shorten(side, prompt=30, reply=9) for side in (train, held_out))
    assert {pair.prompt for pair in train} == {pair.prompt for pair in held_out} == {tail}
    assert preference.without(train, held_out) == []


def test_the_hh_data_hold_pairs_that_the_split_keeps_apart():
    if not os.environ.get("L3M_HH_DATA"):
        pytest.skip("L3M_HH_DATA names no file of preference pairs")
    read = preference.read_pairs(preference.data_path(None))
    assert read.uneven + read.unanswered < 0.02 * len(read.pairs)
    sides = preference.split(read.pairs, 0.3)
    train, held_out = (preference.shorten(side, prompt=240, reply=240) for side in sides)
    train = preference.without(train, held_out)
    assert min(len(train), len(held_out)) > 0.1 * len(read.pairs)
    assert {pair.prompt for pair in train}.isdisjoint(pair.prompt for pair in held_out)


# ---- the reward model ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny causal language model of words, saved: what a reward model starts from."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", "Human:", "Assistant:", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def planted(count: int, seed: int) -> list[Pair]:
    """The chosen reply has a "please", the rejected one has not; their lengths say nothing."""
    generator = random.Random(seed)
    others = [word for word in WORDS if word != "please"]
    found = []
    for number in range(count):
        prompt = (("user", " ".join(generator.choices(others, k=3)) + f" {number}"),)
        good, bad = ([*generator.choices(others, k=generator.randint(1, 4))] for _ in range(2))
        good.insert(generator.randint(0, len(good)), "please")
        bad.append(generator.choice(others))
        found.append(Pair(prompt, " ".join(good), " ".join(bad)))
    return found


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """(folder, report, held-out pairs) of a reward model trained on a planted preference."""
    folder = tmp_path_factory.mktemp("rm")
    held_out = planted(100, 1)
    settings = Settings(epochs=4, learning_rate=1e-2, max_length=32)
    return folder, train_reward_model(checkpoint, planted(200, 0), held_out, folder, settings), held_out


def test_the_loss_is_bradley_terrys():
    chosen, rejected = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    wanted = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert float(bradley_terry_loss(chosen, rejected)) == pytest.approx(wanted, rel=1e-12)
    shifted = bradley_terry_loss(chosen + 3, rejected + 3)
    assert float(shifted) == pytest.approx(wanted, rel=1e-12)


def test_a_planted_preference_is_learned(trained):
    _, report, _ = trained
    losses = report["validation_loss"]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert min(losses) < 0.3
    assert losses[report["best_epoch"]] == min(losses)
    assert report["accuracy"]["share"] > 0.9
    assert report["accuracy"]["ci95"][0] > report["accuracy_of_the_shorter"]["ci95"][1]


def test_the_checkpoint_is_one_of_transformers_with_scores_of_unit_spread(trained):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, report, held_out = trained
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, found = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert model.config.num_labels == 1
    again = assess(model, tokenizer, held_out, Settings(**report["settings"]))
    assert again["score"]["mean"] == pytest.approx(report["score"]["mean"], abs=1e-5)
    assert 0.7 < again["score"]["std"] < 1.4
    assert abs(again["score"]["mean"]) < 0.5
    texts = [preference.conversation(pair, pair.chosen, tokenizer) for pair in held_out[:7]]
    alone = torch.cat([score(model, tokenizer, [text], max_length=32) for text in texts])
    torch.testing.assert_close(score(model, tokenizer, texts, max_length=32), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_standardised_scores_have_mean_0_and_spread_1_and_keep_their_order(trained, bias):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, report, held_out = trained
    settings = Settings(**report["settings"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    head = torch.nn.Linear(16, 1, bias=bias)
    with torch.no_grad():
        head.weight.copy_(5 * model.score.weight)
        if bias:
            head.bias.fill_(7.0)
    model.score = head
    texts = [preference.conversation(pair, pair.chosen, tokenizer) for pair in held_out]
    before = score(model, tokenizer, texts, max_length=32)
    told = standardise(model, tokenizer, held_out, settings)
    assert told is not None
    assert told["std"] > 3
    again = assess(model, tokenizer, held_out, settings)["score"]
    assert again["mean"] == pytest.approx(0, abs=1e-4)
    assert again["std"] == pytest.approx(1, abs=1e-4)
    after = score(model, tokenizer, texts, max_length=32)
    assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) > 0.97
    model.score = torch.nn.Sequential(head)  # no linear head
    assert standardise(model, tokenizer, held_out, settings) is None


def test_the_last_blocks_alone_can_learn(checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification

    settings = Settings(epochs=4, learning_rate=1e-2, max_length=32, blocks=1)
    report = train_reward_model(checkpoint, planted(200, 0), planted(100, 1), tmp_path / "rm", settings)
    assert report["accuracy"]["share"] > 0.9
    before, after = (
        dict(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).named_parameters())
        for folder in (checkpoint, tmp_path / "rm")
    )
    moved = {name for name, weight in before.items() if "score" not in name and not torch.equal(weight, after[name])}
    blocks = {name.split(".")[2] for name in before if ".layers." in name}
    last = f"layers.{max(map(int, blocks))}."
    assert len(blocks) > 1
    assert moved == {name for name in before if last in name or name == "model.norm.weight"}
    for blocks in (-1, 100):
        with pytest.raises(ConfigError, match=rf"blocks: the model has \d+ of them: {blocks} cannot learn"):
            freeze_below(AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1), blocks)


def test_l3ms_reward_model_gives_the_same_scores(trained):
    """The text that a constraint scores is the one that the model has learned from."""
    reward_model = pytest.importorskip("l3ms.constraints.reward_model")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, _, held_out = trained
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    texts = [preference.conversation(pair, pair.chosen, tokenizer) for pair in held_out[:5]]
    wanted = score(model, tokenizer, texts, max_length=32).tanh().tolist()
    constraint = reward_model.RewardModel("harmless", str(folder), squash="tanh", min=0.0)
    prompts = [preference.prompt_text(pair.prompt) for pair in held_out[:5]]
    values = constraint.values(prompts, [f" {pair.chosen}" for pair in held_out[:5]], [1] * 5)
    assert values == pytest.approx(wanted, abs=1e-5)


def test_a_model_that_only_learned_the_length_is_visible(checkpoint, tmp_path):
    def shorter(count: int, seed: int) -> list[Pair]:
        generator = random.Random(seed)
        return [
            Pair((("user", f"{generator.choice(WORDS)} {i}"),), " ".join(["yes"] * (1 + i % 3)), " ".join(["yes"] * (5 + i % 3)))
            for i in range(count)
        ]  # fmt: skip

    settings = Settings(epochs=3, learning_rate=1e-2, max_length=32)
    report = train_reward_model(checkpoint, shorter(150, 0), shorter(60, 1), tmp_path / "rm", settings)
    assert report["accuracy"]["share"] > 0.95
    assert report["accuracy_of_the_shorter"]["share"] == 1
    assert report["correlation_with_length"] < -0.7
    assert report["accuracy_where_the_longer_is_chosen"]["of"] == 0


def test_the_interval_is_wilsons():
    found = share(torch.tensor([True] * 8 + [False] * 2))
    assert found["share"] == 0.8
    assert found["ci95"] == pytest.approx([0.4901625, 0.9433178], abs=1e-6)
    assert share(torch.tensor([], dtype=torch.bool))["share"] is None


def test_the_command_trains_from_a_file(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = [
        {side: preference.conversation(pair, getattr(pair, side), None) for side in ("chosen", "rejected")}
        for pair in planted(60, 3)
    ]
    data = write(tmp_path / "pairs.jsonl.gz", rows)
    words = ["--data", str(data), "--model", checkpoint, "--output", str(tmp_path / "rm"), "--epochs", "1"]
    assert main([*words, "--max-length", "32"]) == 0
    assert "held-out pairs" in capsys.readouterr().out
    assert json.loads((tmp_path / "rm" / "reward_model.json").read_text())["settings"]["epochs"] == 1
    assert main(words) == 2  # the folder is not empty
    assert main([*words[:-4], "--output", str(tmp_path / "other"), "--model", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "other").exists()
    assert not any(Path().iterdir())
