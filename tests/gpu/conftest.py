"""Tests that need a CUDA device: marked `gpu`, skipped with the reason where there is none. `make test-gpu` runs these alone."""

import os
import sys
from pathlib import Path

import pytest
import torch

from l3m_kernels import check_targets, set_workspace
from l3m_kernels.device_flags import FAULTS

for folder in ("kernels", "gpu"):  # the oracle and the random problems are those of the CPU's tests
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None if torch.cuda.is_available() else pytest.mark.skip(reason="no CUDA device here")
    here = f"{Path(__file__).parent}{os.sep}"  # as text: all of 45,000 tests are asked, in each process
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker("gpu")
            if skip:
                item.add_marker(skip)


def settings() -> dict[str, object]:
    """Of the process, which a test may change and is to put back."""
    return {
        "precision of products": (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "device": torch.cuda.current_device(),
        "stream": torch.cuda.current_stream(),
        "debugging of waits": torch.cuda.get_sync_debug_mode(),
        "autocast": torch.is_autocast_enabled("cuda"),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.fixture(autouse=True)
def _alone():
    """A test finds what it would find alone: seeds, no flag, the settings and the workspace as they come. One that leaves any fails."""
    torch.manual_seed(0)  # the GPU's too
    before = settings()
    yield
    set_workspace(None)
    left = {name: value for name, value in settings().items() if value != before[name]}
    torch.cuda.set_sync_debug_mode("default")
    torch.set_float32_matmul_precision("highest")
    raised = []
    for _ in FAULTS:
        try:
            check_targets()
        except (IndexError, ValueError) as error:
            raised.append(str(error))
    assert (left, raised) == ({}, [])
