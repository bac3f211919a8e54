"""Steps that make weights which are not finite, and steps that rounding swallows."""

import logging

import pytest
import torch
from training_runs import run


class Spoils(torch.optim.SGD):
    """A step whose number is `at` makes a weight infinite, of a gradient that was finite."""

    at, made = 3, 0

    def step(self, closure=None):
        super().step(closure)
        self.made += 1
        if self.made == self.at:
            self.param_groups[0]["params"][0].data.view(-1)[0] = torch.nan


@pytest.mark.parametrize(("at", "named"), [(3, "iteration 2: the task"), (4, "iteration 2: the constraint")])
def test_a_step_that_makes_weights_nan_is_named_in_its_iteration(
    tmp_path, tokenizer, make_model, monkeypatch, at, named
):
    monkeypatch.setattr(Spoils, "at", at)
    trainer, _ = run(tmp_path, tokenizer, make_model(), start=False, max_steps=4)
    trainer.optimizer_cls_and_kwargs = (Spoils, {"lr": 0.01})
    with pytest.raises(RuntimeError, match=rf"{named} half-step has made weights that are not finite \(.*lower the"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("dtype", "rate", "said"),
    [("bfloat16", 1e-7, True), ("bfloat16", 0.05, False), pytest.param("float32", 1e-5, False, marks=pytest.mark.slow)],
)
def test_bfloat16_weights_that_rounding_keeps_where_they_are_are_said(
    tmp_path, tokenizer, make_model, caplog, dtype, rate, said
):
    model = make_model().to(getattr(torch, dtype))
    with caplog.at_level(logging.WARNING, "l3ms"):
        run(tmp_path, tokenizer, model, max_steps=10, learning_rate=rate, optim="adamw_torch", constraint_batch_size=2)
    assert ("of the bfloat16 weights with a gradient moved in 10 steps" in caplog.text) == said


class RoundsStochastically(torch.optim.SGD):
    """As torchao's optimizers say it of themselves."""

    bf16_stochastic_round = True


def test_an_optimizer_that_rounds_stochastically_is_let_be(tmp_path, tokenizer, make_model, caplog):
    trainer, _ = run(
        tmp_path, tokenizer, make_model().to(torch.bfloat16), start=False, max_steps=10, constraint_batch_size=2
    )
    trainer.optimizer_cls_and_kwargs = (RoundsStochastically, {"lr": 1e-9})
    with caplog.at_level(logging.WARNING, "l3ms"):
        trainer.train()
    assert "weights with a gradient moved" not in caplog.text
