"""Rows become tokens as a rollout would continue them; a malformed row is named by its line."""

import json

import pytest

from l3ms.config.run_config import DataConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.data import Example, encode, hold_out, load_examples
from l3ms.runs.models import context_room

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Characters are tokens; <s> opens every text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    characters |= {chr(code): len(characters) + code for code in range(32, 127)}
    backend = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def chat(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def test_prompt_masked_and_end_appended(tokenizer):
    row = encode([Example("ab", "cd")], tokenizer, max_length=50).rows[0]
    assert row["input_ids"] == [1, *tokens(tokenizer, "abcd"), 2]
    assert row["labels"] == [-100] * 3 + [*tokens(tokenizer, "cd"), 2]
    assert row["prompt"] == "ab"


def test_empty_completion_still_teaches_to_stop(tokenizer):
    assert encode([Example("ab", "")], tokenizer, max_length=50).rows[0]["labels"] == [-100] * 3 + [2]


def test_long_rows_are_cut_or_dropped_and_counted(tokenizer):
    examples = [Example("ab", "cdef"), Example("a" * 20, "b"), Example("ab", "c"), Example("", "x")]
    encoded = encode(examples, tokenizer, max_length=6)
    assert (len(encoded.rows), encoded.truncated, encoded.dropped) == (3, 1, 1)
    assert encoded.rows[0]["labels"] == [-100] * 3 + tokens(tokenizer, "cde")
    assert all(len(row["input_ids"]) <= 6 for row in encoded.rows)
    assert [note.split(": ")[1] for note in encoded.notes("x")] == [
        "1 of 3 completions were cut at the maximum length",
        "1 of 4 rows were dropped (prompt empty or too long)",
    ]
    assert encode(examples, tokenizer, max_length=60, max_prompt=2).dropped == 3


def test_empty_prompt_without_opening_token_is_dropped(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **_: {"input_ids": [5] * len(text)})
    assert encode([Example("", "x")], tokenizer, max_length=9).dropped == 1


def test_chat_template_wraps_text_prompts(chat):
    row = encode([Example("hi", "yo")], chat, max_length=99).rows[0]
    assert row["prompt"] == [{"role": "user", "content": "hi"}]
    assert row["labels"][-3:] == [*tokens(chat, "yo"), 2]  # the blank that the template puts after </s> is not scored
    assert chat.decode(row["input_ids"]).replace(" ", "") == "<user>hi<assistant>yo</s>"
    assert sum(label != -100 for label in row["labels"]) == 3
    plain = encode([Example("hi", "yo")], chat, max_length=99, chat_template=False).rows[0]
    assert plain["prompt"] == "hi"


def test_last_assistant_turn_is_scored(chat, tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write(tmp_path / "chat.jsonl", [{"messages": messages}] * 2 + [{"prompt": "x", "completion": "y"}])
    examples, _ = load_examples(DataConfig(train=path, evaluation=path), seed=0)
    assert examples[0] == Example(messages[:4], "d")
    row = encode(examples, chat, max_length=99).rows[0]
    assert [label for label in row["labels"] if label != -100] == [*tokens(chat, "d"), 2]
    assert row["prompt"] == messages[:4]


def test_messages_need_a_template(tokenizer):
    with pytest.raises(ConfigError, match="no chat template"):
        encode([Example([{"role": "user", "content": "a"}], "b")], tokenizer, max_length=9)


def test_columns_of_every_row_are_kept(tokenizer, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c", "answer": i, "labels": 3} for i in range(3)]
    rows[1]["extra"] = 1
    path = write(tmp_path / "rows.jsonl", rows)
    encoded = encode(load_examples(DataConfig(train=path, evaluation=path), seed=0)[0], tokenizer, max_length=50)
    assert [row["answer"] for row in encoded.rows] == [0, 1, 2]
    assert set(encoded.rows[1]) == {"input_ids", "labels", "prompt", "answer"}


def test_held_out_prompts_are_on_one_side_only():
    examples = [Example(f"p{i % 10}", f"c{i}") for i in range(100)]
    train, held = hold_out(examples, 0.2, seed=3)
    assert len(train) + len(held) == 100
    assert len({str(row.prompt) for row in held}) == 2
    assert not {str(row.prompt) for row in held} & {str(row.prompt) for row in train}
    assert hold_out(examples, 0.2, seed=3) == (train, held)
    assert hold_out(examples, 0.2, seed=4) != (train, held)
    assert len({str(row.prompt) for row in hold_out(examples, 0.001, seed=0)[1]}) == 1
    with pytest.raises(ConfigError, match="2 different prompts"):
        hold_out(examples[:1], 0.5, seed=0)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, '{"prompt": "a", "completion": '], "line 2: is not JSON"),
        ([GOOD, "", "nonsense"], "line 3: is not JSON"),
        ([GOOD, [1, 2]], "line 2: must be an object"),
        ([{"prompt": "a"}], "line 1: field 'completion' is missing (fields: prompt)"),
        ([GOOD, {"prompt": 3, "completion": "b"}], "line 2: field 'prompt' must be text, got int"),
        ([GOOD, {"prompt": "a", "completion": None}], "line 2: field 'completion' must be text, got NoneType"),
        ([GOOD, '{"prompt": "\\ud800", "completion": "b"}'], "line 2: field 'prompt' holds half a character"),
        (["[" * 100_000], "line 1: is not JSON"),
        (['{"prompt": ' + "9" * 5000 + "}"], "line 1: is not JSON"),
        ([{"messages": []}], "line 1: field 'messages' must be a list"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages[0] must hold role and content"),
        ([{"messages": [{"role": "user", "content": 1}]}], "messages[0].content must be text"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "needs an assistant turn"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "needs an assistant turn"),
        ([], "holds no rows"),
        (["", "  "], "holds no rows"),
    ],
    ids=range(16),
)
def test_bad_rows_are_named(tmp_path, rows, words):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError) as caught:
        load_examples(DataConfig(train=path), seed=0)
    assert caught.value.field == "data.train"
    assert words in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ConfigError, match="line 2: is not UTF-8"):
        load_examples(DataConfig(train=str(path)), seed=0)


