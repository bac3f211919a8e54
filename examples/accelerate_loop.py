"""A loop of one's own with accelerate: its launcher, its devices, its accumulation; the two half-steps are ours.

accelerate launch examples/accelerate_loop.py MODEL ROWS.jsonl          # rows of {"prompt": ..., "completion": ...}
"""

import json
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms


def main(folder, data, low=50.0, high=100.0, iterations=200, new_tokens=256, cpu=False):
    accelerator = Accelerator(cpu=cpu)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(rows):
        """Tokens of prompts and completions, the end token too, and labels for the completions alone."""
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        ends = [row["completion"] + tokenizer.eos_token for row in rows]
        learnt = tokenizer(ends, add_special_tokens=False)["input_ids"]
        both = {"input_ids": [a + b for a, b in zip(prompts, learnt, strict=True)]}
        batch = tokenizer.pad(both, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, prompt in zip(labels, prompts, strict=True):
            row[: len(prompt)] = -100
        return {**batch, "labels": labels, "prompts": [row["prompt"] for row in rows]}

    with open(data) as file:
        rows = [json.loads(line) for line in file]
    model = AutoModelForCausalLM.from_pretrained(folder)
    l3ms.fuse_head(model)
    bounds = l3ms.Length(min=float(low), max=float(high))
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.5, 0.95))
    ours = l3ms.L3MOptimizer(base, [bounds], mu=l3ms.NoiseFloorDecay(1.0, 1e-6, steps=int(iterations)))
    loader = DataLoader(rows, batch_size=8, shuffle=True, drop_last=True, collate_fn=collate)
    forward, opt, loader = accelerator.prepare(model, ours, loader)  # an L3MOptimizer is an optimizer to it
    step = 0
    while step < int(iterations):
        for batch in loader:
            prompts = batch.pop("prompts")
            weight = 1.0 / (len(prompts) * (batch["labels"] != -100).sum(1))
            accelerator.backward(forward(**batch, seq_weight=weight.float(), use_cache=False).loss)
            opt.step()
            opt.zero_grad()

            rollout = l3ms.rollout(
                accelerator.unwrap_model(forward), tokenizer, prompts, max_new_tokens=int(new_tokens)
            )
            weight = ours.observe(rollout.rewards([bounds]), rollout.lengths)
            tokens = {
                "input_ids": rollout.input_ids,
                "attention_mask": rollout.attention_mask,
                "labels": rollout.labels,
            }
            accelerator.backward(forward(**tokens, seq_weight=weight, use_cache=False).loss)
            opt.step()
            opt.zero_grad()
            step += 1
            if step == int(iterations):
                break
    accelerator.print({name: round(value, 3) for name, value in ours.metrics().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
