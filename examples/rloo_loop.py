"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740) on the fused head, required to keep to a length.

    python examples/rloo_loop.py MODEL PROMPTS.jsonl          # rows of {"prompt": ...}

The weights of the responses are known before the head runs, so loss and gradients come from one pass over the vocabulary. The bound adds
its own weights to them: one backward for the reward and every constraint.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms
from l3m_kernels import weighted_log_likelihood


def reward(completions):
    """Yours. Here: words that are not said twice."""
    return torch.tensor([len(set(text.split())) / max(len(text.split()), 1) for text in completions])


def main(folder, data, low=50.0, high=100.0, iterations=200, new_tokens=256, questions=4, answers=4):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    bounds = l3ms.Length(min=float(low), max=float(high))
    base = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.5, 0.95))
    opt = l3ms.L3MOptimizer(base, [bounds], mu=l3ms.NoiseFloorDecay(1.0, 1e-6, steps=int(iterations)))
    with open(data) as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    for step in range(int(iterations)):
        asked = [prompts[(questions * step + i) % len(prompts)] for i in range(questions) for _ in range(answers)]
        rollout = l3ms.rollout(model, tokenizer, asked, max_new_tokens=int(new_tokens), chat_template=False)
        scores = reward(rollout.completions).view(questions, answers)
        others = (scores.sum(1, keepdim=True) - scores) / (
            answers - 1
        )  # the mean of the other answers to the same question
        advantages = (scores - others).flatten() / (len(asked) * rollout.lengths.float().mean())
        wanted = opt.observe(rollout.rewards([bounds]), rollout.lengths)  # of the bound, divided by S
        weights = opt.task_weight.float() * advantages + wanted

        targets = torch.nn.functional.pad(rollout.labels[:, 1:], (0, 1), value=-100)
        hidden = model.model(rollout.input_ids, attention_mask=rollout.attention_mask).last_hidden_state
        loss, _ = weighted_log_likelihood(hidden, model.lm_head.weight, targets, weights)
        loss.backward()
        opt.step()
        opt.zero_grad()
    print(f"reward {scores.mean().item():.3f}", {name: round(value, 3) for name, value in opt.metrics().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
