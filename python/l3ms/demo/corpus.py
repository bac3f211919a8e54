"""Task data without a download: prompt/response pairs from the docstrings of the packages installed here.

A prompt is a function's signature on one line, `def name(a, b=1):` and a newline; its response is the first paragraphs of the
docstring, cleaned of markup. Files are parsed with `ast` and never imported. The same installed packages give the same pairs.

This module imports the standard library only: `mine` runs it as a plain script in a few child processes, which (unlike
`multiprocessing`) needs neither a `__main__` guard in the caller nor a fork of a process in which torch has started threads.
"""

import ast
import contextlib
import gc
import hashlib
import inspect
import json
import os
import queue
import re
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

VERSION = 2  # raise it when the same files would give other pairs
MAX_PROMPT_CHARS = 140  # about 50 tokens; parameters that go beyond become "..."
MIN_RESPONSE_CHARS = 12
MAX_RESPONSE_CHARS = 300  # about 90 tokens; mean response 32 tokens (byte-level BPE, vocabulary 2,048)
MAX_FILE_BYTES = 400_000  # larger files are generated tables
HELD_OUT_PERCENT = 8  # at 46,000 pairs about 3,600 prompts

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "testing", "__pycache__", "idlelib", "lib2to3"}
_SKIPPED_PACKAGES = {"l3ms", "l3m_kernels"}  # a new version of this project is not new data
_WORKERS = 8
_DOCSTRING_CHARS = 4 * MAX_RESPONSE_CHARS  # what lies beyond is never used, and some are a hundred pages
_DOCSTRING = re.compile(rb":[ \t]*(?:#[^\n]*)?\r?\n\s*[rRuU]?(?:\"\"\"|''')")  # spares a sixth of the parsing


class Pair(NamedTuple):
    """One example of the demo's task; `prompt` ends with a newline."""

    prompt: str
    response: str


class Source(NamedTuple):
    """One file to mine: `name` is its path below the folder it was found in, `bytes` its size."""

    name: str
    path: str
    bytes: int


def roots() -> list[Path]:
    """The folders of installed packages: the standard library first, then every site-packages in use."""
    paths = sysconfig.get_paths()
    found = [paths["stdlib"], paths["purelib"], paths["platlib"]]
    found += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(Path(entry).resolve() for entry in found if Path(entry).is_dir()))


