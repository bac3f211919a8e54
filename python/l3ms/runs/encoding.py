"""Examples to token rows for the trainer: each split where a rollout of its prompt would start.

What is trained on is, token for token, what the chat template renders of the whole conversation, up to its end token. A row of which that
cannot be had is dropped and counted; what a template leaves out of one is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from l3ms.config.yaml_reader import ConfigError
from l3ms.model.columns import ROW, TAKEN
from l3ms.rollouts.prompts import (
    MARK,
    BrokenTemplate,
    Message,
    Prompt,
    TemplateRefusal,
    chat_text,
    encode_chat,
    encode_prompt,
    encode_text,
)
from l3ms.runs.examples import CALLS, THOUGHTS, Example

IGNORE_INDEX = -100
RESERVED = ROW | TAKEN


@dataclass
class Encoded:
    """Token rows `{"input_ids", "labels", "prompt", further columns}` and what happened to the ones that did not fit."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    truncated: int = 0  # completion cut at the maximum length
    dropped: int = 0  # prompt empty or too long, so nothing is left to score
    empty: int = 0  # of those, whose prompt has no tokens
    bent: int = 0  # dropped: the chat template does not render the answer behind its prompt
    early: int = 0  # begin before the generation prompt ends
    apart: int = 0  # white space is put between prompt and answer
    longer: int = 0  # turns after the last assistant turn are left out
    unrendered: Counter[str] = field(default_factory=Counter)  # what the chat template leaves out -> rows
    columns: dict[str, str] = field(default_factory=dict)  # column that is left out -> why

    @property
    def total(self) -> int:
        return len(self.rows) + self.dropped + self.bent

    def notes(self, name: str) -> list[str]:
        lines = []
        if self.truncated:
            lines.append(f"{name}: {self.truncated} of {len(self.rows)} completions were cut at the maximum length")
        if self.dropped:
            lines.append(f"{name}: {self.dropped} of {self.total} rows were dropped (prompt empty or too long)")
        if self.bent:
            lines.append(f"{name}: {self.bent} of {self.total} rows were dropped ({BENT})")
        if self.early:
            lines.append(
                f"{name}: {self.early} of {len(self.rows)} answers begin before the generation prompt of the chat template ends (it opens "
                "a thought that they do not have): they are trained on and sampled from there"
            )
        if self.apart:
            lines.append(
                f"{name}: {self.apart} of {len(self.rows)} answers have white space before them that the data has not, since a token goes "
                "over the border: end prompts without white space, and begin answers with it"
            )
        if self.longer:
            lines.append(
                f"{name}: {self.longer} of {self.total} conversations go on after their last assistant turn; that is left out"
            )
        for what, count in sorted(self.unrendered.items()):
            lines.append(f"{name}: {what} of {count} of {self.total} rows left out, {UNRENDERED}")
        taken = ", ".join(sorted(self.columns.keys() & TAKEN))
        if taken:
            lines.append(f"{name}: left out, since reward functions are given something else by these names: {taken}")
        others = sorted((column, why) for column, why in self.columns.items() if column not in TAKEN)
        lines += [f"{name}: column {column!r} is left out: {why}" for column, why in others]
        return lines

    def nothing(self, limit: int) -> str:
        """Why no row is left, where `limit` is the longest prompt."""
        if self.bent > self.dropped:
            return f"no row can be trained on: {BENT}"
        if self.empty == self.total:
            return "no prompt has any tokens: each is empty, or is rendered as nothing by the chat template"
        return f"no prompt fits in {limit} tokens"


BENT = "the chat template does not render the answer behind its prompt: it rewrites earlier turns, or leaves the answer out"
UNRENDERED = "since no chat template renders them"


