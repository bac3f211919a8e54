"""Preference pairs {"chosen", "rejected"}: read, checked, shortened, and split so that no prompt is on both sides.

Two formats, told apart by their type: text as in the HH data (a whole conversation, its turns opened by a blank line and "Human: " or
"Assistant: "), and lists of messages {"role", "content"}. In both the two conversations of a pair are the same up to the last assistant
turn. With a field "prompt" beside them (a text), chosen and rejected are the replies alone.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.data_files import data_file
from l3ms.config.yaml_reader import ConfigError

WHERE_FROM = (
    'a JSONL or JSONL.gz file of {"chosen", "rejected"} conversations, for instance harmless-base/test.jsonl.gz of the public '
    "repository anthropics/hh-rlhf; name it by --data or L3M_HH_DATA"
)
ROLES = {"Human": "user", "Assistant": "assistant"}
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


class Pair(NamedTuple):
    """Two replies to one conversation, the better one first."""

    prompt: tuple[tuple[str, str], ...]  # (role, content) of each turn; the last one is the user's
    chosen: str
    rejected: str


class Read(NamedTuple):
    """What a file gave; `uneven` and `unanswered` rows hold no pair of replies to one prompt and are left out."""

    pairs: list[Pair]
    uneven: int  # the conversations differ before the last reply
    unanswered: int  # no reply, or an empty one


def data_path(given: str | Path | None) -> Path:
    """The file named by --data or L3M_HH_DATA. ConfigError in one line where neither is there."""
    return data_file(given, "L3M_HH_DATA", WHERE_FROM)


def read_pairs(path: Path) -> Read:
    """All pairs of a file. ConfigError naming the line for what is no preference pair."""
    pairs: list[Pair] = []
    uneven = unanswered = 0
    for where, row in _rows(path):
        if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
            raise ConfigError("data", f'{where}: wanted an object with "chosen" and "rejected"')
        if isinstance(row.get("prompt"), str):
            turns = _turns(where, "prompt", row["prompt"])
            better, worse = ((*turns, ("assistant", _text(where, side, row[side]))) for side in ("chosen", "rejected"))
        else:
            better, worse = (_turns(where, side, row[side]) for side in ("chosen", "rejected"))
        if any(turns[-1][0] != "assistant" or not turns[-1][1].strip() for turns in (better, worse)):
            unanswered += 1
        elif better[:-1] != worse[:-1] or better[-2:-1][0][0] != "user":
            uneven += 1
        else:
            pairs.append(Pair(better[:-1], better[-1][1].strip(), worse[-1][1].strip()))
    if not pairs:
        raise ConfigError("data", f"{path} holds no pair of replies to the same prompt")
    return Read(pairs, uneven, unanswered)


def shorten(pairs: Sequence[Pair], *, prompt: int, reply: int) -> list[Pair]:
    """Pairs whose replies have at most `reply` characters, their prompts cut to the last turns (from one of the user's on) of at most
    `prompt` characters; pairs whose last user turn alone is longer are left out."""
    short = []
    for pair in pairs:
        if max(len(pair.chosen), len(pair.rejected)) > reply:
            continue
        starts = [i for i, (role, _) in enumerate(pair.prompt) if role == "user"]
        fitting = [i for i in starts if len(prompt_text(pair.prompt[i:])) <= prompt]
        if fitting:
            short.append(pair._replace(prompt=pair.prompt[fitting[0] :]))
    return short


def split(pairs: Sequence[Pair], share: float, *, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out), about `share` of the conversations held out; those that open alike stay together."""
    openings = sorted({pair.prompt[0][1] for pair in pairs})
    if len(openings) < 2:
        raise ConfigError("data", f"needs at least 2 different conversations to hold some out, got {len(openings)}")
    random.Random(seed).shuffle(openings)
    held = set(openings[: max(1, min(len(openings) - 1, round(share * len(openings))))])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[pair.prompt[0][1] in held].append(pair)
    return sides


def without(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """Those whose prompt none of the others has: conversations that differ can end alike, and are the same when shortened."""
    prompts = {pair.prompt for pair in others}
    return [pair for pair in pairs if pair.prompt not in prompts]


def prompt_text(turns: Sequence[tuple[str, str]]) -> str:
    """A prompt as the HH data writes it, ready for the reply."""
    return "".join(f"\n\n{NAMES[role]}: {content}" for role, content in turns) + "\n\nAssistant:"


def messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The same for a tokenizer with a chat template."""
    return [{"role": role, "content": content} for role, content in turns]


def conversation(pair: Pair, reply: str, tokenizer: Any) -> str:
    """Prompt and reply as one text, through the tokenizer's chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        turns = messages([*pair.prompt, ("assistant", reply)])
        return tokenizer.apply_chat_template(turns, tokenize=False)
    return f"{prompt_text(pair.prompt)} {reply}"


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                    raise ConfigError("data", f"{where}: is not a line of JSON in UTF-8") from None
    except (OSError, EOFError) as error:  # gzip.BadGzipFile is an OSError; a cut file ends in EOFError
        raise ConfigError("data", f"{path} cannot be read: {error}") from None


def _turns(where: str, field: str, value: Any) -> tuple[tuple[str, str], ...]:
    """(role, content) of each turn of a conversation, of either format."""
    if isinstance(value, list):
        return tuple(_message(where, field, turn) for turn in value) or (("user", ""),)
    parts = _TURN.split(_text(where, field, value))
    if len(parts) == 1:
        return (("user", value.strip()),)
    return tuple((ROLES[name], content.strip()) for name, content in zip(parts[1::2], parts[2::2], strict=True))


def _message(where: str, field: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict) or turn.get("role") not in NAMES:
        raise ConfigError("data", f"{where}: {field} must be a text or a list of messages with role and content")
    return turn["role"], _text(where, f"{field}.content", turn.get("content")).strip()


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError("data", f"{where}: {field} must be a text, got {type(value).__name__}")
    return value
