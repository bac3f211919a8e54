"""What the sections of a configuration are made of: strict frozen models, and the types of their fields."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _of_float32(value: float) -> float:
    """Numbers that float32 can be divided by and multiplied with: beyond it a run would train on zeros and infinities."""
    if value != 0 and not 1e-30 <= abs(value) <= 1e30:
        raise ValueError(f"must be 0 or between 1e-30 and 1e30 in size, got {value:g}")
    return value


Bound = Annotated[float, AfterValidator(_of_float32)]
Positive = Annotated[float, Field(gt=0), AfterValidator(_of_float32)]
NonNegative = Annotated[float, Field(ge=0), AfterValidator(_of_float32)]
MOST = (1 << 31) - 1  # of whatever is counted
Count = Annotated[int, Field(ge=1, le=MOST)]
Batch = Annotated[int, Field(ge=1, le=1 << 24)]  # what is in memory at once
Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Frozen, strict (`true` is not 1, `"3"` is not 3), no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


def check_used(section: Section, needs: Iterable[tuple[str, str, tuple[str, ...]]]) -> None:
    """Raise `ValueError` where a field has another value than its default, and nothing that reads it.

    Args:
        needs: (field, the field that decides, its values with which the first is read).
    """
    for field, decides, values in needs:
        found = getattr(section, decides)
        if found not in values and getattr(section, field) != type(section).model_fields[field].default:
            raise ValueError(f"{field} is of {decides}: {' or '.join(values)}, and it is {found}: leave it out")
