"""What a process holds and sends: one process with the whole model, and each of N with its part of it (fully_shard).

python bench/sharded_memory.py [RANKS]. Bytes of tensors by part, the largest resident size, and bytes that collectives were given by this
rank in a task half-step, a constraint half-step and a sampling, on CPUs over gloo.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import l3ms
from l3ms.model.averaging import WeightAverage
from l3ms.model.sharding import local

ROWS, LENGTH, NEW = 4, 32, 8
SENT = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor", "all_reduce")


class Tokenizer:
    eos_token_id, pad_token_id, all_special_ids, added_tokens_decoder, chat_template = 1, 0, (0, 1), {}, None

    def __len__(self):
        return 16384

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(map(str, row)) for row in rows]


def size(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


def counted(sent):
    """Collectives add the bytes of their largest tensor to `sent`."""
    for name in SENT:
        plain = getattr(dist, name, None)
        if plain is None:
            continue

        def call(*args, plain=plain, name=name, **options):
            given = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
            kind = name.rpartition("_")[0] if name != "all_reduce" else name
            sent[kind] = sent.get(kind, 0) + max((value.nbytes for value in given), default=0)
            return plain(*args, **options)

        setattr(dist, name, call)


def measure(rank, ranks, store):
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    sent: dict[str, int] = {}
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (ranks,))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if ranks > 1:
        counted(sent)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).normal_(0, 0.02)
        for module in model.modules():
            if "RotaryEmbedding" in type(module).__name__:
                module.__init__(config)  # its buffer is of no parameter
    l3ms.fuse_head(model)
    optimizer = l3ms.L3MOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), [l3ms.Length(max=6)])
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 16384, (ROWS, LENGTH), generator=generator)
    traffic = {}

    def half_step(name, seq_weight):
        sent.clear()
        model(input_ids=ids, labels=ids, seq_weight=seq_weight, use_cache=False).loss.backward()
        grads = size(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        traffic[name] = dict(sent)
        optimizer.zero_grad()
        return grads

    grads = half_step("task half-step", torch.full((ROWS,), 1 / (ROWS * LENGTH)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sent.clear()
    l3ms.rollout(model, Tokenizer(), ["p"] * ROWS, prompt_ids=ids[:, :8].tolist(), max_new_tokens=NEW)
    l3ms.rollout(model, Tokenizer(), ["p"] * ROWS, prompt_ids=ids[:, :8].tolist(), max_new_tokens=1)
    sent.clear()
    l3ms.rollout(model, Tokenizer(), ["p"] * ROWS, prompt_ids=ids[:, :8].tolist(), max_new_tokens=NEW)
    traffic[f"sampling of {NEW} tokens"] = dict(sent)
    weights = optimizer.observe({"length": [5.0, 7.0, 6.0, 9.0]}, torch.full((ROWS,), 7))
    half_step("constraint half-step", weights)
    average = WeightAverage()
    average.update(model)
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    mib = 1 << 20
    found = {
        "ranks": ranks,
        "parameters": sum(p.numel() for p in model.parameters()),
        "MiB": {
            "weights": size(model.parameters()) / mib,
            "gradients": grads / mib,
            "optimizer": size(moments) / mib,
            "average": size(average.weights.values()) / mib,
            "largest resident, a task half-step": peak / 1024,
        },
        "MiB through collectives": {
            step: {name: value / mib for name, value in kinds.items()} for step, kinds in traffic.items()
        },
    }
    dist.barrier()
    if rank == 0:
        print(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        sys.exit()
    for ranks in (1, int(sys.argv[1]) if sys.argv[1:] else 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes = [
                subprocess.Popen([*command, str(rank), str(ranks), f"{folder}/store"], env=environment)
                for rank in range(ranks)
            ]
            if any(process.wait() for process in processes):
                sys.exit(1)
