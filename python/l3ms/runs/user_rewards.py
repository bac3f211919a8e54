"""Code named in a configuration, reward functions and engines: importing it runs somebody's code, so it takes `--allow-code`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l3ms.config.yaml_reader import ConfigError
from l3ms.constraints.constraint import Constraint, Reward


def load_reward(field: str, spec: str) -> tuple[Reward, str]:
    """(function, where it came from), as `load_named`."""
    function, source = load_named(field, spec)
    if not callable(function):
        raise ConfigError(field, f"{spec} is a {type(function).__name__}, not a function")
    reward: Any = function
    return reward, source


def load_named(field: str, spec: str) -> tuple[Any, str]:
    """(what it names, where it came from) for `file.py:name` or `module:name`; `field` is blamed in a `ConfigError`.

    The caller has checked that running code is allowed.
    """
    source, _, name = spec.rpartition(":")
    try:
        module = _import_file(field, Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(field, f"importing {source} raised {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(name, dir(module), 1)
        raise ConfigError(field, f"{source} has no {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return found, str(getattr(module, "__file__", None) or source)


def _import_file(field: str, path: Path) -> Any:
    if not os.path.isfile(path):  # false where pathlib raises: a name that is too long
        raise ConfigError(field, f"no such file: {path}")
    name = f"l3ms_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(field, f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def try_reward(
    field: str,
    constraint: Constraint,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    *,
    nonfinite: str = "raise",
) -> None:
    """Call the reward once on a few reference answers, before anything is written: a broken one costs no run."""
    try:
        call = constraint.values if nonfinite == "drop" else constraint.rewards
        call(prompts, completions, [1] * len(completions), **columns)
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, ValueError) else f"raised {type(error).__name__} on a trial call: "
        words = str(error).replace(f"{constraint.where}: ", "", 1) if kind else str(error)
        raise ConfigError(field, f"{kind}{words}") from error
