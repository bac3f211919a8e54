"""The average is of the last share of the iterations of this training, whatever a trainer or a checkpoint has from before."""

import logging
import types
from typing import Any

import pytest
import torch
import transformers
from training_runs import rows

import l3ms
from l3ms.model.averaging import WeightAverage
from l3ms.model.batches import Collator
from l3ms.training.averaging import AveragingTrainer


def begun(averaged, step, max_steps, fraction):
    """-> how many iterations are in the average of a training that begins at `step`."""
    average_from: Any = AveragingTrainer.average_from.fget  # type: ignore[attr-defined]
    trainer = types.SimpleNamespace(
        average=WeightAverage(averaged) if averaged else None,
        state=types.SimpleNamespace(global_step=step, max_steps=max_steps),
        l3m=types.SimpleNamespace(average_fraction=fraction),
    )
    trainer.average_from = average_from(trainer)
    AveragingTrainer.begin_average(trainer)  # type: ignore[arg-type]
    return trainer.average.n_averaged if trainer.average else 0


@pytest.mark.parametrize(
    ("averaged", "step", "max_steps", "fraction", "left", "told"),
    [
        (0, 0, 10, 0.2, 0, None),
        (2, 0, 10, 0.2, 0, None),  # of the training before
        (0, 4, 10, 0.2, 0, None),
        (1, 9, 10, 0.2, 1, None),
        (2, 10, 20, 0.2, 0, "it begins anew"),
        (3, 8, 10, 0.0, 0, "it begins anew"),
        (1, 9, 10, 0.5, 1, "it goes on with what is there"),  # or a snapshot was gone back to
    ],
)
def test_iterations_of_another_training_are_not_in_it(averaged, step, max_steps, fraction, left, told, caplog):
    with caplog.at_level(logging.WARNING):
        assert begun(averaged, step, max_steps, fraction) == left
    assert [told] == [record.getMessage().partition("on: ")[2] for record in caplog.records] or (
        told,
        caplog.records,
    ) == (None, [])


@pytest.mark.parametrize(("fraction", "first"), [(0.9, 2), (0.8, 3), (0.2, 9), (0.0, 11), (1.0, 1), (0.25, 8)])
def test_the_share_is_rounded_once(fraction, first):
    trainer = types.SimpleNamespace(
        state=types.SimpleNamespace(max_steps=10), l3m=types.SimpleNamespace(average_fraction=fraction)
    )
    assert AveragingTrainer.average_from.fget(trainer) == first  # type: ignore[attr-defined]


def test_a_second_training_has_its_own_and_one_without_constraints_goes_on_with_it(tmp_path, make_model):
    def make():
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_strategy="steps", save_steps=3, learning_rate=0.05, report_to=[],
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, per_device_train_batch_size=2,
        )  # fmt: skip
        trainer = l3ms.constrained(transformers.Trainer)(
            make_model(), args, train_dataset=rows(), data_collator=Collator(0),
            l3m=l3ms.L3MSettings(solver="none", average_fraction=0.5),
        )  # fmt: skip
        return trainer

    trainer = make()
    trainer.train()
    first, own = trainer.average, dict(trainer.averaged_model().named_parameters())
    resumed = make()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert resumed.average.n_averaged == first.n_averaged == 2
    assert all(torch.equal(p, own[name]) for name, p in resumed.averaged_model().named_parameters())
    trainer.train()
    assert trainer.average is not first
    assert trainer.average.n_averaged == 2
