"""`rollout:` of a configuration: what it takes, what does not go together, and what the trainer gets of it."""

import pytest
import yaml

from l3ms.config.run_config import ConfigError, load_config
from l3ms.runs.arguments import training_arguments

LENGTH = {"type": "length", "max": 16}
DATA = {"type": "data_nll", "name": "general", "data": {"train": "rows.jsonl"}, "max": 2.0}


def read(tmp_path, rollout, constraints=(LENGTH,), **train):
    path = tmp_path / "run.yaml"
    values = {"model": "./base", "output": "out", "data": {"train": "rows.jsonl"}, "constraints": list(constraints)}
    path.write_text(yaml.safe_dump({**values, "rollout": rollout, "train": {"device": "cpu", **train}}))
    return load_config(path)


@pytest.mark.parametrize(
    ("rollout", "given"),
    [
        ({}, ("1", 1, "none")),
        ({"every": 1, "reuse": 1, "importance": "none"}, ("1", 1, "none")),
        ({"every": "auto", "reuse": 4, "engine": "vllm", "importance": "truncate"}, ("auto", 4, "truncate")),
    ],
)
def test_the_trainer_gets_what_was_said(tmp_path, rollout, given):
    args = training_arguments(read(tmp_path, rollout))
    assert (args.rollout_every, args.rollout_reuse, args.rollout_importance) == given


@pytest.mark.parametrize(
    ("rollout", "train", "line"),
    [
        ({"every": 2}, {}, "rollout.every: must be 1 or 'auto', got 2"),
        ({"reuse": 0}, {}, "rollout.reuse: must be greater than or equal to 1, got 0"),
        ({"importance": True}, {}, "rollout.importance: must be 'none' or 'truncate', got True"),
        ({"evry": "auto"}, {}, "rollout.evry: unknown field; did you mean every?"),
        ({"every": "auto"}, {"solver": "none"}, 'rollout.every: must be left out with solver "none"'),
        ({"every": "auto"}, {"half_steps": "joint"}, "rollout.every: needs half_steps: alternating, got 'joint'"),
        (
            {"importance": "truncate"},
            {},
            "rollout.importance: is for an engine whose probabilities are not the model's",
        ),
        ({"reuse": 2}, {"smoothing": 0.3}, "rollout.reuse: needs smoothing: trend, got 0.3"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, rollout, train, line):
    with pytest.raises(ConfigError, match="^" + line):
        read(tmp_path, rollout, **train)


def test_it_is_about_responses_that_are_trained_on(tmp_path):
    monitor = {"type": "length", "monitor": True}
    assert read(tmp_path, {"every": "auto"}, [DATA, monitor]).rollout.every == "auto"
    for rollout in ({"reuse": 2}, {"importance": "truncate"}):
        (name,) = rollout
        with pytest.raises(
            ConfigError, match=f"rollout.{name}: is about sampled responses, and no constraint is on any"
        ):
            read(tmp_path, rollout, [DATA, monitor])
