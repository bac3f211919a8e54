"""A configuration is read as written, or refused in one line that names the field."""

import copy
from typing import Any

import pytest
import yaml

from l3ms.config.run_config import ConfigError, RunConfig, load_config, parse_override
from l3ms.config.yaml_reader import dump_yaml, parse_yaml

GOOD = {
    "model": "./base",
    "output": "out/run",
    "data": {"train": "rows.jsonl"},
    "constraints": [
        {"type": "length", "min": 12, "max": 16},
        {"type": "function", "name": "polite", "function": "rewards.py:polite", "min": 0.5},
    ],
    "train": {"iterations": 50, "learning_rate": 1e-6},
}


def test_good_file_with_paths_relative_to_it(write, tmp_path):
    config = load_config(write(GOOD))
    assert config.model == str(tmp_path / "base")
    assert config.output == str(tmp_path / "out/run")
    assert config.data.train == str(tmp_path / "rows.jsonl")
    assert config.constraints[1].function == f"{tmp_path}/rewards.py:polite"  # pyright: ignore[reportAttributeAccessIssue]
    assert config.train.learning_rate == 1e-6


def test_resolved_config_reads_back_equal(write):
    config = load_config(write(GOOD))
    assert load_config(write(config.model_dump())) == config


def test_hub_names_stay_names(write):
    config = load_config(write(GOOD | {"model": "org/name", "data": {"train": "org/rows"}}))
    assert (config.model, config.data.train) == ("org/name", "org/rows")


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "+1e-6", "1.0e-6", "0.000001", "1.e-06"])
def test_small_numbers_are_numbers(write, text):
    file = yaml.safe_dump(GOOD).replace("1.0e-06", text)
    assert text in file
    assert load_config(write(file)).train.learning_rate == 1e-6


def test_flags_override_the_file_and_their_paths_start_here(write, tmp_path, monkeypatch):
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    flags = [
        ("--train.learning-rate", "3e-5"), ("--constraints.0.max", "20"), ("--train.lora.r", "4"), ("--output", "mine"),
        ("--constraints.2.type", "length"), ("--constraints.2.max", "90"), ("--constraints.2.name", "long"),
        ("--train.betas", "[0.8, 0.9]"), ("--data.split", "train[:5%]"),
    ]  # fmt: skip
    config = load_config(write(GOOD), [parse_override(*flag) for flag in flags])
    assert config.train.learning_rate == 3e-5
    assert config.constraints[0].max == 20
    assert config.train.lora is not None
    assert config.train.lora.r == 4
    assert config.output == str(here / "mine")
    assert config.model == str(tmp_path / "base")
    assert config.constraints[2].name == "long"
    assert config.train.betas == (0.8, 0.9)
    assert config.data.split == "train[:5%]"


def test_every_field_has_a_flag(write):
    """Each resolved value, given back as a flag, changes nothing."""
    config = load_config(write(GOOD))

    def leaves(value, prefix):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            yield prefix, value
            return
        for key, item in items:
            yield from leaves(item, f"{prefix}.{key}".lstrip("."))

    flags = [(f"--{name.replace('_', '-')}", yaml.safe_dump(value)) for name, value in leaves(config.model_dump(), "")]
    assert len(flags) > 40
    assert load_config(write(GOOD), [parse_override(*flag) for flag in flags]) == config


