"""Metadata of images: a flat dictionary for each image, from Python, a CSV or a JSON Lines file.

A file names its images in the column `path`, `file_name` or `name` (the first of these that it has), relative to the
source; every other column is a key. Values are JSON's scalars. In CSV, a cell that reads as a number is a number, an
empty cell has no value, and any other cell is a string; JSON Lines has types of its own.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hashret.errors import HashretError, one_line
from hashret.results import Root, is_key

Metadata = dict[str, Any]
MetadataRow = tuple[str, Metadata]  # the name of an image in its source, and its metadata

MAX_BYTES = 50_000  # of one item's metadata, as JSON
NAME_COLUMNS = ("path", "file_name", "name")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def check_metadata(metadata: Any) -> Metadata:
    """Return the metadata of an image as a dict. Raise ValueError for an invalid key or a value that is no scalar."""
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata of an image must be a dict, not {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not is_key(key):
            raise ValueError(f'{key!r} cannot be a key of metadata: 1 to 200 characters, no ", \\ or line breaks')
        if value is not None and not isinstance(value, str | int | float):
            raise ValueError(f"metadata {key!r} must be text, a number, true, false or null, not {value!r:.100}")
    try:
        text = json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"metadata cannot be stored: {one_line(error)}") from None
    if len(text) > MAX_BYTES:
        raise ValueError(f"metadata of an image may have {MAX_BYTES:,} bytes as JSON, not {len(text):,}")
    return dict(metadata)


def open_metadata(metadata: Mapping[str, Any] | str | os.PathLike[str] | None, root: Root) -> Iterable[MetadataRow]:
    """Return checked rows of metadata, which can be iterated any number of times, for the source with this `root`.

    `metadata` maps names to metadata, or is the path of a file. None means the file `metadata.csv` or `metadata.jsonl`
    in a source that is a folder, and `NAME.metadata.csv` or `.jsonl` beside a source that is the file NAME; without
    one there are no rows. Raise HashretError for a faulty file, and ValueError for a faulty mapping.
    """
    if isinstance(metadata, Mapping):
        return [(_relative(str(name), root), check_metadata(values)) for name, values in metadata.items()]
    file = _beside(root) if metadata is None else Path(metadata)
    if file is None:
        return []
    rows = MetadataFile(file, root)
    for _ in rows:  # check all rows before the first is stored
        pass
    return rows


class MetadataFile:
    """The rows of a file, which are parsed while they are iterated."""

    def __init__(self, path: Path, root: Root) -> None:
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise HashretError(f"{path} is not a metadata file: give a .csv or .jsonl file")
        self._path, self._root = path, root
        self._read: Callable[[IO[str]], Iterable[tuple[int, Any]]] = _json_lines
        self._parse: Callable[[Any], Metadata] = _from_json
        if path.suffix.lower() == ".csv":
            self._read, self._parse = _csv_rows, _from_csv

    def __iter__(self) -> Iterator[MetadataRow]:
        before = 0  # lines before the current row
        try:
            with self._path.open(encoding="utf-8-sig", newline="") as file:
                for before, raw in self._read(file):  # noqa: B007  # the errors below use it
                    row = self._parse(raw)
                    column = next((name for name in NAME_COLUMNS if name in row), NAME_COLUMNS[0])
                    name = row.pop(column, None)
                    if not isinstance(name, str) or not name:
                        raise ValueError(f"it names no image: add a column {' or '.join(NAME_COLUMNS)}")
                    yield _relative(name, self._root), check_metadata(row)
        except OSError as error:
            raise HashretError(f"{self._path} cannot be read: {error.strerror}") from error
        except (ValueError, csv.Error) as error:
            raise HashretError(f"{self._path}, line {before + 1}: {one_line(error)}") from None


def _csv_rows(file: IO[str]) -> Iterator[tuple[int, Any]]:
    """Yield each row after the number of lines before it."""
    rows = csv.DictReader(file, strict=True)
    before = 1
    for row in rows:
        yield before, row
        before = rows.line_num


def _json_lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """Yield each line that is not empty after the number of lines before it."""
    return ((before, line) for before, line in enumerate(file) if line.strip())


def _from_csv(row: dict[Any, Any]) -> Metadata:
    if None in row or None in row.values():
        raise ValueError("it has another number of cells than the first line")
    return {key: cell if key in NAME_COLUMNS else _value(cell) for key, cell in row.items() if cell != ""}


def _from_json(line: str) -> Metadata:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    return row


def _value(cell: str) -> str | float:
    """Return the value of a cell: a number if it reads as one, the string otherwise."""
    number = _NUMBER.fullmatch(cell)
    if number is None:
        return cell
    return float(cell) if number[2] or number[3] else int(cell)


def _relative(name: str, root: Root) -> str:
    """Return the name of an image relative to the source, from that name or a full path."""
    return name.removeprefix(root).removeprefix("./")


def _beside(root: Root) -> Path | None:
    """Return the metadata file in or beside a source; None without one. Raise HashretError for two."""
    if not Path(root).is_absolute():
        return None
    base = f"{root}metadata" if root.is_folder else f"{root.location}.metadata"
    files = [path for path in (Path(f"{base}.csv"), Path(f"{base}.jsonl")) if path.is_file()]
    if len(files) > 1:
        raise HashretError(f"{files[0]} and {files[1].name} both exist: keep one, or name one with --meta")
    return files[0] if files else None
