"""Rows of every shape become what they say, or are refused by file and line."""

import datetime
import json

import pytest

from l3ms.config.data import DataConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.data import hold_out, load_examples
from l3ms.runs.examples import Example, example

USER, ANSWER = {"role": "user", "content": "hot"}, {"role": "assistant", "content": "cold"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": None}}}


def made(row, **options):
    return example(DataConfig(train="rows.jsonl", **options), "data.train", "rows.jsonl, line 1", row)


def test_messages_keep_all_that_they_hold():
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "7", "name": "f", "tool_call_id": "1"}
    thinking = {"role": "assistant", "content": "seven", "reasoning_content": "it said 7"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = made({"messages": [USER, calling, result, thinking], "tools": tools, "id": 3})
    assert (found.prompt, found.completion) == ([USER, calling, result], thinking)
    assert found.options == {"tools": tools}
    assert found.columns == {"tools": tools, "id": 3}
    assert made({"messages": [USER, calling]}).completion == calling
    assert made({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}).completion["tool_calls"] == [CALL]  # pyright: ignore


def test_a_conversation_in_two_columns():
    assert made({"prompt": [USER], "completion": [ANSWER]}) == Example([USER], "cold")
    for completion, words in (
        ([ANSWER, USER, ANSWER], "must be one assistant turn"), ([USER], "must be one assistant turn"), ("cold", "list of messages"),
        ([], "list of messages"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            made({"prompt": [USER], "completion": completion})
    with pytest.raises(ConfigError, match="'prompt' must be a list of messages"):
        made({"prompt": "hot", "completion": [ANSWER]})


def test_text_parts_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "ot"}]
    assert made({"messages": [{"role": "user", "content": parts}, ANSWER]}) == Example([USER], "cold")
    assert (
        made({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "cold"}]}]}).completion
        == "cold"
    )
    for part in ({"type": "image", "url": "x"}, {"type": "image_url", "image_url": {}}, "text", {}):
        with pytest.raises(ConfigError, match=r"line 1: messages\[0\]\.content\[1\] is of type"):
            made({"messages": [{"role": "user", "content": [*parts[:1], part]}, ANSWER]})


def test_texts_are_examples_of_their_own():
    found = [made({"text": f"t{i}", "id": i}) for i in range(10)]
    assert found[3] == Example("", "t3", {"id": 3}, is_text=True)
    train, held = hold_out(found, 0.2, seed=0)
    assert (len(train), len(held)) == (8, 2)
    row = {"prompt": "a", "completion": "b", "text": "more"}
    assert made(row) == Example("a", "b", {"text": "more"})
    assert made({"body": "t"}, text="body").is_text
    with pytest.raises(ConfigError, match="field 'completion' is missing"):
        made({"text": "a"}, prompt="text")


def test_a_column_that_is_named_goes_before_others():
    talk = {"messages": [USER, ANSWER]}
    pair = {"question": "a", "answer": "b"}
    assert made(pair | talk, prompt="question", completion="answer") == Example("a", "b", talk)
    assert made({"prompt": "a", "answer": "b"} | talk, completion="answer") == Example("a", "b", talk)
    assert made({"prompt": "a", "completion": "b", "body": "c"}, text="body").completion == "c"
    assert made(pair | {"text": "c"}, prompt="question", completion="answer").completion == "b"
    assert made({"prompt": "a", "completion": "b", "talk": [USER, ANSWER]}, messages="talk").completion == "cold"
    with pytest.raises(
        ConfigError, match=r"line 1: two kinds of rows are named .* both \(prompt: question, text: body\)"
    ):
        made(pair | {"body": "c"}, prompt="question", text="body")


@pytest.mark.parametrize("field", ["prompt", "completion", "messages", "text", "tools"])
def test_a_column_that_no_row_has_is_refused(tmp_path, field):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}", "completion": "", "messages": [USER, ANSWER]} for i in range(3)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = rf"^data\.{field}: no row has a column 'typo' \(columns: completion, messages, prompt\)"
    with pytest.raises(ConfigError, match=words):
        load_examples(DataConfig(train=str(path), evaluation=str(path), **{field: "typo"}), seed=0)  # type: ignore[arg-type]


def test_tools_may_be_json_as_tables_hold_them():
    row = {"messages": [USER, ANSWER]}
    assert made(row | {"tools": json.dumps([{"name": "f"}])}).options == {"tools": [{"name": "f"}]}
    assert made(row | {"functions": [{"name": "f"}]}, tools="functions").options == {"tools": [{"name": "f"}]}
    for nothing in (None, [], ""):
        assert made(row | {"tools": nothing}).options == {}
    assert made(row | {"chat_template_kwargs": {"enable_thinking": False}}).options == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER, ANSWER], "tools": "hammer"}, "field 'tools' is text that is not JSON"),
        ({"messages": [USER, ANSWER], "tools": ["hammer"]}, "field 'tools' must be a list of objects"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "\ud800"}]}, "field 'tools' holds half a character"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": False}},
            "field 'chat_template_kwargs' must be",
        ),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"messages": "d"}},
            "field 'chat_template_kwargs' must be",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": "f()"}]}, "messages[1].tool_calls must be a list of objects"),
        ({"messages": [USER, ANSWER | {"name": "\ud800"}]}, "messages[1].name holds half a character"),
        ({"messages": [USER | {"content": None}, ANSWER]}, "messages[0].content must be text, got NoneType"),
        ({"messages": [USER, ANSWER | {"content": None, "tool_calls": []}]}, "messages[1].content must be text"),
        ({"messages": [USER, {"role": None, "content": "a"}]}, "messages[1].role must be text"),
        ({"messages": ["hot"]}, "messages[0] must hold role and content"),
        ({"messages": [USER | {"at": datetime.date(2000, 1, 1)}, ANSWER]}, "messages[0].at holds what JSON has not: "),
        ({"text": 3}, "field 'text' must be text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, words):
    with pytest.raises(ConfigError) as caught:
        made(row)
    assert str(caught.value).startswith("data.train: rows.jsonl, line 1: ")
    assert words in str(caught.value)


def test_the_place_of_a_row_goes_with_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "completion": ""}) for i in range(3)))
    found = load_examples(DataConfig(train=str(path), evaluation=str(path)), seed=0)[0]
    assert [item.where for item in found] == [f"{path}, line {i}" for i in (1, 2, 3)]
