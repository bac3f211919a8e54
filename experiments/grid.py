"""What an experiment is: a base configuration of `l3ms train`, a grid of named cells that change some of its fields, seeds.

    title: ...
    seeds: [0, 1, 2]
    reference: sft                     # the cell whose task perplexity the others are divided by, seed by seed
    certify: {samples: 2048}           # of the averaged weights, on held-out prompts; `certify: null` leaves it out
    base: {model: "${model}", data: {train: "${train}", evaluation: "${held_out}"}, constraints: [...], train: {...}}
    grid:
      - axes: [{sft: {train.solver: none, constraints: []}}]
        certify: null
      - axes:
          - {barrier: {train.solver: barrier}, penalty: {train.solver: penalty}}
          - {8-11: {constraints.0.min: 8, constraints.0.max: 11}, 30-36: {...}}
        seeds: [0]

An axis maps labels to overrides (dotted field: value); an entry of the grid is the product of its axes, and a cell is called by its labels,
`barrier_8-11`. `${name}` in a value is filled in from what the experiment's inputs are (`inputs.py`, or its own `prepare.py`); `${here}` is
its folder, and `${bfloat16}` whether the CPU has products of bfloat16.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from l3ms.config.sections import Count, Section, Text
from l3ms.config.yaml_reader import ConfigError, read_yaml

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.,+-]*$")]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Overrides = dict[str, Any]  # dotted field -> value
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]

_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")


class CertifyConfig(Section):
    samples: Annotated[int, Field(ge=2)]


class GridEntry(Section):
    """The product of `axes`; `seeds` and `certify` where they differ from the experiment's."""

    axes: Annotated[list[dict[Label, Overrides]], Field(min_length=1)]
    seeds: Seeds | None = None
    certify: CertifyConfig | None = None


class Experiment(Section):
    """`experiment.yaml`."""

    title: Text
    base: dict[str, Any]
    grid: Annotated[list[GridEntry], Field(min_length=1)]
    seeds: Seeds = Field([0])
    reference: Text | None = None
    certify: CertifyConfig | None = None
    allow_code: bool = False  # the base names reward functions of this repository
    rows: Count = 10_000  # of task data that are made ready (`inputs.py`)
    packages: list[Identifier] = Field([])  # that its rewards import, beyond those of the library
    publish_texts: bool = True  # false where prompts are somebody's data


@dataclass(frozen=True)
class Cell:
    """One run: `config` is what `l3ms train` gets, with placeholders until `fill`."""

    name: str
    labels: tuple[str, ...]
    seed: int
    config: Mapping[str, Any] = field(repr=False)
    certify: int | None  # fresh samples
    identity: str = ""  # of its settings and inputs, whatever machine they are on (`published.identity`)

    @property
    def key(self) -> str:
        return f"{self.name}/seed-{self.seed}"


def read_experiment(path: Path) -> Experiment:
    """Raises `ConfigError` naming the field (or the file)."""
    try:
        return Experiment.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(".".join(map(str, first["loc"])) or str(path), first["msg"]) from None


def check_packages(experiment: Experiment) -> None:
    """Raises `ConfigError` for the packages that are not installed: before anything is prepared, not in each cell."""
    missing = [name for name in experiment.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "packages",
            f'{", ".join(missing)} cannot be imported: pip install ".[experiments]" in the source tree brings what the experiments need',
        )


def expand(experiment: Experiment, *, seeds: Sequence[int] | None = None, only: str | None = None) -> list[Cell]:
    """All cells, in the order of the grid. `seeds` replaces every list of seeds; `only` is a pattern (`barrier_*`) of names.

    The reference's cells stay, whatever `only` says: the others are compared with them.

    Raises:
        ConfigError: two cells of one name, a reference that is no cell, or nothing left.
    """
    cells: dict[str, Cell] = {}
    for index, entry in enumerate(experiment.grid):
        certify = entry.certify if "certify" in entry.model_fields_set else experiment.certify
        for options in itertools.product(*(axis.items() for axis in entry.axes)):
            labels = tuple(label for label, _ in options)
            config = copy.deepcopy(experiment.base)
            for field_name, value in itertools.chain.from_iterable(overrides.items() for _, overrides in options):
                assign(config, field_name, copy.deepcopy(value))
            for seed in seeds or entry.seeds or experiment.seeds:
                samples = None if certify is None else certify.samples
                cell = Cell("_".join(labels), labels, seed, config | {"seed": seed}, samples)
                if cell.key in cells:
                    raise ConfigError(f"grid.{index}", f"cell {cell.key} is there twice; labels must differ")
                cells[cell.key] = cell
    names = {cell.name for cell in cells.values()}
    if experiment.reference is not None and experiment.reference not in names:
        raise ConfigError(
            "reference", f"no cell is called {experiment.reference!r}; there are {', '.join(sorted(names))}"
        )
    if only is None:
        return list(cells.values())
    chosen = [cell for cell in cells.values() if fnmatchcase(cell.name, only)]
    if not chosen:
        raise ConfigError("--only", f"no cell is called {only!r}; there are {', '.join(sorted(names))}")
    kept = {cell.seed for cell in chosen}
    compared = [cell for cell in cells.values() if cell.name == experiment.reference and cell.seed in kept]
    return list({cell.key: cell for cell in [*compared, *chosen]}.values())


def assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """`values["train"]["solver"] = value` for `train.solver`; a number is an index, one past the end appends."""
    *path, last = dotted.split(".")
    here: Any = values
    try:
        for part in path:
            if isinstance(here, list):
                if int(part) == len(here):
                    here.append({})
                here = here[int(part)]
            else:
                here = here.setdefault(part, {})
        if isinstance(here, list) and int(last) == len(here):
            here.append(value)
        elif isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise ConfigError(dotted, "cannot be set: there is no such section in the base") from None


def fill(value: Any, values: Mapping[str, Any]) -> Any:
    """`value` with each `${name}` replaced: one that is the whole text by the value itself, of its own type.

    Raises:
        ConfigError: a name that nothing has given.
    """
    if isinstance(value, Mapping):
        return {key: fill(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, values) for item in value]
    if not isinstance(value, str):
        return value

    def found(match: re.Match[str]) -> Any:
        if match[1] not in values:
            raise ConfigError(match[0], f"nothing gives this value; there are {', '.join(sorted(values))}")
        return values[match[1]]

    whole = _PLACEHOLDER.fullmatch(value)
    return found(whole) if whole else _PLACEHOLDER.sub(lambda match: str(found(match)), value)
