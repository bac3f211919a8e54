"""A column of the data with the name of something that reward functions get anyway is refused wherever columns come in."""

from typing import Any

import pytest
import torch
from training_runs import rows

import l3ms
from l3ms.measuring.evaluation import evaluate
from l3ms.model.batches import further_columns

NAMES = [
    "prompts",
    "completions",
    "completion_ids",
    "ended",
    "lengths",
    "self",
    "trainer_state",
    "log_extra",
    "log_metric",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_taken_is_refused(name, make_model, tokenizer, train):
    named = rf"column cannot be named '{name}'.*rename it"
    data = [{**row, name: 1} for row in rows()]
    model = make_model()
    ids = torch.ones(1, 2, dtype=torch.int64)
    fields: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": ids,
        "labels": ids,
        "lengths": ids[0, :1],
        "ended": ids[0, :1] > 0,
    }
    with pytest.raises(ValueError, match=rf"rows: a {named}"):
        further_columns(data)
    with pytest.raises(ValueError, match=rf"Rollout: columns: a {named}"):
        l3ms.Rollout(prompts=["a"], completions=["b"], columns={name: [1]}, **fields)
    with pytest.raises(ValueError, match=rf"rollout: columns: a {named}"):
        l3ms.rollout(model, tokenizer, ["a"], columns={name: [1]})
    with pytest.raises(ValueError, match=rf"rows: a {named}"):
        evaluate(model, tokenizer, data, max_new_tokens=2, seed=0)
    with pytest.raises(ValueError, match=rf"train_dataset: a {named}"):
        train(model, data=data, start=False)
    with pytest.raises(ValueError, match=rf"prompts: a {named}"):
        train(make_model(), prompts=data, start=False)


def test_rows_that_no_reward_sees_may_be_named_as_they_like(make_model, train):
    trainer, _ = train(
        make_model(), data=[{**row, "lengths": 1} for row in rows()], constraints=(), solver="none", max_steps=1
    )
    assert trainer.state.global_step == 1


def test_a_column_that_only_some_rows_have_is_named():
    data = [{"prompt": "a"}, {"prompt": "b", "gold": 1.0}]
    for given in (data, data[::-1]):
        with pytest.raises(
            ValueError, match=r"rows: .* 'gold' of all rows or of none, and the row of the prompt 'a' has"
        ):
            further_columns(given)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"topic": ["x"]}, r"columns\['topic'\] must have one value per prompt, wanted 2, got 1"),
        ({"topic": "xy"}, r"columns\['topic'\] must be a list, one value per prompt, got 'xy'"),
        ({"topic": 3}, r"columns\['topic'\] must be a list, one value per prompt, got 3"),
        ({3: ["x", "y"]}, "columns: a column's name must be a text, got 3"),
    ],
)
def test_a_column_has_a_name_and_a_value_per_prompt(columns, named, make_model, tokenizer):
    with pytest.raises(ValueError, match=rf"rollout: {named}"):
        l3ms.rollout(make_model(), tokenizer, ["a", "b"], columns=columns)
