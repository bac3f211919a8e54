"""What pydantic found wrong with a configuration, in one line that names each dotted field and, misspelt, the right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from l3ms.config.yaml_reader import ConfigError

MOST = 8  # fields of which more than the name is said


def explain(error: ValidationError, root: type[BaseModel]) -> ConfigError:
    """All problems of a pydantic error on a `root` model, unknown fields first."""
    found = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    # A list is no text, says the branch of a union that it was not meant for
    lists = [item for item in found if item["type"] == "string_type" and isinstance(item.get("input"), list)]
    return together([_explained(item, root) for item in found if item not in lists or len(found) == len(lists)])


def together(errors: Iterable[ConfigError]) -> ConfigError:
    """Several errors as one, in one line, of each field the first; `field` is that of the first of all."""
    kept: dict[str, ConfigError] = {}
    for error in errors:
        kept.setdefault(error.field, error)
    first, *others = kept.values()
    parts = [first.message, *(str(error) for error in others[: MOST - 1])]
    if others[MOST - 1 :]:
        parts.append(f"and {', '.join(error.field for error in others[MOST - 1 :])}")
    return ConfigError(first.field, "; ".join(parts))


def _explained(details: Any, root: type[BaseModel]) -> ConfigError:
    location = list(details["loc"])
    tagged = len(location) > 2 and location[0] == "constraints"
    names = [location[0], *location[2:]] if tagged else location
    own, section = (".".join(map(str, part)) for part in (names, names[:-1]))
    if tagged:
        del location[2]  # pydantic puts the constraint's type here
    last = len(location) - (details["type"] == "extra_forbidden")  # that is a name as it was written
    location = [part for at, part in enumerate(location) if not (0 < at < last and _is_branch(part))]
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


def _is_branch(part: str | int) -> bool:
    """Whether it is what pydantic calls a branch of a union, which is no part of the field's name."""
    return isinstance(part, str) and (
        "[" in part or part.startswith("constrained-") or part in {"str", "int", "float", "bool"}
    )


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
