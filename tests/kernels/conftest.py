"""Puts this folder on the path, so that the tests share `head_cases`, and restores the workspace after each test."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from l3m_kernels import set_workspace
from l3m_kernels.backends import TABLE

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.prepare()


@pytest.fixture(autouse=True)
def _default_workspace():
    yield
    set_workspace(None)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_collection_modifyitems(items):
    """Tests of every backend and dtype: not the pairs that there are not."""
    narrow = {row.name for row in TABLE if not row.float64}
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") in narrow and parameters.get("dtype") == torch.float64:
            item.add_marker(pytest.mark.skip(reason="float64 inputs are not for this backend"))
