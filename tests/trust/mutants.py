"""One meaningful change in one place each, and the tests that must fail with it; listed in `mutants_of_*`.

A mutant of Python is written into a copy of the tree. Those of C++ and CUDA are all in one build, chosen by L3M_MUTANT when it is loaded:
`old` is then an expression, or whole statements where it ends with `;` or `}`, and `new` one of the same kind.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from goals import ROOT
from native_builds import Change, changed, spot

SWITCH = "L3M_MUTANT"
HEADER = f"""#pragma once
#include <cstdlib>
// Which of the mutants is alive; 0: none.
inline const int l3m_mutant = std::getenv("{SWITCH}") ? std::atoi(std::getenv("{SWITCH}")) : 0;
"""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # exactly once in the file
    new: str
    tests: str  # pytest's arguments

    @cached_property
    def arguments(self) -> list[str]:
        return shlex.split(self.tests)

    def check(self) -> None:
        """ValueError where the text has gone, or stands in several places, or a test file has gone."""
        spot((ROOT / self.file).read_text(), self.file, self.old)
        if self.old == self.new:
            raise ValueError(f"{self.name}: changes nothing")
        for argument in self.arguments:
            path = ROOT / argument.partition("::")[0]
            if argument.startswith("tests/") and not path.exists():
                raise ValueError(f"{self.name}: there is no {path}")

    def text(self) -> str:
        return changed(self.file, [(self.file, self.old, self.new)])


def switched(mutants: Sequence[Mutant]) -> dict[str, str]:
    """The texts of all files with mutants, number n of them (from 1) alive where L3M_MUTANT is n."""
    alike: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for number, mutant in enumerate(mutants, 1):
        alike.setdefault((mutant.file, mutant.old), []).append((number, mutant.new))
    changes: list[Change] = [(file, old, _choice(old, news)) for (file, old), news in alike.items()]
    texts = {file: changed(file, changes) for file in {file for file, _, _ in changes}}

    texts = {file: f'#include "l3m_mutant.h"\n{text}' for file, text in texts.items()}
    return {**texts, "csrc/l3m_mutant.h": HEADER}


def _choice(old: str, news: Sequence[tuple[int, str]]) -> str:
    if old.rstrip().endswith((";", "}")):
        return "".join(f"if (l3m_mutant == {number}) {{ {new} }} else " for number, new in news) + f"{{ {old} }}"
    return "(" + "".join(f"l3m_mutant == {number} ? ({new}) : " for number, new in news) + f"({old}))"
