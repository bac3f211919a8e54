"""The docstring task of the real model."""

from experiments.real.task import prepare

__all__ = ["prepare"]
