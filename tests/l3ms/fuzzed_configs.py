"""Configurations made of valid ones, a case a seed: scalars as people write them, keys twice, anchors, encodings, line ends, damage.

What is read of them is compared with the text, scalar by scalar, by another parser and without YAML's rules: `check_meaning`.
"""

import copy
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import yaml

FULL: dict[str, Any] = {
    "model": "./base",
    "output": "out/run",
    "seed": 3,
    "data": {"train": "rows.jsonl", "evaluation": "held.jsonl", "max_length": 64, "chat_template": False},
    "constraints": [
        {"type": "length", "min": 12, "max": 16, "scale": 2.0, "margin": 0.5},
        {"type": "length", "name": "long", "threshold": 20, "max": 0.05},
        {"type": "function", "name": "polite", "function": "rewards.py:polite", "min": 0.5},
        {"type": "reward", "name": "thanks", "reward": "contains", "words": ["thank you"], "min": 0.3},
        {"type": "reward_model", "name": "harmless", "model": "./scorer", "squash": "tanh", "min": 0.2},
        {"type": "data_nll", "name": "old", "data": {"train": "old.jsonl"}, "max": 2.1, "relative": True, "batch_size": 4},
        {"type": "kl", "max": 5, "per_token": True},
        {"type": "kl", "name": "seen", "monitor": True},
    ],
    "train": {"iterations": 50, "learning_rate": 1e-6, "betas": [0.5, 0.95], "lora": {"r": 4}, "warmup": 3, "save_steps": None},
    "evaluate": {"samples": 16},
    "watch": {"on_trip": "rollback", "ended_min": None, "window": 5},
    "logging": {"tensorboard": False},
}  # fmt: skip
MORE: dict[str, Any] = {
    "model": "org/name", "output": "out", "trust_remote_code": False,
    "data": {"train": ["a.jsonl", "b.csv"], "evaluation_share": 0.25, "prompt": "question", "completion": "answer", "limit": 100},
    "constraints": [
        {"type": "length", "name": "short", "quantile": 0.95, "max": 40},
        {"type": "reward", "name": "ends", "reward": "ends_with", "text": "!", "min": 0.5, "margin": 0.0},
        {"type": "reward", "name": "varied", "reward": "distinct_n", "n": 2, "unit": "tokens", "min": 0.5},
        {"type": "reward", "name": "dated", "reward": "matches", "pattern": "[0-9]+", "full": False, "max": 0.5, "scale": 1},
    ],
    "train": {
        "solver": "augmented_lagrangian", "dual_rate": 0.1, "penalty": 3, "optimizer": "sgd", "optimizer_options": {"momentum": 0.9},
        "batch_size": 2, "gradient_accumulation": 4, "weight_decay": 0.01, "schedule": "constant", "smoothing": 0.2,
        "half_steps": "joint", "length_norm": "none", "nonfinite": "drop", "timeout": 60, "agree_every": None, "dtype": "bfloat16",
        "lora": {"r": 8, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}, "activation_checkpointing": True,
    },
    "evaluate": {"samples": 32, "batch_size": 8, "initial": False},
    "watch": None,
    "logging": {"report_to": ["tensorboard"], "tags": ["one", "two"], "run_name": "first", "completions": 0},
    "seed": 7,
}  # fmt: skip
ENGINE: dict[str, Any] = {
    "model": "./base", "output": "out",
    "data": {"train": "rows.jsonl"}, "constraints": [{"type": "length", "max": 40}, {"type": "kl", "name": "near", "monitor": True}],
    "train": {"iterations": 20, "temperature": 0.7, "max_new_tokens": 64},
    "rollout": {"engine": "vllm", "options": {"max_model_len": 512, "enforce_eager": True}, "every": "auto", "reuse": 2,
    "importance": "truncate"},
    "watch": {"on_trip": "stop", "truncated_max": 0.3, "every": 0, "held_out_gap": None},
}  # fmt: skip
SCALARS = [
    *["0", "-0", "00", "007", "010", "-010", "+010", "0_10", "0o10", "0x10", "0X10", "0b11", "1_000", "1__0", "1,000", "1e3", "1E3",
    "1e-6", "1.5e3", "1.e3", ".5", "-.5", "+.5", ".5e-3", "5.", "+5", "--5", "5-", "0x", "1e"],
    *["1:30", "1:30:00", "190:20:30", "1:30.5", "99:99", ".inf", "-.inf", "+.Inf", ".nan", ".NaN", "NaN", "inf", "Infinity", "1e400",
    "-1e400", "1e-400", "1e308", "4e-324"],
    *["~", "null", "Null", "NULL", "none", "yes", "Yes", "NO", "no", "on", "On", "off", "OFF", "y", "n", "true", "TRUE", "True",
    "false", "=", "<<", "$HOME", "${HOME}", "%d", "%s", "{}", "[]", "[1]", "[[1]]", "{a: 1}"],
    "2001-01-01", "2001-01-01T00:00:00Z", "2001-13-45", "12:30:45", "'5'", '"5"', '"\\u0035"', "5 # five", "5 #", "5# five", "", "''",
    '""',
    "!!int 5", "!!str 5", "!!float 5", "! 5", "!local 5", "!!binary aGk=", "!!python/name:os.system", "&a 5", "*a", "&a", "- 1", "? x",
    "[1", "{a",
    "]", "}", "@x", "`x`", "%x", "| 5", "|\n        5", ">-\n        some\n        text", "'it''s'", "'open", '"open', '"\\x1b[2J"',
    '"\\0"',
    '"\\ud800"', '"\\ud83d\\ude00"', '"\\q"', '"a\\nb"', "٣", "\uff15", "½", "∞", "\u22125", "1 000", "1\u00a0000", "\u00a05",
    "5\u200b", "\ufeff5", "é", "e\u0301",
    "\u202e5", "💥", "a: b", "a:b", "a #b", "#", "x" * 2000, "9" * 30, "9" * 400, "1" * 5000, "0." + "3" * 400, "1" + "0" * 310, "a\tb",
    "\t5", "5\t",
    *("[" * depth + "]" * depth for depth in (3, 60, 400, 2000)), *("{a: " * depth + "1" + "}" * depth for depth in (3, 60, 400)),
    "*" * 50, "&a [*a]", "&a {b: *a}", "'" + "\n\n" * 50 + "'", '"' + "\\n" * 100 + '"', "/", "..", "~/x", "~nobody/x", "C:\\x",
    "file:///x", "a/../b",
    "./x.jsonl", "rewards.py:f", "os:system", "x.py:", ":f", "http://a", "length", "all", "auto", "-1", "1", "2", "3", "16", "0.5",
    "0.1", "1.0",
]  # fmt: skip
BOMB = "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


