"""What the contestants by TRL share: the base model, its adapters, the rows, and the arguments of a small CPU run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.versus.task import Task, as_row, examples
from l3ms.rollouts.prompts import as_turns

# A run that is a few minutes on a CPU: float32 as the others', no recomputation, nothing saved or reported on the way
TRAINER: dict[str, Any] = {
    "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
    "report_to": [], "disable_tqdm": True,
}  # fmt: skip


def base_model(task: Task) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(task.model, dtype="float32"), tokenizer


def adapters(task: Task) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=task.lora_r, lora_alpha=task.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def resumed(model: Any, folder: str) -> Any:
    """`model` with the adapters of `folder`, to be trained on."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def dataset(task: Task, tokenizer: Any) -> Any:
    """The training rows, in the form that TRL applies chat templates to where there is one."""
    from datasets import Dataset

    rows = [as_row(as_turns(tokenizer, example.prompt), example.completion) for example in examples(task)[0]]
    return Dataset.from_list(rows)


def save(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The trained adapters alone: TRL keeps a frozen copy of those it began with in the model."""
    weights = folder / "weights"
    model.save_pretrained(weights, selected_adapters=["default"])
    tokenizer.save_pretrained(weights)
    return weights
