"""What one writes without this library, as a contestant: `generate`, (B, L, V) logits that are held, log_softmax and gather, AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from l3ms.model.losses import scored_lengths, shift
from l3ms.training.phases import Phases


class PlainLoop:
    """Takes ours' batch, prompts and, for the constraint's gradient, ours' responses with the weights that they were given there."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, phases: Phases):
        self.model, self.tokenizer, self.max_new_tokens, self.phases = model, tokenizer, max_new_tokens, phases
        self.parameters = trained(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.5, 0.95), weight_decay=0.0)

    def iteration(self, task: Mapping[str, Tensor], responses: Mapping[str, Tensor], weights: Tensor) -> None:
        """
        Args:
            task: (B, L) input_ids, attention_mask, labels.
            responses: the same of the responses that are scored, (N, L).
            weights: (N,) of those.
        """
        self.model.train()
        with self.phases.inside("task"):
            length = scored_lengths(shift(task["labels"])).clamp(min=1)
            backward(self.model, task, 1 / (length * len(length)))
        self._step()
        with self.phases.inside("sampling"):
            self.phases.sampled(self._sampled(responses))
        self.model.train()
        with self.phases.inside("constraint"):
            backward(self.model, responses, weights)
        self._step()

    def _step(self) -> None:
        with self.phases.inside("optimizer"):
            clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def _sampled(self, responses: Mapping[str, Tensor]) -> int:
        """`generate` for the same prompts, as many tokens at most. -> tokens sampled, the end tokens included."""
        self.model.eval()
        rows = zip(responses["input_ids"], responses["attention_mask"].bool(), responses["labels"], strict=True)
        prompts = {"input_ids": [ids[mask & (labels == -100)].tolist() for ids, mask, labels in rows]}
        padded = self.tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(self.model.device)
        end = self.tokenizer.eos_token_id
        out = self.model.generate(
            **padded, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=end,
        )[:, padded["input_ids"].shape[1] :]  # fmt: skip
        ended = (out == end).cumsum(1)
        return int(((ended == 0) | ((ended == 1) & (out == end))).sum())


def backward(model: Any, batch: Mapping[str, Tensor], seq_weight: Tensor) -> None:
    """-sum_n w_n log pi(y_n|x_n), of logits (B, L, V) that are there as a whole."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = shift(batch["labels"])  # (B, L)
    chosen = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    likelihood = chosen.masked_fill(targets == -100, 0.0).sum(1)
    (-(seq_weight.to(likelihood) * likelihood).sum()).backward()


def trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found - expected| / |expected|, of gradients."""
    apart = torch.stack([(a - b).double().norm() for a, b in zip(found, expected, strict=True)]).norm()
    return float(apart / torch.stack([b.double().norm() for b in expected]).norm().clamp(min=1e-300))
