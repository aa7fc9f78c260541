"""Indexes larger than memory, built on disk: items are sorted in parts, and become the file that `save` writes.

Items are first written down as *records*, a code's bytes and then its id's, highest first, so that a record compared
as bytes is compared by (code, id). A file of records that is too large to be sorted in memory is split at quantiles of
a sample, again and again if need be (samplesort; Frazer and McKellar, 1970). Ids come once, so no two records are equal
and even items that all share one code can be split. Then codes, ids and tables are written one after another.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_bits
from hashret.indexes import protocol, segments, tables
from hashret.indexes.files import Writer
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_build import mark
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Ids

PART = 1 << 27  # bytes of records that are sorted at once
PASS = 1 << 27  # ids that are sorted at once, with 32 bytes each
BLOCK = 1 << 20  # rows that are read at once, a multiple of the 64 of which a row of marks tells
FANOUT = 256  # files that one is split into at most: a byte numbers them
OVERSAMPLING = 64  # of as many rows as this, sampled for each part, hardly one part is half as large again as the mean

Batches = Iterable[tuple[Codes, NDArray[np.int64]]]
Told = Callable[[str, int], None]
Read = Callable[[int, int], NDArray[Any]]  # rows begin ... end - 1 of what is on the disk


class Column:
    """A temporary file of rows of one type."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        path.touch()

    def __len__(self) -> int:
        rows: int = self.path.stat().st_size // self.dtype.itemsize
        return rows

    def append(self, rows: NDArray[Any]) -> None:
        with self.path.open("ab") as file:
            file.write(rows.view(np.uint8).data)

    def read(self, begin: int, end: int) -> NDArray[Any]:
        return np.fromfile(self.path, self.dtype, end - begin, offset=begin * self.dtype.itemsize)

    def delete(self) -> None:
        self.path.unlink()


def build(path: protocol.Path, kind: str, bits: int, batches: Batches, told: Told) -> None:
    """Write an index of all items, of this kind, to `path`, with tables and an empty tail; see `BitFlipIndex.build`."""
    path, width = Path(path), check_bits(bits) // 8
    tail = segments.plain(segments.to_words(np.empty((0, width), np.uint8)), np.empty(0, np.int64))
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name, Writer(path, kind) as writer:
        folder = Path(name)
        records = Column(folder / "records", f"S{width + 8}")
        least, others = Column(folder / "least", np.int64), Column(folder / "others", np.int64)
        counts = Column(folder / "counts", np.uint32)
        total, greatest = _write_records(records, batches, bits, told)
        writer.write("base.codes", _distinct(_sorted_parts(records), tail.codes, least, others, counts, told))
        ids = (block for column in (least, others) for block in _blocks(column.read, len(column)))
        writer.write("base.ids", (segments.narrow(block, greatest) for block in ids))
        distinct = len(counts)
        writer.write("base.shared", _shared(counts) if distinct < total else [tail.shared])
        writer.write("base.starts", _starts(counts, distinct) if distinct < total else [tail.starts])
        for column in (least, others, counts):
            column.delete()
        writer.write("base.by_id", _by_id(lambda *rows: writer.read("base.ids", *rows).astype(np.int64), total, told))
        writer.write("base.dead", [tail.dead])
        _write_tables(writer, distinct, bits, Column(folder / "sifts", np.uint32), told)
        _write_balls(writer, tail, bits, told)
        for name, array in tail._asdict().items():
            writer.write(f"tail.{name}", [array])
        writer.finish({"bits": bits, "live": total})


def _write_records(records: Column, batches: Batches, bits: int, told: Told) -> tuple[int, int]:
    """Write down the items of all batches; how many there are, and the greatest id."""
    total, greatest, width = 0, 0, bits // 8
    for codes, ids in batches:
        codes = protocol.check_items(codes, ids, bits)
        total, greatest = total + len(ids), max(greatest, int(ids.max(initial=0)))
        if total > segments.MAX_ITEMS:
            raise ValueError(f"an index holds at most {segments.MAX_ITEMS} items")
        rows = np.empty((len(ids), width + 8), np.uint8)
        rows[:, :width] = codes
        rows[:, width:] = ids.astype(">i8").view(np.uint8).reshape(-1, 8)
        records.append(rows)
        told("reading", total)
    return total, greatest


def _from_records(records: NDArray[np.bytes_]) -> tuple[Words, Ids]:
    """The codes and ids of records."""
    rows = records.view(np.uint8).reshape(-1, records.dtype.itemsize)
    ids = np.ascontiguousarray(rows[:, -8:]).view(">i8")[:, 0].astype(np.int64)
    return segments.to_words(np.ascontiguousarray(rows[:, :-8])), ids


def _blocks(read: Read, count: int) -> Iterator[NDArray[Any]]:
    """All rows, a block after the other; an empty block if there are none."""
    for begin in range(0, max(1, count), BLOCK):
        yield read(begin, min(begin + BLOCK, count))


def _sample(read: Read, count: int, parts: int) -> NDArray[Any]:
    """Sorted rows from random places spread evenly, enough to cut all into so many parts."""
    bounds = np.arange(min(count, OVERSAMPLING * parts) + 1) * count // max(1, min(count, OVERSAMPLING * parts))
    places = np.random.default_rng(0).integers(bounds[:-1], bounds[1:])
    return np.sort(np.concatenate([read(0, 0), *(read(place, place + 1) for place in places.tolist())]))


