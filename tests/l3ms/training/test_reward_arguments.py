"""TRL's `trainer_state`, `log_extra` and `log_metric`, in a training."""

import pytest
from training_runs import rows

import l3ms


def test_reward_functions_see_the_training_and_write_to_its_log(make_model, train):
    steps = []

    def asks(prompts, completions, trainer_state, log_extra, log_metric, **columns):
        steps.append(trainer_state.global_step)
        log_metric("step", trainer_state.global_step)
        log_metric("step", trainer_state.global_step + 1)
        log_extra("own", [f"{trainer_state.global_step}: {number}" for number in columns["number"]])
        return [1.0] * len(prompts)

    def softly(prompts, completions, **columns):
        columns["log_metric"]("max_steps", columns["trainer_state"].max_steps)
        return [1.0] * len(prompts)

    constraints = (l3ms.Constraint("asks", asks, max=2), l3ms.Constraint("softly", softly, monitor=True))
    trainer, _ = train(make_model(), constraints=constraints, max_steps=4, logging_steps=2)
    assert steps == [0, 1, 2, 3]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [(line["rewards/step"], line["rewards/max_steps"]) for line in lines] == [(1.0, 4.0), (3.0, 4.0)]
    assert trainer.last_extra == {"own": [f"3: {number}" for number in trainer.last_rollout.columns["number"]]}


def test_a_watch_gives_them_the_same_state_and_keeps_its_held_out_responses_out_of_the_log(
    make_model, tokenizer, tmp_path
):
    steps = []

    def asks(prompts, completions, trainer_state, log_metric):
        steps.append((len(prompts), trainer_state.global_step))
        log_metric("rows", len(prompts))
        return [1.0] * len(prompts)

    args = l3ms.L3MConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, constraint_batch_size=6, max_new_tokens=4, optim="sgd",
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    watch = l3ms.Watch(held_out=rows(3), held_out_every=1, every=0)
    trainer = l3ms.L3MTrainer(
        make_model(), args, constraints=[l3ms.Constraint("asks", asks, max=2)], train_dataset=rows(),
        processing_class=tokenizer, callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    assert steps == [(6, 0), (3, 1), (6, 1), (3, 2)]
    assert [line["rewards/rows"] for line in trainer.state.log_history if "loss" in line] == [6.0, 6.0]


def test_a_watch_refuses_held_out_columns_whose_names_are_taken_before_the_first_step(make_model, tokenizer, tmp_path):
    watch = l3ms.Watch(held_out=[{**row, "ended": 1} for row in rows(3)])
    args = l3ms.L3MConfig(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = l3ms.L3MTrainer(
        make_model(),
        args,
        constraints=[l3ms.Length(max=6)],
        train_dataset=rows(),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    with pytest.raises(ValueError, match="Watch: held_out: a column cannot be named 'ended'"):
        trainer.train()
    assert trainer.state.global_step == 0
