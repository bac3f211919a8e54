"""The ranks of `test_parallel.py`: python parallel_ranks.py WORLD FOLDER [GROUP OF CHECKS]; each writes FOLDER/WORLD-RANK.pt.

One process imports torch, and forks the ranks.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import FOUR, TRITON, TWO
from torch.utils._python_dispatch import TorchDispatchMode

import l3m_kernels
from l3m_kernels import parallel

# tokens, vocabulary, width, workspace in bytes
PEAKS = {"logits": (2048, 16384, 16, 8 << 20), "weight": (32, 65536, 96, 2 << 20)}


class Sent(TorchDispatchMode):
    """What collectives are called in the block, and the bytes that this rank puts in."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            (inputs,) = args[1] if "allgather" in func.name() else args[0]
            self.calls.append((func.name(), inputs.numel() * inputs.itemsize))
        return func(*args, **(kwargs or {}))


def cases(rank, table):
    found = {}
    for name, case in table.items():
        first = sum(case.rows[:rank])
        part = slice(first, first + case.rows[rank])
        found[name] = case.run(parallel.log_likelihood, parallel.weighted_log_likelihood, part)
    return found


def attempts(calls):
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except (ValueError, IndexError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return found


def refused(rank):
    hidden, targets, offsets = torch.ones(4, 3), torch.tensor([0, 5, -100, 9]), torch.tensor([0, 2, 4])

    def call(hidden=hidden, targets=targets, rows=5, op=parallel.log_likelihood, **options):
        return op(hidden, torch.ones(rows, 3), targets, offsets, **options)

    weight = torch.ones(5, 3)  # the same object again
    again = lambda targets: parallel.log_likelihood(hidden, weight, targets, offsets)  # noqa: E731
    again(targets)
    ones, wanting = torch.ones(4, 3), torch.ones(4, 3, requires_grad=True)
    half = hidden.bfloat16()

    def second():
        found = parallel.log_likelihood(wanting, torch.ones(5, 3), targets, offsets).sequence.sum()
        (gradient,) = torch.autograd.grad(found, wanting, create_graph=True)
        gradient.sum().backward()

    return attempts(
        {
            "outside": lambda: call(targets=torch.tensor([0, 10, 1, 1])),
            "outside again": lambda: again(torch.tensor([0, -3, 1, 1])),
            "ranks' targets": lambda: call(targets=targets if rank else targets.flip(0)),
            "ranks' targets again": lambda: again(targets if rank else targets.flip(0)),
            "ranks' shapes": lambda: call(torch.ones(4 + rank, 3)),
            "ranks' options": lambda: call(temperature=1.0 + rank),
            "ranks' gradients": lambda: call(wanting if rank else ones),
            "one rank's bias": lambda: call(bias=torch.ones(4) if rank else torch.ones(5)),
            "one rank's dtype": lambda: call(half if rank else hidden),
            "no rows": lambda: call(rows=0),
            "seq_weight": lambda: parallel.weighted_log_likelihood(
                hidden, weight, targets, torch.ones(2, requires_grad=True), offsets
            ),
            "backend": lambda: call(backend="cuda"),
            "second derivative": second,
        }
    )


def traffic(rank):
    """Collectives of a call: forward, backward, and of a second call with the weight."""
    from torch.distributed.tensor.debug import CommDebugMode

    targets = torch.tensor([0, 5, -100, 9, 2, 2])
    found = {}
    for name, frozen in (("all", False), ("frozen hidden", True)):
        hidden, weight = torch.ones(6, 3, requires_grad=not frozen), torch.ones(5, 3, requires_grad=True)
        options = (hidden, weight, targets, torch.tensor([0, 6]))
        with Sent() as first:
            parallel.log_likelihood(*options)
        with Sent() as forward, CommDebugMode() as counted:
            result = parallel.log_likelihood(*options).sequence.sum()
        with Sent() as backward:
            result.backward()
        counts = {str(key): value for key, value in counted.get_comm_counts().items()}
        found[name] = [first.calls, forward.calls, backward.calls, counts]
    return found


def again():
    """Second backwards: of a kept graph, and what a no_grad call gives."""
    hidden, weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.eye(5, 3)
    weight.requires_grad_()
    targets = torch.tensor([0, 5, -100, 9, 2, 2])
    found = parallel.log_likelihood(hidden, weight, targets, torch.tensor([0, 6])).sequence.sum()
    grads = [torch.autograd.grad(found, (hidden, weight), retain_graph=True) for _ in range(2)]
    with torch.no_grad():
        plain = parallel.log_likelihood(hidden, weight, targets, torch.tensor([0, 6])).sequence.sum()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = parallel.log_likelihood(hidden, weight, targets, torch.tensor([0, 6])).token
    nothing, bad = torch.ones(0, 3, requires_grad=True), torch.ones(4, 3)
    bad[1], bad[3] = torch.nan, torch.inf
    empty = parallel.log_likelihood(nothing, weight, targets[:0], torch.tensor([0]))
    ignored = parallel.log_likelihood(hidden, weight, torch.full((6,), -100), torch.tensor([0, 6]))
    poisoned = parallel.log_likelihood(bad, torch.ones(5, 3), targets[:4], torch.tensor([0, 1, 4])).token
    (empty.token.sum() + ignored.sequence.sum()).backward()
    odd = {
        "empty": empty.token.detach(),
        "ignored": ignored.sequence.detach(),
        "zero": weight.grad,
        "poisoned": poisoned,
    }
    return odd | {"grads": grads, "plain": [found.detach(), plain], "autocast": rounded.detach()}


def resident(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024


def peak(tokens, vocabulary, width, workspace, backend):
    """Bytes beyond what was there before, of a call and its backward. Backend "gathered": of all rows on one rank, by the reference."""
    l3m_kernels.set_workspace(workspace)
    rows = vocabulary // dist.get_world_size()

    def run(tokens):
        hidden = (torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)) / 4).requires_grad_()
        targets, offsets = torch.arange(tokens) % vocabulary, torch.tensor([0, tokens])
        if backend == "gathered":
            whole = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
            dist.all_gather(whole, weight.detach())
            found = l3m_kernels.log_likelihood(hidden, torch.cat(whole), targets, offsets, backend="reference")
        else:
            found = parallel.log_likelihood(hidden, weight, targets, offsets, backend=backend)
        found.sequence.sum().backward()
        weight.grad = None

    weight = (torch.randn(rows, width) / 4).requires_grad_()
    run(8)  # what is allocated once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most since now
    run(tokens)
    found = resident("VmHWM") - before
    l3m_kernels.set_workspace(None)
    return found


