"""L3MTrainer on several processes: nothing in the script knows of them.

torchrun --nproc-per-node 4 examples/trainer_launch.py MODEL ROWS.jsonl          # rows of {"prompt": ..., "completion": ...}
accelerate launch --config_file examples/fsdp2.yaml examples/trainer_launch.py MODEL ROWS.jsonl        # weights in parts, on GPUs
"""

import json
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms


def main(folder, data, low=50.0, high=100.0, iterations=200, new_tokens=256):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(data) as file:
        texts = [json.loads(line) for line in file]
    rows = []
    for text in texts:
        prompt = tokenizer(text["prompt"])["input_ids"]
        learnt = tokenizer(text["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        labels = [-100] * len(prompt) + learnt
        rows.append({"prompt": text["prompt"], "input_ids": prompt + learnt, "labels": labels})
    trainer = l3ms.L3MTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=l3ms.L3MConfig(
            output_dir="out",
            max_steps=int(iterations),
            per_device_train_batch_size=8,
            constraint_batch_size=8,  # responses of each rank
            max_new_tokens=int(new_tokens),
            learning_rate=1e-3,
            logging_steps=1,
            save_steps=50,
            report_to="none",
        ),
        constraints=[l3ms.Length(min=float(low), max=float(high))],
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model("out/model")
    if trainer.is_world_process_zero():
        print({name: round(value, 3) for name, value in trainer.l3m_optimizer.metrics().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
