"""One rank of `test_sharded_models.py`: transformers models that fully_shard has split, beside whole ones.

python rank_forks.py sharded_ranks WORLD FOLDER [CHECK ...]; writes FOLDER/RANK.pt.
"""

import copy
import functools
import sys
import traceback
import warnings

import torch
import torch.distributed as dist
from sharded_models import Tokenizer, batch_of, model, prompts, replaced, sampled, shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import l3ms
from l3ms.model.averaging import WeightAverage
from l3ms.model.sharding import is_part, whole
from l3ms.rollouts import shrinking, transformers_engine
from l3ms.rollouts.ways import Way

# ---- the checks: each -> what it found ----


def gradients(how, tied, first):
    """The gradient of both ranks' batches through a head that is fused first or later, and that of a whole model."""
    alone, made = model(tied=tied), model(tied=tied)
    if first:
        l3ms.fuse_head(made)
    shard(made, how)
    l3ms.fuse_head(made)
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = list(made.parameters())
    kinds = [is_part(p) for p in parameters]
    losses = []
    for _ in range(2):  # gathered, split and gathered again
        batch, weight = batch_of(rank)
        out = made(**batch, seq_weight=weight, use_cache=False)
        out.loss.backward()
        losses.append(float(out.loss))
    l3ms.fuse_head(alone)
    for other in range(world):
        batch, weight = batch_of(other)
        (alone(**batch, seq_weight=weight, use_cache=False).loss * 2 / world).backward()
    apart = [
        float((whole(ours.grad) - whole(theirs.grad)).abs().max())
        for ours, theirs in zip(parameters, alone.parameters(), strict=True)
    ]
    optimizer = l3ms.L3MOptimizer(torch.optim.SGD(made.parameters(), lr=0.1), [l3ms.Length(max=3)], max_grad_norm=1e9)
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()])  # type: ignore[misc]
    ours = optimizer.metrics()["l3m/grad_norm/task"]
    return {"parts": all(kinds), "apart": max(apart), "losses": losses, "norm": (ours, float(norm))}


def ends():
    """Ranks whose responses end at unlike places, with unlike numbers of prompts, in every way of sampling; and as whole models do."""
    rank = dist.get_rank()
    count = 5 + 4 * rank
    found = {}
    for kind in ("padded", "equal lengths", "forward"):
        way = Way(kind, shrink=True)
        with replaced(transformers_engine, "way_of", lambda *args, way=way: way):
            split = sampled(shard(model()), count, rank, batch_size=3)
            with replaced(shrinking, "_may_shrink", lambda model: False):
                found[kind] = split, sampled(model(), count, rank, batch_size=3)
    found["found"] = sampled(shard(model(tied=True), "accelerate"), count, rank)
    made = shard(model(), "root")
    sampled(made, count, rank)
    found["parts"] = all(is_part(p) for p in made.parameters())
    return found


def streams():
    made = model()
    torch.manual_seed(3)
    ids = [[5, 6]] * 8
    ask = lambda **options: l3ms.rollout(  # noqa: E731
        made, Tokenizer(), ["p"] * 8, prompt_ids=ids, max_new_tokens=6, **options
    ).completion_ids()
    first, second = ask(), ask()
    after = torch.rand(2)
    engine = lambda prompts, *, max_new_tokens, generator, **rest: [  # noqa: E731
        l3ms.Response([int(torch.randint(3, 19, (), generator=generator)), 1], True) for _ in prompts
    ]
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return {
        "drawn": [first, second],
        "after": after,
        "seeded": [ask(seed=4), ask(seed=4), ask(seed=5)],
        "engine": ask(engine=engine),
        "one batch": ask(seed=4, process_group=groups[dist.get_rank()]),
    }


def divergence():
    """KL from a reference that is split as the policy is; ranks have unlike numbers of responses."""
    rank = dist.get_rank()
    found = {}
    for split in (True, False):
        policy = model()
        if split:
            shard(policy, "accelerate")
        constraint = l3ms.KL(max=1.0, batch_size=2)
        constraint.prepare(policy)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        ids = prompts(rank, 3 + 4 * rank)
        responses = [l3ms.Response([4 + n, 7, 1], True) for n in range(len(ids))]
        rollout = l3ms.Rollout.from_tokens(Tokenizer(), [f"p{n}" for n in range(len(ids))], ids, responses)
        found["split" if split else "whole"] = constraint.ask(rollout, policy)
        if split:
            found["parts"] = [is_part(p) for p in constraint.reference_model.parameters()]
    return found


