"""A stand-in for wandb, whose calls are kept; it draws random numbers where the real one might."""

import importlib.machinery
import os
import random
import sys
import types
from typing import Any


class Run:
    def __init__(self, identity: str, **options: Any):
        self.id, self.options, self.summary = identity, options, {}
        self.name = options.get("name")

    def _label(self, **_):
        pass


class Wandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.run: Any = None
        self.runs: list[Run] = []
        self.config: dict[str, Any] = {}
        self.config_of_run: Any = None
        self.lines: list[dict[str, Any]] = []
        self.ended: list[int] = []
        self.broken: Any = None  # called with each line

    def init(self, **options):
        random.seed(0)
        self.run = Run(options.get("id", f"run{len(self.runs)}"), **options)
        self.runs.append(self.run)
        self.config = _Config()

    def log(self, values):
        random.random()
        if self.broken is not None:
            self.broken(values)
        self.lines.append(values)

    def define_metric(self, *_, **__):
        pass

    def Table(self, columns, data):  # as wandb spells it
        return {"columns": columns, "data": data}

    def finish(self, exit_code):
        self.ended.append(exit_code)
        self.run = None


class _Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


def install(monkeypatch) -> Wandb:
    found = Wandb()
    inner = types.ModuleType("wandb.sdk.lib.config_util")
    inner.ConfigError = type("ConfigError", (Exception,), {})  # type: ignore[attr-defined]
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", inner)
    monkeypatch.setitem(sys.modules, "wandb", found)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return found
