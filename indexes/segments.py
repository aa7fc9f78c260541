"""Segments: distinct codes with posting lists, built from items in any order, and searched."""

import math
import threading
import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.indexes.kernels import CHUNK_BLOCKS, MAX_RANGES, PREFILTER_BATCH, Plan, Segment, Workspace
from hashret.indexes.kernels_build import build_rank_bitmap, find_codes
from hashret.indexes.kernels_codes import BLOCK, FAR, Words
from hashret.indexes.kernels_heap import Heaps, Ids
from hashret.indexes.kernels_nearest import search_nearest
from hashret.indexes.kernels_within import search_within
from hashret.indexes.protocol import read_only

MAX_ITEMS = (1 << 32) - 1  # slots and codes are numbered in 32 bits

_CACHE_LINE, _PAGE = 64, 4096  # bytes of a cache line, and of a page of memory
_BIG_ENDIAN = np.dtype(">u8")
_thread = threading.local()
_NO_RANKS = np.empty((0, 2), np.uint64)
_NO_NUMBERS = np.empty(0, np.uint32)
NO_PLAN = np.array(Plan(-1, -1, -1, -1, -1, candidate_budget=0), np.int64)
_BUDGET = Plan._fields.index("candidate_budget")
_NO_CLUSTERS = (np.empty((0, 0), np.uint64), np.empty(0, np.int32), _NO_NUMBERS, _NO_NUMBERS)
_NO_TABLES = (
    np.empty((0, 5), np.int64),
    _NO_RANKS,
    _NO_NUMBERS,
    np.empty((0, 0), np.uint32),
    np.empty((0, 0), np.uint32),
    NO_PLAN,
    *_NO_CLUSTERS,
)
_NO_TOMBSTONES = np.empty(0, np.uint8)
NO_IDS = read_only(np.empty(0, np.int64))


def to_words(codes: Codes) -> Words:
    """Return codes as the kernels read them: uint64 (n,) if 64 bits suffice, else (n, words), padded with zero bits."""
    n, width = codes.shape
    if width % 8:
        padded = np.zeros((n, width + -width % 8), np.uint8)
        padded[:, :width] = codes
        codes = padded
    words: Words = codes.view(_BIG_ENDIAN).astype(np.uint64)
    return words[:, 0] if width <= 8 else words


