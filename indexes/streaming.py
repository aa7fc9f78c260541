"""Building indexes larger than memory: items are sorted on disk in parts and written as the file that `save` writes.

Items are first written as *records*, the bytes of a code and then those of its id, highest first, so that comparing
records as bytes compares them by (code, id). A file of records that is too large to sort in memory is split at
quantiles of a sample, recursively (samplesort; Frazer and McKellar, 1970). Ids are distinct, so no two records are
equal, and even items that all share one code can be split. Then codes, ids and tables are written in turn.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_bits
from hashret.durable import Replacement
from hashret.indexes import protocol, segments, tables
from hashret.indexes.files import Writer, array_name
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_build import build_rank_bitmap
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Ids

PART = 1 << 27  # bytes of records sorted at once
PASS = 1 << 27  # ids sorted at once, with 32 bytes each
BLOCK = 1 << 20  # rows read at once, a multiple of the 64 that a row of a rank bitmap covers
FANOUT = 256  # files that one is split into at most: their numbers fit in a byte
OVERSAMPLING = 64  # rows sampled for each part: then hardly any part is 1.5 times as large as the mean

Batches = Iterable[tuple[Codes, NDArray[np.int64]]]
ProgressCallback = Callable[[str, int], None]  # called with the stage and the number of items, tables or clusters done
Reader = Callable[[int, int], NDArray[Any]]  # returns rows begin ... end - 1 of an array on disk


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


def build(path: protocol.Path, backend: str, bits: int, batches: Batches, progress: ProgressCallback) -> None:
    """Write an index of this backend with all items in its main segment to `path`; see `BitFlipIndex.build`."""
    path, width = Path(path), check_bits(bits) // 8
    empty = segments.build_flat(segments.to_words(np.empty((0, width), np.uint8)), np.empty(0, np.int64))
    with Replacement(path, folder=True) as scratch, Writer(path, backend) as writer:  # the folder is never committed
        folder = scratch.path
        records = Column(folder / "records", f"S{width + 8}")
        first_ids, other_ids = Column(folder / "first_ids", np.int64), Column(folder / "other_ids", np.int64)
        counts = Column(folder / "counts", np.uint32)
        total, greatest = _write_records(records, batches, bits, progress)
        codes = _distinct_codes(_sorted_parts(records), empty.codes, first_ids, other_ids, counts, progress)
        writer.write(_main("codes"), codes)
        ids = (block for column in (first_ids, other_ids) for block in _blocks(column.read, len(column)))
        writer.write(_main("ids"), (segments.narrow(block, greatest) for block in ids))
        distinct = len(counts)
        writer.write(_main("shared_ranks"), _shared_ranks(counts) if distinct < total else [empty.shared_ranks])
        offsets = _shared_offsets(counts, distinct) if distinct < total else [empty.shared_offsets]
        writer.write(_main("shared_offsets"), offsets)
        for column in (first_ids, other_ids, counts):
            column.delete()
        slots = _slots_by_id(lambda *rows: writer.read(_main("ids"), *rows).astype(np.int64), total, progress)
        writer.write(_main("by_id"), slots)
        writer.write(_main("tombstones"), [empty.tombstones])
        _write_tables(writer, distinct, bits, Column(folder / "signatures", np.uint32), progress)
        _write_clusters(writer, empty, bits, progress)
        for field, array in empty._asdict().items():
            writer.write(array_name("tail", field), [array])
        writer.finish({"bits": bits, "live": total})


def _main(field: str) -> str:
    """Return the name in the file of a field of the main segment."""
    return array_name("base", field)


def _write_records(records: Column, batches: Batches, bits: int, progress: ProgressCallback) -> tuple[int, int]:
    """Write the items of all batches as records; return their number and the greatest id."""
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
        progress("reading", total)
    return total, greatest


def _from_records(records: NDArray[np.bytes_]) -> tuple[Words, Ids]:
    """Return the codes and ids of records."""
    rows = records.view(np.uint8).reshape(-1, records.dtype.itemsize)
    ids = np.ascontiguousarray(rows[:, -8:]).view(">i8")[:, 0].astype(np.int64)
    return segments.to_words(np.ascontiguousarray(rows[:, :-8])), ids


def _blocks(read: Reader, count: int) -> Iterator[NDArray[Any]]:
    """Yield all rows in blocks, and one empty block if there are none."""
    for begin in range(0, max(1, count), BLOCK):
        yield read(begin, min(begin + BLOCK, count))


def _sample(read: Reader, count: int, parts: int) -> NDArray[Any]:
    """Return a sorted stratified sample of the rows, large enough to split them into so many parts."""
    size = min(count, OVERSAMPLING * parts)
    strata = np.arange(size + 1) * count // max(1, size)
    rows = np.random.default_rng(0).integers(strata[:-1], strata[1:])
    return np.sort(np.concatenate([read(0, 0), *(read(row, row + 1) for row in rows.tolist())]))


def _splitters(sample: NDArray[Any], parts: int) -> NDArray[Any]:
    """Return the quantiles of the sample that split so many parts."""
    return sample[len(sample) * np.arange(1, parts) // parts]


def _sorted_parts(records: Column) -> Iterator[tuple[Words, Ids]]:
    """Yield all items in parts that ascend by (code, id), each in any order, and delete the records.

    The rows of the sample are distinct, so no part is empty, and each is smaller than the file it was split from.
    """
    count, size = len(records), records.dtype.itemsize
    if count <= max(1, PART // size):
        items = _from_records(records.read(0, count))
        records.delete()
        yield items
        return
    parts = min(FANOUT, count, -(-3 * count * size // (2 * PART)))
    sample = _sample(records.read, count, parts)
    protocol.check_distinct(np.sort(_from_records(sample)[1]))
    splitters = _splitters(sample, parts)
    columns = [Column(records.path.with_name(f"{records.path.name}.{part}"), records.dtype) for part in range(parts)]
    for rows in _blocks(records.read, count):
        numbers = np.searchsorted(splitters, rows, "right").astype(np.uint8)
        ends = np.cumsum(np.bincount(numbers, minlength=parts))
        by_part = np.split(rows[np.argsort(numbers, kind="stable")], ends[:-1])
        for column, part_rows in zip(columns, by_part, strict=True):
            column.append(part_rows)
    records.delete()
    for column in columns:
        yield from _sorted_parts(column)


def _distinct_codes(
    parts: Iterable[tuple[Words, Ids]],
    empty: Words,
    first_ids: Column,
    other_ids: Column,
    counts: Column,
    progress: ProgressCallback,
) -> Iterator[Words]:
    """Yield the distinct codes; append the least id of each, its other ids and their number to columns.

    The ids of a code may lie in several parts, so the count of a part's last code is appended with the next part.
    """
    last_code, last_count, done = empty, np.empty(0, np.uint32), 0
    yield empty
    for words, ids in parts:
        codes, first, others, count = segments.group(words, ids)
        if np.array_equal(codes[:1], last_code):
            others, last_count = np.concatenate([first[:1], others]), last_count + 1 + count[:1]
            codes, first, count = codes[1:], first[1:], count[1:]
        count = np.concatenate([last_count, count])
        counts.append(count[:-1])
        first_ids.append(first)
        other_ids.append(others)
        last_count, last_code = count[-1:], codes[-1:].copy() if len(codes) else last_code
        yield codes
        done += len(ids)
        progress("sorting", done)
    counts.append(last_count)


def _shared_ranks(counts: Column) -> Iterator[NDArray[np.uint64]]:
    """Yield the rank bitmap of the codes that have several ids."""
    total = 0
    for block in _blocks(counts.read, len(counts)):
        bitmap, number = build_rank_bitmap(block)
        bitmap[:, 1] += np.uint64(total)
        total += number
        yield bitmap


def _shared_offsets(counts: Column, distinct: int) -> Iterator[NDArray[np.uint32]]:
    """Yield the first slot of the other ids of each code that has any, and the end of the last."""
    end = np.array([distinct], np.uint32)
    yield end
    for block in _blocks(counts.read, len(counts)):
        ends = (end[-1:] + np.cumsum(block[block > 0])).astype(np.uint32)
        end = ends if len(ends) else end
        yield ends


def _slots_by_id(read: Reader, count: int, progress: ProgressCallback) -> Iterator[NDArray[np.uint32]]:
    """Yield the slots in the order of their ids, one range of ids after another; raise ValueError for a repeated id."""
    passes, done = max(1, -(-count // PASS)), 0
    sample = _sample(read, count, passes)
    protocol.check_distinct(sample)  # a range would be too large if most ids were equal
    splitters = _splitters(sample, passes)
    for low, last in zip([0, *splitters], [*(splitters - 1), np.iinfo(np.int64).max], strict=True):
        slots, ids, begin = [], [], 0
        for block in _blocks(read, count):
            positions = np.flatnonzero((block >= low) & (block <= last))
            slots.append((begin + positions).astype(np.uint32))
            ids.append(block[positions])
            begin += len(block)
        range_ids, range_slots = np.concatenate(ids), np.concatenate(slots)
        del ids, slots
        order = np.argsort(range_ids)
        protocol.check_distinct(range_ids[order])
        yield range_slots[order]
        done += len(order)
        progress("ids", done)


def _write_tables(writer: Writer, count: int, bits: int, signatures: Column, progress: ProgressCallback) -> None:
    """Write the tables of so many codes, with the postings and signatures of one table in memory at a time."""
    layout, plan = tables.make_layout(count, bits)
    ranks, offsets = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint32)]
    rows, prefiltered = max(0, len(layout) - 1), len(layout) > 1 and bool(layout[0, 4])

    def codes() -> Iterator[Words]:
        return _blocks(lambda begin, end: writer.read(_main("codes"), begin, end), count)

    def postings() -> Iterator[NDArray[np.uint32]]:
        row, row_signatures = np.empty(count * (rows > 0), np.uint32), np.empty(count * prefiltered, np.uint32)
        yield np.empty((0, count if len(layout) else 0), np.uint32)
        built = (
            tables.build_table(codes, entry, (row, row_signatures) if t else None) for t, entry in enumerate(layout)
        )
        for t, table in enumerate(tables.renumber(built)):
            ranks.append(table[0])
            offsets.append(table[1])
            if t:
                yield row[None]
                signatures.append(row_signatures)
            progress("tables", t + 1)

    writer.write(_main("postings"), postings())
    stored = (signatures.read(t * count, (t + 1) * count)[None] for t in range(rows))
    writer.write(_main("signatures"), stored if prefiltered else [np.empty((0, 0), np.uint32)])
    writer.write(_main("layout"), [layout])
    writer.write(_main("bucket_ranks"), ranks)
    writer.write(_main("bucket_offsets"), offsets)
    writer.write(_main("plan"), [plan])


def _write_clusters(writer: Writer, empty: Segment, bits: int, progress: ProgressCallback) -> None:
    """Write the clusters of the codes whose tables have been written."""
    fields = ("codes", "layout", "bucket_ranks", "bucket_offsets", "postings", "signatures", "plan")
    main = empty._replace(**{field: writer.mapped(_main(field)) for field in fields})
    main = tables.add_clusters(segments.freeze(main), bits)
    progress("clusters", len(main.radii))
    for field in ("pivots", "radii", "member_offsets", "members"):
        writer.write(_main(field), [getattr(main, field)])
