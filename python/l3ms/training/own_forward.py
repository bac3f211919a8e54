"""The fused head beside the one that TRL gives a model.

TRL's trainers put a `forward` of their own on the model as it is made, which knows the arguments of the model's class as that was. The
head of ours is in the class: so theirs is taken off while ours is put in and proven, and then both stand behind one `forward`: a call with
`seq_weight` is ours, any other is theirs. A copy of the model (a KL reference, an average of weights) gets the one of its class: theirs
would compute with the weights of the model that it was made for.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from l3ms.model.heads import fuse_head
from l3ms.model.inside_adapters import inside_adapters


def share_forward(model: Any, *, fuse: bool) -> None:
    """Let the forward of a TRL trainer's `model` take `seq_weight` too, where `fuse`; copies of it are models of their own in any case.

    Raises:
        ValueError: as `fuse_head`.
    """
    inner = inside_adapters(model)
    theirs = vars(inner).pop("forward", None)
    try:
        if fuse:
            fuse_head(model)
    finally:
        if theirs is not None:
            inner.forward = types.MethodType(_both(inner, theirs), inner)


def _both(model: Any, theirs: Any) -> Any:
    @functools.wraps(theirs.__func__)  # generate() reads the signature
    def forward(self: Any, *args: Any, seq_weight: Any = None, **kwargs: Any) -> Any:
        if seq_weight is not None:
            return type(self).forward(self, *args, seq_weight=seq_weight, **kwargs)
        return theirs(*args, **kwargs) if self is model else type(self).forward(self, *args, **kwargs)

    return forward
