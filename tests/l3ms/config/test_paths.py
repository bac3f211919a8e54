"""Paths of a configuration start where it stands, those of flags where one is, and names of a hub stay names."""

from typing import Any

import pytest
import yaml

from l3ms.config.run_config import ConfigError, load_config, parse_override

GOOD = {
    "model": "./base", "output": "out/run", "data": {"train": "rows.jsonl"}, "constraints": [{"type": "length", "min": 12, "max": 16}],
}  # fmt: skip


def test_names_of_the_file_are_not_looked_for_here_and_those_of_flags_not_there(write, tmp_path, monkeypatch):
    here = tmp_path / "elsewhere"
    for folder in (here / "gpt2", here / "imdb", tmp_path / "bert"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    kl = {"type": "kl", "reference": "gpt2", "max": 1}
    path = write(GOOD | {"model": "gpt2", "data": {"train": "imdb"}, "constraints": [kl]})
    config = load_config(path)
    assert (config.model, config.data.train, config.constraints[0].reference) == ("gpt2", "imdb", "gpt2")  # pyright: ignore[reportAttributeAccessIssue]
    flags: list[Any] = [("model", "bert"), ("data", {"train": ["imdb", "bert"]}), ("constraints.0.reference", "gpt2")]
    config = load_config(path, flags)
    assert (config.model, config.data.train) == ("bert", [str(here / "imdb"), "bert"])
    assert config.constraints[0].reference == str(here / "gpt2")  # pyright: ignore[reportAttributeAccessIssue]
    assert flags[1] == ("data", {"train": ["imdb", "bert"]})
    assert load_config(path, [("data.train", ["a"]), ("data.train.1", "gpt2")]).data.train == ["a", str(here / "gpt2")]


def test_a_folder_for_weights_that_is_not_there_yet_stands_beside_the_file(write, tmp_path):
    rollout = {"engine": "vllm", "server": "http://a:8000", "folder": "weights/here"}
    assert load_config(write(GOOD | {"rollout": rollout})).rollout.folder == str(tmp_path / "weights/here")


def test_lists_and_globs_of_data_start_at_the_file(write, tmp_path, monkeypatch):
    (tmp_path / "part [1].jsonl").write_text("")
    data = {"train": ["a.jsonl", "more/*.jsonl.gz", "part [1].jsonl"], "evaluation": "held/**/*.json"}
    nll = {"type": "data_nll", "name": "old", "data": {"train": ["b.csv", "c.parquet"]}, "max": 2}
    path = write(GOOD | {"data": data, "constraints": [nll]})
    monkeypatch.chdir("/")
    config = load_config(path)
    assert config.data.train == [
        str(tmp_path / "a.jsonl"),
        f"{tmp_path}/more/*.jsonl.gz",
        str(tmp_path / "part [1].jsonl"),
    ]
    assert config.data.evaluation == f"{tmp_path}/held/**/*.json"
    assert config.constraints[0].data.train == [str(tmp_path / "b.csv"), str(tmp_path / "c.parquet")]  # pyright: ignore
    assert load_config(write(config.model_dump())) == config
    assert load_config(path, [parse_override("--data.train.1", "x.jsonl")]).data.train[1] == "/x.jsonl"
    for nothing in ([], [""], [None], {}):
        with pytest.raises(ConfigError, match=r"^data\.train"):
            load_config(write(GOOD | {"data": {"train": nothing}}))


def test_a_glob_in_a_folder_that_looks_like_one(tmp_path):
    import glob

    folder = tmp_path / "[x]"
    folder.mkdir()
    (folder / "a.jsonl").write_text("")
    (folder / "run.yaml").write_text(yaml.safe_dump(GOOD | {"data": {"train": "*.jsonl"}}))
    config = load_config(folder / "run.yaml")
    assert glob.glob(str(config.data.train)) == [str(folder / "a.jsonl")]


def test_paths_of_a_list_that_no_file_can_have(write, tmp_path):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for path, words in (("loop.jsonl", "circle"), ("a\0b", "NUL")):
        with pytest.raises(ConfigError, match=rf"^data\.train\.1: .*({words})"):
            load_config(write(GOOD | {"data": {"train": ["rows.jsonl", f"./{path}"]}}))
