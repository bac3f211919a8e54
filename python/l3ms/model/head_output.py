"""What a model with a fused head returns."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput


class Exact:
    """What fully_shard's mixed precision does not cast: it goes into all that can hold tensors but this."""

    def __init__(self, fields: dict[str, Tensor | None], handed: Any):
        self.fields, self.handed = fields, handed


@dataclass
class HeadOutput(ModelOutput):
    """What a model with a fused head returns for `seq_weight`.

    What a wrapper adds to `.loss` afterwards (AdaLoRA its regulariser) is treated as what the model adds itself: see `share`.
    """

    loss: Tensor | None = None  # (), -sum_n seq_weight_n log pi(y_n) + share * auxiliary
    sequence: Tensor | None = None  # (N,) log-likelihoods, detached
    length: Tensor | None = None  # (N,) scored tokens
    token: Tensor | None = None  # (N, L) detached
    auxiliary: Tensor | None = None  # (), what the model adds to its mean cross-entropy; None: nothing
    exact: Exact | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        exact = self.exact
        vars(self)["exact"] = None  # no item of the output
        super().__post_init__()
        if exact is not None:
            for name, value in exact.fields.items():
                super().__setattr__(name, value)
            vars(self)["_handed"] = exact.handed
        vars(self)["exact"] = exact

    def hand(self, loss: Tensor, share: Tensor | None) -> None:
        """Make `loss` the loss; of what is added to it by a wrapper, `share` will be in it. None: nothing."""
        # Wrappers add in place: they get a copy, so that what they added can be told.
        super().__setattr__("loss", loss.clone())
        super().__setattr__("_handed", (loss, share))
        names = ("loss", "sequence", "length", "token", "auxiliary")
        vars(self)["exact"] = Exact({name: getattr(self, name) for name in names}, (loss, share))

    def __setattr__(self, name: str, value: Any) -> None:
        handed = vars(self).get("_handed") if name == "loss" else None
        if handed is None:
            super().__setattr__(name, value)
            return
        loss, share = handed
        added = value - loss
        self.auxiliary = added if self.auxiliary is None else self.auxiliary + added
        self.hand(loss if share is None else loss + share * added, share)
