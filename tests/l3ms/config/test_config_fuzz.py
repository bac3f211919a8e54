"""Random damage to configurations and data files: what is read is a valid run, what is not is one line, and nothing else happens.

The tests are a slice of it; `make trust` counts more kinds of it (G13).
"""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzed_configs import FULL, places, scrambled

from l3ms.config.data import DataConfig
from l3ms.config.run_config import ConfigError, load_config, parse_override
from l3ms.runs.data import load_examples

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"), 10**30, -(2**63), "", " ", "x", "x" * 5000,
    "1e-6", "nan", "\0", "a\nb", "\u2028", "../..", "/", "~", "~nobody/x", "é", [], [[]], [1, 2, 3], ["a"], {}, {"a": 1}, {"": None},
    {"type": "length"}, {"type": []}, [None], "length", "rewards.py", ":f", "a:b:c", "${HOME}", "%s %d {}", "[bold]x[/bold]", "{",
    "2001-01-01",
]  # fmt: skip


def damaged(draw: random.Random) -> dict[str, Any]:
    """`FULL` with a few values replaced, left out, moved or under another name."""
    values = copy.deepcopy(FULL)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        found = places(values)
        if not found:
            break
        *above, key = draw.choice(found)
        here: Any = values
        for part in above:
            here = here[part]
        action = draw.random()
        if action < 0.7:
            here[key] = draw.choice(NASTY)
        elif action < 0.8:
            del here[key]
        elif isinstance(here, dict):
            here[draw.choice((f"{key}s", "min", "type", "name", "data", "", f"{key}.x"))] = here.pop(key)
        else:
            here.append(copy.deepcopy(here[key]))
    return values


def one_line(attempt: Callable[[], Any]) -> Any:
    """What `attempt` returns; None for a `ConfigError`, which is one line that names something."""
    start, found, refused = time.monotonic(), None, None
    try:
        found = attempt()
    except ConfigError as error:
        refused = error
    assert time.monotonic() - start < 10
    if refused is not None:
        assert refused.field
        assert refused.message
        assert "\n" not in str(refused)
        assert len(str(refused)) < 20_000
    return found


def fuzz_config(seed: int, folder: Path) -> bool:
    """-> whether it was read."""
    draw = random.Random(seed)
    path = folder / "run.yaml"
    if draw.random() < 0.6:
        path.write_text(yaml.safe_dump(damaged(draw), allow_unicode=True), encoding="utf-8")
    else:
        path.write_bytes(scrambled(yaml.safe_dump(FULL).encode(), draw))

    def read():
        flags = []
        if draw.random() < 0.2:
            parts = draw.choice(places(FULL))
            flag = "--" + ".".join(map(str, parts)).replace("_", "-") + draw.choice(("", "", ".x", ".0", "."))
            flags = [parse_override(flag, str(draw.choice(NASTY)))]
        return load_config(path, flags)

    config = one_line(read)
    if config is not None:
        path.write_text(yaml.safe_dump(config.model_dump(), allow_unicode=True), encoding="utf-8")
        assert load_config(path) == config  # what a run folder keeps is the run
    return config is not None


ROWS = [
    {"prompt": "a b", "completion": "c", "n": 1},
    {"prompt": "b", "completion": "é \u2028 f"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]


def fuzz_data(seed: int, folder: Path) -> bool:
    draw = random.Random(seed)
    rows: list[Any] = [copy.deepcopy(ROWS[draw.choice((0, 0, 1) if draw.random() < 0.7 else (2,))]) for _ in range(6)]
    if draw.random() < 0.5:
        row = draw.choice(rows)
        found = places(row)
        *above, key = draw.choice(found)
        here: Any = row
        for part in above:
            here = here[part]
        here[key] = draw.choice(NASTY)
        text = "".join(f"{json.dumps(item)}\n" for item in rows).encode()
    else:
        text = scrambled("".join(f"{json.dumps(item, ensure_ascii=False)}\n" for item in rows).encode(), draw)
    path = folder / "rows.jsonl"
    path.write_bytes(text)
    config = DataConfig(train=str(path), evaluation_share=0.5)
    return one_line(lambda: load_examples(config, seed=0)) is not None


@pytest.mark.parametrize("fuzz", [fuzz_config, fuzz_data])
def test_random_damage_is_read_or_refused_in_one_line(tmp_path, fuzz):
    read = sum(fuzz(seed, tmp_path) for seed in range(400))
    assert 10 < read < 390  # both happen
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml" if fuzz is fuzz_config else "rows.jsonl"}
