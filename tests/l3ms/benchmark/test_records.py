"""Results are read from JSON as strictly as they are written, and where pydantic is not installed."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from l3ms.benchmark.records import NotARecord, of_json


@dataclass(kw_only=True)
class Inner:
    name: str
    sizes: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Outer:
    version: Literal[1] = 1
    rate: float
    why: str | None = None
    good: bool = True
    inner: list[Inner] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def test_a_record():
    value = {"rate": 2, "inner": [{"name": "a", "sizes": [1, 2]}], "seconds": {"NT": 0.5}, "of a later version": 3}
    found = of_json(Outer, value)
    assert found == Outer(rate=2.0, inner=[Inner(name="a", sizes=[1, 2])], seconds={"NT": 0.5})
    assert type(found.rate) is float
    assert of_json(Outer, {"rate": 1.5, "why": None, "good": False}) == Outer(rate=1.5, good=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "file: must be an object, got []"),
        ({}, "rate: is missing"),
        ({"rate": "fast"}, "rate: must be a number, got 'fast'"),
        ({"rate": True}, "rate: must be a number, got True"),
        ({"rate": None}, "rate: must be a number, got None"),
        ({"rate": 1.0, "why": 3}, "why: must be text, got 3"),
        ({"rate": 1.0, "good": 1}, "good: must be true or false, got 1"),
        ({"rate": 1.0, "version": 2}, "version: must be one of 1, got 2"),
        ({"rate": 1.0, "inner": {}}, "inner: must be a list, got {}"),
        ({"rate": 1.0, "inner": [{"name": "a"}, {"name": 1}]}, "inner.1.name: must be text, got 1"),
        ({"rate": 1.0, "inner": [{"name": "a", "sizes": [1.5]}]}, "inner.0.sizes.0: must be a whole number, got 1.5"),
        ({"rate": 1.0, "seconds": {"NT": []}}, "seconds.NT: must be a number, got []"),
    ],
)
def test_what_is_none(value, message):
    with pytest.raises(NotARecord) as told:
        of_json(Outer, value)
    assert str(told.value) == message


def test_the_benchmark_needs_no_pydantic():
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "import l3ms.benchmark.run, l3ms.benchmark.figure, l3ms.benchmark.page, l3ms.benchmark.scaling"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
