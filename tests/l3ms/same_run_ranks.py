"""One of four ranks of `test_same_run.py`: fifty iterations of one run by 1, 2 and 4 processes, whole and in parts.

python rank_forks.py same_run_ranks 4 FOLDER [KIND ...]; writes FOLDER/RANK.pt.
Two processes are two of the four; the other two make the same run beside them.
"""

import itertools

import torch
import torch.distributed as dist
from sharded_models import VOCABULARY, Tokenizer, model, rows, shard
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import l3ms
from l3ms.constraints.data_nll import sequence_nll
from l3ms.model.batches import Collator
from l3ms.model.losses import scored_lengths, shift
from l3ms.model.sharding import whole

RANKS = 4
SPLITS = {1: [8], 2: [5, 3], 4: [3, 2, 2, 1]}  # rows of the batches
KINDS = {"whole": (1,), "ddp": (2, 4), "fsdp": (2, 4), "hsdp": (4,), "vocabulary": (2, 4), "fsdp x vocabulary": (4,)}
STEPS = 50


def responses_of(step):
    """Of a fixed engine: 8 prompts and their responses; some rewards are missing, in two iterations all of the last rows'."""
    generator = torch.Generator().manual_seed(1000 + step)
    draw = lambda size: torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(1 + n % 3) for n in range(8)]
    answers = [l3ms.Response([*draw(1 + (n + step) % 6), 1], True) for n in range(8)]
    polite = torch.randn(8, generator=generator, dtype=torch.float64).tolist()
    missing = {3, 6} if step % 3 else {4, 5, 6, 7}
    return prompts, answers, [None if n in missing else value for n, value in enumerate(polite)]


def split_vocabulary(made, mesh):
    """The head's rows over the ranks of `mesh`, as transformers' plans have it."""
    apply_tensor_parallelism(made, mesh, dict.fromkeys(("lm_head.weight", "lm_head"), "colwise_gather_output"))


def run(kind, world, dtype, groups):
    """-> the whole weights, and the bits of each iteration's multipliers and estimates."""
    rank = dist.get_rank() % world
    group = groups[world]
    made = model(dtype=dtype)
    if "vocabulary" not in kind:  # a head is fused before it is sharded, or afterwards
        l3ms.fuse_head(made)
    called = made
    if kind == "ddp":
        called = torch.nn.parallel.DistributedDataParallel(made, process_group=group)
    elif kind == "fsdp":
        shard(made, "accelerate", mesh=DeviceMesh.from_group(group, "cpu"))
    elif kind == "hsdp":
        shard(made, "accelerate", mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "vocabulary":  # all have one batch
        split_vocabulary(made, DeviceMesh.from_group(group, "cpu"))
        rank, world, group = 0, 1, groups[1]
    elif kind == "fsdp x vocabulary":  # two batches, each of the two ranks that share the vocabulary
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        split_vocabulary(made, mesh["tp"])
        shard(made, "layers", mesh=mesh["dp"])
        rank, world, group = mesh["dp"].get_local_rank(), 2, mesh["dp"].get_group()
    if "vocabulary" in kind:
        l3ms.fuse_head(made)
    constraints = [l3ms.Constraint("polite", min=0.3), l3ms.Length(min=2, max=3), l3ms.Constraint("nll", max=2.0)]
    if dtype == torch.float64:
        base = torch.optim.AdamW(
            made.parameters(), lr=5e-3, foreach=False
        )  # one list may hold parts over different ranks
    else:  # Adam makes steps of the rounding of gradients that are nearly 0: in float32 weights would be 2e-5 apart after all
        base = torch.optim.SGD(made.parameters(), lr=0.02, momentum=0.5, foreach=False)
    mu = l3ms.NoiseFloorDecay(1.0, 1e-3, steps=STEPS)
    optimizer = l3ms.L3MOptimizer(base, constraints, mu=mu, process_group=group)
    start = sum(SPLITS[world][:rank])
    own = slice(start, start + SPLITS[world][rank])
    bits = []
    for step in range(STEPS):
        for part in range(2):  # of an accumulated batch
            batch = Collator(0)(rows(8, seed=2 * step + part)[own])
            weight = world / (16 * scored_lengths(shift(batch["labels"])).to(dtype))
            called(**batch, seq_weight=weight, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        prompts, answers, polite = responses_of(step)
        responses = l3ms.Rollout.from_tokens(Tokenizer(), [f"p{n}" for n in range(8)][own], prompts[own], answers[own])
        rewards = {**responses.rewards(constraints), "polite": polite[own]}
        weights = optimizer.observe(rewards, responses.lengths)
        out = called(**responses.inputs(slice(None)), seq_weight=weights)
        data = Collator(0)(rows(8, seed=500 + step)[own])
        out.loss.backward()
        optimizer.barrier_loss({"nll": sequence_nll(called, data)}).backward()
        optimizer.step()
        optimizer.zero_grad()
        last = optimizer.estimates.last
        assert last is not None
        bits.append(torch.cat([last.multiplier, last.estimate, last.stderr, optimizer.mu[None]]))
    return [whole(p.detach()).clone() for p in made.parameters()], torch.stack(bits)


def groups_of(rank):
    """Of each number of processes the group that this rank is in."""
    found = {}
    for world in SPLITS:
        for first in range(0, RANKS, world):
            ranks = list(range(first, first + world))
            made = dist.new_group(ranks)
            if rank in ranks:
                found[world] = made
    return found


def main(folder, *kinds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = groups_of(rank)
    found = {}
    for dtype, (kind, worlds) in itertools.product((torch.float64, torch.float32), KINDS.items()):
        for world in worlds if not kinds or kind in (*kinds, "whole") else ():
            found[kind, world, dtype] = run(kind, world, dtype, groups)
            torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
