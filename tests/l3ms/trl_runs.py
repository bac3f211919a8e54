"""Short runs of TRL's trainers under constraints: prompts of one word, a model of 17 tokens, on a CPU."""

import importlib
from typing import Any

import l3ms

WORDS = ("a", "b", "c", "d", "e", "f")
PROMPTS = [{"prompt": word, "number": n} for n, word in enumerate(WORDS * 4)]
LONG, SHORT = "e f def name ( ) e f", "e f"  # of 9 and 3 tokens with the end

COMMON: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "optim": "sgd",
    "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
    "disable_tqdm": True, "activation_checkpointing": False,
}  # fmt: skip


def settings(kind: str, folder: Any, **options: Any) -> Any:
    """The arguments of a trainer of TRL, or transformers' own."""
    import transformers

    name = "TrainingArguments" if kind == "Trainer" else f"{kind.removesuffix('Trainer')}Config"
    own: dict[str, Any] = {
        "GRPOTrainer": {"num_generations": 4, "max_completion_length": 16, "per_device_train_batch_size": 8},
        "RLOOTrainer": {"num_generations": 4, "max_completion_length": 16, "per_device_train_batch_size": 8},
        "SFTTrainer": {"max_length": None},
        "DPOTrainer": {"max_length": None},
        "Trainer": {"remove_unused_columns": False},
    }
    made = getattr(transformers if kind == "Trainer" else importlib.import_module("trl"), name)
    return made(**{**COMMON, "output_dir": str(folder), **own[kind], **options})


def dataset(kind: str, tokenizer: Any) -> Any:
    from datasets import Dataset

    if kind == "SFTTrainer":
        rows = [{**row, "completion": f" {LONG}"} for row in PROMPTS]
    elif kind == "DPOTrainer":
        rows = [{**row, "chosen": f" {LONG}", "rejected": f" {SHORT}"} for row in PROMPTS]
    elif kind == "Trainer":
        rows = []
        for row in PROMPTS:
            prompt, answer = tokenizer(row["prompt"])["input_ids"], [*tokenizer(LONG)["input_ids"], 1]
            rows.append({**row, "input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    else:
        rows = PROMPTS
    return Dataset.from_list(rows)


def longer(completion_ids: Any, **columns: Any) -> list[float]:
    """The reward of the online trainers: tokens."""
    return [float(len(ids)) for ids in completion_ids]


def make(
    kind: str, folder: Any, tokenizer: Any, model: Any, *, constraints: Any, base: Any = None, **options: Any
) -> Any:
    """A constrained trainer of a `kind` by name, or of the class `base` of that kind. Options of it, and of its arguments."""
    import transformers

    given = {
        name: options.pop(name)
        for name in ("prompts", "l3m", "peft_config", "callbacks", "train_dataset")
        if name in options
    }
    if "l3m" not in given and kind in ("Trainer", "SFTTrainer", "DPOTrainer"):
        given["l3m"] = l3ms.L3MSettings(constraint_batch_size=8, max_new_tokens=16)
    if kind in ("GRPOTrainer", "RLOOTrainer"):
        given["reward_funcs"] = options.pop("reward_funcs", longer)
    if kind == "Trainer":
        from l3ms.model.batches import Collator

        given["data_collator"] = Collator(0)
    given.setdefault("train_dataset", dataset(kind, tokenizer))
    model.save_pretrained(f"{folder}/start")  # where TRL finds the reference model
    model.name_or_path = model.config._name_or_path = f"{folder}/start"
    base = base or getattr(transformers if kind == "Trainer" else importlib.import_module("trl"), kind)
    return l3ms.constrained(base)(
        model=model, args=settings(kind, folder, **options), processing_class=tokenizer, constraints=constraints, **given
    )  # fmt: skip
