"""Files of every kind are read whole and in order, and what cannot be read is one line with the file and the line."""

import gzip
import json
import os
import socket

import pytest

from l3ms.config.data import DataConfig
from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.data import Example, load_examples, load_prompts


def pairs(first, count=3):
    return [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(first, first + count)]


def lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def read(source, **options):
    """The prompts of a source, in order."""
    held = options.pop("evaluation", source)
    return [item.prompt for item in load_examples(DataConfig(train=source, evaluation=held, **options), seed=0)[0]]


def refused(source, **options):
    with pytest.raises(ConfigError) as caught:
        load_examples(DataConfig(train=source, **options), seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(pairs(0)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(pairs(3)).encode()))
    (tmp_path / "c.json").write_text("\ufeff\n " + json.dumps(pairs(6), indent=2) + "\n")
    (tmp_path / "d.json").write_text(lines(pairs(9)))
    (tmp_path / "e.csv").write_text("prompt,completion\np12,c12\np13,c13\np14,c14\n")
    return tmp_path


def test_lists_and_globs_are_read_file_by_file(folder):
    names = ["a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.csv"]
    wanted = [f"p{i}" for i in range(15)]
    assert read([str(folder / name) for name in names]) == wanted
    assert read(str(folder / "*")) == wanted
    assert read([str(folder / "[cd].json"), str(folder / "a.jsonl")]) == [*wanted[6:12], *wanted[:3]]
    assert read(str(folder / "**" / "*.json")) == wanted[6:12]
    assert read([str(folder / "*.json*")], limit=5) == wanted[:5]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder):
    (folder / "[a].jsonl").write_text(lines(pairs(40)))
    (folder / "e[1].csv").write_text("prompt,completion\nq,r\ns,t\n")
    assert read(str(folder / "[a].jsonl")) == ["p40", "p41", "p42"]
    assert read(str(folder / "e[1].csv")) == ["q", "s"]


def test_what_a_list_names_is_there_and_once(folder):
    assert refused(str(folder / "x*.jsonl")).startswith("data.train: no file matches ")
    assert "a.jsonl is named twice" in refused([str(folder / "a.jsonl"), str(folder / "*.jsonl")])
    assert "no such file: " in refused([str(folder / "a.jsonl"), str(folder / "gone.jsonl")])
    assert "no such file: org/rows" in refused(["org/rows"])
    (folder / "empty.jsonl").write_text("")
    assert refused([str(folder / "empty.jsonl")]).endswith("empty.jsonl holds no rows")


