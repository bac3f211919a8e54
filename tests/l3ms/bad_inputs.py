"""Bad input to the commands: configurations, YAML, paths, data, command lines. A case makes itself in a project and is a command."""

import copy
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from l3ms.config.run_config import RunConfig, list_fields

Case = tuple[str, Callable[[Path], list[str]]]  # its name, and what makes it in a project -> arguments

SECTIONS: dict[str, dict[str, Any]] = {
    "length": {"min": 2, "max": 5},
    "function": {"name": "f", "function": "rewards.py:even", "min": 0.1},
    "reward": {"name": "r", "reward": "contains", "words": ["a"], "min": 0.1},
    "reward_model": {"name": "m", "model": "classifier", "min": 0.1},
    "data_nll": {"name": "d", "data": {"train": "other.jsonl"}, "max": 9},
    "kl": {"max": 5},
}
# Of no field the right type; those of a kind of field alone are below.
NEVER = {"a mapping": {"strange": 1}, "nested lists": [["x"]], "not a number": float("nan"), "infinite": float("-inf")}
WORDS = {"0": 0, "true": True, "": "", "a list": ["x"], "words": "no such words"}
NUMBERS = {"words": "three", "true": True, "negative": -7, "1e300": 1e300, "1e40 as an integer": 10**40, "a list": [1]}
OPTIONAL_TRUE = {"chat_template", "target_modules"}


def set_in(folder: Path, field: str, value: Any, remove: bool = False) -> None:
    """Write run.yaml with a dotted field changed; `constraints.<type>.x` is of a constraint of that type."""
    values = yaml.safe_load((folder / "run.yaml").read_text())
    parts = field.split(".")
    if parts[0] == "constraints" and len(parts) > 2:
        values["constraints"] = [{"type": parts[1], **copy.deepcopy(SECTIONS[parts[1]])}]
        parts[1] = "0"
    here: Any = values
    for part in parts[:-1]:
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[int(part)] if isinstance(here, list) else here[part]
    if remove:
        del here[parts[-1]]
    else:
        here[parts[-1]] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def fields() -> Iterator[tuple[str, str]]:
    """(dotted field, default) of all, once for each type of constraint that has it."""
    for name, default in list_fields(RunConfig):
        if not name.startswith("constraints."):
            yield name, default
    for kind in SECTIONS:
        yield from ((f"constraints.{kind}.{name}", str(value)) for name, value in _own(kind))


def _own(kind: str) -> list[tuple[str, Any]]:
    from l3ms.config.errors import models_in, type_of

    [model] = [m for m in models_in(RunConfig.model_fields["constraints"].annotation) if type_of(m) == kind]
    return [(name, default) for name, default in list_fields(model) if name != "type"]


def _numeric(field: str, default: str) -> bool:
    name = field.rpartition(".")[2]
    if name in {"min", "max", "scale", "margin", "threshold", "quantile", "limit", "warmup", "n"} or field.endswith(
        "max_length"
    ):
        return True
    try:
        float(default)
    except ValueError:
        return False
    return True


def of_fields() -> Iterator[Case]:
    def case(field: str, kind: str, value: Any) -> Case:
        def make(folder: Path) -> list[str]:
            set_in(folder, field, value)
            return ["train", "run.yaml", "--allow-code"]

        return f"{field}: {kind}", make

    for field, default in fields():
        values = dict(NEVER)
        if _numeric(field, default):
            values |= NUMBERS
            if field.rpartition(".")[2] in {"min", "max", "threshold"}:
                del values["negative"]
        elif default in {"true", "false", "True", "False"}:
            values |= {"words": "maybe", "1": 1, "empty": ""}
        elif field.rpartition(".")[2] not in OPTIONAL_TRUE:
            values |= {"0": 0, "true": True}
        for kind, value in values.items():
            yield case(field, kind, value)


REQUIRED = (
    "model", "output", "data", "data.train", "constraints.function.name", "constraints.function.function", "constraints.reward.reward",
    "constraints.reward.words", "constraints.reward_model.model", "constraints.data_nll.data", "constraints.data_nll.data.train",
    "constraints.kl.max", "constraints.length.type",
)  # fmt: skip


