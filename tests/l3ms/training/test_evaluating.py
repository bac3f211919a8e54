"""`evaluate` and `predict`: the loss of all rows, and logits as transformers gives them."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from training_runs import log_likelihood, rows

import l3ms
from l3ms.model.batches import Collator

# ---- the loss ----


def mean_nll(model, given, collate):
    with torch.no_grad():
        total, count = log_likelihood(model.eval(), collate(given))
    return -(total / count)[count > 0].double().mean().item()


@pytest.mark.parametrize("count", [3, 8, 11])
@pytest.mark.parametrize("scored", ["all", "some"])
def test_eval_loss_is_the_mean_over_all_rows(make_model, train, count, scored):
    """Also over those after the last whole batch, and where batches have rows with nothing scored."""
    held_out = rows(count, seed=5)
    if scored == "some":
        for row in held_out[1 : count - 1]:
            row["labels"] = [-100] * len(row["labels"])
    trainer, _ = train(make_model(), start=False, held_out=held_out, per_device_eval_batch_size=4)
    expected = mean_nll(make_model(), held_out, trainer.data_collator)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.args.dataloader_drop_last


def test_each_of_several_data_sets_has_its_own(make_model, train):
    parts = {"one": rows(5, seed=5), "two": rows(9, seed=6)}
    trainer, _ = train(make_model(), start=False, per_device_eval_batch_size=4)
    found = trainer.evaluate(parts)
    for name, part in parts.items():
        expected = mean_nll(make_model(), part, trainer.data_collator)
        assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-6)


# ---- logits ----


def test_metrics_are_given_logits_labels_inputs_and_losses(tmp_path, tokenizer, make_model):
    held_out, seen = rows(7, seed=5), []

    def accuracy(prediction):
        seen.append(prediction)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right[prediction.label_ids[:, 1:] != -100].mean())}

    model = make_model()
    settings = l3ms.L3MConfig(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, per_device_eval_batch_size=3,
        include_for_metrics=["inputs", "loss"],
    )  # fmt: skip
    trainer = l3ms.L3MTrainer(
        model, settings, constraints=[l3ms.Length(max=3)], train_dataset=rows(), eval_dataset=held_out,
        processing_class=tokenizer, compute_metrics=accuracy,
    )  # fmt: skip
    found = trainer.evaluate()
    batch = trainer.data_collator(held_out)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[batch["labels"][:, 1:] != -100]
    assert found["eval_accuracy"] == pytest.approx(right.double().mean().item())
    assert seen[0].predictions.shape == logits.shape
    real = batch["attention_mask"].bool().numpy()
    np.testing.assert_allclose(seen[0].predictions[real], logits.numpy()[real], atol=1e-5)
    assert seen[0].inputs.shape == batch["input_ids"].shape
    assert len(seen[0].losses) == 7
    predicted = trainer.predict(held_out)  # type: ignore[arg-type]
    np.testing.assert_array_equal(predicted.predictions, seen[0].predictions)


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
def test_a_metric_that_is_called_loss_is_what_the_trainer_makes_of_it(tmp_path, tokenizer, make_model, name):
    """transformers puts "loss" of `compute_metrics` into eval_loss, and its own in the place of an "eval_loss"."""
    args: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    more: dict[str, Any] = {"eval_dataset": rows(4, seed=5), "compute_metrics": lambda given: {name: 123.0}}
    ours = l3ms.L3MTrainer(make_model(), l3ms.L3MConfig(str(tmp_path), solver="none", **args), **more)
    plain = transformers.Trainer(
        make_model(), transformers.TrainingArguments(str(tmp_path), **args), data_collator=Collator(0), **more
    )
    found = ours.evaluate()["eval_loss"]
    assert found == pytest.approx(plain.evaluate()["eval_loss"], rel=0.5)
    assert (found == 123.0) == (name == "loss")
    assert ours.compute_metrics is more["compute_metrics"]


def test_logits_are_preprocessed(tmp_path, tokenizer, make_model):
    settings = l3ms.L3MConfig(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = l3ms.L3MTrainer(
        make_model(), settings, constraints=[l3ms.Length(max=3)], train_dataset=rows(), eval_dataset=rows(4),
        processing_class=tokenizer, compute_metrics=lambda given: {"shape": list(given.predictions.shape)},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    shape = trainer.evaluate()["eval_shape"]
    assert shape == list(trainer.data_collator(rows(4))["input_ids"].shape)


@pytest.mark.parametrize("further", ["another loss", "other labels", "labels in place"])
def test_a_compute_loss_of_ones_own(make_model, tmp_path, tokenizer, further):
    class Mine(l3ms.L3MTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            if further == "another loss":
                out = model(input_ids=inputs["input_ids"], labels=inputs["labels"])
                return (out.loss, out) if return_outputs else out.loss
            labels = inputs["labels"] if further == "labels in place" else inputs["labels"].clone()
            labels[:, :3] = -100
            return super().compute_loss(model, {**inputs, "labels": labels}, return_outputs, **options)

    args = l3ms.L3MConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4, solver="none", report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    held_out = rows(4, seed=5)
    trainer = Mine(make_model(), args, train_dataset=rows(8), eval_dataset=held_out, processing_class=tokenizer)
    collate: Any = trainer.data_collator
    model: Any = trainer.model
    batch = collate(held_out)
    if further == "another loss":
        expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    else:
        expected = mean_nll(
            make_model(), [{**row, "labels": [-100] * 3 + row["labels"][3:]} for row in held_out], collate
        )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
