"""Responses of the policy: what a rollout holds, and how one is sampled.

`rollout` is the data, `sampling` makes one, `ways` finds how a model is sampled as it is scored, `shrinking` runs `generate` on a batch
that shrinks, `stepping` does without it, `prompts` turns prompts into tokens.
"""

from l3ms.earlier import of_a_room

__getattr__ = of_a_room("rollouts")