PIECES = [
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"!!python/object/apply:os.system ['false']", b"&a *a", b"<<: ", b"- ", b": ", b"\t", b"'", b'"',
    b"{", b"}", b"[", b"]", b"#", b"---\n", b"...\n", b"? ", b"| ", b"> ", b"%YAML 9.9\n", b"1e999", b"\r", b"0x1G", b"~",
]  # fmt: skip


class Written(str):
    """A scalar that is put in the text as it is."""


def plain(value: Any) -> str:
    if isinstance(value, str):
        bare = re.fullmatch(r"[A-Za-z_./][\w./:-]*", value) and value.lower() not in (
            "null",
            "true",
            "false",
            "yes",
            "no",
            "on",
            "off",
        )
        return value if bare else json.dumps(value)
    return json.dumps(value) if not isinstance(value, float) else repr(value)


def block(value: Any, indent: str = "") -> str:
    """`value` as a block, `indent` deep."""
    if isinstance(value, dict) and value:
        items = [(str(key) if isinstance(key, Written) else plain(key), item) for key, item in value.items()]
        return "".join(f"\n{indent}{key}:{block(item, indent + '  ')}" for key, item in items)
    if isinstance(value, list) and value:
        return "".join(f"\n{indent}-{block(item, indent + '  ')}" for item in value)
    return f" {value if isinstance(value, Written) else plain(value)}"


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something can be put: the paths of all values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in items for found in places(item, (*path, key))]