class _Split(NamedTuple):
    head: list[int]  # what a rollout starts from
    tail: list[int]  # what is scored
    prompt: Prompt
    early: bool = False
    apart: bool = False


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt: int | None = None,
    chat_template: bool = True,
    name: str = "data.train",
) -> Encoded:
    """Tokenise for the trainer: prompt masked with -100, end-of-sequence token appended to the completion that has none at its end.

    `max_length` counts prompt and completion; a prompt of more than `max_prompt` tokens (default `max_length - 1`)
    leaves no room for an answer, and its row is dropped. Of a text without a prompt all is scored; without a BOS token its first
    token, which nothing predicts, is the prompt. `name` is the field to blame in a `ConfigError`, beside the row's place.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("model", "the tokenizer has no end-of-sequence token, so responses could never end")
    template = bool(getattr(tokenizer, "chat_template", None))
    result = Encoded()
    kept = _columns(examples, result)
    longest_prompt = min(max_length - 1, max_prompt if max_prompt is not None else max_length)
    for number, example in enumerate(examples, 1):
        if not isinstance(example.prompt, str) and not template:
            hint = "use prompt/completion rows"
            raise ConfigError(name, f"rows hold messages, but the tokenizer has no chat template; {hint}")
        try:
            split = _split(tokenizer, example, template and chat_template, result.unrendered)
        except BrokenTemplate as error:
            raise ConfigError("model", str(error)) from error
        except TemplateRefusal as error:
            where = example.where or f"row {number}"
            raise ConfigError(name, f"{where}: the chat template refuses it: {error}") from error
        if split is None:
            result.bent += 1
            continue
        head, tail, prompt, early, apart = split
        result.longer += example.left_out > 0
        if not head or len(head) > longest_prompt:
            result.dropped += 1
            result.empty += not head
            continue
        result.early += early
        result.apart += apart
        result.truncated += len(head) + len(tail) > max_length
        tail = tail[: max_length - len(head)]
        labels = [IGNORE_INDEX] * len(head) + tail
        columns = {column: example.columns[column] for column in kept}
        result.rows.append({**columns, "input_ids": head + tail, "labels": labels, "prompt": prompt})
    return result


def _columns(examples: Sequence[Example], result: Encoded) -> list[str]:
    """The further columns that reward functions get: those of every row, with a name that an argument can have."""
    counts = Counter(column for example in examples for column in example.columns)
    for column, count in counts.items():
        if column in RESERVED:
            result.columns[column] = "rows of tokens have something else by that name"
        elif not column.isidentifier():
            result.columns[column] = "no argument of a reward function can have this name"
        elif count < len(examples):
            result.columns[column] = f"only {count} of {len(examples)} rows have it"
    return sorted(counts.keys() - result.columns.keys())


def _split(tokenizer: Any, example: Example, template: bool, unrendered: Counter[str]) -> _Split | None:
    """The tokens of an example; None where the chat template does not render it as its prompt and what follows."""
    prompt, answer = example.prompt, example.completion
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        if example.is_text or not template or not prompt:
            unrendered.update(example.options.keys())
            return _text(tokenizer, answer) if example.is_text else _plain(tokenizer, prompt, answer)
        prompt = [{"role": "user", "content": prompt}]
    turn: Message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    return _chat(tokenizer, prompt, turn, dict(example.options), unrendered)


def _text(tokenizer: Any, text: str) -> _Split:
    whole, head = encode_text(tokenizer, text), encode_prompt(tokenizer, "")
    if not head:
        head = whole[:1]
        return _Split(head, _ended(tokenizer, whole[1:]), tokenizer.decode(head))
    return _Split(head, _rest(tokenizer, head, whole, text)[0], "")


def _plain(tokenizer: Any, prompt: str, completion: str) -> _Split:
    head = encode_prompt(tokenizer, prompt)
    tail, apart = _rest(tokenizer, head, encode_text(tokenizer, prompt + completion), completion)
    return _Split(head, tail, prompt, apart=apart)


def _rest(tokenizer: Any, head: list[int], whole: list[int], text: str) -> tuple[list[int], bool]:
    """The tokens of `text` behind `head`, ended; whether white space stands between the two that the whole has not.

    They are those of the whole, where it begins with the head; else of `text` by itself, or behind a line break, where the tokenizer writes
    a space before what stands alone (SentencePiece).
    """
    if whole[: len(head)] == head:
        return _ended(tokenizer, whole[len(head) :]), False
    alone, broken, line = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (text, "\n" + text, "\n"))
    tail = _ended(tokenizer, list(alone))
    wanted, found = tokenizer.decode(_ended(tokenizer, whole)), tokenizer.decode(head + tail)
    if found == wanted or found.split() != wanted.split():
        return tail, False
    behind = _ended(tokenizer, list(broken[len(line) :]))
    if broken[: len(line)] == line and tokenizer.decode(head + behind) == wanted:
        return behind, False
    return tail, True


def _chat(
    tokenizer: Any, prompt: list[Message], turn: Message, options: dict[str, Any], unrendered: Counter[str]
) -> _Split | None:
    head = encode_prompt(tokenizer, prompt, **options)
    whole = encode_chat(tokenizer, [*prompt, turn], **options)
    if not head:
        return _Split(head, [], prompt)
    early = False
    if whole[: len(head)] == head:
        tail = whole[len(head) :]
    else:
        opened = chat_text(tokenizer, prompt, add_generation_prompt=True, **options)
        text = chat_text(tokenizer, [*prompt, turn], **options)
        if text.startswith(opened):  # a token goes over the border
            tail = list(tokenizer(text[len(opened) :], add_special_tokens=False)["input_ids"])
            if tokenizer.decode(head + tail) != tokenizer.decode(whole):
                return None
        else:
            start = _start(tokenizer, prompt, head, options)
            if start is None or whole[: len(start)] != start:
                return None
            head, tail, early = start, whole[len(start) :], True
    end = tokenizer.eos_token_id
    if end in tail:  # what the template writes behind it, nobody samples
        tail = tail[: len(tail) - tail[::-1].index(end)]
    tail = _ended(tokenizer, tail)
    if len(tail) == 1 and _says_something(tokenizer, turn):
        return None
    unrendered.update(_unrendered(tokenizer, prompt, turn, options, whole))
    return _Split(head, tail, prompt, early)


def _start(tokenizer: Any, prompt: list[Message], opened: list[int], options: dict[str, Any]) -> list[int] | None:
    """The beginning of the generation prompt that every assistant turn has, whatever it says; None where there is none."""
    other = encode_chat(tokenizer, [*prompt, {"role": "assistant", "content": MARK}], **options)
    count = next((i for i, pair in enumerate(zip(opened, other, strict=False)) if pair[0] != pair[1]), len(opened))
    return opened[:count] if count > len(encode_chat(tokenizer, prompt, **options)) else None


def _ended(tokenizer: Any, tail: list[int]) -> list[int]:
    """With one end token at the end, that of the text where it has one; white space behind it is not scored."""
    end, cut = tokenizer.eos_token_id, None
    for place in range(len(tail) - 1, -1, -1):
        if tail[place] == end:
            cut = place
        elif tokenizer.decode([tail[place]]).strip():
            break
    return [*tail, end] if cut is None else tail[: cut + 1]


def _says_something(tokenizer: Any, turn: Message) -> bool:
    content = str(turn.get("content") or "").replace(str(tokenizer.eos_token), "")
    return bool(content.strip()) or any(turn.get(key) for key in CALLS)


def _unrendered(
    tokenizer: Any, prompt: list[Message], turn: Message, options: dict[str, Any], whole: list[int]
) -> list[str]:
    """What the rendering of the whole would be the same without: tools, calls of them, the thoughts of the answer."""

    def same(messages: list[Message], options: dict[str, Any]) -> bool:
        try:
            return encode_chat(tokenizer, messages, **options) == whole
        except TemplateRefusal:
            return False

    conversation = [*prompt, turn]
    found = [
        name for name in options if same(conversation, {key: value for key, value in options.items() if key != name})
    ]
    for name in CALLS:
        if any(message.get(name) for message in conversation):
            without = [{key: value for key, value in message.items() if key != name} for message in conversation]
            found += [name] * same(without, options)
    for name in THOUGHTS:
        if turn.get(name):
            found += [name] * same([*prompt, {key: value for key, value in turn.items() if key != name}], options)
    return found
