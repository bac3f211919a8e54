"""What the kernel of a row must give: the one oracle of its tests, in float64."""

import torch


def exact(logits, targets, upstream, bias, softcap, temperature):
    """Of logits (n, V), targets (n,), upstream (n,), bias (V,) or None -> float64 token (n,), lse (n,), gradients (n, V)."""
    x = logits.double().requires_grad_()
    z = x if bias is None else x + bias.double()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    token = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    (gradients,) = torch.autograd.grad(token, x, upstream.double())
    return token.detach(), z.logsumexp(1).detach(), gradients