def dtensors(rank) -> Any:
    """On 4 ranks: FSDP x tensor parallel, by the ordinary functions. -> gradients whole, by what they are of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tp, dp = mesh["tp"], mesh.get_local_rank("dp")
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(11, generator=generator, dtype=torch.float64)
    batches = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (2, 6), generator=generator)
    offsets, weights = torch.tensor([0, 2, 6]), torch.tensor([1.0, -0.5])

    def run(weight: Any, bias: Any, weighted: Any = False, hidden: Any = None, mine: int = dp) -> Any:
        hidden = batches[mine].clone().requires_grad_() if hidden is None else hidden
        if weighted:
            loss, found = l3m_kernels.weighted_log_likelihood(
                hidden, weight, targets[mine], weights, offsets, bias=bias
            )
        else:
            found = l3m_kernels.log_likelihood(hidden, weight, targets[mine], offsets, bias=bias)
            loss = -(found.sequence * weights).sum()
        loss.backward()
        return found.token.detach(), hidden.grad

    results = {}
    for name, device_mesh, placements in (
        ("tp", tp, [Shard(0)]),
        ("replicated x tp", mesh, [Replicate(), Shard(0)]),
    ):
        for weighted in (False, True):
            sharded: Any = [
                torch.nn.Parameter(distribute_tensor(t, device_mesh, placements, src_data_rank=None))
                for t in (whole, bias)
            ]
            token, d_hidden = run(*sharded, weighted=weighted)
            assert sharded[0].grad.placements == tuple(placements)
            assert sharded[0].grad.device_mesh == device_mesh
            grads = [t.grad.redistribute(device_mesh, [Replicate()] * device_mesh.ndim).to_local() for t in sharded]
            results[f"{name}, {'weighted' if weighted else 'plain'}"] = (token, d_hidden, *grads)
    # a hidden DTensor
    sharded: Any = [torch.nn.Parameter(distribute_tensor(t, tp, [Shard(0)], src_data_rank=None)) for t in (whole, bias)]
    leaf: Any = distribute_tensor(batches[dp], tp, [Replicate()], src_data_rank=None).requires_grad_()
    token, d_hidden = run(*sharded, hidden=leaf)
    results["hidden, plain"] = (token, d_hidden.to_local(), *(t.grad.full_tensor() for t in sharded))

    # FSDP on top of tensor parallel: by the sharded parameters themselves, and in a forward, where FSDP has gathered them.
    class Loss(torch.nn.Linear):
        def forward(self, hidden):
            found = l3m_kernels.log_likelihood(hidden, self.weight, targets[dp], offsets, bias=self.bias)
            return -(found.sequence * weights).sum(), found.token.detach().clone()

    for name in ("sharded parameters", "in a forward"):
        module = Loss(4, 11, dtype=torch.float64)
        for key, t in (("weight", whole), ("bias", bias)):
            setattr(module, key, torch.nn.Parameter(distribute_tensor(t, tp, [Shard(0)], src_data_rank=None)))
        fully_shard(module, mesh=mesh["dp"])
        parameters: Any = module.weight, module.bias
        placements = [tuple(p.placements) for p in parameters]
        if name == "in a forward":
            hidden = batches[dp].clone().requires_grad_()
            loss, token = module(hidden)
            loss.backward()
            d_hidden = hidden.grad
        else:
            token, d_hidden = run(*parameters)
        assert [tuple(p.grad.placements) for p in parameters] == placements
        results[f"{name}, fsdp"] = (token, d_hidden, *(p.grad.full_tensor() for p in parameters))

    one = init_device_mesh("cpu", (4,))
    make = lambda placement: distribute_tensor(whole, one, [placement], src_data_rank=None)  # noqa: E731
    hidden, offsets_, target = batches[0], offsets, targets[0]
    refusals = attempts(
        {
            "columns": lambda: l3m_kernels.log_likelihood(hidden, make(Shard(1)), target, offsets_),
            "whole": lambda: l3m_kernels.log_likelihood(hidden, make(Replicate()), target, offsets_),
            "partial": lambda: l3m_kernels.log_likelihood(
                hidden, DTensor.from_local(whole, one, [Partial()]), target, offsets_
            ),
            "two": lambda: l3m_kernels.log_likelihood(
                hidden, distribute_tensor(whole, mesh, [Shard(0), Shard(0)], src_data_rank=None), target, offsets_
            ),
            "data parallel": lambda: l3m_kernels.log_likelihood(batches[dp], make(Shard(0)), targets[dp], offsets_),
            "bias": lambda: l3m_kernels.log_likelihood(hidden, make(Shard(0)), target, offsets_, bias=bias),
            "hidden": lambda: l3m_kernels.log_likelihood(
                distribute_tensor(hidden, one, [Shard(0)], src_data_rank=None), make(Shard(0)), target, offsets_
            ),
            "group": lambda: parallel.log_likelihood(hidden, make(Shard(0)), target, offsets_, group=dist.group.WORLD),
        }
    )
    return {"results": results, "refused": refusals}


def checks(rank, world, only):
    if only == "triton":
        from interpreter import prepare

        prepare()
        return {"cases": cases(rank, {"triton": TRITON})}
    if world == 4:
        return {"cases": cases(rank, FOUR), **dtensors(rank)}
    found = {"cases": cases(rank, TWO), "refused": refused(rank), "traffic": traffic(rank), "again": again()}
    peaks = {
        (name, backend): peak(*size, backend)
        for name, size in PEAKS.items()
        for backend in ("reference", "cpp", "gathered")
        if name == "weight" or backend != "gathered"
    }
    return found | {"peaks": peaks}


if __name__ == "__main__":
    world, folder, only = int(sys.argv[1]), Path(sys.argv[2]), (*sys.argv[3:], "")[0]
    torch.set_num_threads(1)
    import torch.distributed.tensor  # once, not on every rank

    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        try:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
            torch.save(checks(rank, world, only), folder / f"{world}-{rank}.pt")
            dist.barrier()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    failed = 0
    for _ in children:  # one that ends badly ends the others
        _, status = os.wait()
        if status:
            failed = 1
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, 9)
    sys.exit(failed)
