"""TRL's SFTTrainer, where its users begin: what it leaves is what `trl_grpo` goes on from. A contestant too: it meets the bounds or not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.versus.task import Task, Trained, only
from experiments.versus.trl_common import TRAINER, adapters, base_model, dataset, save


def train(task: Task, setting: Mapping[str, Any], folder: Path) -> Trained:
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    only(setting)
    model, tokenizer = base_model(task)
    arguments = SFTConfig(
        output_dir=str(folder / "trainer"),
        max_steps=task.iterations,
        per_device_train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        warmup_steps=max(1, task.iterations // 10),
        max_length=task.max_length,
        completion_only_loss=True,
        seed=task.seed,
        **TRAINER,
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=dataset(task, tokenizer), processing_class=tokenizer, peft_config=adapters(task)
    )
    trainer.train()
    log = [{"iteration": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row]
    return Trained(save(trainer.model, tokenizer, folder), 0, log)
