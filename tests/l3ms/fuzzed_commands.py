"""Command lines, a case a seed: options of every command as it lists them itself, with values that they take and that none does."""

import functools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIG = """model: base
output: out
data: {train: rows.jsonl}
constraints: [{type: length, min: 4, max: 40}, {type: length, name: long, threshold: 30, max: 0.1}]
train: {iterations: 50, max_new_tokens: 64, batch_size: 2}
"""
NASTY = [
    "", " ", "x", "0", "-1", "1e3", "1.5", "nan", "inf", "-inf", "1e400", "010", "0x10", "1_000", "1:30", "true", "null", "~", "[]",
    "{}", "[1", "{a: 1}",
    "٣", "é", "\u202e", "\x1b[2J", "a\nb", "\t", "'", '"', "--", "-", "--seed", "/", "..", "/dev/null", "/dev/zero", "nowhere/x",
    "x" * 3000, "9" * 400,
    "9" * 5000, "*a", "&a 1", "!!python/name:os.system", "$(touch canary)", "`x`", "%s", "a,b", "a=b", "length=0,9", "x.json", "x.png",
    "run.yaml", "\udc80",
    "[" * 3000, "- 1", "? x", "1 # one",
]  # fmt: skip
GOOD = {
    int: ("2", "64", "7"),
    float: ("0.5", "12.5", "20"),
    str: ("a", "auto", "last", "cpu"),
    Path: ("x.json", "out2", "x.png"),
}
FIELDS = {  # dotted, as flags -> values that they take
    "train.learning-rate": ("1e-6", "3e-5"), "train.iterations": ("3", "200"), "train.schedule": ("cosine", "'linear'"),
    "train.warmup": ("2", "null"),
    "train.lora.r": ("4",), "constraints.0.max": ("50", "41.5"), "constraints.1.max": ("0.25",), "constraints.0.name": ("short",),
    "data.limit": ("9",),
    "data.chat-template": ("false", "no"), "watch": ("null",), "watch.window": ("4",), "logging.tags": ("[one, two]",),
    "evaluate.samples": ("32",),
    "train.betas": ("[0.5, 0.9]",), "train": ("{max_new_tokens: 64}",), "data": ("{train: rows.jsonl}",), "logging.run-name": ("010",
    "first"),
    "train.optimizer-options": ("{eps: 1e-6}",), "constraints.2": ("{type: kl, max: 5}",), "trust-remote-code": ("false",),
    "rollout.reuse": ("2",),
}  # fmt: skip


@functools.cache
def commands() -> dict[str, list[Any]]:
    """Command -> its parameters."""
    import typer.main

    from l3ms.commands.command_line import app

    group: Any = typer.main.get_command(app)
    return {name: command.params for name, command in group.commands.items()}


@dataclass
class Case:
    arguments: list[str]
    flags: list[tuple[str, str]] = field(default_factory=list)  # fields by flags
    option: str = ""  # the one that has a value which no option takes

    def write(self, folder: Path) -> None:
        (folder / "run.yaml").write_text(CONFIG)

    def check(self, went_on: tuple[str, tuple, dict]) -> None:
        """AssertionError where the command goes on with something else than what it was told."""
        from fuzzed_configs import _compare

        name, values, named = went_on
        if not name.endswith(("executing.train", "checking.check")):
            return
        config = values[0].model_dump()
        for flag, text in dict(self.flags).items():
            here: Any = config
            for part in flag.replace("-", "_").split("."):
                here = here[int(part)] if isinstance(here, list) else here[part]
            overridden = any(other != flag and other.startswith(f"{flag}.") for other, _ in self.flags)
            if overridden:
                continue
            try:
                node = yaml.compose(text, Loader=yaml.CSafeLoader)
            except yaml.YAMLError:
                node = None
            try:
                assert node is not None
                _compare(node, here, flag, Path.cwd())
            except AssertionError:
                assert here == text or (node is None and here is None), (
                    f"--{flag} {text!r:.60} was read as {here!r:.60}"
                )
        if name.endswith("checking.check"):
            wanted = _last(self.arguments, "--samples")
            assert wanted is None or named["samples"] == int(wanted)
        else:
            for option, found in (("--seed", config["seed"]), ("--iterations", config["train"]["iterations"])):
                given = _last(self.arguments, option)
                later = option == "--iterations" and any(
                    flag in ("train.iterations", "train") for flag, _ in self.flags
                )
                assert given is None or later or found == int(given), f"{option} {given} was read as {found}"


def _last(arguments: list[str], option: str) -> str | None:
    places = [at for at, word in enumerate(arguments[:-1]) if word == option]
    return arguments[places[-1] + 1] if places else None


def case(seed: int) -> Case:
    draw = random.Random(seed)
    command = draw.choice(("train", "train", "check", "certify", "plot", "bench", "demo"))
    arguments = [
        command,
        *{"train": ["run.yaml"], "check": ["run.yaml"], "certify": ["finished"], "plot": ["finished"]}.get(command, []),
    ]
    found = Case(arguments)
    nasty = draw.random() < 0.6
    count = 1 if nasty else draw.choice((1, 2, 3))
    for _ in range(count):
        if command in ("train", "check") and draw.random() < 0.7:
            flag = draw.choice(list(FIELDS))
            if any(
                flag.startswith(f"{other}.") or other.startswith(f"{flag}.") or flag == other
                for other, _ in found.flags
            ):
                continue
            text = draw.choice(NASTY if nasty else FIELDS[flag])
            found.flags.append((flag, text))
            arguments += [f"--{flag}={text}"] if draw.random() < 0.5 or text.startswith("--") else [f"--{flag}", text]
            found.option = f"--{flag}" if nasty else ""
            continue
        options = [
            item
            for item in commands()[command]
            if item.param_type_name == "option" and item.name not in ("debug", "help")
        ]
        if not options:
            continue
        parameter = draw.choice(options)
        option = draw.choice(parameter.opts)
        if parameter.is_flag:
            arguments.append(option)
            continue
        text = draw.choice(NASTY if nasty else GOOD.get(parameter.bare_type, GOOD[str]))
        arguments += [option, text]
    if nasty and draw.random() < 0.15:
        arguments.insert(
            draw.randrange(len(arguments) + 1),
            draw.choice(
                ("--strange", "more", "-x", "\x1b[2J", "--train.", "--.", "--constraints.0.", "--constraints.-1.max=3")
            ),
        )
        found.option = ""
    return found
