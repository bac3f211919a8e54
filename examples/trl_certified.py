"""TRL's GRPO with a bound on the length of responses, three lines of it changed; then whether it holds, on prompts of its own.

pip install ".[trl]"
python examples/trl_certified.py MODEL TRAIN.jsonl HELD_OUT.jsonl     # rows of {"prompt": text or messages}
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import l3ms  # 1


def words(completions, **columns):
    """A reward in TRL's signature, yours. Here: words that are not said twice, so it asks for long answers; the bound does not."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [len(set(text.split())) / 20 for text in texts]


def main(folder, data, held_out, most=28.0, iterations=60, new_tokens=64, rate=1e-3, **arguments):
    dataset = load_dataset("json", data_files=str(data), split="train").select_columns(["prompt"])
    options = {"output_dir": "out", "max_steps": int(iterations), "logging_steps": 1, "report_to": "none"}
    options |= {"per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": int(new_tokens)}
    options |= {"learning_rate": float(rate), "adam_beta1": 0.5, "save_strategy": "no", **arguments}
    if not torch.cuda.is_available():  # TRL takes a GPU and bf16 for granted
        options |= {"use_cpu": True, "bf16": False}
    trainer = l3ms.constrained(GRPOTrainer)(  # 2
        model=str(folder),
        reward_funcs=words,
        args=GRPOConfig(**options),
        train_dataset=dataset,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
        constraints=[l3ms.Length(max=float(most))],  # 3
    )
    trainer.train()

    [bound] = trainer.constraints
    prompts = load_dataset("json", data_files=str(held_out), split="train")["prompt"]
    declared = l3ms.declare(bound, len(prompts), 0.05, known=(1, int(new_tokens)))  # before anything is sampled
    answers = l3ms.rollout(trainer.policy, trainer.processing_class, list(prompts), max_new_tokens=int(new_tokens))
    verdict = l3ms.judge(bound, answers.rewards([bound], trainer.policy)["length"], 0.05, declared)
    print(f"length: {verdict.mean:.1f}, {verdict.lower:.1f} to {verdict.upper:.1f}, at most {most}: {verdict.verdict}")
    for text in answers.completions[:3]:
        print(repr(text))
    return verdict


if __name__ == "__main__":
    main(*sys.argv[1:])
