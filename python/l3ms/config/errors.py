"""What pydantic found wrong with a configuration, in one line that names the dotted field and, misspelt, the right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from l3ms.config.yaml_reader import ConfigError


def explain(error: ValidationError, root: type[BaseModel]) -> ConfigError:
    """The first problem of a pydantic error on a `root` model, unknown fields first."""
    details = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    location = list(details["loc"])
    tagged = len(location) > 2 and location[0] == "constraints"
    names = [location[0], *location[2:]] if tagged else location
    own, section = (".".join(map(str, part)) for part in (names, names[:-1]))
    if tagged:
        del location[2]  # pydantic puts the constraint's type here
    while len(location) > 1 and isinstance(location[-1], str) and ("[" in location[-1] or location[-1] in {"str"}):
        location.pop()  # and the branch of a union here
    field = ".".join(str(part) for part in location) or "config"
    kind, value, message = details["type"], details.get("input"), details["msg"]
    if kind == "extra_forbidden":
        return ConfigError(field, f"unknown field; {_did_you_mean(root, section, str(details['loc'][-1]))}")
    if kind == "missing":
        return ConfigError(field, "is required")
    if kind == "union_tag_not_found":
        return ConfigError(f"{field}.type", f"is required: {_constraint_types(root)}")
    if kind == "union_tag_invalid":
        return ConfigError(f"{field}.type", f"must be {_constraint_types(root)}, got {_short(_get(value, 'type'))}")
    if kind == "value_error":
        return blame(field, _known_fields(root).get(own, []), message.removeprefix("Value error, "))
    if kind == "finite_number":
        return ConfigError(field, f"must be a finite number, got {value}")
    if kind == "model_type":
        return ConfigError(field, f"must be a section with fields of its own, got {_short(value)}")
    return ConfigError(field, f"{message.replace('Input should', 'must')}, got {_short(value)}")


def blame(section: str, fields: Iterable[str], message: str) -> ConfigError:
    """The error of the field of `section` ("config": the root) that `message` begins with; of the section where it begins with none."""
    first, _, rest = message.partition(" ")
    if first not in fields:
        return ConfigError(section, message)
    return ConfigError(first if section == "config" else f"{section}.{first}", rest)


def type_of(model: type[BaseModel]) -> str:
    """The `type` of a constraint's section, empty for other sections."""
    return get_args(model.model_fields["type"].annotation)[0] if "type" in model.model_fields else ""


def _constraint_types(root: type[BaseModel]) -> str:
    *types, last = map(type_of, models_in(root.model_fields["constraints"].annotation))
    return f"{', '.join(types)} or {last}"


def _known_fields(model: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Section -> its field names; a constraint's section is `constraints.<type>`."""
    sections = {prefix: list(model.model_fields)}
    for name, info in model.model_fields.items():
        for inner in models_in(info.annotation):
            suffix = f".{type_of(inner)}".removesuffix(".")
            sections |= _known_fields(inner, f"{prefix}.{name}".lstrip(".") + suffix)
    return sections


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _did_you_mean(root: type[BaseModel], section: str, key: str) -> str:
    """A hint for an unknown key: the nearest field of its section, else of any section."""
    sections = _known_fields(root)
    near = difflib.get_close_matches(key.replace("-", "_"), sections.get(section, []), 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    elsewhere = {field: name for name, fields in sections.items() for field in fields if name != section}
    near = difflib.get_close_matches(key.replace("-", "_"), list(elsewhere), 1, 0.8)
    if near:
        return f"did you mean {elsewhere[near[0]]}.{near[0]}?".replace("mean .", "mean ")
    return f"the fields here are {', '.join(sections.get(section, []))}"


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
