"""accelerate divides what is backpropagated by its accumulation steps; the parts of a constraint half-step already add up to the whole."""

import pytest
import torch
from training_runs import rows, run

import l3ms


@pytest.mark.parametrize(
    "constraint",
    [l3ms.Length(max=6), l3ms.DataNLL("general", rows(8, seed=3), max=1.0, batch_size=4)],
    ids=["sampled", "data"],
)
def test_the_constraints_gradient_is_not_divided_by_the_accumulation_steps_of_the_accelerator(
    tmp_path, tokenizer, make_model, constraint
):
    """The Trainer divides by itself and leaves the accelerator's steps at 1; a script or plugin may set others."""
    norms = []
    for steps in (1, 4):
        trainer, _ = run(tmp_path, tokenizer, make_model(), constraints=[constraint], start=False, max_steps=1)
        trainer.accelerator.gradient_accumulation_steps = steps
        trainer.create_optimizer()
        torch.manual_seed(0)
        trainer.constraint_half_step()
        assert trainer.l3m_optimizer is not None
        norms.append(trainer.l3m_optimizer.metrics()["l3m/grad_norm/constraint"])
        trainer.accelerator.gradient_accumulation_steps = 1
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
