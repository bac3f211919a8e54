"""A reward that somebody else computes, over HTTP: asked for all responses at a time, while the training goes on.

    python examples/reward_service.py MODEL ROWS.jsonl URL       # POST {"texts": [...]} answers {"scores": [...]}

An `async` function is a reward like any other. A failed request is an error that names it and ends the run; a None leaves a response out.
"""

import asyncio
import json
import sys
import urllib.request

from transformers import AutoModelForCausalLM, AutoTokenizer

import l3ms


def service(url, timeout=60.0):
    """-> a reward in TRL's signature that posts the completions to `url`."""

    def post(texts):
        body = json.dumps({"texts": texts}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)["scores"]

    async def score(prompts, completions, **columns):
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        return await asyncio.to_thread(post, texts)

    return score


def main(folder, data, url, least=0.5, iterations=200, new_tokens=256):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = []
    with open(data) as file:
        for row in map(json.loads, file):
            prompt = tokenizer(row["prompt"])["input_ids"]
            learnt = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            labels = [-100] * len(prompt) + learnt
            rows.append({"prompt": row["prompt"], "input_ids": prompt + learnt, "labels": labels})
    trainer = l3ms.L3MTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=l3ms.L3MConfig(
            output_dir="out",
            max_steps=int(iterations),
            constraint_batch_size=8,
            max_new_tokens=int(new_tokens),
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
        ),
        constraints=[l3ms.Constraint("service", service(url), min=float(least))],
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model("out/model")
    print({name: round(value, 3) for name, value in trainer.l3m_optimizer.metrics().items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