def averages():
    """An average of parts: as that of a whole model, whole where it is copied or kept, and taken up again."""
    found = {}
    for split in (True, False):
        made = model(dtype=torch.bfloat16)
        l3ms.fuse_head(made)
        if split:
            shard(made, "accelerate")
        average = WeightAverage()
        for step in range(3):
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.1 * (step + 1))
            average.update(made)
        copied = average.copied(made)
        kept = average.whole()
        batch, weight = batch_of(0)
        found["split" if split else "whole"] = {
            "copied": {name: p.detach() for name, p in copied.named_parameters()},
            "kept": kept,
            "kinds": {mean.dtype for mean in average.weights.values()},
            "logits": copied(input_ids=batch["input_ids"]).logits.detach(),
            "likelihood": copied(**batch, seq_weight=weight).sequence,
            "class": type(copied).__name__,
        }
        if split:
            everywhere = [kept]
            dist.broadcast_object_list(everywhere)
            again = WeightAverage.of(3, everywhere[0], made)
            same = [torch.equal(whole(again.weights[name]), whole(mean)) for name, mean in average.weights.items()]
            found["taken up"] = all(same) and all(is_part(mean) for mean in again.weights.values())
    return found


def precision():
    """Mixed precision rounds activations, and neither what weighs sequences nor their log-likelihoods."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    found = {}
    for first in (True, False):
        made = model()
        if first:
            l3ms.fuse_head(made)
        shard(made, "accelerate", mp_policy=policy)
        l3ms.fuse_head(made)
        batch, weight = batch_of(dist.get_rank())
        out = made(**batch, seq_weight=weight, use_cache=False)
        exact = -(weight * out.sequence).sum()
        out.loss.backward()
        kinds = {out.loss.dtype, out.sequence.dtype, out.token.dtype}
        grads = {whole(p.grad).dtype for p in made.parameters()}
        apart = float((out.loss.detach() - exact).abs() / exact.abs())
        found[first] = {"kinds": kinds, "grads": grads, "apart": apart}
    return found


def adapters():
    """LoRA: the head fused, sampling, KL from the model without adapters and from that of the start; what is trained is what is split."""
    from peft import LoraConfig, get_peft_model

    rank = dist.get_rank()
    found = {}
    for split in (True, False):
        torch.manual_seed(0)
        made = get_peft_model(model(), LoraConfig(r=3, target_modules=["q_proj", "lm_head"], lora_dropout=0.0))
        constraint = l3ms.KL(max=1.0)
        if split:
            shard(made, mp_policy=MixedPrecisionPolicy())
        l3ms.fuse_head(made)
        constraint.prepare(made)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.2)
        later = l3ms.KL(max=1.0, name="later")
        later.prepare(made)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        ids = prompts(rank, 4)
        responses = [l3ms.Response([4 + n, 7, 1], True) for n in range(4)]
        rollout = l3ms.Rollout.from_tokens(Tokenizer(), [f"p{n}" for n in range(4)], ids, responses)
        values = [constraint.ask(rollout, made), later.ask(rollout, made)]
        optimizer = l3ms.L3MOptimizer(
            torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1), [constraint]
        )
        for other in range(1 if split else dist.get_world_size()):
            batch, weight = batch_of(rank if split else other)
            scale = 1 if split else 1 / dist.get_world_size()
            (made(**batch, seq_weight=weight, use_cache=False).loss * scale).backward()
        grads = {name: whole(p.grad).clone() for name, p in made.named_parameters() if p.grad is not None}
        optimizer.step()
        with replaced(shrinking, "_may_shrink", lambda model: False):
            answers = sampled(made, 4 + rank, rank)
        now = {name: whole(p.detach()).clone() for name, p in made.named_parameters()}
        found["split" if split else "whole"] = {"values": values, "grads": grads, "answers": answers, "now": now}
        if split:
            copied = WeightAverage()
            copied.update(made)
            whole_one = copied.copied(made)
            found["copy"] = {name: p.detach() for name, p in whole_one.named_parameters()}
    return found


def states():
    """Through torch.distributed.checkpoint: what goes on from a state is what was not interrupted."""
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )  # fmt: skip

    def begun():
        made = shard(model(), "accelerate")
        l3ms.fuse_head(made)
        constraints = [l3ms.Length(min=2, max=3)]
        return made, l3ms.L3MOptimizer(torch.optim.AdamW(made.parameters(), lr=1e-2), constraints)

    def steps(made, optimizer, count):
        batch, weight = batch_of(dist.get_rank())
        lengths = (batch["labels"] != -100).sum(1)
        for _ in range(count):
            made(**batch, seq_weight=weight, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            weights = optimizer.observe({"length": lengths.double()}, lengths)
            made(**batch, seq_weight=weights, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [whole(p.detach()) for p in made.parameters()], optimizer.metrics()

    made, optimizer = begun()
    steps(made, optimizer, 2)
    kept = copy.deepcopy((get_model_state_dict(made), get_optimizer_state_dict(made, optimizer)))
    expected = steps(made, optimizer, 2)
    other, again = begun()
    set_model_state_dict(other, kept[0])
    set_optimizer_state_dict(other, again, kept[1])
    return expected, steps(other, again, 2)


def heads_of_ones_own():
    """`constraint_loss` on a head's matrix that is in parts: gathered, and its gradient the mean over the ranks."""
    made, alone = shard(model(), "root"), model()
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for one, ranks in ((made, [rank]), (alone, range(world))):
        optimizer = l3ms.L3MOptimizer(torch.optim.SGD(one.parameters(), lr=0.1), [l3ms.Length(max=3)])
        for other in ranks:
            batch, weight = batch_of(other)
            hidden = torch.randn(*batch["labels"].shape, 16, generator=torch.Generator().manual_seed(other))
            loss = optimizer.constraint_loss(hidden, one.lm_head.weight, batch["labels"], seq_weight=weight).loss
            (loss if one is made else loss / world).backward()
        found.append(whole(one.lm_head.weight.grad))
    return found


