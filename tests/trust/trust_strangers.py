"""G14: what strangers hand over, tried against the commands: no canary made, no victim changed, nothing written beside the project."""

from __future__ import annotations

import functools
import importlib
import random
from collections.abc import Callable

from parts import Found, Part

# Runs that go on to their end take most of a second: of this module a seeded share, of each kind some.
RUNS = 60


@functools.cache
def _cases(module: str) -> list[tuple]:
    return importlib.import_module(module).cases()


def _drawn(module: str) -> list[tuple]:
    """All cases of a module, in an order in which those of one kind are far apart."""
    cases = list(_cases(module))
    random.Random(0).shuffle(cases)
    return cases


def _of(module: str) -> Callable[[range], Found]:
    def run(seeds: range) -> Found:
        from strangers import Strangers

        return Strangers.here().all_of(seeds, _drawn(module))

    return run


def parts() -> list[Part]:
    return [
        Part("models", _of("hostile_artefacts"), len(_cases("hostile_artefacts")), slice=8, seconds=15),
        Part(
            "templates, tokenizers, adapters, files",
            _of("hostile_models"),
            len(_cases("hostile_models")),
            slice=12,
            seconds=50,
        ),
        Part("run folders", _of("hostile_runs"), RUNS, slice=3, seconds=40),
    ]
