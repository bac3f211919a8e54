"""Tests that need a CUDA device: marked `gpu`, skipped with the reason where there is none. `make test-gpu` runs these alone."""

import sys
from pathlib import Path

import pytest
import torch

from l3m_kernels import set_workspace

for folder in ("kernels", "gpu"):  # the oracle and the random problems are those of the CPU's tests
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None if torch.cuda.is_available() else pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")
            if skip:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _default_workspace():
    yield
    set_workspace(None)