def test_missing_files_are_named(tmp_path):
    there = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(ConfigError, match=r"data\.train: no such file.*gone\.jsonl"):
        load_examples(DataConfig(train=str(tmp_path / "gone.jsonl")), seed=0)
    with pytest.raises(ConfigError, match=r"data\.evaluation: no such file"):
        load_examples(DataConfig(train=there, evaluation=str(tmp_path / "gone.jsonl")), seed=0)
    with pytest.raises(ConfigError, match=r"data\.train: no such file or folder"):
        load_examples(DataConfig(train=str(tmp_path / "gone")), seed=0)
    with pytest.raises(ConfigError, match=r"data\.evaluation_split: a JSONL file has no splits"):
        load_examples(DataConfig(train=there, evaluation_split="test"), seed=0)


def test_columns_whose_names_are_taken_are_left_out_and_said(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "completion": "b", "ended": 1, "log_metric": 2, "number": 3}
    path.write_text("\n".join(json.dumps({**row, "prompt": prompt}) for prompt in "abcd"))
    train, _ = load_examples(DataConfig(train=str(path)), seed=0)
    encoded = encode(train, tokenizer, max_length=8)
    assert set(encoded.rows[0]) == {"input_ids", "labels", "prompt", "number"}
    assert encoded.notes("data.train") == [
        "data.train: left out, since reward functions are given something else by these names: ended, log_metric"
    ]


def test_other_columns_and_a_limit(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"q": f"{i}", "a": "b"} for i in range(9)])
    config = DataConfig(train=path, prompt="q", completion="a", limit=4, evaluation=path)
    assert load_examples(config, seed=0)[0] == [Example(f"{i}", "b") for i in range(4)]


@pytest.mark.filterwarnings("default")
def test_datasets_reads_what_is_not_jsonl(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(5)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    examples, held = load_examples(DataConfig(train=str(path)), seed=0)
    assert sorted(examples + held) == [Example(f"p{i}", f"c{i}") for i in range(5)]
    with pytest.raises(ConfigError, match=r"data\.evaluation_split: .*cannot load"):
        load_examples(DataConfig(train=str(path), evaluation_split="nothing"), seed=0)


def test_prompts_leave_room_for_responses_that_are_scored_as_they_are_sampled(make_model):
    """A longrope changes behind its original length; a table of positions may have fewer rows than it says."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "rope_theta": 1e4,
        "factor": 2.0,
    }
    model = make_model(rope_parameters=rope | {"original_max_position_embeddings": 20})
    assert context_room(model, 8) == (64, 12)
    with pytest.raises(ConfigError, match=r"train.max_new_tokens: must be below 20 \(beyond 20 tokens .*\), got 20"):
        context_room(model, 20)
    assert context_room(make_model(), 8) == (64, 56)
    with pytest.raises(ConfigError, match="must be below the model's context of 64 tokens, got 64"):
        context_room(make_model(), 64)
