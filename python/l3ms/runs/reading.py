"""Files, and data sets that `datasets` knows, to rows: each with the place it stands at. Only regular files are opened."""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from l3ms.config.yaml_reader import ConfigError
from l3ms.regular_files import open_regular
from l3ms.runs.tables import TABLES, dataset_rows, table_rows

LINES = (".jsonl", ".ndjson", ".json")
Source = str | Sequence[str]
Rows = Iterator[tuple[str, Any]]  # (`FILE, line N`, row)


def read_rows(name: str, source: Source, *, configuration: str | None, split: str, texts: Collection[str]) -> Rows:
    """The rows of all files of a source, or of a data set. Raises `ConfigError` of the field `name`, with the file and line.

    Args:
        texts: the columns that are texts, messages, tools or options of a template: in a CSV they are not taken for numbers.
    """
    if not is_files(source):
        yield from dataset_rows(name, cast(str, source), configuration, split, texts)
        return
    for path in files_of(name, source):
        suffix = _suffix(path)
        if suffix in LINES:
            yield from json_rows(name, path)
        else:
            yield from table_rows(name, regular(name, path), suffix, split, texts)


def is_files(source: Source) -> bool:
    """Whether a source is files: else it is the name of a data set, or a folder."""
    return not isinstance(source, str) or is_lines(source) or is_glob(source) or _is_file(source)


def is_lines(source: Source) -> bool:
    """Whether a source has no splits: JSON, or several files."""
    return not isinstance(source, str) or _suffix(source) in LINES or is_glob(source)


def files_of(name: str, source: Source) -> list[str]:
    """The files that a source names, those of a glob in the order of their names; none twice."""
    found: list[str] = []
    for item in [source] if isinstance(source, str) else source:
        if not is_glob(item):
            found.append(item)
            continue
        matches = sorted(path for path in glob.glob(item, recursive=True) if not os.path.isdir(path))
        if not matches:
            raise ConfigError(name, f"no file matches {item}")
        found += matches
    for path in found:
        if found.count(path) > 1:
            raise ConfigError(name, f"{path} is named twice, and its rows would count twice")
    return found


def regular(name: str, path: str) -> str:
    """`path`, if a regular file stands there: another kind of file may never end."""
    try:
        open_regular(path).close()
    except OSError as error:
        raise _unreadable(name, path, error) from None
    return path


def _unreadable(name: str, path: str, error: OSError) -> ConfigError:
    if isinstance(error, FileNotFoundError):
        return ConfigError(name, f"no such file: {path}")
    return ConfigError(name, f"{ascii(path)[1:-1]} cannot be read: {_reason(error)}")


def is_glob(text: str) -> bool:
    """Whether a pattern is meant: a file may have such a name."""
    return glob.has_magic(text) and not _exists(text)


def _is_file(text: str) -> bool:
    """Whether something that is no folder stands there; a link that leads nowhere does."""
    return _exists(text) and not os.path.isdir(text)


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(text)
    except ValueError:  # a null byte, half a character
        return False


def _suffix(path: str) -> str:
    """`.jsonl` of rows.jsonl and of rows.jsonl.gz."""
    inner = Path(path.removesuffix(".gz")).suffix
    return inner if not path.endswith(".gz") or inner in LINES else ".gz"


def is_table(path: str) -> bool:
    return _suffix(path) in TABLES


def json_rows(name: str, path: str) -> Rows:
    """(`FILE, line N`, parsed line) of every line that is not blank; a .json may be one array."""
    try:
        with (
            open_regular(path) as plain,
            cast("IO[bytes]", gzip.open(plain) if path.endswith(".gz") else plain) as file,
        ):
            if _suffix(path) == ".json" and _opens_array(file):
                yield from _array_rows(name, path, file.read())
            else:
                yield from _line_rows(name, path, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(name, f"{path} cannot be read: as gzip it is damaged ({_reason(error)})") from None
    except OSError as error:
        raise _unreadable(name, path, error) from None


def _opens_array(file: IO[bytes]) -> bool:
    """Whether the first that stands in the file is a bracket; the file is at its beginning again."""
    first = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    return first == b"["


def _line_rows(name: str, path: str, file: IO[bytes]) -> Rows:
    for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield where, _parsed(name, where, line)


def _array_rows(name: str, path: str, content: bytes) -> Rows:
    """Row by row, so that each has its line and a bad one is named."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(name, f"{path}, line {line}: is not UTF-8 text") from None
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    at, line, number = text.index("[") + 1, 1, 0
    counted = 0  # characters whose line ends are in `line`

    def spot() -> str:
        return f"{path}, line {line}" if number < 2 else f"{path}, line {line} (row {number})"

    while True:
        at = _blank_to(text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and number == 0:
            break
        number += 1
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ConfigError(
                name, f"{path}, line {error.lineno}: is not JSON: {error.msg} at column {error.colno}"
            ) from None
        except _Twice as error:
            raise ConfigError(name, f"{spot()}: {error}") from None
        except (RecursionError, ValueError):
            raise ConfigError(name, f"{spot()}: is not JSON that can be read") from None
        yield spot(), row
        at = _blank_to(text, at)
        closing = text[at : at + 1]
        if closing not in (",", "]"):
            raise ConfigError(name, f"{spot()}: is not JSON: wanted a comma or the end of the array after the row")
        if closing == "]":
            break
        at += 1
    if text[at + 1 :].strip():
        raise ConfigError(name, f"{path}: is not JSON: something follows the array")


def _blank_to(text: str, at: int) -> int:
    """The place of the first character from `at` on that is no white space."""
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


class _Twice(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(f"field {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _parsed(name: str, where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise ConfigError(name, f"{where}: is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ConfigError(name, f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
    except _Twice as error:
        raise ConfigError(name, f"{where}: {error}") from None
    except (RecursionError, ValueError):
        raise ConfigError(name, f"{where}: is not JSON that can be read") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
