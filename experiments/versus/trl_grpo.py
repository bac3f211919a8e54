"""TRL's GRPOTrainer with a penalty on the length as the reward, the two ways in which its users keep a task in mind.

After fine-tuning: from the adapters that SFTTrainer left (`task.start`), with a reward for the length alone and TRL's `beta`, which holds
the policy near the fine-tuned one. All that GRPO knows of the task is that divergence.

With fine-tuning (`penalty`): GRPOTrainer has no loss on data beside a reward (TRL 1.16), so a subclass adds one in `compute_loss`:
loss = task + penalty x GRPO's. It starts from the base model, as L3M does.

The reward is of a response, since that is all a reward can be of: minus the distance of its length to [min, max], in units of the middle. A
range for the mean, which single responses may leave, cannot be written as one. GRPO divides rewards by their deviation in a group, so a
weight on the one reward would be nothing; what can be tuned is `beta`, or `penalty`, and the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.versus.task import Tally, Task, Trained, encoded, examples, only
from experiments.versus.trl_common import TRAINER, adapters, base_model, dataset, resumed, save
from l3ms.model.batches import Collator
from l3ms.model.orders import PromptOrder


def train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained:
    """setting: `beta` (from `task.start`) or `penalty` (from the base model); `generations` per prompt, 4 by default."""
    from trl import GRPOConfig  # type: ignore[import-not-found]

    own = only(setting, "beta", "penalty", "generations")
    if ("penalty" in own) == (task.start is not None):
        raise ValueError(
            "setting: penalty is for a training from the base model, beta for one that goes on from adapters"
        )
    tally = Tally()
    model, tokenizer = base_model(task)
    arguments = GRPOConfig(
        output_dir=str(folder / "trainer"),
        max_steps=task.iterations,
        per_device_train_batch_size=task.responses,
        num_generations=int(own.get("generations", min(4, task.responses))),
        max_completion_length=task.max_new_tokens,
        learning_rate=task.learning_rate,
        warmup_steps=max(1, task.iterations // 10),
        beta=float(own.get("beta", 0.0)),
        seed=task.seed,
        **TRAINER,
    )
    options: dict[str, Any] = {
        "reward_funcs": length_reward(task, tally),
        "args": arguments,
        "train_dataset": dataset(task, tokenizer).remove_columns("completion"),
        "processing_class": tokenizer,
    }
    if task.start is None:
        batches = task_batches(task, tokenizer)
        trainer = with_task(float(own["penalty"]), batches)(model, peft_config=adapters(task), **options)
    else:
        from trl import GRPOTrainer  # type: ignore[import-not-found]

        trainer = GRPOTrainer(resumed(model, task.start), **options)
    trainer.train()
    return Trained(save(trainer.model, tokenizer, folder), tally.tokens, tally.log)


def length_reward(task: Task, tally: Tally) -> Callable[..., list[float]]:
    def length(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths = [len(ids) for ids in completion_ids]
        tally.add(lengths)
        return [-max(task.min - n, n - task.max, 0.0) / task.unit for n in lengths]

    return length


def with_task(penalty: float, batches: Iterator[dict[str, Any]]) -> type:
    """A GRPOTrainer whose loss has the task's in it."""
    from trl import GRPOTrainer  # type: ignore[import-not-found]

    class TaskAndGRPO(GRPOTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            policy = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return model(**next(batches)).loss + penalty * policy

    return TaskAndGRPO


def task_batches(task: Task, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Training rows in an order of the seed, `batch_size` at a time, for ever."""
    rows = PromptOrder(encoded(task, tokenizer, examples(task)[0]).rows, seed=task.seed, rank=0, world=1)
    collate = Collator(tokenizer.pad_token_id)
    while True:
        yield collate(rows.take(task.batch_size))
