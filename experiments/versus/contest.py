"""What `grid.yaml` says: who takes part, what each is tried with, and the cells that come of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from experiments.grid import Label, Seeds
from experiments.versus.task import Task
from l3ms.config.sections import Section, Share, Text
from l3ms.config.yaml_reader import ConfigError, read_yaml

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Entrant(Section):
    title: Text
    module: Name | None = None  # a file of this folder; by default the one that is called as the contestant
    needs: list[Text] = Field([])  # packages, as they are imported
    after: Name | None = None  # the contestant whose adapters it goes on from: the first try's
    tries: Annotated[dict[Label, dict[str, Any]], Field(min_length=1)]


class Judge(Section):
    samples: Annotated[int, Field(ge=2)] = 512
    delta: Share = 0.05


class Contest(Section):
    """`grid.yaml`."""

    title: Text
    contestants: Annotated[dict[Name, Entrant], Field(min_length=1)]
    reference: Name
    seeds: Seeds = Field([0])
    task: dict[str, Any] = Field({})
    judge: Judge = Judge()


@dataclass(frozen=True)
class Cell:
    """One contestant, one setting, one seed."""

    contestant: str
    attempt: str
    seed: int
    values: Mapping[str, Any] = field(repr=False)  # what the process is told
    after: str | None  # the key of the cell whose weights it goes on from
    number: int = 0  # of the try, in the order of the grid

    @property
    def key(self) -> str:
        return f"{self.contestant}/{self.attempt}/seed-{self.seed}"


def read_contest(path: Path) -> Contest:
    """Raises `ConfigError` naming the field (or the file)."""
    try:
        contest = Contest.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(".".join(map(str, first["loc"])) or str(path), first["msg"]) from None
    names = ", ".join(contest.contestants)
    if contest.reference not in contest.contestants:
        raise ConfigError("reference", f"no contestant is called {contest.reference!r}; there are {names}")
    for name, entrant in contest.contestants.items():
        if entrant.after is not None and entrant.after not in contest.contestants:
            raise ConfigError(
                f"contestants.{name}.after", f"no contestant is called {entrant.after!r}; there are {names}"
            )
    return contest


def chosen(contest: Contest, only: str | None) -> list[str]:
    """The contestants that `only` (patterns with commas between them) names, the reference, and those that one of them goes on from."""
    names = list(contest.contestants)
    if only is None:
        return names
    patterns = [pattern.strip() for pattern in only.split(",")]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError("--only", f"no contestant is called {pattern!r}; there are {', '.join(names)}")
    named = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)} | {contest.reference}
    named |= {after for name in named if (after := contest.contestants[name].after) is not None}
    return [name for name in names if name in named]


def check_installed(contest: Contest, names: Sequence[str]) -> None:
    """Raise `ConfigError` where a contestant's library is not there: before hours of the others."""
    for name in names:
        for package in contest.contestants[name].needs:
            if importlib.util.find_spec(package) is None:
                others = ",".join(other for other in names if package not in contest.contestants[other].needs)
                raise ConfigError(
                    f"contestants.{name}", f'needs {package}, which is not installed: pip install ".[versus]" brings it; '
                    f"--only {others} leaves it out",
                )  # fmt: skip


def cells(
    contest: Contest,
    names: Sequence[str],
    task: Mapping[str, Any],
    folder: Path,
    seeds: Sequence[int],
    tuned: Mapping[str, str] | None = None,
) -> list[Cell]:
    """In the order of the grid, seed by seed.

    Args:
        task: what is given on the command line, over what the grid has.
        tuned: by contestant its one try, and its verdict is the only one; None: all tries. Who is not in it is left out.

    Raises:
        ConfigError: a field that no task has.
    """
    made = []
    for seed in seeds:
        for name in names:
            entrant = contest.contestants[name]
            tries = {key: entrant.tries[key] for key in entrant.tries if tuned is None or tuned.get(name) == key}
            for number, (attempt, setting) in enumerate(tries.items()):
                fields = {**contest.task, **task, "seed": seed}
                after, before = None, None
                if entrant.after is not None:
                    first, options = next(iter(contest.contestants[entrant.after].tries.items()))
                    after, before = f"{entrant.after}/{first}/seed-{seed}", options
                    fields["start"] = str(folder / "cells" / after / "work" / "weights")
                try:
                    complete = Task(**fields)
                except TypeError as error:
                    raise ConfigError("task", str(error)) from None
                values = {
                    "module": entrant.module or name,
                    "setting": setting,
                    "task": complete.as_dict(),
                    "after": before,
                    "judge": {**contest.judge.model_dump(), "looks": len(tries)},
                }
                made.append(Cell(name, attempt, seed, values, after, number))
    return made