# (dotted field to set, value, field the error must name, words it must hold)
BAD = [
    ("train.learning_rat", 1, "train.learning_rat", "did you mean learning_rate"),
    ("learning_rate", 1, "learning_rate", "did you mean train.learning_rate"),
    ("constraint", [], "constraint", "did you mean constraints"),
    ("constraints.0.mim", 1, "constraints.0.mim", "did you mean min"),
    ("train.lora.rank", 1, "train.lora.rank", "unknown field"),
    ("model", None, "model", "required"),
    ("output", None, "output", "required"),
    ("data", None, "data", "section"),
    ("data", {}, "data.train", "required"),
    ("data.train", None, "data.train", "string"),
    ("constraints.0.min", 17, "constraints.0.min", "below max"),
    ("constraints.0.min", 16, "constraints.0.min", "below max"),
    ("constraints.0.min", float("nan"), "constraints.0.min", "finite"),
    ("constraints.0.max", float("inf"), "constraints.0.max", "finite"),
    ("constraints.0.max", "16", "constraints.0.max", "number"),
    ("constraints.0.max", True, "constraints.0.max", "number"),
    ("constraints.1.min", None, "constraints.1", "min, max or both"),
    ("constraints.0", {"type": "length", "max": 1}, "constraints.0.max", "above 1 token"),
    ("constraints.0.scale", 0, "constraints.0.scale", "greater than 0"),
    ("constraints.0.margin", -1, "constraints.0.margin", "greater than or equal"),
    ("constraints.0.type", "lenght", "constraints.0.type", "length, function, reward_model, data_nll, kl or reward"),
    ("constraints.0.type", None, "constraints.0.type", "length, function, reward_model, data_nll, kl or reward"),
    ("constraints.1.name", "length", "constraints.1.name", "twice"),
    ("constraints.1.name", "a/b", "constraints.1.name", "pattern"),
    ("constraints.1.function", "polite", "constraints.1.function", "file.py:name"),
    ("constraints.0.min", 300, "constraints.0.min", "below max"),
    ("train.max_new_tokens", 12, "constraints.0.min", "max_new_tokens"),
    ("constraints", [], "constraints", "at least one"),
    ("constraints", "length", "constraints", "list"),
    ("train.iterations", -3, "train.iterations", "-3"),
    ("train.iterations", 2.5, "train.iterations", "integer"),
    ("train.iterations", True, "train.iterations", "integer"),
    ("train.learning_rate", 0, "train.learning_rate", "greater than 0"),
    ("train.learning_rate", float("nan"), "train.learning_rate", "finite"),
    ("train.temperature", 0, "train.temperature", "greater than 0"),
    ("train.penalty", 50.0, "train.penalty", "is of solver: penalty or augmented_lagrangian, and it is barrier"),
    ("train.dual_rate", 2.0, "train.dual_rate", "is of solver: dual_ascent or augmented_lagrangian"),
    ("train", {"solver": "penalty", "mu": "paper"}, "train.mu", "is of solver: barrier, and it is penalty"),
    ("train", {"solver": "penalty", "mu_end": 0.1}, "train.mu_end", "is of solver: barrier"),
    (
        "train",
        {"schedule": "constant", "final_learning_rate_share": 0.5},
        "train.final_learning_rate_share",
        "is of schedule",
    ),
    ("watch.max_rollbacks", 7, "watch.max_rollbacks", "is of on_trip: rollback, and it is warn"),
    ("watch", {"on_trip": "stop", "snapshot_every": 20}, "watch.snapshot_every", "is of on_trip: rollback"),
    ("train.solver", "lagrange", "train.solver", "barrier"),
    ("train.mu", "fast", "train.mu", "auto"),
    ("train.constraint_batch_size", 1, "train.constraint_batch_size", "2"),
    ("train.betas", [0.9], "train.betas.1", "required"),
    ("train.warmup", 10**6, "train.warmup", "below train.iterations"),
    ("train.betas", [0.9, 1.0], "train.betas.1", "less than 1"),
    ("seed", -1, "seed", "greater"),
    ("data.evaluation_share", 1.0, "data.evaluation_share", "less than 1"),
    ("train.lora", 3, "train.lora", "section"),
    ("trust_remote_code", "yes", "trust_remote_code", "boolean"),
    ("rollout.engine", "vlm", "rollout.engine", "must be transformers, vllm,"),
    ("rollout.engine", "engine.py:my engine", "rollout.engine", "file.py:name"),
    ("rollout.server", "http://a:8000", "rollout.server", "is of the engine vllm"),
    ("rollout", {"engine": "vllm", "server": "a:8000"}, "rollout.server", "must begin with http://"),
    ("rollout", {"engine": "vllm", "folder": "w"}, "rollout.folder", "is of a server"),
    ("rollout.options", {"max_model_len": 64}, "rollout.options", "leave them out"),
    (
        "rollout",
        {"engine": "vllm", "server": "http://a", "options": {"x": 1}},
        "rollout.options",
        "a server has its own",
    ),
    ("rollout", {"engine": "vllm", "options": {"x": [1]}}, "rollout.options.x", "valid"),
]


@pytest.mark.parametrize(("target", "value", "field", "words"), BAD, ids=[f"{case[0]}={case[1]}" for case in BAD])
def test_bad_value_is_one_line_naming_the_field(write, target, value, field, words):
    values = copy.deepcopy(GOOD)
    here: Any = values
    *parents, last = target.split(".")
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    here[int(last) if isinstance(here, list) else last] = value
    with pytest.raises(ConfigError) as caught:
        load_config(write(values))
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- 1\n- 2\n", "mapping"),
        ("model: a\nmodel: b\n", "line 2: key 'model' is given twice"),
        ("data: {train: a, train: b}\n", "given twice"),
        ("model: [\n", "line 2"),
        ("model: &x a\noutput: *x\n", "aliases"),
        ("model: !!python/object/apply:os.system ['true']\n", "line 1"),
        ("model: !!python/name:os.system\n", "line 1"),
        ("1: a\n", "not text"),
        ("? [a]\n: b\n", "not text"),
        ("model: 2024-13-45\n", "cannot be read"),
        ("seed: " + "9" * 5000, "cannot be read"),
        ("model: " + "[" * 2000, "line"),
        ("model: \x07", "not YAML"),
        (b"model: \xff\xfe", "UTF-8"),
        ("#" * (1 << 21), "larger than a configuration"),
    ],
    ids=range(16),
)
def test_bad_file_is_one_line_naming_it(write, text, words):
    path = write(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert caught.value.field == str(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--constraints.7.min", "constraints.7"), ("--constraints.x", "constraints.x"), ("--model.size", "model.size"),
        ("--train..lr", "train."), ("--nothing.at.all", "nothing"),
    ],
)  # fmt: skip
def test_flag_for_a_field_that_is_not_there(write, flag, field):
    with pytest.raises(ConfigError) as caught:
        load_config(write(GOOD), [parse_override(flag, "1")])
    assert caught.value.field == field


