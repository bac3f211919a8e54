"""The average of a model's weights over iterations, in float32 whatever their dtype.

In bfloat16 a running mean of n iterates stands still once a step of (w - mean) / n is below half of its last bit: after 100 iterations it
missed the mean by 40% of the way that the weights had moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from l3ms.model.copies import plain_name, whole_copy
from l3ms.model.sharding import as_placed, is_part, reshard, whole


@dataclass
class WeightAverage:
    """Of the trained parameters, also of those that are frozen meanwhile; the others are what they are. Of sharded ones each rank averages
    its part."""

    n_averaged: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)  # by name, float32, or float64 where the parameter is

    @classmethod
    def of(cls, n_averaged: int, kept: Mapping[str, Tensor], model: nn.Module) -> WeightAverage:
        """As it was kept, in any dtype, for the parameters that `model` trains or has trained."""
        return cls(n_averaged, {name: _wide(kept[name], parameter) for name, parameter in _averaged(model, kept)})

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights as they are now."""
        self.n_averaged += 1
        if self.n_averaged == 1:
            self.weights = {name: _wide(parameter.detach(), parameter) for name, parameter in trained(model)}
        else:
            for name, parameter in _averaged(model, self.weights):
                mean = self.weights[name]
                mean.lerp_(parameter.detach().to(mean.dtype), 1 / self.n_averaged)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Give `model` the averaged weights, rounded once to its dtype."""
        reshard(model)
        parameters = dict(model.named_parameters())
        for name, mean in self.weights.items():
            parameters[name].copy_(mean)

    def whole(self) -> dict[str, Tensor]:
        """Of sharded weights all of it, on the CPU of the first rank; the others, which gather it with that, get nothing."""
        if not any(is_part(mean) for mean in self.weights.values()):
            return {name: mean.contiguous() for name, mean in self.weights.items()}
        first = dist.get_rank() == 0
        gathered = ((name, whole(mean)) for name, mean in self.weights.items())
        return {name: mean.cpu() for name, mean in gathered if first}

    @torch.no_grad()
    def copied(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with the averaged weights; of a sharded one on each rank, whole, on the CPU."""
        averaged = whole_copy(model)
        parameters = dict(averaged.named_parameters())
        for name, mean in self.weights.items():
            parameters[plain_name(name) if is_part(mean) else name].copy_(whole(mean))
        return averaged


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    reshard(module)
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _averaged(model: nn.Module, known: Mapping[str, Tensor]) -> Iterator[tuple[str, nn.Parameter]]:
    """What is in an average, whether it is trained now or not. ValueError for what is trained and not in it."""
    reshard(model)
    for name, parameter in model.named_parameters():
        if name in known:
            yield name, parameter
        elif parameter.requires_grad:
            raise ValueError(
                f"{name} is trained, and was not when the average of the weights began: unfreeze it before, or set average_fraction=0"
            )


def _wide(tensor: Tensor, like: nn.Parameter) -> Tensor:
    return as_placed(tensor, like).to(torch.promote_types(like.dtype, torch.float32), copy=True)
