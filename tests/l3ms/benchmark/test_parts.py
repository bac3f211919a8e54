"""The head within several workspaces: each is in force while it is measured, and none afterwards."""

import sys

from l3ms.benchmark import parts
from l3ms.benchmark.contestant import Functions, Unavailable
from l3ms.benchmark.contestants import contestants
from l3ms.benchmark.shapes import Case, Shape

CASE = Case("weighted", Shape(64, 24, 300), "fp32", 0.0)


def test_over_workspaces(monkeypatch):
    set_now: list[int | None] = [None]
    seen: list[int | None] = []
    monkeypatch.setattr(parts, "set_workspace", lambda size: set_now.__setitem__(0, size))
    real = contestants()["reference"]

    def witness(case: Case) -> Functions:
        functions = real.make(case)

        def loss(batch):
            seen.append(set_now[0])
            return functions.loss(batch)  # pyright: ignore[reportOptionalCall]

        return Functions(loss=loss)

    monkeypatch.setattr(parts, "contestants", lambda device: {"ours": type(real)("ours", "ours", witness, "ours")})
    found = list(parts.over_workspaces((1 << 20, 3 << 20), CASE, "ours", 2, 0))
    assert [(part.title, len(part.seconds), part.flops) for part in found] == [
        ("ours, 1 MiB", 2, CASE.flops),
        ("ours, 3 MiB", 2, CASE.flops),
    ]
    assert seen == [1 << 20] * 3 + [3 << 20] * 3
    assert set_now == [None]


def test_the_workspace_is_the_one_that_is_set(monkeypatch):
    """Not the default one, which a contestant otherwise has."""
    seen: list[int] = []
    real = sys.modules["l3m_kernels.backends"].workspace

    def told(*arguments) -> int:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(sys.modules["l3m_kernels.backends"], "workspace", told)
    assert len(list(parts.over_workspaces((1 << 20,), CASE, "reference", 1, 0))) == 1
    assert set(seen) == {1 << 20}


def test_who_is_not_there_says_so(monkeypatch):
    def gone(case: Case) -> Functions:
        raise Unavailable("no such device")

    known = contestants()["reference"]
    monkeypatch.setattr(parts, "contestants", lambda device: {"cuda": type(known)("cuda", "ours", gone, "ours")})
    (found,) = parts.over_workspaces((1 << 20,), CASE, "cuda", 2, 0)
    assert found.reason == "no such device"
