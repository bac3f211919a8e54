"""Rows of tables: CSV and Parquet files, and what `datasets` loads. Nothing of it is printed, and no code of a data set is run."""

from __future__ import annotations

import contextlib
import csv
import glob
import logging
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

from l3ms.config.yaml_reader import ConfigError

TABLES = (".csv", ".tsv", ".parquet")
BUILDERS = {".txt": "text", ".arrow": "arrow"}  # what `datasets` calls them
Rows = Iterator[tuple[str, Any]]  # (`FILE, line N`, row)
EMPTY = ("", "NA", "N/A", "NaN", "nan", "null", "None")  # of a column of numbers
TRUTH = {"True": True, "true": True, "TRUE": True, "False": False, "false": False, "FALSE": False}
INTEGER = re.compile(r"[+-]?[0-9]+")


def table_rows(name: str, path: str, suffix: str, split: str, texts: Collection[str]) -> Rows:
    """The rows of a file that is no JSON; in a CSV the columns `texts` are not taken for numbers."""
    if suffix not in TABLES:
        if suffix not in BUILDERS:
            kinds = f".jsonl, .json (both also .gz), {', '.join([*TABLES, *BUILDERS])}"
            raise ConfigError(name, f"{path} is of no kind that is read: {kinds}")
        yield from _loaded(name, path, BUILDERS[suffix], None, split, texts, glob.escape(path))
        return
    rows = _parquet_rows(name, path, texts) if suffix == ".parquet" else _csv_rows(name, path, texts)
    yield from rows if split == "train" else _sliced(name, path, split, list(rows))


def dataset_rows(name: str, source: str, configuration: str | None, split: str, texts: Collection[str]) -> Rows:
    """The rows of a `datasets` data set, a folder or from the hub."""
    if os.path.isabs(source) and not os.path.exists(source):
        raise ConfigError(name, f"no such file or folder: {source}")
    if "\0" in source:
        raise ConfigError(name, f"{source!r} is the name of no file and of no data set")
    return _loaded(name, source, source, configuration, split, texts)


def _loaded(
    name: str,
    source: str,
    builder: str,
    configuration: str | None,
    split: str,
    texts: Collection[str],
    file: str | None = None,
) -> Rows:
    try:
        with _quiet():
            import datasets

            loaded = datasets.load_dataset(builder, configuration, data_files=file, split=split)
        for number, row in enumerate(cast("Iterable[dict[str, Any]]", loaded), 1):
            yield f"{source}, row {number}", _without_null(row, texts)
    except Exception as error:  # the library raises a dozen kinds, and its hub client more
        raise _unloadable(name, source, split, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, logs and warnings of `datasets` and its hub client."""
    import datasets
    import huggingface_hub.utils as hub

    barred = [part for part in (datasets, hub) if not part.are_progress_bars_disabled()]
    verbosity = datasets.logging.get_verbosity(), hub.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in barred:
            part.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)
        hub.logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            for part in barred:
                part.enable_progress_bars()
            datasets.logging.set_verbosity(verbosity[0])
            hub.logging.set_verbosity(verbosity[1])


def _unloadable(name: str, source: str, split: str, error: BaseException) -> ConfigError:
    while error.__cause__ is not None:  # what `datasets` says of it is that there was an error
        error = error.__cause__
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ConfigError(name, f"`datasets` cannot load {source!r}, split {split!r}: {reason[0][:300]}")


def _sliced(name: str, path: str, split: str, rows: list[tuple[str, Any]]) -> Rows:
    """`train[:5%]` and the like, of a file whose rows are all `train`."""
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except Exception as error:
        raise _unloadable(name, path, split, error) from error
    for part in parts:
        yield from rows[part.from_ : part.to]


def _without_null(row: dict[str, Any], columns: Collection[str]) -> dict[str, Any]:
    """Messages and tools as they were before they were put in a table, where each object has the fields of all, null where it had none."""
    return row | {column: _given(row[column]) for column in columns if column in row}


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _parquet_rows(name: str, path: str, texts: Collection[str]) -> Rows:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _without_null(row, texts)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(name, f"{path} cannot be read after row {number}: {error}") from error


def _csv_rows(name: str, path: str, texts: Collection[str]) -> Rows:
    """Fields as they are written; but a column that is numbers alone, and none of `texts`, is read as numbers."""
    where, rows = [], []
    with _long_fields(), open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.endswith(".tsv") else ",", strict=True)
        try:
            header = next(reader, [])
            start = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    wanted = f"wanted {len(header)} fields, as in the first line, got {len(row)}"
                    raise ConfigError(name, f"{path}, line {start}: {wanted}")
                if row:  # a blank line is none
                    where.append(f"{path}, line {start}")
                    rows.append(row)
                start = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(name, f"{path}, line {reader.line_num}: is not CSV: {error}") from None
        except UnicodeDecodeError:
            raise ConfigError(name, f"{path}: is not UTF-8 text, behind line {reader.line_num}") from None
    for column in header:
        if header.count(column) > 1:
            raise ConfigError(name, f"{path}: column {column!r} is there twice")
    columns = [[row[index] for row in rows] for index in range(len(header))]
    typed = [values if column in texts else _numbers(values) for column, values in zip(header, columns, strict=True)]
    for spot, *values in zip(where, *typed, strict=True):
        yield spot, dict(zip(header, values, strict=True))


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Python reads fields of 128 KiB, and texts are longer."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _numbers(column: list[str]) -> list[Any]:
    """As pandas takes them: integers; floats where fields are empty (null) or decimals; truth values. Other columns stay texts."""
    given = [value.strip() for value in column if value not in EMPTY]
    if given and len(given) == len(column) and TRUTH.keys() >= set(given):
        return [TRUTH[value.strip()] for value in column]
    if not given or any("_" in value for value in given):
        return list(column)
    try:
        if len(given) == len(column) and all(map(INTEGER.fullmatch, given)):
            return [int(value) for value in column]
        return [None if value in EMPTY else float(value) for value in column]
    except ValueError:
        return list(column)
