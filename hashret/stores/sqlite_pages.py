"""The rows in the pages of an SQLite file, whichever of them are damaged: https://sqlite.org/fileformat2.html.

SQLite finds a row by way of the pages above it, so that it can read nothing of a table whose first page is lost, nor
anything of a file whose first page is. Here every page is looked at for itself, as the log has it if that is newer.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_TABLE, _INDEX, _ABOVE_INDEX = 13, 10, 2  # the kinds of pages that hold rows
_SIZE = 4096  # of a page, unless the file says otherwise
_LEAST, _MOST = 512, 65536


class Cell(NamedTuple):
    """A row as it lies in a file: its number, if it is of a table that has numbers, and its values."""

    number: int | None
    values: tuple[Any, ...]


def cells(database: Path) -> Iterator[Cell]:
    """Every row that can be read, of whichever table or index; those in pages that are free are left out."""
    pages = _Pages(database)
    free = set(pages.free())
    for number in range(1, pages.count + 1):
        if number not in free:
            yield from pages.cells(number)


class _Pages:
    """The pages of the database, as of the last commit in its log."""

    def __init__(self, database: Path) -> None:
        self._content = database.read_bytes()
        told = int.from_bytes(self._content[16:18], "big")
        told = _MOST if told == 1 else told
        self.size = told if _LEAST <= told <= _MOST and told.bit_count() == 1 else _SIZE
        log = database.with_name(database.name + "-wal")
        self._newer = self._read_log(log.read_bytes()) if log.is_file() else {}
        self.count = max(len(self._content) // self.size, *self._newer, 0)  # those in between may be lost

    def _read_log(self, log: bytes) -> dict[int, bytes]:
        """The pages that were committed since the log was begun."""
        committed: dict[int, bytes] = {}
        begun: dict[int, bytes] = {}
        most = (len(self._content) + len(log)) // self.size
        for start in range(32, len(log) - self.size - 23, self.size + 24):
            number, commits = struct.unpack_from(">II", log, start)
            if log[start + 8 : start + 16] != log[16:24] or not 0 < number <= most:  # of a log that was here before
                break
            begun[number] = log[start + 24 : start + 24 + self.size]
            if commits:
                committed |= begun
                begun = {}
        return committed

    def __getitem__(self, number: int) -> bytes:
        if number in self._newer:
            return self._newer[number]
        page = self._content[(number - 1) * self.size : number * self.size] if number > 0 else b""
        return page if len(page) == self.size else bytes(self.size)  # of nothing, where it was cut off

    def free(self) -> Iterator[int]:
        """Pages that hold nothing any more: what lists them is known by how it looks, should the first page be lost."""
        for number in range(2, self.count + 1):
            page = self[number]
            following, count = struct.unpack_from(">II", page)
            if following <= self.count and 0 < count <= self.size // 4 - 2:
                listed = struct.unpack_from(f">{count}I", page, 8)
                if len(set(listed)) == count and min(listed) > 1 and max(listed) <= self.count:
                    yield from listed

    def cells(self, number: int) -> Iterator[Cell]:
        """What can be read of the rows in a page."""
        page = self[number]
        start = 100 if number == 1 else 0
        kind = page[start]
        if kind not in (_TABLE, _INDEX, _ABOVE_INDEX):
            return
        count = int.from_bytes(page[start + 3 : start + 5], "big")
        first = start + (12 if kind == _ABOVE_INDEX else 8)
        for place in range(first, min(first + 2 * count, self.size - 1), 2):
            # Of a cell that is damaged any number may be wrong.
            with suppress(IndexError, struct.error, ValueError):
                yield self._cell(page, int.from_bytes(page[place : place + 2], "big"), kind)

    def _cell(self, page: bytes, at: int, kind: int) -> Cell:
        if kind == _ABOVE_INDEX:
            at += 4  # where it leads
        length, at = _varint(page, at)
        number = None
        if kind == _TABLE:
            number, at = _varint(page, at)
        return Cell(number, _values(self._payload(page, at, length, kind)))

    def _payload(self, page: bytes, at: int, length: int, kind: int) -> bytes:
        """What a cell holds, some of it perhaps in a chain of other pages."""
        most = self.size - 35 if kind == _TABLE else (self.size - 12) * 64 // 255 - 23
        if length <= most:
            here = length
        else:
            least = (self.size - 12) * 32 // 255 - 23
            here = least + (length - least) % (self.size - 4)
            here = here if here <= most else least
        if length > self.count * self.size:
            raise ValueError("longer than the file")
        parts = [page[at : at + here]]
        following = int.from_bytes(page[at + here : at + here + 4], "big")
        for left in range(length - here, 0, 4 - self.size):
            more = self[following]
            following = int.from_bytes(more[:4], "big")
            parts.append(more[4 : 4 + left])
        return b"".join(parts)


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and what follows it."""
    value = 0
    for i in range(8):
        byte = page[at + i]
        value = value << 7 | byte & 127
        if byte < 128:
            return value, at + i + 1
    value = value << 8 | page[at + 8]
    return value - (value >> 63 << 64), at + 9


_BYTES = (0, 1, 2, 3, 4, 6, 8)  # of an integer, by its type


def _values(record: bytes) -> tuple[Any, ...]:
    """The values of a row; raises ValueError for what is none."""
    end, at = _varint(record, 0)
    kinds = []
    while at < end:
        kind, at = _varint(record, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        if kind >= 12:
            length = (kind - 12) // 2
            value: Any = record[at : at + length]
            if kind % 2:
                value = value.decode()
        elif kind in (0, 8, 9):
            length, value = 0, (None, 0, 1)[(0, 8, 9).index(kind)]
        elif kind == 7:
            length, (value,) = 8, struct.unpack_from(">d", record, at)
        elif kind < 7:
            length = _BYTES[kind]
            value = int.from_bytes(record[at : at + length], "big", signed=True)
        else:
            raise ValueError(f"no type {kind}")
        at += length
        values.append(value)
    if at != len(record):
        raise ValueError("another length")
    return tuple(values)