def at(value: Any, path: tuple) -> Any:
    for part in path:
        value = value[part]
    return value


def base(draw: random.Random) -> dict[str, Any]:
    """A valid configuration: some sections of one of three."""
    values = copy.deepcopy(draw.choice((FULL, MORE, ENGINE)))
    for key in [key for key in values if key not in ("model", "output", "data", "constraints", "train")]:
        if draw.random() < 0.5:
            del values[key]
    if len(values["constraints"]) > 2:
        values["constraints"] = draw.sample(values["constraints"], draw.choice((1, 2, 2, 3)))
        if values["constraints"][0].get("monitor"):
            values["constraints"].append({"type": "length", "name": "bounded", "max": 99})
    return values


def changed(draw: random.Random, values: dict[str, Any]) -> tuple | None:
    """Put scalars where others stood; the path of the one change, None where there are more, or one of another kind."""
    if draw.random() < 0.75:
        path = draw.choice(places(values))
        at(values, path[:-1])[path[-1]] = Written(draw.choice(SCALARS))
        return path
    for _ in range(draw.choice((1, 2, 3))):
        mappings = [(), *(path for path in places(values) if isinstance(at(values, path), dict) and at(values, path))]
        here = at(values, draw.choice(mappings))
        key = draw.choice(list(here))
        action = draw.randrange(5)
        if action == 0:
            del here[key]
        elif action == 1:  # twice, in another style
            here[Written(draw.choice((f"{key}", f'"{key}"', f"'{key}'", f"? {key}\n", f"{key} ")))] = copy.deepcopy(
                here[key]
            )
        elif action == 2:
            other = (
                key.upper(),
                key.replace("_", "-"),
                f"{key}\u200b",
                f"{key}s",
                f" {key}",
                "",
                "<<",
                "\x1b[2J",
                "\u202e",
                "__class__",
                "é" * 700,
            )
            here[draw.choice(other)] = here.pop(key)
        elif action == 3:
            here[key] = [here[key]] if draw.random() < 0.5 else {key: here[key]}
        else:
            here[key] = Written(draw.choice(SCALARS))
        if not here:
            break
    return None


def encoded(draw: random.Random, text: str) -> bytes:
    """The whole text in another encoding, with other line ends, or damaged."""
    pieces = {
        "BOM": lambda: b"\xef\xbb\xbf" + text.encode(), "CRLF": lambda: text.replace("\n", "\r\n").encode(),
        "CR": lambda: text.replace("\n", "\r").encode(),
        "utf-16": lambda: text.encode("utf-16"), "utf-32": lambda: text.encode("utf-32"),
        "latin-1": lambda: (text + "# é\n").encode("latin-1"),
        "cp1252": lambda: (text + "# “x”\n").encode("cp1252"), "tabs": lambda: text.replace("  ", "\t").encode(),
        "NEL": lambda: text.replace("\n", "\x85", 1).encode(),
        "LS": lambda: text.replace("\n", "\u2028", 1).encode(), "NUL": lambda: text.encode() + b"\0",
        "documents": lambda: text.encode() + b"\n---\n" + text.encode(),
        "start": lambda: b"%YAML 1.1\n---\n" + text.encode(), "1.2": lambda: b"%YAML 1.2\n---\n" + text.encode(),
        "end": lambda: text.encode() + b"\n...\n",
        "tag": lambda: b"%TAG ! tag:yaml.org,2002:python/\n---\n" + text.encode(),
        "bomb": lambda: b"a: &a [x]\n" + BOMB.encode() + text.encode(),
        "list": lambda: b"- " + text.replace("\n", "\n  ").encode(), "comment": lambda: b"#" + b"x" * 9000 + b"\n" + text.encode(),
        "spaces": lambda: text.replace("\n", "   \n\n").encode(), "twice": lambda: text.encode() + b"\n" + text.encode(),
        "merge": lambda: text.encode() + b"\n<<: {seed: 1}\n", "indented": lambda: ("  " + text.replace("\n", "\n  ")).encode(),
    }  # fmt: skip
    return draw.choice(list(pieces.values()))()


