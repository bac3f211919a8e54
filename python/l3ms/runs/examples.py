"""Rows to examples: a prompt, its answer, and what the chat template is given with them. Every row is one, or is refused by its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from l3ms.config.yaml_reader import ConfigError
from l3ms.rollouts.prompts import TEMPLATE_OPTIONS, Message, Prompt, taken_options

if TYPE_CHECKING:
    from l3ms.config.run_config import DataConfig

CALLS = ("tool_calls", "function_call")  # an assistant's turn may be these alone
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, order=True)
class Example:
    """A prompt and its answer: of a conversation the last assistant turn, its text or, where there is more to it, the whole message."""

    prompt: Prompt
    completion: str | Message
    columns: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of the chat template: tools, ...
    is_text: bool = False  # of a {"text"} row: all of it is the completion, nothing is put around it
    where: str = field(default="", compare=False)  # FILE, line N
    left_out: int = field(default=0, compare=False)  # turns after the last assistant turn

    @property
    def key(self) -> str:
        """Equal where the prompts are; of a text without a prompt where the texts are."""
        return json.dumps(self.completion if self.is_text else self.prompt, sort_keys=True, default=str)


def example(config: DataConfig, name: str, where: str, row: Any, *, prompt_only: bool = False) -> Example:
    """One checked row; with `prompt_only` it may have no answer, which is empty then. `name` is the field to blame."""
    if not isinstance(row, dict):
        raise ConfigError(name, f"{where}: must be an object with fields, got {type(row).__name__}")
    kind = _kind(config, name, where, row)
    if kind == "messages":
        used = {config.messages}
        found = _conversation(name, f"{where}: {config.messages}", config, row[config.messages], prompt_only)
    elif kind == "text":
        used = {config.text}
        _check_text(name, f"{where}: field {config.text!r}", row[config.text])
        found = Example("", row[config.text], is_text=True)
    else:
        used = {config.prompt, config.completion}
        found = _pair(name, where, config, row, prompt_only)
    options = _options(name, where, config, row)
    columns = {key: value for key, value in row.items() if key not in used}
    return Example(
        found.prompt, found.completion, columns, options, is_text=found.is_text, where=where, left_out=found.left_out
    )


def _kind(config: DataConfig, name: str, where: str, row: dict[str, Any]) -> str:
    """messages, text or pair: what has a column that the configuration names; else by the default names, in this order."""
    here = {field: column for field, column in config.named.items() if column in row and field != "tools"}
    wanted = list(dict.fromkeys("pair" if field in ("prompt", "completion") else field for field in here))
    if len(wanted) > 1:
        columns = ", ".join(f"{field}: {column}" for field, column in here.items())
        raise ConfigError(name, f"{where}: two kinds of rows are named and it is both ({columns}): name one kind")
    if wanted:
        return wanted[0]
    if config.messages in row:
        return "messages"
    return "text" if config.text in row and not {config.prompt, config.completion} & row.keys() else "pair"


def _pair(name: str, where: str, config: DataConfig, row: dict[str, Any], prompt_only: bool) -> Example:
    for column in (config.prompt,) if prompt_only else (config.prompt, config.completion):
        if column not in row:
            fields = ", ".join(map(str, list(row)[:8])) or "none"
            raise ConfigError(name, f"{where}: field {column!r} is missing (fields: {fields})")
    prompt, answer = row[config.prompt], row.get(config.completion, "" if prompt_only else None)
    spots = [f"{where}: field {column!r}" for column in (config.prompt, config.completion)]
    if not isinstance(prompt, list) and not isinstance(answer, list):
        for spot, value in zip(spots, (prompt, answer), strict=True):
            _check_text(name, spot, value)
        return Example(prompt, answer)
    turns = _messages(name, f"{where}: {config.prompt}", f"field {config.prompt!r}", prompt)
    if prompt_only and answer == "":
        return Example(turns, "")
    answers = _messages(name, f"{where}: {config.completion}", f"field {config.completion!r}", answer)
    roles = [str(turn["role"]) for turn in answers]
    if roles != ["assistant"]:
        wanted = "must be one assistant turn, since that is what is sampled again: earlier ones belong to the prompt"
        raise ConfigError(name, f"{spots[1]} {wanted}, got {', '.join(roles)}")
    return Example(turns, _answer(answers[0]))


def _conversation(name: str, spot: str, config: DataConfig, messages: Any, prompt_only: bool) -> Example:
    """Messages up to the last assistant turn -> prompt, that turn -> completion; turns after it are left out, and counted."""
    turns = _messages(name, spot, f"field {config.messages!r}", messages)
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if prompt_only and last < len(turns) - 1:
        return Example(turns, "")
    if last < 1:
        where = spot.removesuffix(f": {config.messages}")
        raise ConfigError(name, f"{where}: {config.messages} needs an assistant turn after the prompt")
    return Example(turns[:last], _answer(turns[last]), left_out=len(turns) - 1 - last)


def _answer(turn: Message) -> str | Message:
    """Its text, where it is no more."""
    return turn["content"] if turn.keys() == {"role", "content"} and isinstance(turn["content"], str) else turn


def _messages(name: str, spot: str, what: str, messages: Any) -> list[Message]:
    """Checked messages with all that they have, contents of text parts joined."""
    if not isinstance(messages, list) or not messages:
        where = spot.rpartition(": ")[0]
        raise ConfigError(name, f"{where}: {what} must be a list of messages, got {messages!r:.60}")
    turns = []
    for index, message in enumerate(messages):
        here = f"{spot}[{index}]"
        more = isinstance(message, dict) and any(message.get(key) for key in (*CALLS, *THOUGHTS))
        if (
            not isinstance(message, dict)
            or not {"role", "content"} - ({"content"} if more else set()) <= message.keys()
        ):
            raise ConfigError(name, f"{here} must hold role and content")
        _check_text(name, f"{here}.role", message["role"])
        content = message.get("content")
        if isinstance(content, list):
            content = _joined(name, f"{here}.content", content)
        if content is not None or not more:
            _check_text(name, f"{here}.content", content)
        _check_calls(name, here, message)
        turns.append(message | ({"content": content} if "content" in message else {}))
    return turns


def _joined(name: str, spot: str, parts: list[Any]) -> str:
    """The text of content parts, `[{"type": "text", "text": ...}, ...]`."""
    texts = []
    for index, part in enumerate(parts):
        here = f"{spot}[{index}]"
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part, dict):
            _check_text(name, f"{here}.text", part.get("text"))
            texts.append(part["text"])
        else:
            raise ConfigError(name, f"{here} is of type {kind!r}; a language model reads parts of type 'text' alone")
    return "".join(texts)


def _check_calls(name: str, spot: str, message: Message) -> None:
    """Whatever a template may read is text that can be written, and calls are what templates take for calls."""
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ConfigError(name, f"{spot}.tool_calls must be a list of objects, got {calls!r:.60}")
    for key, value in message.items():
        if key not in ("role", "content"):
            _check_whole(name, f"{spot}.{key}", value)


def _options(name: str, where: str, config: DataConfig, row: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is given beside the messages."""
    options: dict[str, Any] = {}
    tools = row.get(config.tools)
    if isinstance(tools, str):  # tables hold JSON
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ConfigError(
                name, f"{where}: field {config.tools!r} is text that is not JSON, got {tools!r:.60}"
            ) from None
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            way = "; data.tools: NAME takes them from another column"
            raise ConfigError(
                name,
                f"{where}: field {config.tools!r} must be a list of objects (JSON schemas), got {tools!r:.60}{way}",
            )
        _check_whole(name, f"{where}: field {config.tools!r}", tools)
        options["tools"] = tools
    more = row.get(TEMPLATE_OPTIONS)
    if more:
        if not isinstance(more, dict) or taken_options(more):
            wanted = "must be an object with what the chat template reads"
            raise ConfigError(name, f"{where}: field {TEMPLATE_OPTIONS!r} {wanted}, got {more!r:.80}")
        _check_whole(name, f"{where}: field {TEMPLATE_OPTIONS!r}", more)
        options |= more
    return options


def _check_text(name: str, spot: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ConfigError(name, f"{spot} must be text, got {type(value).__name__}")
    _check_whole(name, spot, value)


def _check_whole(name: str, spot: str, value: Any) -> None:
    """No half characters, which no tokenizer takes, and nothing of a table that JSON has not."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except TypeError as error:
        raise ConfigError(name, f"{spot} holds what JSON has not: {error}") from None
    except UnicodeEncodeError:
        raise ConfigError(name, f"{spot} holds half a character (a lone surrogate)") from None
