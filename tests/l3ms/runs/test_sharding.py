"""`train.sharding`: what it asks accelerate for, and where it is refused."""

import types
from typing import Any

import pytest

from l3ms.config.yaml_reader import ConfigError
from l3ms.runs.arguments import sharding


def config(kind: str | None) -> Any:
    return types.SimpleNamespace(train=types.SimpleNamespace(sharding=kind))


def test_several_processes_on_gpus_ask_for_fsdp2(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = sharding(config("fsdp2"), on_cpu=False)
    assert asked["fsdp"] is True
    assert asked["fsdp_config"]["version"] == 2
    assert sharding(config(None), on_cpu=True) == {}


@pytest.mark.parametrize(
    ("on_cpu", "world", "line"), [(True, "2", "needs GPUs"), (False, "1", "torchrun --nproc-per-node N")]
)
def test_where_nothing_can_be_split_it_is_refused_by_name(monkeypatch, on_cpu, world, line):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=line) as found:
        sharding(config("fsdp2"), on_cpu=on_cpu)
    assert str(found.value).startswith("train.sharding")