def refusals():
    """What is said of weights that are in parts otherwise."""
    found = {}

    def attempt(name, action):
        try:
            action()
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel

        flat = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=False)
    attempt("fuse_head of FSDP1", lambda: l3ms.fuse_head(flat))
    attempt(
        "optimizer of FSDP1",
        lambda: l3ms.L3MOptimizer(torch.optim.SGD(flat.parameters(), lr=1.0), [l3ms.Length(max=1)]),
    )
    zero = model()
    for parameter in zero.parameters():
        parameter.ds_id = 0  # type: ignore[attr-defined]  # what ZeRO-3 puts on its own
    attempt("fuse_head of ZeRO-3", lambda: l3ms.fuse_head(zero))
    attempt(
        "optimizer of ZeRO-3",
        lambda: l3ms.L3MOptimizer(torch.optim.SGD(zero.parameters(), lr=1.0), [l3ms.Length(max=1)]),
    )
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    part = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), tensors, [Shard(0)]))
    constraints = [l3ms.Length(max=1)]
    attempt("optimizer of tensor parallelism", lambda: l3ms.L3MOptimizer(torch.optim.SGD([part], lr=1.0), constraints))
    return found


SPLITS = [(how, False) for how in ("layers", "head", "accelerate", "offloaded")] + [
    ("layers", True),
    ("accelerate", True),
]
CHECKS = {
    f"gradients, {how}, {'tied' if tied else 'untied'}, fused {'first' if first else 'later'}": functools.partial(
        gradients, how, tied, first
    )
    for how, tied in SPLITS
    for first in (True, False)
} | {
    "ends": ends,
    "streams": streams,
    "divergence": divergence,
    "averages": averages,
    "precision": precision,
    "adapters": adapters,
    "states": states,
    "heads of one's own": heads_of_ones_own,
    "refusals": refusals,
}


def main(folder, *names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name in names or CHECKS:
        try:
            found[name] = CHECKS[name]()
        except Exception:  # the tests say which
            found[name] = traceback.format_exc()
            print(name, found[name], file=sys.stderr)
    torch.save(found, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()
