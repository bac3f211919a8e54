"""Dataclasses from JSON, checked against their annotations: the benchmark runs where torch is and little else, so without pydantic.

Known are str, int, float, bool, None, unions, Literal, list, dict with text as keys, and dataclasses. Fields that a class does not have are
left out, and those that a file does not have take their default: files of other versions are read.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class NotARecord(ValueError):
    """What a value should be, with the place: `cases.0.rows: must be a whole number, got 'x'`."""

    def __init__(self, place: str, message: str):
        super().__init__(f"{place or 'file'}: {message}")


def of_json(kind: type[Record], value: Any, place: str = "") -> Record:
    """A dataclass of parsed JSON.

    Raises:
        NotARecord: a value that is missing or is not what its annotation says.
    """
    if not isinstance(value, dict):
        raise NotARecord(place, f"must be an object, got {_shown(value)}")
    hints, given = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]: it is a dataclass
        inside = f"{place}.{field.name}" if place else field.name
        if field.name in value:
            given[field.name] = _value(hints[field.name], value[field.name], inside)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise NotARecord(inside, "is missing")
    return kind(**given)


NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _value(hint: Any, value: Any, place: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return of_json(hint, value, place)
    kind: Any = hint
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        return None if value is None and len(kinds) < len(arguments) else _value(kinds[0], value, place)
    if origin is Literal:
        if value not in arguments:
            raise NotARecord(place, f"must be one of {', '.join(map(repr, arguments))}, got {_shown(value)}")
        return value
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{place}.{index}") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    wanted = {list: "a list", dict: "an object"}.get(origin) or NAMES[hint]
    number = hint is float and isinstance(value, int)  # JSON has one kind of numbers
    if origin or not (isinstance(value, kind) or number) or (isinstance(value, bool) and hint is not bool):
        raise NotARecord(place, f"must be {wanted}, got {_shown(value)}")
    return float(value) if number else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
