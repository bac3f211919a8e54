"""Tiny tokenizers and models, made here: nothing is downloaded. Heavy packages are imported where a test asks for them."""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # modules that tests of several rooms share

import tiny_models
from cli_projects import checkpoint, project  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(scope="session")
def make_model():
    return tiny_models.make_model


@pytest.fixture
def train(tmp_path, tokenizer):
    """train(model, **options) -> an `L3MTrainer` after a few iterations, and the recorder of what it did."""
    import training_runs

    return functools.partial(training_runs.run, tmp_path, tokenizer)
