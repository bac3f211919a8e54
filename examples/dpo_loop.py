"""DPO (Rafailov et al. 2023, arXiv 2305.18290) on the fused head: log-likelihoods of pairs, and no logits in memory.

python examples/dpo_loop.py MODEL PAIRS.jsonl          # rows of {"prompt": ..., "chosen": ..., "rejected": ...}
"""

import json
import sys

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from l3m_kernels import log_likelihood


def encoded(tokenizer, prompts, answers):
    """Padded tokens, and the token that each position predicts where that belongs to an answer."""
    asked = tokenizer(prompts)["input_ids"]
    said = tokenizer([answer + tokenizer.eos_token for answer in answers], add_special_tokens=False)["input_ids"]
    both = {"input_ids": [a + b for a, b in zip(asked, said, strict=True)]}
    batch = tokenizer.pad(both, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, prompt in zip(labels, asked, strict=True):
        row[: len(prompt)] = -100
    return batch, F.pad(labels[:, 1:], (0, 1), value=-100)


def score(model, batch, targets):
    """(N,) log pi(answer | prompt)."""
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return log_likelihood(hidden, model.lm_head.weight, targets).sequence


def main(folder, data, beta=0.1, iterations=200, rate=1e-5, batch_size=8):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), lr=float(rate))
    with open(data) as file:
        pairs = [json.loads(line) for line in file]
    for step in range(int(iterations)):
        rows = [pairs[(batch_size * step + i) % len(pairs)] for i in range(batch_size)]
        prompts = [row["prompt"] for row in rows] * 2
        batch, targets = encoded(
            tokenizer, prompts, [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        )
        with torch.no_grad():
            before = score(reference, batch, targets)
        chosen, rejected = (score(model, batch, targets) - before).chunk(2)  # log ratios to the reference
        loss = -F.logsigmoid(float(beta) * (chosen - rejected)).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    right = (chosen > rejected).float().mean().item()
    print(
        f"loss {loss.item():.3f}, {right:.0%} of the last pairs told apart, margin {(chosen - rejected).mean().item():.2f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
