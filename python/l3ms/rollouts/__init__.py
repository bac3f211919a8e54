"""Responses of the policy: what a rollout holds, and how one is sampled.

`rollout` is the data, `sampling` makes one, `shrinking` runs `generate` on a batch that shrinks, `prompts` turns prompts into tokens.
"""
