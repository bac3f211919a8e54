"""Programs written for 0.1.0 import from modules that have moved: they still can, and are told where the names are now."""

import importlib
import subprocess
import sys

import pytest

from l3ms import earlier


@pytest.mark.parametrize("name", earlier.MODULES)
def test_every_module_of_0_1_0_can_be_imported(name):
    sys.modules.pop(f"l3ms.{name}", None)
    with pytest.warns(DeprecationWarning, match=rf"l3ms\.{name} stands in l3ms\."):
        module = importlib.import_module(f"l3ms.{name}")
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = module.nothing_of_this_name


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("from l3ms.batches import Collator as found", "l3ms.model.batches"),
        ("from l3ms.data_constraints import KL as found", "l3ms.constraints.divergence"),
        ("from l3ms.config import load_config as found", "l3ms.config.run_config"),
        ("from l3ms.constraints import Constraint as found", "l3ms.constraints.constraint"),
        ("from l3ms.rollouts import Rollout as found", "l3ms.rollouts.rollout"),
        ("import l3ms.cli; found = l3ms.cli.main", "l3ms.commands.command_line"),
        ("from l3ms.rewards import contains as found", "l3ms.constraints.rewards"),
    ],
)
def test_its_names_are_those_of_now(statement, where):
    code = f"{statement}\nassert found.__module__ == {where!r}, found.__module__"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_never_was_is_an_import_error():
    with pytest.raises(ModuleNotFoundError, match=r"l3ms\.nonsense"):
        importlib.import_module("l3ms.nonsense")
