"""Data files, a case a seed: nasty texts in every format that is read, whole or damaged. What is read of one is compared with another
parser's reading of the file, and its tokens with its texts."""

import csv
import functools
import gzip
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TEXTS = [
    "a b", "b", "7", "007", "1e5", "true", "null", "NA", "NaN", "None", "1_000", "-", "é", "e\u0301", "ﬁ", "\u202eabc", "a\u200bb",
    "💥🏽", "\U0010ffff",
    "a\nb", "a\r\nb", "a\rb", "a\u2028b", "a\x85b", "a\x0bb", "a\x0cb", "\x1b[2J", "a\tb", " a", "a ", "a  b", "\u00a0a", "\ufeffa",
    "</s>", "<s>x</s>",
    '"', "'", '""', "a,b", 'a","b', "a;b", "\\", "\\n", "{{ 7 * 7 }}", "{% x %}", "=1+1", "<|im_end|>", "x" * 3000, "[]", "{}", "# a",
    "//", "--", "1,5",
]  # fmt: skip
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    [],
    {},
    ["a"],
    {"a": 1},
    [[]],
    "\ud800",
    "x\udc80",
]
ENDINGS = ["jsonl", "jsonl", "jsonl", "json", "jsonl.gz", "ndjson", "csv", "tsv", "parquet"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}" \
    "{% if add_generation_prompt %}[assistant]{% endif %}"  # fmt: skip