def test_frozen_and_code_is_listed(write):
    config = load_config(write(GOOD | {"trust_remote_code": True}))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert len(config.runs_code) == 2
    assert RunConfig.model_validate(config.model_dump()) == config


def test_an_engine_of_ones_own_is_code_and_stands_beside_the_file(write, tmp_path):
    config = load_config(write(GOOD | {"rollout": {"engine": "mine.py:Engine"}}))
    assert config.rollout.engine == f"{tmp_path / 'mine.py'}:Engine"
    assert config.runs_code["rollout.engine"] == config.rollout.engine
    config = load_config(write(GOOD | {"rollout": {"engine": "vllm", "server": "http://a:8000", "folder": "./w"}}))
    assert config.rollout.folder == str(tmp_path / "w")
    assert "rollout.engine" not in config.runs_code
    flags = [parse_override("--rollout.engine", "vllm"), parse_override("--rollout.options.max-model-len", "64")]
    assert load_config(write(GOOD), flags).rollout.options == {"max_model_len": 64}


def test_all_wrong_fields_are_named_at_once(write):
    values = copy.deepcopy(GOOD)
    values["train"] |= {"iterations": -3, "learning_rat": 1}
    values["data"] |= {"train": ["a.jsonl", 3], "limit": "many"}
    values["constraints"][0]["max"] = "16"
    values["seed"] = -1
    with pytest.raises(ConfigError) as caught:
        load_config(write(values))
    assert caught.value.field == "train.learning_rat"
    text = str(caught.value)
    assert "did you mean learning_rate" in text
    for field in ("data.train.1", "data.limit", "constraints.0.max", "train.iterations", "seed"):
        assert f"; {field}: " in text
    assert "data.train: " not in text
    assert "\n" not in text
    many = {f"unknown{i:02}": i for i in range(20)}
    with pytest.raises(ConfigError, match=r"unknown00: unknown field.*; and unknown08, .*, unknown19$"):
        load_config(write(GOOD | many))


def test_all_broken_rules_between_sections_are_named_at_once(write):
    values = copy.deepcopy(GOOD)
    values["train"] |= {"warmup": 60, "max_new_tokens": 12}
    values["constraints"][1]["name"] = "length"
    with pytest.raises(
        ConfigError, match=r"^train\.warmup: .*; constraints\.0\.min: .*; constraints\.1\.name: .* is used twice"
    ):
        load_config(write(values))


@pytest.mark.parametrize(
    ("text", "value"), [("010", 8), ("0_10", 8), ("-010", -8), ("1:30", 90), ("1:00:00", 3600), ("1:30.5", 90.5)]
)
def test_a_number_in_base_8_or_60_is_refused(text, value):
    """YAML 1.1 reads them so without a word, and whoever writes `iterations: 010` or `timeout: 1:30` means something else."""
    with pytest.raises(ConfigError, match=rf"line 1: {text} is {value} to YAML; write that, or '{text}' for a text"):
        parse_yaml(f"timeout: {text}")
    assert parse_override("--logging.run-name", text) == ("logging.run_name", text)


def test_other_numbers_stay_numbers():
    text = "[0, 00, 0.0, -0, 007.5, 1_000, 0x10, 0b11, 1e-6, 08.5]"
    assert parse_yaml(text) == [0, 0, 0.0, 0, 7.5, 1000, 16, 3, 1e-6, 8.5]


def test_texts_that_look_like_numbers_are_texts_when_they_are_read_again(write):
    texts = ["3e-6", "1E5", "+1e9", "1_0e3", "1.e-6", ".5e3", "010", "1:30", "1_000", "0x1F", "null", "on", "2024-01-01", "é"]  # fmt: skip
    assert parse_yaml(dump_yaml({"tags": texts, "rate": 3e-6})) == {"tags": texts, "rate": 3e-6}
    config = load_config(write(dump_yaml(GOOD | {"logging": {"report_to": "tensorboard", "run_name": "3e-6"}})))
    assert load_config(write(dump_yaml(config.model_dump()))) == config


def test_half_a_character_is_refused():
    """Of an emoji that JSON has escaped YAML makes two halves, which no file, no tokenizer and no tracker takes."""
    for text in ('"\\ud83d\\ude00"', '"a\\udc80"', '{"\\ud800": 1}'):
        with pytest.raises(ConfigError, match=r"line 2: .* holds half a character"):
            parse_yaml(f"# a\nname: {text}")
    with pytest.raises(ConfigError, match=r"^logging\.run_name: holds half a character"):
        parse_override("--logging.run-name", "a\udc80")
    assert parse_yaml('"\\U0001F600 \\u00e9"') == "\U0001f600 é"
