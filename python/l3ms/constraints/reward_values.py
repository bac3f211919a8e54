"""What a reward function may return: a sequence of numbers, one per response, None where a response has none.

A list, a tuple, any other ordered iterable, an array or tensor of one dimension. True and False are 1 and 0. What would only look like
numbers is refused: a text (its characters), a dict (its keys), a set (no order), text numbers, complex numbers, rows of several numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any


def numbers(what: str, values: Any, count: int | None = None) -> list[float | None]:
    """The values as a list of `count` numbers (None: as many as there are), NaN and inf let through.

    Raises:
        ValueError: begins with `what`: no sequence of numbers, a wrong number of them, or a value that is no number, with its row.
    """
    wanted = "a list of numbers" if count is None else f"a list of {count} numbers"
    kind = type(values).__name__
    if isinstance(values, (str, bytes, bytearray, memoryview, Mapping, Set)):
        raise ValueError(f"{what} must return {wanted}, got {kind}")
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{what} must return {wanted}, got {kind} of shape {tuple(values.shape)}")
    try:
        found = iter(values)
    except TypeError:
        raise ValueError(f"{what} must return {wanted}, got {kind}") from None
    listed = list(found)
    if count is not None and len(listed) != count:
        raise ValueError(f"{what} must return one number per response, wanted {count}, got {len(listed)}")
    return [_number(what, row, value) for row, value in enumerate(listed)]


def _number(what: str, row: int, value: Any) -> float | None:
    if value is None:
        return None
    given = value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of an array or tensor: as Python's own
        value = value.item()
    try:
        if hasattr(value, "ndim") or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what}: row {row} is {given!r:.200}, wanted a number or None") from None