def of_missing_and_unknown() -> Iterator[Case]:
    def case(name: str, change: Callable[[Path], None]) -> Case:
        return name, lambda folder: (change(folder), ["train", "run.yaml", "--allow-code"])[1]

    for field in REQUIRED:
        yield case(f"{field} is missing", lambda folder, field=field: set_in(folder, field, None, remove=True))
    sections = ["", "data.", "train.", "train.lora.", "evaluate.", "watch.", "logging."]
    sections += [f"constraints.{kind}." for kind in SECTIONS]
    for section in sections:
        for name in ("strange", "lerning_rate", "0", "__class__", "é", "a b", "model_config"):
            yield case(f"{section}{name} is unknown", lambda folder, f=section + name: set_in(folder, f, 1))


TEXTS = {
    "empty": b"", "a comment": b"# nothing\n", "a list": b"- a\n", "a word": b"word\n", "a number": b"3\n", "null": b"null\n",
    "a tab": b"model:\tbase\n\tx: 1\n", "an open list": b"model: [\n", "an open mapping": b"model: {\n", "an open quote": b"model: 'x\n",
    "a python object": b"model: !!python/object/apply:os.mkdir [canary]\n", "python/name": b"model: !!python/name:os.system\n",
    "python/module": b"model: !!python/module:os\n", "python/object/new": b"model: !!python/object/new:os.mkdir [canary]\n",
    "a tag of its own": b"model: !mine x\n", "binary": b"model: !!binary aGk=\n", "a set": b"model: !!set {a, b}\n",
    "a tag directive": b"%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !name:os.system x\n",
    "a verbatim tag": b"m: !<tag:yaml.org,2002:str> x\n",
    "an alias": b"a: &a [1]\nmodel: *a\n", "a bomb": b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "a merge": b"a: &a {x: 1}\n<<: *a\n",
    "an anchor of itself": b"a: &a [*a]\n", "a key twice": b"model: a\nmodel: b\n", "a key that is a list": b"? [a]\n: 1\n",
    "a key that is a number": b"1: 2\n", "two documents": b"model: a\n---\nmodel: b\n", "latin-1": "model: é\n".encode("latin-1"),
    "utf-16": "model: a\n".encode("utf-16"), "a NUL": b"model: a\0b\n", "control characters": b"model: \x01\x02\n",
    "escape": b"model: \x1b[2J\n",
    "nested deeply": b"a: " + b"[" * 5000,
    "nested and closed": b"a: " + b"[" * 3000 + b"]" * 3000, "mappings deep": b"{a: " * 3000,
    "large": b"#" * (1 << 21), "a version": b"%YAML 9.9\n---\nmodel: x\n", "thousands of digits": b"seed: " + b"9" * 5000 + b"\n",
    "a date that is none": b"model: 2001-99-99\n", "base 60": b"seed: 99:99:99:99\n", "a lone surrogate": b'model: "\\ud800"\n',
    "JSON that is cut": b'{"model": "x", "data": {', "a shell": b"model: $(touch canary)\n", "an archive": b"PK\x03\x04" + b"\0" * 50,
    "a pickle": b"\x80\x04\x95\x10\x00", "an ELF": b"\x7fELF" + bytes(range(60)), "only whitespace": b" \n \t\n", "a dash": b"-\n",
}  # fmt: skip


def of_texts() -> Iterator[Case]:
    for name, text in TEXTS.items():
        yield (
            f"CONFIG is {name}",
            lambda folder, text=text: ((folder / "run.yaml").write_bytes(text), ["train", "run.yaml"])[1],
        )


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _linked(path: Path, target: str) -> None:
    path.symlink_to(target)


