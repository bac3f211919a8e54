"""Module names of 0.1.0: `from l3ms.batches import Collator` still works, and warns. Public names never were there: `from l3ms import ...`.

Each stands for the modules in which its names are now.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

MODULES: dict[str, str] = {
    "async_rewards": "constraints.async_rewards",
    "batches": "model.batches",
    "certificate_table": "verdicts.certificate_table",
    "certificates": "verdicts.certificates verdicts.declaring",
    "certifying": "verdicts.certifying verdicts.subject verdicts.options",
    "checking": "verdicts.checking",
    "checkpointing": "training.checkpointing",
    "checkpoints": "training.checkpoints",
    "cli": "commands.command_line commands.train",
    "clipping": "barrier.clipping",
    "config_constraints": "config.constraints",
    "config_data": "config.data",
    "config_errors": "config.errors",
    "config_sections": "config.sections",
    "config_watch": "config.watch",
    "conflicts": "barrier.conflicts",
    "constraint_step": "training.constraint_step",
    "data": "runs.data runs.examples runs.encoding",
    "data_constraints": "constraints.data_nll constraints.divergence",
    "estimates": "barrier.estimates",
    "evaluation": "measuring.evaluation",
    "figure": "runs.figure",
    "gradient_cosines": "watching.gradient_cosines",
    "heads": "model.heads",
    "held_out": "watching.held_out",
    "losses": "model.losses",
    "optimizer": "barrier.optimizer",
    "prices": "verdicts.prices",
    "probes": "verdicts.probes verdicts.subject",
    "progress": "runs.progress",
    "quantiles": "verdicts.quantiles",
    "reference_model": "constraints.reference_model",
    "report": "runs.report runs.labels runs.whole_files",
    "response_statistics": "watching.response_statistics",
    "resuming": "training.resuming model.orders",
    "resuming_runs": "runs.resuming",
    "reward_model": "constraints.reward_model",
    "run": "runs.executing runs.loading runs.evaluating",
    "run_folder": "runs.folder",
    "run_inputs": "runs.loading runs.models runs.constraints runs.arguments",
    "sampling": "rollouts.shrinking",
    "schedules": "barrier.schedules",
    "shifts": "barrier.shifts",
    "snapshots": "watching.snapshots",
    "solvers": "barrier.solvers",
    "state_trees": "training.state_trees model.random_numbers",
    "step_reports": "barrier.step_reports",
    "trainer": "training.trainer training.arguments",
    "user_rewards": "runs.user_rewards",
    "verdict_commands": "commands.certify commands.check",
    "watch": "watching.watch",
    "watch_rules": "watching.rules",
    "yaml_reader": "config.yaml_reader",
}
# Modules then, rooms now: names that were in them.
ROOMS: dict[str, str] = {
    "config": "config.run_config config.train config.evaluate config.yaml_reader",
    "constraints": "constraints.constraint",
    "rollouts": "rollouts.rollout rollouts.sampling rollouts.prompts",
}


def find(earlier: str, name: str) -> Any:
    """What was called `l3ms.<earlier>.<name>`.

    Raises:
        AttributeError: nothing was.
    """
    for place in (MODULES | ROOMS)[earlier].split():
        module = importlib.import_module(f"l3ms.{place}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'l3ms.{earlier}' has no attribute {name!r}")


def of_a_room(earlier: str) -> Any:
    """The `__getattr__` of a room that has the name of a module."""

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = find(earlier, name)
        _warn(f"{earlier}.{name}", found.__module__.removeprefix("l3ms."))
        return found

    return get


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules for the names that no file has."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        package, _, name = fullname.rpartition(".")
        known = package == "l3ms" and name in MODULES
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        name = spec.name.rpartition(".")[2]
        _warn(name, " and ".join(MODULES[name].split()))
        module = types.ModuleType(spec.name, f"{spec.name} of 0.1.0")
        module.__getattr__ = lambda attribute: find(name, attribute)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _warn(earlier: str, now: str) -> None:
    warnings.warn(f"l3ms.{earlier} stands in l3ms.{now} now", DeprecationWarning, stacklevel=3)


def install() -> None:
    """Last in the search: names that files have are found first."""
    sys.meta_path.append(_Finder())
