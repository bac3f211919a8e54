"""What the tests of estimates and weights share: an optimizer whose gradients do not matter, and its constraint half-step."""

import torch

import l3ms

MU = l3ms.ExponentialDecay(0.1, 0.1, 1)  # constant


def make(*constraints, **options):
    x = torch.nn.Parameter(torch.zeros(1))
    return l3ms.L3MOptimizer(torch.optim.SGD([x], lr=0.0), constraints, **{"mu": MU, **options})


def step(opt):
    """Any gradient will do: what is tested is what was observed."""
    for group in opt.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    opt.step()


def observe(opt, values, lengths=None):
    weights = opt.observe(values, lengths)
    step(opt)
    return weights
