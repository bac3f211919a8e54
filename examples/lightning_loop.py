"""A length bound in Lightning: manual optimization, two half-steps a batch.

    pip install lightning; python examples/lightning_loop.py MODEL ROWS.jsonl   # of {"prompt": ..., "completion": ...}

Automatic optimization makes one step of each batch: L3MOptimizer refuses it.
"""

import json
import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms


class Constrained(lightning.LightningModule):
    automatic_optimization = False

    def __init__(self, folder, low, high, iterations, new_tokens):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.bounds, self.iterations, self.new_tokens = l3ms.Length(min=low, max=high), iterations, new_tokens

    def configure_optimizers(self):
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.5, 0.95))
        return l3ms.L3MOptimizer(base, [self.bounds], mu=l3ms.NoiseFloorDecay(1.0, 1e-6, steps=self.iterations))

    def batch(self, rows):
        """Tokens of prompts and completions; the completions are to be learnt, with their end."""
        prompts = self.tokenizer([row["prompt"] for row in rows])["input_ids"]
        ends = [row["completion"] + self.tokenizer.eos_token for row in rows]
        learnt = self.tokenizer(ends, add_special_tokens=False)["input_ids"]
        both = {"input_ids": [a + b for a, b in zip(prompts, learnt, strict=True)]}
        padded = self.tokenizer.pad(both, padding_side="right", return_tensors="pt")
        labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        for row, prompt in zip(labels, prompts, strict=True):
            row[: len(prompt)] = -100
        return {**padded, "labels": labels}

    def hidden(self, batch):
        return self.model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state

    def training_step(self, rows, _):
        opt = self.optimizers()  # Lightning's: it hands our step() a closure that does nothing
        batch = self.batch(rows)
        self.manual_backward(l3ms.task_loss(self.hidden(batch), self.model.lm_head.weight, batch["labels"]))
        opt.step()
        opt.zero_grad()

        prompts = [row["prompt"] for row in rows]
        rollout = l3ms.rollout(self.model, self.tokenizer, prompts, max_new_tokens=self.new_tokens)
        ours = opt.optimizer
        out = ours.constraint_loss(
            self.hidden(rollout), self.model.lm_head.weight, rollout.labels, rollout.rewards([self.bounds])
        )
        self.manual_backward(out.loss)
        opt.step()
        opt.zero_grad()
        self.log_dict(ours.metrics())


def main(model, data, low=50.0, high=100.0, iterations=200, new_tokens=256):
    with open(data) as file:
        rows = [json.loads(line) for line in file]
    loader = DataLoader(rows, batch_size=8, shuffle=True, drop_last=True, collate_fn=list)
    module = Constrained(model, float(low), float(high), int(iterations), int(new_tokens))
    trainer = lightning.Trainer(max_steps=2 * module.iterations, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)
    print({name: round(value.item(), 3) for name, value in trainer.logged_metrics.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
