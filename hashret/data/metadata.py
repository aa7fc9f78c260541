"""What is known of images besides their pixels: a flat dictionary for each, from Python, a CSV or a JSON Lines file.

A file names its images in the column `path`, `file_name` or `name` (the first of them that it has), relative to the
source; every other column is a key. Values are JSON's scalars. In CSV, what reads as a number is one, an empty cell is
no value, and everything else is a text; JSON Lines says itself what is what.
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
MetadataRow = tuple[str, Metadata]  # an image's name in its source, and what is known of it

MAX_BYTES = 50_000  # of one item's metadata, as JSON
NAME_COLUMNS = ("path", "file_name", "name")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def check_metadata(metadata: Any) -> Metadata:
    """The same as a dict; raises ValueError unless keys are possible ones, and values JSON's scalars."""
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata must be a dict for each image, not {type(metadata).__name__}")
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


def open_metadata(given: Mapping[str, Any] | str | os.PathLike[str] | None, root: Root) -> Iterable[MetadataRow]:
    """The rows, checked and to be gone through any number of times, for a source whose names begin with `root`.

    They are those given, or those of a file, or else of `metadata.csv` or `metadata.jsonl` in the source, if it is a
    folder, or `NAME.metadata.csv` beside it, if it is the file NAME. Raises HashretError for what is wrong in a file,
    and ValueError for what is wrong in a mapping.
    """
    if isinstance(given, Mapping):
        return [(_relative(str(name), root), check_metadata(metadata)) for name, metadata in given.items()]
    file = _beside(root) if given is None else Path(given)
    if file is None:
        return []
    rows = MetadataFile(file, root)
    for _ in rows:  # now, rather than when half of it is stored
        pass
    return rows


class MetadataFile:
    """The rows of a file, a few of them in memory at a time."""

    def __init__(self, path: Path, root: Root) -> None:
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise HashretError(f"{path} is no metadata: give a .csv or .jsonl file")
        self._path, self._root = path, root
        self._read: Callable[[IO[str]], Iterable[tuple[int, Any]]] = _json_lines
        self._parse: Callable[[Any], Metadata] = _from_json
        if path.suffix.lower() == ".csv":
            self._read, self._parse = _csv_rows, _from_csv

    def __iter__(self) -> Iterator[MetadataRow]:
        before = 0  # lines that are good
        try:
            with self._path.open(encoding="utf-8-sig", newline="") as file:
                for before, raw in self._read(file):  # noqa: B007  # for the errors below
                    row = self._parse(raw)
                    column = next((name for name in NAME_COLUMNS if name in row), NAME_COLUMNS[0])
                    name = row.pop(column, None)
                    if not isinstance(name, str) or not name:
                        raise ValueError(f"it names no image: that is what a column {', '.join(NAME_COLUMNS)} is for")
                    yield _relative(name, self._root), check_metadata(row)
        except OSError as error:
            raise HashretError(f"{self._path} cannot be read: {error.strerror}") from error
        except (ValueError, csv.Error) as error:
            raise HashretError(f"{self._path}, line {before + 1}: {one_line(error)}") from None


def _csv_rows(file: IO[str]) -> Iterator[tuple[int, Any]]:
    """Each row, and the number of lines before it."""
    rows = csv.DictReader(file, strict=True)
    before = 1
    for row in rows:
        yield before, row
        before = rows.line_num


def _json_lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """Each line that is not empty, and the number of lines before it."""
    return ((before, line) for before, line in enumerate(file) if line.strip())


def _from_csv(row: dict[Any, Any]) -> Metadata:
    if None in row or None in row.values():
        raise ValueError("it has more cells, or fewer, than the first line")
    return {key: cell if key in NAME_COLUMNS else _value(cell) for key, cell in row.items() if cell != ""}


def _from_json(line: str) -> Metadata:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    return row


def _value(cell: str) -> str | float:
    """What a cell says: a number if it reads as one, else a text."""
    number = _NUMBER.fullmatch(cell)
    if number is None:
        return cell
    return float(cell) if number[2] or number[3] else int(cell)


def _relative(name: str, root: Root) -> str:
    """An image's name in the source, which may have been given as a whole path."""
    return name.removeprefix(root).removeprefix("./")


def _beside(root: Root) -> Path | None:
    """The file that lies with a source, if there is one."""
    if not Path(root).is_absolute():
        return None
    base = f"{root}metadata" if root.is_folder else f"{root.location}.metadata"
    found = [path for path in (Path(f"{base}.csv"), Path(f"{base}.jsonl")) if path.is_file()]
    if len(found) > 1:
        raise HashretError(f"{found[0]} and {found[1].name} both lie there: keep one, or name one with --meta")
    return found[0] if found else None
