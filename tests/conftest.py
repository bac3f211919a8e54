"""One thread for every test: the same sums in the same order, and no fight over the cores of a small machine."""

import gc
import sys

import torch

torch.set_num_threads(1)
frozen_at = 0  # modules


def pytest_runtest_setup():
    """What imports have made stays: accelerate collects garbage at the beginning of every training, and to look through all of that takes
    as long as a tiny model's training."""
    global frozen_at
    if len(sys.modules) > frozen_at + 100:
        gc.collect()
        gc.freeze()
        frozen_at = len(sys.modules)