def _splitters(sample: NDArray[Any], parts: int) -> NDArray[Any]:
    """Where to cut between so many parts."""
    return sample[len(sample) * np.arange(1, parts) // parts]


def _sorted_parts(records: Column) -> Iterator[tuple[Words, Ids]]:
    """All items, in parts that ascend by (code, id), each in any order; deletes the records.

    A part is smaller than what it was split from: the rows of a sample differ, so none of the parts is empty.
    """
    count, size = len(records), records.dtype.itemsize
    if count <= max(1, PART // size):
        items = _from_records(records.read(0, count))
        records.delete()
        yield items
        return
    parts = min(FANOUT, count, -(-3 * count * size // (2 * PART)))
    sample = _sample(records.read, count, parts)
    protocol.check_once(np.sort(_from_records(sample)[1]))
    splitters = _splitters(sample, parts)
    columns = [Column(records.path.with_name(f"{records.path.name}.{part}"), records.dtype) for part in range(parts)]
    for rows in _blocks(records.read, count):
        numbers = np.searchsorted(splitters, rows, "right").astype(np.uint8)
        ends = np.cumsum(np.bincount(numbers, minlength=parts))
        by_part = np.split(rows[np.argsort(numbers, kind="stable")], ends[:-1])
        for column, some in zip(columns, by_part, strict=True):
            column.append(some)
    records.delete()
    for column in columns:
        yield from _sorted_parts(column)


def _distinct(
    parts: Iterable[tuple[Words, Ids]], none: Words, least: Column, others: Column, counts: Column, told: Told
) -> Iterator[Words]:
    """The distinct codes; the least id of each, the others, and how many these are go to columns.

    The ids of a code may lie in several parts, so the count of the last one is held back.
    """
    last, held, done = none, np.empty(0, np.uint32), 0
    yield none
    for words, ids in parts:
        codes, first, more, count = segments.group(words, ids)
        if np.array_equal(codes[:1], last):
            more, held = np.concatenate([first[:1], more]), held + 1 + count[:1]
            codes, first, count = codes[1:], first[1:], count[1:]
        count = np.concatenate([held, count])
        counts.append(count[:-1])
        least.append(first)
        others.append(more)
        held, last = count[-1:], codes[-1:].copy() if len(codes) else last
        yield codes
        done += len(ids)
        told("sorting", done)
    counts.append(held)


def _shared(counts: Column) -> Iterator[NDArray[np.uint64]]:
    """The marks of the codes that have others."""
    number = 0
    for block in _blocks(counts.read, len(counts)):
        marks, marked = mark(block)
        marks[:, 1] += np.uint64(number)
        number += marked
        yield marks


def _starts(counts: Column, distinct: int) -> Iterator[NDArray[np.uint32]]:
    """Where the others of each code that has any begin, and end."""
    end = np.array([distinct], np.uint32)
    yield end
    for block in _blocks(counts.read, len(counts)):
        ends = (end[-1:] + np.cumsum(block[block > 0])).astype(np.uint32)
        end = ends if len(ends) else end
        yield ends


def _by_id(read: Read, count: int, told: Told) -> Iterator[NDArray[np.uint32]]:
    """The slots in the order of their ids, a range of ids after the other; raises ValueError if an id comes twice."""
    passes, done = max(1, -(-count // PASS)), 0
    sample = _sample(read, count, passes)
    protocol.check_once(sample)  # were one id most of them, a range would be too large
    splitters = _splitters(sample, passes)
    for low, last in zip([0, *splitters], [*(splitters - 1), np.iinfo(np.int64).max], strict=True):
        slots, ids, begin = [], [], 0
        for block in _blocks(read, count):
            chosen = np.flatnonzero((block >= low) & (block <= last))
            slots.append((begin + chosen).astype(np.uint32))
            ids.append(block[chosen])
            begin += len(block)
        ranged, numbers = np.concatenate(ids), np.concatenate(slots)
        del ids, slots
        order = np.argsort(ranged)
        protocol.check_once(ranged[order])
        yield numbers[order]
        done += len(order)
        told("ids", done)


def _write_tables(writer: Writer, count: int, bits: int, sifts: Column, told: Told) -> None:
    """Write tables of so many codes, with the postings and sifts of one in memory at a time."""
    cuts, plan = tables.cut(count, bits)
    marks, bounds = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint32)]
    rows, sifted = max(0, len(cuts) - 1), len(cuts) > 1 and bool(cuts[0, 4])

    def codes() -> Iterator[Words]:
        return _blocks(lambda begin, end: writer.read("base.codes", begin, end), count)

    def postings() -> Iterator[NDArray[np.uint32]]:
        row, sift = np.empty(count * (rows > 0), np.uint32), np.empty(count * sifted, np.uint32)
        yield np.empty((0, count if len(cuts) else 0), np.uint32)
        filled = (tables.fill_table(codes, cut, (row, sift) if t else None) for t, cut in enumerate(cuts))
        for t, table in enumerate(tables.numbered(filled)):
            marks.append(table[0])
            bounds.append(table[1])
            if t:
                yield row[None]
                sifts.append(sift)
            told("tables", t + 1)

    writer.write("base.postings", postings())
    written = (sifts.read(t * count, (t + 1) * count)[None] for t in range(rows))
    writer.write("base.sifts", written if sifted else [np.empty((0, 0), np.uint32)])
    writer.write("base.cuts", [cuts])
    writer.write("base.marks", marks)
    writer.write("base.bounds", bounds)
    writer.write("base.plan", [plan])


def _write_balls(writer: Writer, none: Segment, bits: int, told: Told) -> None:
    """Write the balls of the codes whose tables have been written."""
    written = ("codes", "cuts", "marks", "bounds", "postings", "sifts", "plan")
    base = none._replace(**{name: writer.mapped(f"base.{name}") for name in written})
    base = tables.with_balls(segments.frozen(base), bits)
    told("balls", len(base.radii))
    for name in ("centres", "radii", "begins", "members"):
        writer.write(f"base.{name}", [getattr(base, name)])
