"""Recover rows from the pages of an SQLite file, however damaged the others are: https://sqlite.org/fileformat2.html.

SQLite finds a row through its parent pages: without a table's first page it reads nothing of the table, without the
file's first page nothing at all. Here every page is parsed on its own, in its newest version from the write-ahead log.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR = 13, 10, 2  # the types of pages that hold rows
_DEFAULT_PAGE_SIZE = 4096
_MIN_PAGE_SIZE, _MAX_PAGE_SIZE = 512, 65536


class Cell(NamedTuple):
    """A stored row: its rowid, None in an index or a table WITHOUT ROWID, and its values."""

    rowid: int | None
    values: tuple[Any, ...]


def cells(database: Path) -> Iterator[Cell]:
    """Iterate over the readable rows of all tables and indexes, without those in free pages."""
    pages = _Pages(database)
    free = set(pages.free())
    for number in range(1, pages.count + 1):
        if number not in free:
            yield from pages.cells(number)


class _Pages:
    """The pages of a database as of the last commit in its log."""

    def __init__(self, database: Path) -> None:
        self._content = database.read_bytes()
        size = int.from_bytes(self._content[16:18], "big")
        size = _MAX_PAGE_SIZE if size == 1 else size
        is_valid = _MIN_PAGE_SIZE <= size <= _MAX_PAGE_SIZE and size.bit_count() == 1
        self.size = size if is_valid else _DEFAULT_PAGE_SIZE
        log = database.with_name(database.name + "-wal")
        self._logged = self._read_log(log.read_bytes()) if log.is_file() else {}
        self.count = max(len(self._content) // self.size, *self._logged, 0)  # pages in between may be missing

    def _read_log(self, log: bytes) -> dict[int, bytes]:
        """Return the committed pages of the log, by page number."""
        committed: dict[int, bytes] = {}
        pending: dict[int, bytes] = {}
        max_number = (len(self._content) + len(log)) // self.size
        for start in range(32, len(log) - self.size - 23, self.size + 24):
            number, is_commit = struct.unpack_from(">II", log, start)
            # A frame with another salt is left over from before the log was last reset.
            if log[start + 8 : start + 16] != log[16:24] or not 0 < number <= max_number:
                break
            pending[number] = log[start + 24 : start + 24 + self.size]
            if is_commit:
                committed |= pending
                pending = {}
        return committed

    def __getitem__(self, number: int) -> bytes:
        if number in self._logged:
            return self._logged[number]
        page = self._content[(number - 1) * self.size : number * self.size] if number > 0 else b""
        return page if len(page) == self.size else bytes(self.size)  # zeros beyond the end of a truncated file

    def free(self) -> Iterator[int]:
        """Iterate over the free pages. Trunk pages are recognised by their form, as the first page may be lost."""
        for number in range(2, self.count + 1):
            page = self[number]
            following, count = struct.unpack_from(">II", page)
            if following <= self.count and 0 < count <= self.size // 4 - 2:
                leaves = struct.unpack_from(f">{count}I", page, 8)
                if len(set(leaves)) == count and min(leaves) > 1 and max(leaves) <= self.count:
                    yield from leaves

    def cells(self, number: int) -> Iterator[Cell]:
        """Iterate over the readable rows of a page."""
        page = self[number]
        start = 100 if number == 1 else 0
        page_type = page[start]
        if page_type not in (_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR):
            return
        count = int.from_bytes(page[start + 3 : start + 5], "big")
        first = start + (12 if page_type == _INDEX_INTERIOR else 8)
        for pointer in range(first, min(first + 2 * count, self.size - 1), 2):
            # Any number in a damaged cell may be wrong.
            with suppress(IndexError, struct.error, ValueError):
                yield self._cell(page, int.from_bytes(page[pointer : pointer + 2], "big"), page_type)

    def _cell(self, page: bytes, offset: int, page_type: int) -> Cell:
        if page_type == _INDEX_INTERIOR:
            offset += 4  # the number of the left child page
        length, offset = _varint(page, offset)
        rowid = None
        if page_type == _TABLE_LEAF:
            rowid, offset = _varint(page, offset)
        return Cell(rowid, _values(self._payload(page, offset, length, page_type)))

    def _payload(self, page: bytes, offset: int, length: int, page_type: int) -> bytes:
        """Return the payload of a cell, including what is in overflow pages."""
        max_local = self.size - 35 if page_type == _TABLE_LEAF else (self.size - 12) * 64 // 255 - 23
        if length <= max_local:
            local = length
        else:
            min_local = (self.size - 12) * 32 // 255 - 23
            local = min_local + (length - min_local) % (self.size - 4)
            local = local if local <= max_local else min_local
        if length > self.count * self.size:
            raise ValueError("longer than the file")
        parts = [page[offset : offset + local]]
        following = int.from_bytes(page[offset + local : offset + local + 4], "big")
        for remaining in range(length - local, 0, 4 - self.size):
            overflow = self[following]
            following = int.from_bytes(overflow[:4], "big")
            parts.append(overflow[4 : 4 + remaining])
        return b"".join(parts)


def _varint(page: bytes, offset: int) -> tuple[int, int]:
    """Read an integer of one to nine bytes; return it and the offset after it."""
    value = 0
    for i in range(8):
        byte = page[offset + i]
        value = value << 7 | byte & 127
        if byte < 128:
            return value, offset + i + 1
    value = value << 8 | page[offset + 8]
    return value - (value >> 63 << 64), offset + 9


_INTEGER_LENGTHS = (0, 1, 2, 3, 4, 6, 8)  # in bytes, by serial type


def _values(record: bytes) -> tuple[Any, ...]:
    """Decode the values of a record; raise ValueError if it is not one."""
    end, offset = _varint(record, 0)
    serial_types = []
    while offset < end:
        serial_type, offset = _varint(record, offset)
        serial_types.append(serial_type)
    values: list[Any] = []
    for serial_type in serial_types:
        if serial_type >= 12:
            length = (serial_type - 12) // 2
            value: Any = record[offset : offset + length]
            if serial_type % 2:
                value = value.decode()
        elif serial_type in (0, 8, 9):
            length, value = 0, (None, 0, 1)[(0, 8, 9).index(serial_type)]
        elif serial_type == 7:
            length, (value,) = 8, struct.unpack_from(">d", record, offset)
        elif serial_type < 7:
            length = _INTEGER_LENGTHS[serial_type]
            value = int.from_bytes(record[offset : offset + length], "big", signed=True)
        else:
            raise ValueError(f"no serial type {serial_type}")
        offset += length
        values.append(value)
    if offset != len(record):
        raise ValueError("the values do not end where the record does")
    return tuple(values)
