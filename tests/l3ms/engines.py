"""Engines for tests: one that samples a copy of the policy, and what it was asked."""

import copy

import torch

from l3ms.rollouts.engines import Response
from l3ms.rollouts.transformers_engine import TransformersEngine
from l3ms.rollouts.vllm_weights import gaps


class Copying:
    """As a vLLM: a model of its own, which has the weights that `update` gave it, and says how likely its tokens were."""

    def __init__(self, tokenizer, updates=True):
        self.tokenizer, self.updates = tokenizer, updates
        self.model = None
        self.asked = []

    def update(self, model):
        self.asked.append("update")
        if self.model is None or self.updates:
            self.model = copy.deepcopy(model)

    def sample(self, prompts, *, max_new_tokens, temperature, end, generator):
        self.asked.append("sample")
        own = TransformersEngine(self.model, self.tokenizer)
        stop = {"max_new_tokens": max_new_tokens, "temperature": temperature, "end": end, "generator": generator}
        found = own.sample(prompts, **stop)
        nothing = [Response(r.tokens, r.ended, [0.0] * len(r.tokens)) for r in found]
        likely = gaps(self.model, prompts, nothing, temperature)  # 0 - log pi
        return [Response(r.tokens, r.ended, (-x).tolist()) for r, x in zip(found, likely, strict=True)]


def script_model(model):
    """Weights far from where they were."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