@functools.cache
def tokenizer() -> Any:
    """Bytes to tokens: of these the text can be had again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def read(config: Any) -> Any:
    """What `l3ms train` reads of its data, before a model is loaded: (examples, rows of tokens, what the rows come to)."""
    from rich.console import Console

    from l3ms.runs.data import load_examples
    from l3ms.runs.loading import encode_sides

    sides = load_examples(config.data, seed=config.seed)
    text_config = SimpleNamespace(max_position_embeddings=1 << 20)
    config_of = SimpleNamespace(get_text_config=lambda decoder=False: text_config)
    model = SimpleNamespace(config=config_of, named_modules=lambda: ())
    encoded = encode_sides(config, tokenizer(), model, *sides, Console(file=io.StringIO()))
    return [*sides[0], *sides[1]], encoded, config.data.chat_template


@dataclass
class Case:
    name: str
    contents: bytes
    damaged: bool
    template: bool

    def write(self, folder: Path) -> None:
        (folder / self.name).write_bytes(self.contents)
        (folder / "run.yaml").write_text(
            f"model: base\noutput: out\ndata: {{train: {self.name}, evaluation_share: 0.5, max_length: 100000, "
            f"chat_template: {str(self.template).lower()}}}\nconstraints: [{{type: length, max: 9}}]\n"
            "train: {max_new_tokens: 16, iterations: 2, batch_size: 1}\n"
        )

    def check(self, told: Any) -> None:
        """AssertionError where what was read is not what the file holds, or tokens are not those of its texts."""
        examples, encoded, _ = told
        wanted = self._rows()
        if wanted is not None:
            assert _sorted(map(_shown, examples)) == _sorted(map(_wanted, wanted)), (
                f"{self.name} was read as something else"
            )
        for side in encoded:
            for row in side.rows:
                ids, labels = row["input_ids"], row["labels"]
                assert len(ids) == len(labels)
                scored = [label != -100 for label in labels]
                assert scored == sorted(scored)  # the prompt first
                assert [label for label in labels if label != -100] == ids[scored.count(False) :]
        total = sum(side.total for side in encoded)
        assert total == len(examples)
        if not self.template and not any(side.dropped + side.truncated for side in encoded):
            texts = [text for side in encoded for row in side.rows for text in [tokenizer().decode(row["input_ids"])]]
            given = [
                item.prompt + item.completion.removesuffix("</s>") for item in examples if isinstance(item.prompt, str)
            ]
            if len(given) == len(texts):
                assert sorted(text.removesuffix("</s>").removeprefix("<s>") for text in texts) == sorted(
                    text.removeprefix("<s>") for text in given
                )

    def _rows(self) -> list[Any] | None:
        """Another reading of the file; None where there is none."""
        ending = self.name.partition(".")[2]
        if ending == "parquet":
            if self.damaged:
                return None
            from pyarrow import parquet

            return parquet.read_table(io.BytesIO(self.contents)).to_pylist()
        data = gzip.decompress(self.contents) if ending.endswith("gz") else self.contents
        text = data.decode("utf-8").removeprefix("\ufeff")
        if ending in ("csv", "tsv"):
            csv.field_size_limit(1 << 30)
            table = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if ending == "tsv" else ",", strict=True)
            header, *rows = [row for row in table if row]
            return [dict(zip(header, row, strict=True)) for row in rows]
        if ending == "json" and text.lstrip(" \t\r\n").startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip(" \t\r\x0b\x0c")]


def _sorted(values: Any) -> list[str]:
    return sorted(json.dumps(value, sort_keys=True) for value in values)


def _shown(item: Any) -> Any:
    return [item.prompt, item.completion["content"] if isinstance(item.completion, dict) else item.completion]


def _wanted(row: Any) -> Any:
    if "messages" not in row:
        return [row["prompt"], row["completion"]]
    turns = [
        turn | {"content": ""} if turn.get("content") == [] else turn for turn in row["messages"]
    ]  # no parts, no text
    last = max(at for at, turn in enumerate(turns) if turn["role"] == "assistant")
    return [turns[:last], turns[last]["content"]]


def case(seed: int) -> Case:
    draw = random.Random(seed)
    ending = draw.choice(ENDINGS)
    table = ending in ("csv", "tsv", "parquet")
    messages = not table and draw.random() < 0.3
    rows = [_row(draw, index, messages) for index in range(draw.choice((4, 6, 9)))]
    if draw.random() < 0.5:
        for index, row in enumerate(rows):
            row["n"] = index
    damaged = draw.random() < 0.6
    broken = damaged and draw.random() < 0.5
    if broken:  # in its values
        _break(draw, rows, table)
    contents = _written(rows, ending, draw)
    if damaged and not broken:
        contents = _harm(draw, contents, ending)
    return Case(f"rows.{ending}", contents, damaged, messages or draw.random() < 0.3)


def _row(draw: random.Random, index: int, messages: bool) -> dict[str, Any]:
    prompt, completion = f"{index} {draw.choice(TEXTS)}", f"{draw.choice(TEXTS)}."
    if not messages:
        return {"prompt": prompt, "completion": completion}
    before = (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": draw.choice(TEXTS)}]
        if draw.random() < 0.3
        else []
    )
    return {"messages": [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}


def _break(draw: random.Random, rows: list[dict[str, Any]], table: bool) -> None:
    from fuzzed_configs import at, places

    row = draw.choice(rows)
    if table:
        row["prompt" if draw.random() < 0.5 else "completion"] = draw.choice(("", "\x00", "x" * 200_000, " ", "\n"))
        if draw.random() < 0.3:
            for item in rows:
                item["Prompt"] = item.pop("prompt")
        return
    path = draw.choice(places(row))
    if draw.random() < 0.7:
        at(row, path[:-1])[path[-1]] = draw.choice(VALUES)
    elif isinstance(path[-1], str):
        at(row, path[:-1]).pop(path[-1])
    else:
        at(row, path[:-1]).append(draw.choice(VALUES))


def _written(rows: list[dict[str, Any]], ending: str, draw: random.Random) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        file = io.BytesIO()
        kind = draw.choice(("NONE", "SNAPPY", "GZIP", "ZSTD"))
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), file, compression=kind, row_group_size=draw.choice((2, 100))
        )
        return file.getvalue()
    if ending in ("csv", "tsv"):
        text = io.StringIO(newline="")
        bare = any(
            "\r" in str(value) for row in rows for value in row.values()
        )  # csv writes it without quotes, and does not read that
        quoting = csv.QUOTE_ALL if bare or draw.random() < 0.5 else csv.QUOTE_MINIMAL
        writer = csv.writer(
            text,
            delimiter="\t" if ending == "tsv" else ",",
            quoting=quoting,
            lineterminator=draw.choice(("\n", "\r\n")),
        )
        writer.writerows([names, *([row.get(name) for name in names] for row in rows)])
        return text.getvalue().encode()
    ascii_alone = draw.random() < 0.5 or "\\ud" in json.dumps(rows)
    lines = [json.dumps(row, ensure_ascii=ascii_alone) for row in rows]
    text = (
        f"[{', '.join(lines)}]" if ending == "json" and draw.random() < 0.7 else "".join(f"{line}\n" for line in lines)
    )
    data = text.encode("utf-8", "surrogatepass")
    return gzip.compress(data) if ending.endswith("gz") else data


def _harm(draw: random.Random, contents: bytes, ending: str) -> bytes:
    """Damage to the bytes of a file."""
    from fuzzed_configs import scrambled

    whole = ending in ("parquet", "jsonl.gz")
    actions = [
        lambda: scrambled(contents, draw), lambda: scrambled(contents, draw), lambda: scrambled(contents, draw),
        lambda: b"\xef\xbb\xbf" + contents, lambda: contents[: draw.randrange(len(contents))], lambda: contents + contents[:20],
        lambda: b"", lambda: b"\n \n", lambda: contents + b"\0", lambda: contents * 2, lambda: gzip.compress(contents),
    ]  # fmt: skip
    if not whole:
        words = contents.decode("utf-8", "surrogatepass")
        actions += [
            lambda: contents.replace(b"\n", b"\r\n"), lambda: contents.replace(b"\n", b"\r"), lambda: contents.replace(b"\n", b"\n\n"),
            lambda: words.encode("utf-16", "surrogatepass"), lambda: words.encode("latin-1", "replace") + b"\xe9",
            lambda: contents.replace(b",", b";"),
            lambda: contents.replace(b'"', b"'"), lambda: contents.replace(b"}\n", b"},\n"), lambda: contents.replace(b"prompt",
            b"Prompt", 1),
            lambda: contents.replace(b'"prompt"', b'"prompt": "x", "prompt"', 1), lambda: b"// rows\n" + contents,
            lambda: contents.replace(b": ", b": " + b"[" * draw.choice((5, 500, 100_000)), 1), lambda: b"," + contents,
            lambda: b"\x00" * 50 + contents,
            lambda: contents.replace(b"1", b"1" * 5000, 1), lambda: contents.replace(b'"', b'"\\ud800', 1),
            lambda: contents.replace(b" ", b"\xc2\xa0"),
        ]  # fmt: skip
    return draw.choice(actions)()
