"""One rank of `test_distributed.py`: a policy over lengths, whose batch is split over the ranks.

python rank_forks.py ranks WORLD FOLDER; writes FOLDER/RANK.pt.
"""

import torch
import torch.distributed as dist

import l3ms

# Rows of the batch of 8 that each of two ranks has, and its micro-batches.
SPLITS = {
    "even": [[4], [4]],
    "uneven": [[5], [3]],
    "lopsided": [[7], [1]],
    "micro": [[2, 3], [1, 2]],
    "empty": [[8], [0]],
}
LENGTHS = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])


def batch(step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    chosen = torch.randint(0, 8, (8,), generator=generator)
    noise = torch.randn(8, generator=generator, dtype=torch.float64)
    polite = [None if step == 1 and row >= 4 else value for row, value in enumerate(noise.tolist())]
    return inputs, chosen, polite


def run(split, rank, world):
    """Three constraint half-steps of `split[rank]`'s rows -> what each step found, as tensors."""
    head = torch.nn.Parameter(torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3))
    constraints = [l3ms.Constraint("polite", min=0.5), l3ms.Length(min=2, max=3), l3ms.Constraint("nll", max=1.0)]
    mu = l3ms.NoiseFloorDecay(1.0, 1e-2, steps=4)
    opt = l3ms.L3MOptimizer(torch.optim.SGD([head], lr=0.5), constraints, mu=mu)
    found = []
    for step in range(3):
        inputs, chosen, polite = batch(step)
        start = sum(sum(sizes) for sizes in split[:rank])
        rows = slice(start, start + sum(split[rank]))
        lengths = LENGTHS[chosen]
        weights = opt.observe({"polite": polite[rows], "length": lengths[rows]}, lengths[rows])
        loss = head.sum() * 0.0
        for at, size in zip(torch.tensor([0, *split[rank]]).cumsum(0).tolist(), split[rank], strict=False):
            part = slice(start + at, start + at + size)
            token = (inputs[part] @ head.T).log_softmax(-1).gather(1, chosen[part, None])[:, 0]
            loss = loss - (weights[at : at + size] * token).sum()
        first = opt.estimates.pending.multiplier  # type: ignore[union-attr]
        nll = -(inputs[rows] @ head.T).log_softmax(-1).gather(1, chosen[rows, None])[:, 0]
        (loss + opt.barrier_loss({"nll": nll})).backward()
        gradient = head.grad
        assert gradient is not None
        if world > 1:  # what DistributedDataParallel does
            dist.all_reduce(gradient)
            gradient.div_(world)
        gradient = gradient.clone()
        opt.step()
        opt.zero_grad()
        last = opt.estimates.last
        assert last is not None
        values = (first, last.multiplier, last.estimate, last.stderr, opt.estimates.batch_mean, opt.mu.clone())
        found.append([*values, gradient, head.detach().clone()])
    return found


def refused(rank, world):
    """What is wrong on the second rank alone -> what each says, and what both find afterwards."""
    head = torch.nn.Parameter(torch.zeros(1))
    opt = l3ms.L3MOptimizer(torch.optim.SGD([head], lr=0.5), [l3ms.Constraint("polite", min=0.5)])
    bad = float("nan") if rank else 1.0

    def broken(prompts, completions, **columns):
        return [1.0 / (world - 1 - rank)] * len(completions)

    def roll():
        with opt.estimates.errors_on_all_ranks():
            values = l3ms.Constraint("polite", broken, min=0.5).values(["p"], ["x"], [1])
        opt.observe({"polite": values})

    attempts = {
        "list": lambda: opt.observe({"polite": [1.0, bad]}),
        "tensor": lambda: opt.observe({"polite": torch.tensor([bad, 1.0])}),
        "differentiable": lambda: opt.barrier_loss({"polite": head * bad}),
        "name": lambda: opt.observe({"rude" if rank else "polite": [1.0, 2.0]}),
        "function": roll,
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "nothing"
        except (ValueError, ZeroDivisionError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    opt.observe({"polite": [float(rank), 2.0]})
    head.grad = torch.ones_like(head)
    opt.step()
    return {**found, "estimate": opt.metrics()["constraints/polite/estimate"]}


def agreeing(rank):
    """What `l3ms.agree` says on this rank: of equal states, of a weight of the second that is another, and of a multiplier."""
    head = torch.nn.Parameter(torch.zeros(4))
    opt = l3ms.L3MOptimizer(torch.optim.SGD([head], lr=0.5), [l3ms.Constraint("polite", min=0.5)])
    opt.observe({"polite": [float(rank), 2.0]})
    head.grad = torch.ones_like(head)
    opt.step()

    def said(**options):
        try:
            l3ms.agree(opt, **options)
            return ""
        except RuntimeError as error:
            return str(error)

    found = {"equal": said()}
    with torch.no_grad():
        head[2] += 1e-6 * rank
    found |= {"weight": said(named={"head": head}, what="step 1"), "number": said()}
    with torch.no_grad():
        head[2] -= 1e-6 * rank
    last = opt.estimates.last
    opt.estimates._last = last._replace(multiplier=last.multiplier + rank)  # type: ignore[union-attr]
    return {**found, "multiplier": said(named={})}


def sharded(world, fused):
    """Both half-steps on parameters that fully_shard (FSDP2) has split over the ranks, each with the whole batch -> the whole weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)).double()
    if fused:
        model.float()  # a fused step on float64 is not folded
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    base = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    constraint, mu = l3ms.Constraint("size", max=1.0, margin=0.0), l3ms.ExponentialDecay(0.1, 0.1, 1)
    opt = l3ms.L3MOptimizer(base, [constraint], mu=mu, smoothing="ema")  # a filter knows how many values there were
    inputs = torch.linspace(-3, 9, 20).reshape(5, 4).to(next(model.parameters()).dtype)
    for step in range(6):
        size = model(inputs).square().mean()
        (opt.barrier_loss({"size": size}) if step % 2 else size).backward()
        if step == 3:
            for parameter in model.parameters():
                parameter.grad = parameter.grad * float("inf")  # type: ignore[operator]
        opt.step()
        opt.zero_grad()
    full = [getattr(p, "full_tensor", p.detach)().detach().clone() for p in model.parameters()]
    return torch.cat([p.double().reshape(-1) for p in full]), opt.metrics()


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {name: run(split, rank, world) for name, split in SPLITS.items()}
    found |= {"refused": refused(rank, world), "agreeing": agreeing(rank)}
    found |= {f"sharded, fused {fused}": sharded(world, fused) for fused in (False, True)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
