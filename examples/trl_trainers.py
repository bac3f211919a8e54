"""Constraints inside TRL's trainers: the class is wrapped, and gets `constraints=`; the rest is TRL's.

pip install ".[trl]"
python examples/trl_trainers.py sft MODEL ROWS.jsonl           # rows of {"prompt": ..., "completion": ...}
python examples/trl_trainers.py grpo MODEL ROWS.jsonl          # the same: their prompts
"""

import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import l3ms


def variety(completions, **columns):
    """A reward in TRL's signature, yours. Here: words that are not said twice."""
    return [len(set(text.split())) / max(len(text.split()), 1) for text in completions]


def main(kind, folder, data, low=50.0, high=100.0, iterations=200, new_tokens=256, **arguments):
    rows = load_dataset("json", data_files=str(data), split="train")
    bounds = [l3ms.Length(min=float(low), max=float(high))]
    options = {"output_dir": "out", "max_steps": int(iterations), "per_device_train_batch_size": 8, "report_to": "none"}
    options |= {"learning_rate": 1e-3, "adam_beta1": 0.5, "logging_steps": 1, "save_strategy": "no", **arguments}
    if kind == "sft":  # task half-steps on the rows, constraint half-steps on fresh responses to their prompts
        trainer = l3ms.constrained(SFTTrainer)(
            model=str(folder),
            args=SFTConfig(**options),
            train_dataset=rows,
            constraints=bounds,
            l3m=l3ms.L3MSettings(constraint_batch_size=16, max_new_tokens=int(new_tokens)),
        )
    else:  # its own samples are weighed: nothing is sampled twice
        trainer = l3ms.constrained(GRPOTrainer)(
            model=str(folder),
            reward_funcs=variety,
            args=GRPOConfig(**options, num_generations=4, max_completion_length=int(new_tokens)),
            train_dataset=rows.select_columns(["prompt"]),
            constraints=bounds,
        )
    trainer.train()
    trainer.save_model("out/model")
    print({name: round(value, 3) for name, value in trainer.l3m_optimizer.metrics().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
