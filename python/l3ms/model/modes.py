"""Evaluation for as long as something is measured or sampled, and then the mode of each module as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout in the block. A part that was in another mode than the whole (a frozen layer in evaluation) is so afterwards too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # the whole first: its train() may be its own, and sets what is in it
            if module.training != training:
                module.train(training)
