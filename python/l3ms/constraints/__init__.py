"""What the model's behaviour must satisfy, a kind of constraint a file; `constraint` has what all of them have, `shares` the bounds on
shares and quantiles of the responses, `single_answers` what a mean length leaves open.

Functions and ready-made `rewards`, a `reward_model`, the loss on other data (`data_nll`), a `divergence` from a frozen `reference_model`.
"""

from l3ms.earlier import of_a_room

__getattr__ = of_a_room("constraints")
