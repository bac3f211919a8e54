"""GRPO (Shao et al. 2024, arXiv 2402.03300) on the fused head: several steps on one set of answers, ratios clipped, token by token.

    python examples/grpo_loop.py MODEL PROMPTS.jsonl          # rows of {"prompt": ...}

Any loss of log-likelihoods of tokens goes through the head this way. Inside TRL's trainer it is `l3ms.constrained(GRPOTrainer)`.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms
from l3m_kernels import log_likelihood


def reward(completions):
    """Yours. Here: words that are not said twice."""
    return torch.tensor([len(set(text.split())) / max(len(text.split()), 1) for text in completions])


def token_scores(model, rollout):
    """(N, L) log pi of the token that each position predicts, 0 where that is no answer's."""
    targets = torch.nn.functional.pad(rollout.labels[:, 1:], (0, 1), value=-100)
    hidden = model.model(rollout.input_ids, attention_mask=rollout.attention_mask).last_hidden_state
    return log_likelihood(hidden, model.lm_head.weight, targets).token


def main(folder, data, iterations=200, new_tokens=256, steps=2, questions=4, answers=4, clip=0.2):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with open(data) as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    for iteration in range(int(iterations)):
        asked = [prompts[(questions * iteration + i) % len(prompts)] for i in range(questions) for _ in range(answers)]
        rollout = l3ms.rollout(model, tokenizer, asked, max_new_tokens=int(new_tokens), chat_template=False)
        scores = reward(rollout.completions).view(questions, answers)
        spread = scores.std(1, keepdim=True) + 1e-4
        advantages = ((scores - scores.mean(1, keepdim=True)) / spread).flatten()[:, None]
        with torch.no_grad():
            before = token_scores(model, rollout)
        for _ in range(int(steps)):
            ratio = torch.exp(token_scores(model, rollout) - before)  # 1 where there is no answer's token
            clipped = ratio.clamp(1 - float(clip), 1 + float(clip))
            gain = torch.minimum(ratio * advantages, clipped * advantages) * (before != 0)
            loss = -(gain.sum(1) / rollout.lengths).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
    print(f"reward {scores.mean().item():.3f}, length {rollout.lengths.float().mean().item():.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