def from_words(words: Words, bits: int) -> Codes:
    """Return the codes of these words: the inverse of `to_words`."""
    rows = words.astype(">u8").view(np.uint8).reshape(len(words), -(-bits // 64) * 8)
    return np.ascontiguousarray(rows[:, : bits // 8])


def narrow(ids: NDArray[Any], greatest: int | None = None) -> NDArray[Any]:
    """Return the ids as uint32 if the greatest, of these ids if not given, fits."""
    greatest = ids.max(initial=0) if greatest is None else greatest
    return ids.astype(np.uint32) if greatest < 1 << 32 else ids


def freeze(segment: Segment) -> Segment:
    """Make the arrays read-only and return the segment: threads share it, and kernels are compiled for such arrays."""
    for array in segment:
        array.flags.writeable = False
    return segment


def build_flat(words: Words, ids: Ids) -> Segment:
    """Build a segment that is only scanned: its codes are not distinct."""
    order = np.argsort(ids, kind="stable")  # merges a delta segment with new items in linear time
    words, ids = words[order], ids[order]
    by_id = np.arange(len(ids), dtype=np.uint32)
    return freeze(Segment(words, narrow(ids), _NO_RANKS, _NO_NUMBERS, by_id, _NO_TOMBSTONES, *_NO_TABLES))


def _align(words: Words) -> Words:
    """Copy the codes to memory that begins at the second cache line of a page.

    Unaligned codes may span two cache lines, which takes two reads. Blocks that begin at a page are read up to a tenth
    more slowly.
    """
    buffer = np.empty(words.nbytes + _PAGE, np.uint8)
    begin = (_CACHE_LINE - buffer.ctypes.data) % _PAGE
    aligned: Words = buffer[begin : begin + words.nbytes].view(np.uint64).reshape(words.shape)
    aligned[:] = words
    return aligned


def _order(ids: Ids) -> NDArray[np.uint32]:
    """Return the positions of the ids in their order, without sorting if they fill at least a quarter of 0 ... max."""
    greatest = int(ids.max(initial=0))
    if greatest >= 4 * len(ids):
        return np.argsort(ids).astype(np.uint32)
    none = np.uint32(MAX_ITEMS)
    slots = np.full(greatest + 1, none)
    slots[ids] = np.arange(len(ids), dtype=np.uint32)
    order: NDArray[np.uint32] = slots[slots != none]
    return order


class Groups(NamedTuple):
    """Items grouped by their codes."""

    codes: Words  # (d,) or (d, words), distinct and ascending
    ids: Ids  # (d,): the least id of each
    other_ids: Ids  # the other ids of each, ascending, code after code
    counts: NDArray[np.uint32]  # (d,): the number of other ids of each


def group(words: Words, ids: Ids) -> Groups:
    """Group items in any order by their codes."""
    by_code = np.argsort(words) if words.ndim == 1 else np.lexsort(words.T[::-1])
    words, ids = words[by_code], ids[by_code]
    first = np.ones(len(ids), np.bool_)
    changed = words[1:] != words[:-1]
    first[1:] = changed if words.ndim == 1 else changed.any(axis=1)
    if first.all():
        return Groups(words, ids, ids[:0], np.zeros(len(ids), np.uint32))
    sharing = ~first
    sharing[:-1] |= ~first[1:]
    code = np.cumsum(first)[sharing]
    ids[sharing] = ids[sharing][np.lexsort((ids[sharing], code))]
    counts = np.diff(np.flatnonzero(first), append=len(ids)).astype(np.uint32) - 1
    return Groups(words[first], ids[first], ids[~first], counts)


def build_distinct(words: Words, ids: Ids) -> Segment:
    """Build a segment of distinct ascending codes with posting lists of ascending ids, without tables."""
    codes, ids, other_ids, counts = group(words, ids)
    shared_ranks, shared_offsets = _NO_RANKS, _NO_NUMBERS
    if len(other_ids):
        shared_ranks = build_rank_bitmap(counts)[0]
        shared_offsets = len(codes) + np.cumsum(np.append(0, counts[counts > 0])).astype(np.uint32)
        ids = np.concatenate([ids, other_ids])
    by_id = _order(ids)
    return freeze(Segment(_align(codes), narrow(ids), shared_ranks, shared_offsets, by_id, _NO_TOMBSTONES, *_NO_TABLES))


def get_workspace(segment: Segment, queries: int) -> Workspace:
    """Return this thread's workspace; allocate a larger one if it is too small for a search of the segment."""
    budget, tables, clusters = int(segment.plan[_BUDGET]), len(segment.layout), len(segment.radii)
    work: Workspace | None = getattr(_thread, "work", None)
    if (
        work is None
        or len(work.candidates) < budget
        or len(work.candidate_ends) <= tables
        or len(work.block_minima) < queries
        or len(work.lower_bounds) < clusters
    ):
        if work is not None:  # or two segments searched in turn would replace it every time
            budget, tables = max(budget, len(work.candidates)), max(tables, len(work.candidate_ends) - 1)
            queries, clusters = max(queries, len(work.block_minima)), max(clusters, len(work.lower_bounds))
        packed_differences = np.zeros(PREFILTER_BATCH // 8, np.uint64)
        work = _thread.work = Workspace(
            substrings=np.empty(tables, np.int64),
            ranges=np.empty((MAX_RANGES, 2), np.int64),
            candidates=np.empty(budget, np.uint32),
            range_ends=np.empty(tables + 1, np.int64),
            differences=packed_differences.view(np.uint8),
            packed_differences=packed_differences,
            prefiltered=np.empty(1, np.int64),
            candidate_ends=np.empty(tables + 1, np.int64),
            shortlist=np.empty((max(budget, BLOCK), 2), np.uint32),
            histogram=np.empty(FAR, np.int64),
            block_minima=np.empty((queries, CHUNK_BLOCKS), np.int16),
            probes_before=np.zeros(FAR, np.int64),
            probes=np.zeros(1, np.int64),
            lower_bounds=np.empty(clusters, np.int32),
        )
        _thread.layout = None
    if len(segment.layout) and (_thread.layout is None or _thread.layout() is not segment.layout):
        work.probes_before[:] = _count_probes(tuple(segment.layout[:, 1].tolist()))
        _thread.layout = weakref.ref(segment.layout)  # a strong reference would keep a mapped file open
    return work


@lru_cache
def _count_probes(widths: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the number of buckets probed before each level, for substrings of these widths.

    Level 0 probes the first bucket of every table.
    """
    m = len(widths)
    flips = [m, *[0] * (m - 1)] + [math.comb(widths[level % m], level // m) for level in range(m, FAR - 1)]
    return np.cumsum([0, *flips])


def take_probes() -> int:
    """Return the number of buckets that this thread has probed since the last call; a level once begun counts whole."""
    work: Workspace | None = getattr(_thread, "work", None)
    if work is None:
        return 0
    probes, work.probes[0] = int(work.probes[0]), 0
    return probes


def is_deleted(segment: Segment, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of these slots have tombstones."""
    if not len(segment.tombstones):
        return np.zeros(len(slots), np.bool_)
    bits: NDArray[np.uint8] = segment.tombstones[slots >> 3] >> (slots & 7).astype(np.uint8) & 1
    deleted: NDArray[np.bool_] = bits != 0
    return deleted


def mark_deleted(segment: Segment, slots: NDArray[np.int64]) -> Segment:
    """Return the segment with tombstones on these slots; the given one stays as it is."""
    n_bytes = (len(segment.ids) + 7) // 8
    tombstones = segment.tombstones.copy() if len(segment.tombstones) else np.zeros(n_bytes, np.uint8)
    np.bitwise_or.at(tombstones, slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8))
    return freeze(segment._replace(tombstones=tombstones))


def read_items(segment: Segment, slots: NDArray[np.int64] | None = None) -> tuple[Words, Ids]:
    """Return the codes and ids of these slots, or of all slots without tombstones."""
    if slots is None:
        slots = np.arange(len(segment.ids))
        slots = slots[~is_deleted(segment, slots)]
    numbers = find_codes(segment, slots) if len(segment.shared_offsets) else slots
    return segment.codes[numbers], segment.ids[slots].astype(np.int64)


def as_filter(allowed: Ids | None) -> tuple[Ids, bool]:
    """Return `allowed` as the kernels take it: ids, and whether they filter."""
    return (NO_IDS, False) if allowed is None else (allowed, True)


def offer_nearest(segment: Segment, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
    """Offer the qualifying items of a segment to the heap of each query."""
    work = get_workspace(segment, len(words))
    search_nearest(tuple(segment), words, *as_filter(allowed), tuple(heaps), tuple(work))


def match_within(segment: Segment, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
    """Return the codes of a segment within a radius of each query: limits (q + 1,) and numbers of codes."""
    limits, matches = search_within(segment, words, radius, get_workspace(segment, 0))
    return limits, matches
