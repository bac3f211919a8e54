"""Puts this folder on the path, so that the tests share `head_cases`, and restores the workspace after each test."""

import sys
from pathlib import Path

import pytest

from l3m_kernels import set_workspace

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _default_workspace():
    yield
    set_workspace(None)
