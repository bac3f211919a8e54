"""torch.compile: the losses in one graph; `step()` with graph breaks, as torch's own optimizers."""

import pytest
import torch

import l3ms

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch itself


def policy():
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Parameter(torch.randn(7, 5, generator=generator))
    body = torch.nn.Parameter(torch.randn(5, 5, generator=generator))
    hidden = torch.randn(8, 6, 5, generator=generator)
    labels = torch.randint(0, 7, (8, 6), generator=generator)
    labels[:, :2] = -100
    labels[3, 3:] = -100
    return head, body, hidden, labels


def make(*params):
    mu = l3ms.NoiseFloorDecay(1.0, 0.1, 5)
    return l3ms.L3MOptimizer(torch.optim.AdamW(params, lr=0.1), [l3ms.Length(max=2)], mu=mu)


@pytest.fixture
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_both_losses_are_one_graph(backend, layout):
    head, body, hidden, labels = policy()
    opt = make(head, body)
    weights = opt.observe({"length": torch.arange(8)}, torch.arange(8))
    cu_seqlens = None
    if layout == "packed":
        hidden, labels = hidden.reshape(48, 5), labels.reshape(48)
        cu_seqlens = torch.arange(9) * 6

    def losses(hidden, weights):
        states = torch.tanh(hidden @ body)
        task = l3ms.task_loss(states, head, labels, cu_seqlens)
        out = opt.constraint_loss(states, head, labels, seq_weight=weights, cu_seqlens=cu_seqlens)
        return task, out.loss, out.log_likelihood.sequence

    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    results = []
    for run in (losses, compiled):
        task, constraint, sequence = run(hidden, weights)
        (task + 3 * constraint).backward()
        results.append([task, constraint, sequence, head.grad, body.grad])
        opt.zero_grad()
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh")
def test_a_compiled_step_is_the_step():
    head, body, hidden, labels = policy()
    other_head, other_body, *_ = policy()
    opt, plain = make(head, body), make(other_head, other_body)
    step = torch.compile(opt.step, backend="aot_eager")
    for i in range(2):
        for optimizer, run, w, b in ((opt, step, head, body), (plain, plain.step, other_head, other_body)):
            l3ms.task_loss(hidden @ b, w, labels).backward()
            run()
            optimizer.zero_grad()
            optimizer.constraint_loss(hidden @ b, w, labels, {"length": torch.arange(8) + i}).loss.backward()
            run()
            optimizer.zero_grad()
    torch.testing.assert_close(head, other_head, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(body, other_body, rtol=1e-4, atol=1e-4)
    assert opt.constraint_steps == 2
    assert opt.metrics() == pytest.approx(plain.metrics(), rel=1e-4)