PLACES: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo, "a socket": _socket, "a loop of links": _loop, "a folder": Path.mkdir,
    "a link to nowhere": lambda path: _linked(path, "nowhere"), "a link to a device": lambda path: _linked(path, "/dev/zero"),
    "a link to a FIFO": lambda path: (os.mkfifo(path.with_name("hidden")), _linked(path, "hidden")),
    "not there": lambda path: None, "empty": Path.touch, "random bytes": lambda path: path.write_bytes(bytes(range(256))),
}  # fmt: skip
NAMES = {
    "NUL": "./no\0where.jsonl", "half a character": "./half\udc80.jsonl", "a long name": f"./{'x' * 300}.jsonl",
    "a long path": "./" + "x/" * 3000, "below a file": "./rows.jsonl/x", "a device": "/dev/zero", "nobody's home": "~nobody-of-this-name/x",
    "in /proc": "/proc/self/nowhere.jsonl",
}  # fmt: skip
PATHS = {
    "model": "model", "data.train": "here.jsonl", "data.evaluation": "here.jsonl", "constraints.kl.reference": "here",
    "constraints.reward_model.model": "here", "constraints.data_nll.data.train": "here.jsonl",
    "constraints.data_nll.data.evaluation": "here.jsonl", "constraints.function.function": "here.py",
}  # fmt: skip


def of_paths() -> Iterator[Case]:
    def field(field: str, name: str, make: Callable[[Path], Any] | None) -> Callable[[Path], list[str]]:
        def prepare(folder: Path) -> list[str]:
            if make is not None:
                make(folder / name)
            set_in(folder, field, f"./{name}:even" if field.endswith("function") and make is not None else name)
            return ["train", "run.yaml", "--allow-code"]

        return prepare

    for path, name in PATHS.items():
        for kind, make in PLACES.items():
            yield f"{path} is {kind}", field(path, name, make)
        for kind, text in NAMES.items():
            yield f"{path} is {kind}", field(path, f"{text}:even" if path.endswith("function") else text, None)
    for kind, text in NAMES.items():
        if kind != "a long path":  # of folders that could be made
            yield f"output is {kind}", field("output", text, None)
    for kind in ("a FIFO", "a socket", "a loop of links", "a link to a device", "random bytes"):
        yield f"output is {kind}", field("output", "here", PLACES[kind])
        yield f"output is in {kind}", field("output", "here/x", lambda path, kind=kind: PLACES[kind](path.parent))

    def argument(kind: str, *before: str, ending: str = "") -> Callable[[Path], list[str]]:
        def prepare(folder: Path) -> list[str]:
            PLACES[kind](folder / f"here{ending}")
            return [*before, f"here{ending}"]

        return prepare

    for kind in PLACES:
        for command in ("train", "check", "plot", "certify"):
            yield f"the argument of {command} is {kind}", argument(kind, command)
        yield f"--prompts is {kind}", argument(kind, "certify", "finished", "--prompts", ending=".jsonl")
    for kind in ("a FIFO", "a socket", "a folder", "a link to a device", "a link to a FIFO"):
        for command in (("check", "run.yaml"), ("certify", "finished"), ("bench",)):
            yield f"--json of {command[0]} is {kind}", argument(kind, *command, "--json", ending=".json")
        yield f"--plot of bench is {kind}", argument(kind, "bench", "--plot", ending=".png")


ROWS = {
    "no JSON": b"{\n",
    "a list": b"[1]\n",
    "a number": b"3\n",
    "text": b'"x"\n',
    "null": b"null\n",
    "no completion": b'{"prompt": "a"}\n',
    "no prompt": b'{"completion": "a"}\n',
    "a prompt that is a number": b'{"prompt": 1, "completion": "a"}\n',
    "a completion that is null": b'{"prompt": "a", "completion": null}\n',
    "a prompt that is a list": b'{"prompt": [], "completion": "a"}\n',
    "messages of text": b'{"messages": "x"}\n',
    "no messages": b'{"messages": []}\n',
    "a message that is text": b'{"messages": ["x"]}\n',
    "a message without a role": b'{"messages": [{"content": "x"}]}\n',
    "a role that is a number": b'{"messages": [{"role": 1, "content": "x"}]}\n',
    "no assistant": b'{"messages": [{"role": "user", "content": "x"}]}\n',
    "latin-1": '{"prompt": "é", "completion": "a"}\n'.encode("latin-1"),
    "utf-16": '{"prompt": "a", "completion": "a"}\n'.encode("utf-16"),
    "half a character": b'{"prompt": "\\ud800", "completion": "a"}\n',
    "nested deeply": b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 100_000 + b"\n",
    "thousands of digits": b"9" * 10_000 + b"\n",
    "NUL bytes": b"\0" * 100 + b"\n",
    "one row": b'{"prompt": "a", "completion": "b"}\n',
    "one prompt": b'{"prompt": "a", "completion": "b"}\n' * 20,
    "blank lines": b"\n\n \n",
    "a pickle": b"\x80\x04\x95\n",
    "empty prompts": b'{"prompt": "", "completion": "b"}\n' * 20,
    "prompts that are too long": b"".join(
        json.dumps({"prompt": f"{'a ' * 99}{letter}", "completion": "b"}).encode() + b"\n" for letter in "abcdefgh"
    ),
    "fewer rows than a batch": b'{"prompt": "a", "completion": "b"}\n{"prompt": "b", "completion": "b"}\n',
}


