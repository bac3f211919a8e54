"""An optimizer with two modes."""

import torch


class TwoModes(torch.optim.SGD):
    """As schedule-free optimizers are: other weights for steps than for evaluation."""

    mode = "eval"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def step(self, closure=None):
        assert self.mode == "train"
        return super().step(closure)
