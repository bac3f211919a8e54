"""Prompts, and their tokens."""

from typing import Any

Prompt = str | list[dict[str, str]]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Tokens of a prompt, ready to be continued."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
        return ids
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def as_turns(tokenizer: Any, prompt: Prompt) -> Prompt:
    """A text becomes one user turn where the tokenizer has a chat template, as the model was trained to be asked."""
    if isinstance(prompt, str) and prompt and getattr(tokenizer, "chat_template", None):
        return [{"role": "user", "content": prompt}]
    return prompt
