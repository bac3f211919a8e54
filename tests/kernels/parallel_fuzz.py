"""Random calls of the vocabulary-parallel head on two ranks: python parallel_fuzz.py FOLDER FIRST COUNT [LARGE].

Writes FOLDER/found.json: of each seed the worst error, as a share of what is allowed, or what went wrong. One process imports torch,
and forks the other rank.
"""

import json
import os
import random
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from head_cases import HEAD_BACKENDS, Case, Inputs, sequence_of
from head_oracle import assert_close_to_oracle

from l3m_kernels import parallel, set_workspace


def call(case: Case, inputs: Inputs, part: slice, weighted: bool, backend: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients, of the weight and bias those of this rank's rows."""
    leaves = {
        name: (leaf.detach() if name == "hidden" else leaf.detach()[part]).requires_grad_(name not in case.frozen)
        for name, leaf in inputs.leaves.items()
    }
    options = {"bias": leaves.get("bias"), "backend": backend, **case.options}
    arguments = (leaves["hidden"], leaves["weight"], inputs.targets)
    if weighted:
        loss, out = parallel.weighted_log_likelihood(*arguments, inputs.seq_weight, inputs.cu_seqlens, **options)
        found = {"loss": loss.detach()}
        differentiated, upstream = (loss,), (loss.new_tensor(case.loss_scale),)
    else:
        out = parallel.log_likelihood(*arguments, inputs.cu_seqlens, **options)
        found, differentiated = {}, (out.sequence, out.token)
        upstream = tuple(given * case.loss_scale for given in (inputs.grad_sequence, inputs.grad_token))
    if any(leaf.requires_grad for leaf in leaves.values()):
        torch.autograd.backward(differentiated, upstream)
    found |= {"sequence": out.sequence.detach(), "token": out.token.detach()}
    found |= {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    lengths = torch.zeros_like(out.length).index_add(
        0, sequence_of(inputs), (inputs.targets != case.ignore_index).flatten().long()
    )
    assert torch.equal(out.length, lengths)
    return found


def fuzz(seed: int, rank: int, large: bool) -> float:
    """One call on both ranks, forward and backward -> the worst error, as a share of what is allowed; rank 1 compares nothing."""
    draw = random.Random(f"parallel {seed}")
    case = replace(Case.hard(seed, large), twice=False)
    set_workspace(case.workspace)
    backend, weighted = draw.choice([name for name in HEAD_BACKENDS if name != "triton"]), draw.random() < 0.5
    cut = draw.choice((0, case.vocabulary, *(draw.randrange(case.vocabulary + 1) for _ in range(8))))
    inputs = case.build()
    found = call(case, inputs, slice(cut, None) if rank else slice(0, cut), weighted, backend)
    both: list = [None, None]
    dist.all_gather_object(both, found)
    for name in found.keys() - {"d_weight", "d_bias"}:
        assert torch.equal(both[0][name], both[1][name]), f"{name} differs between the ranks"
    if rank:
        return 0.0
    whole = {name: torch.cat([each[name] for each in both]) for name in found.keys() & {"d_weight", "d_bias"}}
    return max(assert_close_to_oracle(case, inputs, found | whole, weighted, backend).values())


def main(folder: Path, seeds: range, share: float) -> None:
    torch.set_num_threads(1)
    rank = 0 if (child := os.fork()) else 1
    options = {"rank": rank, "world_size": 2, "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", **options)
    found: dict[int, float | str] = {}
    for seed in seeds:
        try:
            found[seed] = fuzz(seed, rank, random.Random(-1 - seed).random() < share)
        except AssertionError as error:
            found[seed] = str(error)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    if rank:
        os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])), float(sys.argv[4]))
