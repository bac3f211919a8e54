"""What the tests of the trainer share: rows, a recorder of what it trained on, short runs, and how two are compared."""

from typing import Any

import torch
from transformers import TrainerCallback

import l3ms


def rows(count=24, seed=0):
    """Prompts of 1 to 3 tokens, responses of 2 to 6 with EOS."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        prompt = torch.randint(3, 17, (1 + n % 3,), generator=generator).tolist()
        response = [*torch.randint(3, 17, (1 + n % 5,), generator=generator).tolist(), 1]
        made.append(
            {
                "input_ids": prompt + response,
                "labels": [-100] * len(prompt) + response,
                "prompt": f"prompt {n}",
                "number": n,
            }
        )
    return made


CONSTRAINTS = (l3ms.Length(max=6),)


class Recorder(TrainerCallback):
    """What the trainer trained on and where it was after each iteration."""

    def __init__(self):
        self.batches: list[dict[str, torch.Tensor]] = []
        self.rollouts: list[Any] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        model = self.trainer.model
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.rollouts.append(self.trainer.last_rollout)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


def run(
    folder,
    tokenizer,
    model,
    *,
    constraints=CONSTRAINTS,
    data=None,
    prompts=None,
    held_out=None,
    start=True,
    resume=None,
    engine=None,
    **options,
):
    """-> the trainer, after training unless `start` is False, and its recorder."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "constraint_batch_size": 6,
        "max_new_tokens": 16,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    recorder = Recorder()
    trainer = l3ms.L3MTrainer(
        model,
        l3ms.L3MConfig(**{**settings, **options}),
        constraints=constraints,
        train_dataset=rows() if data is None else data,
        prompts=prompts,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[recorder],
        engine=engine,
    )
    recorder.trainer = trainer
    collate = trainer.data_collator

    def recording(features):
        recorder.batches.append(collate(features))
        return recorder.batches[-1]

    trainer.data_collator = recording
    if start:
        trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def assert_same_weights(model, expected, tolerance=1e-6):
    expected = dict(expected.named_parameters()) if isinstance(expected, torch.nn.Module) else expected
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_moved(model, start):
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    assert max(moved) > 1e-3


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def timeless(entries):
    """Lines of a log without what differs from run to run: the time that it took, and the memory."""
    clocked = ("time/", "memory/", "seconds")
    return [{key: value for key, value in entry.items() if not key.startswith(clocked)} for entry in entries]


def log_likelihood(model, batch, temperature=1.0):
    """(N,) log pi of the labels and their (N,) counts, from the logits that the model returns."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    token = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, targets[..., None].clamp(min=0))[..., 0]
    return (token * scored).sum(1), scored.sum(1)
