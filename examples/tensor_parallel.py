"""Tensor parallel: each rank has its rows of the vocabulary matrix, and of the other layers what transformers' plan gives it.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL PROMPTS.jsonl       # rows of {"prompt": ...}

All ranks have one batch, so `process_group` is this rank alone: its responses count once. No rank ever holds logits.
"""

import json
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms


def main(folder, data, low=50.0, high=100.0, iterations=200, new_tokens=256):
    dist.init_process_group()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    l3ms.fuse_head(model)
    bounds = l3ms.Length(min=float(low), max=float(high))
    base = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.5, 0.95), foreach=False
    )  # plain tensors and DTensors
    schedule = l3ms.NoiseFloorDecay(1.0, 1e-6, steps=int(iterations))
    opt = l3ms.L3MOptimizer(base, [bounds], mu=schedule, process_group=alone)
    with open(data) as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    for step in range(int(iterations)):
        asked = [prompts[(8 * step + i) % len(prompts)] for i in range(8)]
        rollout = l3ms.rollout(model, tokenizer, asked, max_new_tokens=int(new_tokens), seed=step, process_group=alone)
        weight = opt.observe(rollout.rewards([bounds]), rollout.lengths)
        tokens = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask, "labels": rollout.labels}
        model(**tokens, seq_weight=weight, use_cache=False).loss.backward()
        opt.step()
        opt.zero_grad()
    if dist.get_rank() == 0:
        print({name: round(value, 3) for name, value in opt.metrics().items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
