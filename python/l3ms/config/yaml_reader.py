"""Safe YAML for configurations, read and written: plain values only, numbers are numbers, and a repeated key is an error.

YAML 1.1 reads `1e-6` as text, `010` as 8 and `1:30` as 90, and silently keeps the last of two equal keys; such have ruined runs. Tags
(`!!python/name`) are refused, and aliases, since a few nested ones expand to gigabytes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from l3ms.regular_files import read_regular

MAX_BYTES = 1 << 20


class ConfigError(ValueError):
    """Bad input: `field` is the dotted field (or the file), the one line says what was wanted and what came."""

    def __init__(self, field: str, message: str):
        message = " ".join(message.split())
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


def unnameable(path: str) -> str | None:
    """Why no file can have this name; None where one can."""
    if "\0" in path:
        return "holds a NUL character"
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    return None


def _refuse(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """`SafeLoader` with JSON's floats, without aliases, and with an eye for repeated keys."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise _refuse("aliases are not supported", self.peek_event().start_mark)
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _refuse(f"tag {event.tag!r} is not supported", event.start_mark)
        if re.search(
            "[\ud800-\udfff]", getattr(event, "value", "")
        ):  # of `"\\ud83d\\ude00"`, as JSON writes it, YAML makes two halves
            raise _refuse(
                f"{event.value!r:.80} holds half a character (a lone surrogate): write the character", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refuse(f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise _refuse(f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node):
        """As it is written in base 10 (or 16, or 2): no octal number and none of minutes and seconds, which nobody means."""
        text = self.construct_scalar(node)
        whole = node.tag.endswith(":int")
        if ":" in text or (whole and re.match(r"[-+]?0[0-9_]+$", text) and text.strip("-+0_")):
            value = (super().construct_yaml_int if whole else super().construct_yaml_float)(node)
            raise _refuse(f"{text} is {value:g} to YAML; write that, or {text!r} for a text", node.start_mark)
        return (super().construct_yaml_int if whole else super().construct_yaml_float)(node)


class _Dumper(yaml.SafeDumper):
    """`SafeDumper` that puts in quotes what `_Loader` would take for a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def parse_yaml(text: str, name: str = "value") -> Any:
    """The plain value `text` stands for; `ConfigError(name, ...)` with the line when it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(name, f"{line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(name, f"is not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(name, "is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # an impossible date, an integer of thousands of digits
        raise ConfigError(name, f"holds a value that cannot be read: {error}") from None


def dump_yaml(values: Mapping[str, Any]) -> str:
    """The text that `parse_yaml` reads as the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the file at `path`. Raises `ConfigError` naming the file."""
    name = ascii(str(path))[1:-1] if unnameable(str(path)) else str(path)
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(name, "no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(name, "cannot be read: is not UTF-8 text") from None
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ConfigError(name, f"is larger than a configuration (more than {MAX_BYTES} bytes)") from None
        raise ConfigError(name, f"cannot be read: {error.strerror}") from None
    values = parse_yaml(text, name)
    if values is None:
        raise ConfigError(name, "is empty; it needs at least model, output and data")
    if not isinstance(values, dict):
        raise ConfigError(name, f"must be a mapping of fields, got {type(values).__name__}")
    return values
