"""Prompts, and their tokens: where a rollout starts is, token for token, the prompt part of a training row."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]  # role, content, and what else the chat template reads: tool_calls, name, tool_call_id, ...
Prompt = str | list[Message]

TOOLS = "tools"  # a column: JSON schemas
TEMPLATE_OPTIONS = "chat_template_kwargs"  # a column: what else the chat template of the row reads, as in TRL
MARK = "\ue000"  # of Unicode's private use: no template writes it


class TemplateRefusal(ValueError):
    """A chat template that does not render a conversation: what it said, in one line."""


class BrokenTemplate(TemplateRefusal):
    """One that renders none: it is not a template."""


def encode_prompt(tokenizer: Any, prompt: Prompt, /, **options: Any) -> list[int]:
    """Tokens of a prompt, ready to be continued.

    Args:
        options: of the chat template, for messages: `tools`, and what else it reads.

    Raises:
        TemplateRefusal: the chat template does not render the messages.
    """
    if not isinstance(prompt, str):
        return encode_chat(tokenizer, prompt, add_generation_prompt=True, **options)
    ids = encode_text(tokenizer, prompt)
    end, sign = tokenizer.eos_token_id, getattr(tokenizer, "eos_token", None)
    keep = 1 if end == getattr(tokenizer, "bos_token_id", None) else 0  # that one opens the text
    if sign and prompt.rstrip().endswith(sign):  # the prompt's own
        while ids[-2:] == [end, end]:
            ids.pop()
        return ids
    while len(ids) > keep and ids[-1] == end:  # some tokenizers close every text
        ids.pop()
    return ids


def template_options(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """What the chat template is given beside the messages of a row: tools, JSON schemas or functions as transformers takes them, and
    options of its own; either may be a JSON text.

    Raises:
        ValueError: one of the two is something else, or an option is an argument of `apply_chat_template`.
    """
    tools, more = (_parsed(columns[name][row]) if name in columns else None for name in (TOOLS, TEMPLATE_OPTIONS))
    if not _empty(tools) and not (
        isinstance(tools, Sequence) and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise ValueError(
            f"{TOOLS} must be a list of JSON schemas or functions, or a JSON text of one, got {tools!r:.80}"
        )
    if not _empty(more) and not isinstance(more, Mapping):
        raise ValueError(f"{TEMPLATE_OPTIONS} must be a dict, or a JSON text of one, got {more!r:.80}")
    if taken := taken_options(more or {}):
        raise ValueError(f"{TEMPLATE_OPTIONS} must hold what the chat template reads, and {taken[0]!r} is not its own")
    return ({TOOLS: list(tools)} if tools else {}) | dict(more or {})


def taken_options(options: Mapping[str, Any]) -> list[str]:
    """Those that a chat template cannot be given, since `apply_chat_template` has arguments of these names."""
    from transformers import PreTrainedTokenizerBase

    own = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents"}
    return sorted(own & options.keys())


def _parsed(given: Any) -> Any:
    """Of a JSON text what it holds, where it is one: tables keep tools so."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given) if given.strip() else None
    except ValueError:
        return given


def _empty(given: Any) -> bool:
    return given is None or (isinstance(given, (Sequence, Mapping)) and not len(given))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that stands by itself. Where it opens with the BOS token already, that is not put there again."""
    ids = list(tokenizer(text)["input_ids"])
    bos, sign = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "bos_token", None)
    if bos is not None and ids[:2] == [bos, bos] and text.lstrip().startswith(str(sign)):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], /, *, add_generation_prompt: bool = False, **options: Any
) -> list[int]:
    """Tokens of a conversation, as the chat template renders it."""
    return list(_render(tokenizer, messages, tokenize=True, add_generation_prompt=add_generation_prompt, **options))


def chat_text(
    tokenizer: Any, messages: Sequence[Message], /, *, add_generation_prompt: bool = False, **options: Any
) -> str:
    """What the chat template renders of a conversation."""
    return _render(tokenizer, messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options)


def _render(tokenizer: Any, messages: Sequence[Message], /, **options: Any) -> Any:
    parts = _takes_parts_only(tokenizer, str(getattr(tokenizer, "chat_template", None)))
    return _apply(tokenizer, [_plain(message, parts) for message in messages], **options)


def _plain(message: Mapping[str, Any], parts: bool) -> Message:
    """Without what is null, which some templates would write as None; its content as the template reads it."""
    given = {key: value for key, value in message.items() if value is not None}
    if isinstance(given.get("content"), (str, list, tuple)):
        try:
            text = content_text(given["content"])
        except ValueError as error:
            raise TemplateRefusal(str(error)) from None
        given["content"] = [{"type": "text", "text": text}] if parts else text
    return given


def content_text(content: Any) -> str:
    """The text of a message's content, which may be in parts, `[{"type": "text", "text": ...}, ...]`, or missing.

    Raises:
        ValueError: a part that is no text.
    """
    if not isinstance(content, (list, tuple)):
        return str(content or "")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"a message's content holds a part of type {kind!r}: a language model reads parts of type 'text' alone"
            )
    return "".join(part["text"] for part in content)


def _apply(tokenizer: Any, messages: list[Message], /, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: of any kind
        said = " ".join(str(error).split())[:300] or type(error).__name__
        import jinja2  # with torch

        if isinstance(error, jinja2.TemplateSyntaxError):
            raise BrokenTemplate(f"its chat template is none: line {error.lineno}: {said}") from error
        if not isinstance(error, ValueError) and type(error) is not jinja2.TemplateError:
            said = f"{type(error).__name__}: {said}"
        raise TemplateRefusal(said) from error


@functools.lru_cache(maxsize=4)
def _takes_parts_only(tokenizer: Any, template: str) -> bool:
    """Whether the template reads a content as a list of parts, and nothing of one that is text."""

    def shows(content: Any) -> bool:
        try:
            return MARK in _apply(tokenizer, [{"role": "user", "content": content}], tokenize=False)
        except TemplateRefusal:
            return False

    return not shows(MARK) and shows([{"type": "text", "text": MARK}])


def as_turns(tokenizer: Any, prompt: Prompt) -> Prompt:
    """A text becomes one user turn where the tokenizer has a chat template, as the model was trained to be asked."""
    if isinstance(prompt, str) and prompt and getattr(tokenizer, "chat_template", None):
        return [{"role": "user", "content": prompt}]
    return prompt
