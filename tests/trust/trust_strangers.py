"""G14: what strangers hand over, tried against the commands: no canary made, no victim changed, nothing written beside the project."""

from __future__ import annotations

import functools
import importlib
import random
from collections.abc import Callable

from parts import Found, Part

# Many of these are runs that go on to their end, of half a second or more: of each module a share, all kinds. `test_strangers.py` has all.
SHARE = {"hostile_models": 150, "hostile_runs": 60}


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


def _part(name: str, module: str, **options: float) -> Part:
    return Part(name, _of(module), SHARE.get(module) or len(_cases(module)), **options)  # pyright: ignore[reportArgumentType]


def parts() -> list[Part]:
    return [
        _part("weights and configurations", "hostile_artefacts", slice=8, seconds=12),
        _part("models and texts", "hostile_models", slice=8, seconds=40),
        _part("files around a run", "hostile_files", slice=4, seconds=35),
        _part("run folders", "hostile_runs", slice=2, seconds=40),
    ]