def test_rows_of_an_array_have_their_line(folder):
    path = folder / "bad.json"
    path.write_text('[\n {"prompt": "a",\n  "completion": "b"},\n\n {"prompt": 3, "completion": "c"}]')
    assert f"{path}, line 5 (row 2): field 'prompt' must be text, got int" in refused(str(path))
    for text, words in (
        ('[{"prompt": "a", "completion": "b"}', "wanted a comma or the end"),
        ('[{"prompt": "a", "completion": "b"},]', "line 1: is not JSON"),
        ('[{"prompt": "a", "completion": "b"}] []', "something follows the array"),
        ('[{"prompt": "a", "completion": "b"\n', "line 2: is not JSON"),
        ("[" * 100_000, "line 1: is not JSON"),
        ("[]", "holds no rows"),
    ):
        path.write_text(text)
        assert words in refused(str(path)), text
    path.write_bytes(b'[\n"\xff"]')
    assert "line 2: is not UTF-8 text" in refused(str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_field_that_is_given_twice_is_refused(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    row = '{"prompt": "a", "completion": "b", "prompt": "c"}'
    path.write_text(f"[{row}]" if suffix == ".json" else row)
    assert "line 1: field 'prompt' is given twice" in refused(str(path))


def test_a_file_of_another_kind_is_refused(tmp_path):
    """Its suffix is not taken for the name of a data set."""
    for name in ("rows.xlsx", "rows.csv.gz", "rows"):
        (tmp_path / name).write_text("x")
        assert f"{name} is of no kind that is read: .jsonl, .json" in refused(str(tmp_path / name))


def test_damaged_gzip_is_one_line(tmp_path):
    whole = gzip.compress(lines(pairs(0, 400)).encode())
    path = tmp_path / "rows.jsonl.gz"
    for content in (b"plain text", whole[: len(whole) // 2], whole[:40] + b"\0" * 40 + whole[80:]):
        path.write_bytes(content)
        assert "rows.jsonl.gz cannot be read: as gzip it is damaged" in refused(str(path))


def test_only_regular_files_are_opened(tmp_path):
    """A FIFO would be waited for, for ever."""
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "nowhere.jsonl").symlink_to("gone")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "s.jsonl"))
    for name, words in (
        ("fifo.jsonl", "is a FIFO, not a regular file"), ("folder.jsonl", "is a folder, not a regular file"), ("s.jsonl", "is a socket"),
        ("loop.jsonl", "Too many levels of symbolic links"), ("nowhere.jsonl", "no such file"), ("a\0.jsonl", "a NUL character"),
        ("x" * 300 + ".jsonl", "File name too long"), ("null\0", "no such file or folder"),
    ):  # fmt: skip
        found = refused(str(tmp_path / name))
        assert found.startswith("data.train: "), name
        assert words in found
    assert "is a device" in refused("/dev/null")
    os.mkfifo(tmp_path / "fifo.csv")
    os.mkfifo(tmp_path / "fifo.parquet")
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo.csv", "fifo.parquet", "fifo"):
        assert "is a FIFO" in refused(str(tmp_path / name))
    assert "is a FIFO" in refused(str(tmp_path / "fifo.*"))


def test_splits_and_configurations_of_files_are_refused(folder):
    path = str(folder / "a.jsonl")
    assert refused(path, split="train[:50%]").startswith("data.split: a JSONL file has no splits, got 'train[:50%]'")
    assert refused([path], split="test").startswith("data.split: a list of files has no splits")
    (folder / "held.csv").write_text("prompt,completion\n" + "a,b\n" * 4)
    held = str(folder / "held.csv")
    assert refused(path, split="train[:50%]", evaluation=held).startswith("data.split: a JSONL file has no splits")
    assert refused(path, name="english").startswith("data.name: names a configuration of a data set")
    with pytest.raises(ValueError, match="evaluation_split names held-out rows, and so does evaluation"):
        DataConfig(train="org/rows", evaluation=path, evaluation_split="test")
    with pytest.raises(ValueError, match="evaluation_share is of no use"):
        DataConfig(train=path, evaluation=path, evaluation_share=0.3)


def test_a_split_leaves_a_file_of_held_out_rows_whole(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "a,b\n" * 4)
    path = str(tmp_path / "rows.csv")
    train, held = load_examples(DataConfig(train=path, evaluation=path, split="train[:50%]"), seed=0)
    assert (len(train), len(held)) == (2, 4)


def test_csv_texts_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        'prompt,completion,count,part,sure,note\n007,NA,1,0.5,True,\n"two\nlines",,2,,false,NA\n\n"say ""so""",null,3,1,true,x\n'
    )
    found = load_examples(DataConfig(train=str(path), evaluation=str(path)), seed=0)[0]
    assert [(item.prompt, item.completion) for item in found] == [
        ("007", "NA"),
        ("two\nlines", ""),
        ('say "so"', "null"),
    ]
    assert [dict(item.columns) for item in found] == [
        {"count": 1, "part": 0.5, "sure": True, "note": ""},
        {"count": 2, "part": None, "sure": False, "note": "NA"},
        {"count": 3, "part": 1.0, "sure": True, "note": "x"},
    ]
    assert [item.where.removeprefix(f"{path}, ") for item in found] == ["line 2", "line 3", "line 6"]
    assert read(str(path), split="train[1:]", evaluation=str(path)) == ["two\nlines", 'say "so"']
    path.with_suffix(".tsv").write_text("prompt\tcompletion\na,b\tc\nd\te\n")
    assert read(str(path.with_suffix(".tsv"))) == ["a,b", "d"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,completion\na,b\nc\n", "line 3: wanted 2 fields, as in the first line, got 1"),
        ("prompt,completion\na,b,c\n", "line 2: wanted 2 fields"),
        ('prompt,completion\na,"b\n', "is not CSV"),
        ("prompt,prompt\na,b\n", "column 'prompt' is there twice"),
        ("prompt,answer\na,b\n", "line 2: field 'completion' is missing"),
        ("prompt,completion\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_torn_csv_is_named_by_its_line(tmp_path, text, words):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert words in refused(str(path))
    path.write_bytes(b"prompt,completion\n\xff,b\n")
    assert "is not UTF-8 text" in refused(str(path))


def test_parquet_gives_messages_back_without_the_nulls_of_a_table(tmp_path, capfd):
    import pyarrow
    from pyarrow import parquet

    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "x"}}}
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [each]}], "n": n,
         "chat_template_kwargs": {name: True}}
        for each, n, name in ((call, 1, "calm"), (other, None, "loud"))
    ]  # fmt: skip
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = load_examples(DataConfig(train=str(path), evaluation=str(path)), seed=0)[0]
    assert [item.completion for item in found] == [
        {"role": "assistant", "tool_calls": [each]} for each in (call, other)
    ]
    assert [item.columns["n"] for item in found] == [1, None]
    assert [item.options for item in found] == [{"calm": True}, {"loud": True}]
    assert [item.where for item in found] == [f"{path}, row 1", f"{path}, row 2"]
    path.write_bytes(path.read_bytes()[:-9])
    assert "rows.parquet cannot be read after row 0" in refused(str(path))
    assert capfd.readouterr().err == ""


def test_prompts_of_a_file_of_any_name(tmp_path):
    path = tmp_path / "prompts"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path.write_text(lines([{"prompt": "x"}, {"prompt": talk}, {"messages": talk}, {"messages": talk[:2]}]))
    config = DataConfig(train="unused")
    assert load_prompts(config, "--prompts", path) == [
        Example("x", ""), Example(talk, ""), Example(talk, ""), Example(talk[:1], "b"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--prompts: no such file"):
        load_prompts(config, "--prompts", tmp_path / "gone")