def scrambled(text: bytes, draw: random.Random) -> bytes:
    """Bytes replaced, inserted, cut out, the end lost."""
    found = bytearray(text)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, action = draw.randrange(len(found) + 1), draw.random()
        if action < 0.3:
            found[at:at] = draw.choice(PIECES)
        elif action < 0.6:
            found[at : at + draw.choice((1, 1, 3, 40))] = b""
        elif action < 0.7:
            del found[at:]
        elif at < len(found):
            found[at] = draw.randrange(256)
    return bytes(found)


def case(seed: int) -> tuple[bytes, tuple | None]:
    """(text, the path of the one scalar that was put there)."""
    draw = random.Random(seed)
    values = base(draw)
    kind = draw.random()
    path = changed(draw, values) if kind < 0.8 else None
    text = block(values).removeprefix("\n") + "\n"
    if kind < 0.8:
        return text.encode("utf-8", "surrogatepass"), path
    return (encoded(draw, text) if kind < 0.9 else scrambled(text.encode(), draw)), None


# ---- what a text means, without YAML's rules ----


def check_meaning(text: bytes, config: Any, folder: Path) -> None:
    """AssertionError where a scalar of the text is something else in the configuration, or was not looked at."""
    words = text.decode("utf-8-sig")
    events = list(yaml.parse(words, Loader=yaml.SafeLoader if "\0" in words else yaml.CSafeLoader))
    for event in events:
        assert not isinstance(event, yaml.AliasEvent), "an alias was read"
        assert getattr(event, "tag", None) is None, f"a tag was read: {event}"
    assert sum(isinstance(event, yaml.DocumentStartEvent) for event in events) == 1, "two documents were read"
    _compare(yaml.compose(words, Loader=yaml.CSafeLoader), config.model_dump(), "", folder)


def _compare(node: Any, value: Any, where: str, folder: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        assert isinstance(value, dict), f"{where} is {value!r}"
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{where}: a key twice: {keys}"
        for key, item in node.value:
            assert key.value in value, f"{where}.{key.value} was read as nothing"
            _compare(item, value[key.value], f"{where}.{key.value}", folder)
    elif isinstance(node, yaml.SequenceNode):
        assert isinstance(value, (list, tuple)), f"{where} is {value!r}"
        assert len(value) == len(node.value), f"{where} is {value!r}"
        for index, (item, found) in enumerate(zip(node.value, value, strict=True)):
            _compare(item, found, f"{where}.{index}", folder)
    else:
        assert _means(node, value, folder), f"{where}: {node.value!r} was read as {value!r}"


def _means(node: Any, value: Any, folder: Path) -> bool:
    text = node.value
    if isinstance(value, str):
        return value == text or value in _paths(text, folder)
    if node.style:  # in quotes
        return False
    if isinstance(value, bool):
        return text.lower() in (("true", "yes", "on") if value else ("false", "no", "off"))
    if value is None:
        return text.lower() in ("", "~", "null")
    digits = text.replace("_", "").lower()
    try:
        for start, radix in (("0x", 16), ("0b", 2)):
            if digits.lstrip("+-").startswith(start):
                return int(digits, radix) == value
        if isinstance(value, int):
            return int(digits, 10) == value
        return float(digits) == value
    except ValueError:
        return False


def _paths(text: str, folder: Path) -> list[str]:
    source, colon, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    path = os.path.join(folder, os.path.expanduser(source))
    return [found + colon + name for found in (os.path.realpath(path), os.path.normpath(path), path)]