def sources(folders: Iterable[Path] | None = None, max_files: int | None = None) -> list[Source]:
    """Python files below `folders` (default: `roots()`), sorted by name; with `max_files`, that many evenly spaced ones."""
    found: dict[str, Source] = {}
    for root in roots() if folders is None else folders:
        for folder, subfolders, names in os.walk(root):
            skipped = _SKIPPED_FOLDERS | _SKIPPED_PACKAGES if folder == str(root) else _SKIPPED_FOLDERS
            subfolders[:] = [name for name in subfolders if name not in skipped]
            for name in names:
                if not name.endswith(".py") or name.startswith("__editable__"):
                    continue
                path = os.path.join(folder, name)
                relative = path[len(str(root)) :].lstrip(os.sep).replace(os.sep, "/")
                try:
                    size = os.stat(path).st_size
                except OSError:
                    continue
                if 0 < size <= MAX_FILE_BYTES:
                    found.setdefault(relative, Source(relative, path, size))
    ordered = [found[name] for name in sorted(found)]
    if max_files is not None and len(ordered) > max_files:
        ordered = [ordered[i * len(ordered) // max_files] for i in range(max_files)]
    return ordered


def fingerprint(files: Iterable[Source]) -> str:
    """Hash of what determines the pairs: the files' names and sizes, and the recipe (ast differs between Python versions)."""
    recipe = (VERSION, MAX_PROMPT_CHARS, MIN_RESPONSE_CHARS, MAX_RESPONSE_CHARS, HELD_OUT_PERCENT)
    digest = hashlib.sha256(f"{recipe} {sys.version_info[:2]}".encode())
    for file in files:
        digest.update(f"\n{file.name}\0{file.bytes}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def mine(
    progress: Callable[[int, int], None] | None = None,
    *,
    files: list[Source] | None = None,
    workers: int | None = None,
) -> list[Pair]:
    """Pairs of all `files` (default: `sources()`), sorted; every prompt and every response occurs once.

    `progress(done, total)` is called in this thread with bytes read. `workers`: child processes, default one a core;
    0 parses in this process. Of two functions with the same prompt or the same response the first (by file name) is kept.
    """
    files = sources() if files is None else files
    if workers is None:
        workers = min(_WORKERS, os.cpu_count() or 1) if sys.executable else 0
    total = sum(file.bytes for file in files)
    done, mined = 0, {}
    for index, pairs in _mine_serially(files) if workers == 0 else _mine_in_children(files, workers):
        mined[index] = pairs
        done += files[index].bytes
        if progress is not None:
            progress(done, total)

    prompts, responses, kept = set(), set(), []
    for index in range(len(files)):
        for prompt, response in mined[index]:
            key = response.casefold().rstrip(".")
            if prompt not in prompts and key not in responses:
                prompts.add(prompt)
                responses.add(key)
                kept.append(Pair(prompt, response))
    return sorted(kept)


def split(pairs: Iterable[Pair]) -> tuple[list[Pair], list[Pair]]:
    """`(train, held_out)`: a hash of the prompt decides, so a pair stays on its side when packages come and go."""
    train: list[Pair] = []
    held_out: list[Pair] = []
    for pair in pairs:
        bucket = int.from_bytes(hashlib.sha256(pair.prompt.encode()).digest()[:4], "big") % 100
        (held_out if bucket < HELD_OUT_PERCENT else train).append(pair)
    return train, held_out


def parse(code: bytes) -> list[tuple[str, str]]:
    """(prompt, response) of every function in `code` whose docstring is usable; nothing when the file does not parse."""
    if not _DOCSTRING.search(code):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return []
    pairs = []
    for function in _functions(tree):
        response = clean(inspect.cleandoc((ast.get_docstring(function, clean=False) or "")[:_DOCSTRING_CHARS]))
        if response:
            pairs.append((signature(function), response))
    return pairs


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`def name(a, b=1, *, c=None):` and a newline, without annotations and without self; long defaults become `...`."""
    arguments = function.args
    positional = arguments.posonlyargs + arguments.args
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [_parameter(argument.arg, default) for argument, default in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls", "mcs", "mcls"):
        shown = shown[1:]
    if arguments.vararg:
        shown.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [_parameter(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        shown.append(f"**{arguments.kwarg.arg}")
    head = f"def {function.name}("
    while len(head) + len(", ".join(shown)) > MAX_PROMPT_CHARS and len(shown) > 1:
        shown = [*shown[:-2], "..."]
    return f"{head}{', '.join(shown)}):\n"


def clean(docstring: str) -> str:
    """The first paragraphs of a docstring as plain text on one line, or "" where they hold no prose.

    Stops at the first section (Args, Parameters, ...), list, code or doctest, and before MAX_RESPONSE_CHARS; a first paragraph
    that is longer is cut after a sentence.
    """
    text = ""
    for paragraph in re.split(r"\n\s*\n", docstring.strip().expandtabs()):
        line = _plain(paragraph)
        if not line or (text and _NOT_PROSE.match(paragraph.lstrip())):
            break
        if len(text) + 1 + len(line) > MAX_RESPONSE_CHARS:
            if not text:
                cut = [match.end() for match in re.finditer(r"[.!?](?= [A-Z])", line[: MAX_RESPONSE_CHARS + 2])]
                text = line[: cut[-1]] if cut else ""
            break
        text = f"{text} {line}".strip()
        if not text.endswith((".", "!", "?")):
            break  # a title, or a sentence that leads into something that is not text
    if text.endswith(":"):
        text = text.rstrip(": ") + "."
    usable = (
        len(text) >= MIN_RESPONSE_CHARS and text.isascii() and text.isprintable() and " " in text and "`" not in text
    )
    return text if usable and _START.match(text) else ""


_START = re.compile(r"[A-Za-z`'\"(]")
_NOT_PROSE = re.compile(r">>>|\.\. |[-*+|:#=]|\d+\.|@|\S+(?: \S+)?\s*\n\s*[-=~]{3}|[A-Z]\w*(?: \w+)?\s*:+\s*(?:\n|$)")
_SECTION = re.compile(
    r"\n\s*(?:>>>|\.\. |:\w+[^\n:`]*:(?!`)|@\w+|[-*+] |\d+[.)] |[-=~]{3}"
    r"|(?:Args?|Arguments?|Parameters?|Params?|Returns?|Yields?|Raises?|Examples?|Notes?|Inputs?|Outputs?|Usage|See [Aa]lso)\s*:)"
)
_MARKUP = [
    (re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :class:`~a.B` and :ref:`text <target>`
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{1,2}"), r"\1"),  # `text <url>`_
    (re.compile(r"\[`?([^\]`]+)`?\]\([^)]*\)"), r"\1"),  # [text](url)
    (re.compile(r"\[`~?([^\]`]+)`\]"), r"\1"),  # [`Name`]
    (re.compile(r"``?~?([^`]+?)``?_?"), r"\1"),  # ``code`` and `name`
    (re.compile(r"\*\*?([^*\s](?:[^*]*[^*\s])?)\*\*?"), r"\1"),  # *emphasis*
    (re.compile(r"\s*::$"), ":"),
    (re.compile(r"\s+"), " "),
]


def _plain(paragraph: str) -> str:
    """One paragraph without markup and on one line, up to the first line that is not running text."""
    if paragraph.lstrip().startswith((">>>", ".. ", ":", "@")):
        return ""
    section = _SECTION.search(paragraph)
    text = (paragraph[: section.start()] if section else paragraph).strip()
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _parameter(name: str, default: ast.expr | None) -> str:
    if default is None:
        return name
    shown = (
        ast.unparse(default) if isinstance(default, ast.Constant | ast.Name | ast.UnaryOp | ast.Attribute) else "..."
    )
    return f"{name}={shown if len(shown) <= 16 and shown.isascii() and shown.isprintable() else '...'}"


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions in source order. Only statements are visited: `ast.walk` over all expressions takes as long as parsing."""
    for field in ("body", "handlers", "orelse", "finalbody"):
        for statement in getattr(tree, field, ()):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield statement
            if hasattr(statement, "body"):
                yield from _functions(statement)


def _mine_serially(files: list[Source]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    for index, file in enumerate(files):
        try:
            code = Path(file.path).read_bytes()
        except OSError:
            code = b""
        yield index, parse(code)


def _mine_in_children(files: list[Source], workers: int) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """As `_mine_serially`, in `workers` processes that each take every `workers`-th file of the list sorted by size."""
    by_size = sorted(range(len(files)), key=lambda index: -files[index].bytes)
    shares = [share for share in (by_size[start::workers] for start in range(workers)) if share]
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(Path(__file__).resolve())]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in shares]
    news: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()  # None: a child has ended

    def talk(child: subprocess.Popen[bytes], share: list[int]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        with child, contextlib.suppress(OSError):  # a child that is gone leaves files out, which is noticed below
            child.stdin.write(json.dumps([files[index].path for index in share]).encode())
            child.stdin.close()
            for index, line in zip(share, child.stdout, strict=False):
                if line.endswith(b"\n"):
                    news.put((index, line))
        news.put(None)

    threads = [threading.Thread(target=talk, args=arguments) for arguments in zip(children, shares, strict=True)]
    left = set(by_size)
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            while (item := news.get()) is not None:
                left.remove(item[0])
                yield item[0], json.loads(item[1])
        if left:
            stopped_at = next(files[index].path for index in by_size if index in left)
            raise RuntimeError(f"mining docstrings: a child process ended at {stopped_at!r}")
    finally:
        for child in children:
            child.kill()
        for thread in threads:
            thread.join()


def _child() -> None:
    """Read a JSON list of paths from stdin; write one JSON line of pairs a file, in that order."""
    gc.disable()  # syntax trees have no cycles, and the collector doubles the time to build them
    paths = json.load(sys.stdin)
    for _, pairs in _mine_serially([Source(path, path, 0) for path in paths]):
        print(json.dumps(pairs), flush=True)


if __name__ == "__main__":
    _child()
