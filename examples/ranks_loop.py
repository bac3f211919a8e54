"""A loop of one's own on several processes: data parallel (DDP), or with the weights in parts (FSDP2).

    torchrun --nproc-per-node 2 examples/ranks_loop.py MODEL ROWS.jsonl ddp      # or fsdp2; rows of {"prompt": ..., "completion": ...}

Each rank has its own rows and prompts; the optimizer's estimates and multipliers are those of all ranks, bit for bit.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms


def encoded(tokenizer, rows):
    """Tokens of prompts and completions, the end token too, and labels for the completions alone."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    learnt = tokenizer([row["completion"] + tokenizer.eos_token for row in rows], add_special_tokens=False)["input_ids"]
    both = {"input_ids": [a + b for a, b in zip(prompts, learnt, strict=True)]}
    batch = tokenizer.pad(both, padding_side="right", return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(batch["labels"], prompts, strict=True):
        row[: len(prompt)] = -100
    return batch


def main(folder, data, how, low=50.0, high=100.0, iterations=200, new_tokens=256):
    dist.init_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    l3ms.fuse_head(model)
    forward = model
    if how == "fsdp2":
        mesh = init_device_mesh(device.type, (world,))
        for part in [*model.model.layers, model]:
            fully_shard(part, mesh=mesh)
    else:
        forward = DistributedDataParallel(model)

    bounds = l3ms.Length(min=float(low), max=float(high))
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.5, 0.95))
    opt = l3ms.L3MOptimizer(base, [bounds], mu=l3ms.NoiseFloorDecay(1.0, 1e-6, steps=int(iterations)))
    with open(data) as file:
        rows = [json.loads(line) for line in file][rank::world]
    for step in range(int(iterations)):
        chosen = [rows[(8 * step + i) % len(rows)] for i in range(8)]
        batch = encoded(tokenizer, chosen).to(device)
        weight = 1.0 / (len(chosen) * (batch["labels"] != -100).sum(1))  # a mean over sequences of means over tokens
        forward(**batch, seq_weight=weight.float(), use_cache=False).loss.backward()
        opt.step()
        opt.zero_grad()

        prompts = [row["prompt"] for row in chosen]
        rollout = l3ms.rollout(model, tokenizer, prompts, max_new_tokens=int(new_tokens), seed=step)
        weight = opt.observe(
            rollout.rewards([bounds]), rollout.lengths
        )  # collective: multipliers of all ranks' responses
        tokens = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask, "labels": rollout.labels}
        forward(**tokens, seq_weight=weight, use_cache=False).loss.backward()
        opt.step()
        opt.zero_grad()
    if rank == 0:
        print({name: round(value, 3) for name, value in opt.metrics().items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