def of_rows() -> Iterator[Case]:
    for name, text in ROWS.items():
        for field in ("data.train", "data.evaluation", "constraints.data_nll.data.train"):
            if field != "data.train" and ("one " in name or "fewer" in name):
                continue

            def make(folder: Path, field: str = field, text: bytes = text) -> list[str]:
                (folder / "here.jsonl").write_bytes(text)
                set_in(folder, field, "here.jsonl")
                return ["train", "run.yaml"]

            yield f"{field} holds {name}", make


COMMANDS = [
    "strange", "train", "train run.yaml more", "train run.yaml --strange 1", "train run.yaml --seed x", "train run.yaml --iterations 1.5",
    "train run.yaml --iterations 0", "train run.yaml --train.strange 1", "train run.yaml --constraints.7.max 3", "train run.yaml --train",
    "train run.yaml --constraints.x.max 3", "train run.yaml --seed.x 3", "train run.yaml --train.lora.r", "train run.yaml --model",
    "train run.yaml --resume --overwrite", "train run.yaml --constraints []", "train run.yaml --train 3", "train run.yaml --data.train {}",
    "train run.yaml --constraints.0.min 99", "train run.yaml --train.betas [0.5]", "train run.yaml --train.betas 0.5", "train nowhere.yaml",
    "train run.yaml --train.max-new-tokens 63 --data.max-length 2", "train run.yaml --train.max-new-tokens 64", "train run.yaml --seed -1",
    "train run.yaml --train.batch-size 100000", "train run.yaml --data.evaluation-split x", "train run.yaml --train.warmup 500",
    "check", "check nowhere.yaml", "check run.yaml --samples 1", "check run.yaml --samples x", "check run.yaml --json nowhere/x.json",
    "check run.yaml --resume", "check run.yaml --seed -1", "certify", "certify nowhere", "certify finished --weights best",
    "certify finished --samples 1", "certify finished --delta 0", "certify finished --delta 1", "certify finished --delta nan",
    "certify finished --delta x", "certify finished --method best", "certify finished --range length", "certify finished --range length=1",
    "certify finished --range length=2,1", "certify finished --range length=a,b", "certify finished --range length=nan,1",
    "certify finished --range other=0,1", "certify finished --prompts nowhere.jsonl", "certify finished --json nowhere/x.json",
    "certify finished --seed -1", "certify finished --probes 1", "certify finished --prices --prompts rows.jsonl", "certify .", "plot",
    "plot nowhere", "plot .", "plot run.yaml", "demo --min 5 --max 4", "demo --min nan", "demo --min 0", "demo --max 1e9", "demo --seed -1",
    "demo --output rows.jsonl", "bench --shape 1", "bench --shape a,b,c", "bench --shape 0,1,2", "bench --dtype fp8", "bench --op strange",
    "bench --masked 2", "bench --masked x", "bench --device tpu", "bench --rounds 0", "bench --contestants strange", "bench --json x.txt",
    "bench --plot x.jpg", "bench --add", "bench --full --op weighted", "bench --scaling --masked 0", "bench --output rows.jsonl",
]  # fmt: skip


def of_commands() -> Iterator[Case]:
    for line in COMMANDS:
        yield f"l3ms {line}", lambda folder, line=line: line.split()


def cases() -> list[Case]:
    return [
        *of_fields(), *of_missing_and_unknown(), *of_texts(), *of_paths(), *of_rows(), *of_commands(),
    ]  # fmt: skip
