"""Responses of the policy: what a rollout holds, and how one is sampled.

`rollout` is the data, `sampling` makes one, `prompts` turns prompts into tokens, `positions` says how long responses may be. `engines` says
what samples, and what is asked of it: `transformers_engine` is the model itself (`ways` finds how it is sampled as it is scored,
`shrinking` runs `generate` on a batch that shrinks, `shared_prefix` begins it, `stepping` does without it), `vllm_engine` a vLLM in this
process, `vllm_server` one of its own (`vllm_weights`: how both get the policy).
"""

from l3ms.earlier import of_a_room

__getattr__ = of_a_room("rollouts")
