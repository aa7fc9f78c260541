"""Distinct codes with posting lists, built from items in any order and searched; and the words that codes become in the
kernels."""

import math
import threading
import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.indexes.kernels import FLIPS, SIFTED, STRETCH, Plan, Segment, Workspace
from hashret.indexes.kernels_build import mark, number_codes
from hashret.indexes.kernels_codes import BLOCK, FAR, Words
from hashret.indexes.kernels_heap import Heaps, Ids
from hashret.indexes.kernels_nearest import nearest
from hashret.indexes.kernels_within import matches_within
from hashret.indexes.protocol import read_only

MAX_ITEMS = (1 << 32) - 1  # slots and codes are numbered in 32 bits

_LINE, _PAGE = 64, 4096  # bytes of a line of the cache, and of a page of memory
_BIG_ENDIAN = np.dtype(">u8")
_mine = threading.local()
_NO_MARKS = np.empty((0, 2), np.uint64)
_NO_NUMBERS = np.empty(0, np.uint32)
NO_PLAN = np.array(Plan(-1, -1, -1, -1, -1, budget=0), np.int64)
_BUDGET = Plan._fields.index("budget")
_NO_BALLS = (np.empty((0, 0), np.uint64), np.empty(0, np.int32), _NO_NUMBERS, _NO_NUMBERS)
_NO_TABLES = (
    np.empty((0, 5), np.int64),
    _NO_MARKS,
    _NO_NUMBERS,
    np.empty((0, 0), np.uint32),
    np.empty((0, 0), np.uint32),
    NO_PLAN,
    *_NO_BALLS,
)
_ALL_LIVE = np.empty(0, np.uint8)
NO_IDS = read_only(np.empty(0, np.int64))


def to_words(codes: Codes) -> Words:
    """Codes as the kernels read them: uint64 (n,) if 64 bits suffice, else (n, words); missing bits are 0."""
    n, width = codes.shape
    if width % 8:
        padded = np.zeros((n, width + -width % 8), np.uint8)
        padded[:, :width] = codes
        codes = padded
    words: Words = codes.view(_BIG_ENDIAN).astype(np.uint64)
    return words[:, 0] if width <= 8 else words


def from_words(words: Words, bits: int) -> Codes:
    """The codes that `to_words` made these words of."""
    rows = words.astype(">u8").view(np.uint8).reshape(len(words), -(-bits // 64) * 8)
    return np.ascontiguousarray(rows[:, : bits // 8])


def narrow(ids: NDArray[Any], greatest: int | None = None) -> NDArray[Any]:
    """The same ids as uint32, if all, or the greatest of all, fit."""
    most = ids.max(initial=0) if greatest is None else greatest
    return ids.astype(np.uint32) if most < 1 << 32 else ids


def frozen(segment: Segment) -> Segment:
    """The same segment with read-only arrays: many threads read it, and kernels are compiled for one kind of array."""
    for array in segment:
        array.flags.writeable = False
    return segment


def plain(words: Words, ids: Ids) -> Segment:
    """A segment that is only ever scanned: every item for itself."""
    order = np.argsort(ids, kind="stable")  # merges a tail and what is added to it in linear time
    words, ids = words[order], ids[order]
    by_id = np.arange(len(ids), dtype=np.uint32)
    return frozen(Segment(words, narrow(ids), _NO_MARKS, _NO_NUMBERS, by_id, _ALL_LIVE, *_NO_TABLES))


def _aligned(words: Words) -> Words:
    """The same codes, from the second line of a page on: what is read at once else lies in two lines of the cache, and
    is waited for twice, and blocks that begin where pages do were read up to a tenth more slowly."""
    room = np.empty(words.nbytes + _PAGE, np.uint8)
    begin = (_LINE - room.ctypes.data) % _PAGE
    aligned: Words = room[begin : begin + words.nbytes].view(np.uint64).reshape(words.shape)
    aligned[:] = words
    return aligned


def _ranked(ids: Ids) -> NDArray[np.uint32]:
    """Where the ids stand, in their order: without sorting, if at least one in four of the ids up to the greatest is
    there."""
    greatest = int(ids.max(initial=0))
    if greatest >= 4 * len(ids):
        return np.argsort(ids).astype(np.uint32)
    none = np.uint32(MAX_ITEMS)
    slots = np.full(greatest + 1, none)
    slots[ids] = np.arange(len(ids), dtype=np.uint32)
    ranked: NDArray[np.uint32] = slots[slots != none]
    return ranked


class Grouped(NamedTuple):
    """Items by their codes."""

    codes: Words  # (d,) or (d, words), distinct and ascending
    ids: Ids  # (d,): the least id of each
    others: Ids  # the other ids of each, ascending, code after code
    counts: NDArray[np.uint32]  # (d,): how many others each has


def group(words: Words, ids: Ids) -> Grouped:
    """Group items in any order by their codes."""
    by_code = np.argsort(words) if words.ndim == 1 else np.lexsort(words.T[::-1])
    words, ids = words[by_code], ids[by_code]
    first = np.ones(len(ids), np.bool_)
    changed = words[1:] != words[:-1]
    first[1:] = changed if words.ndim == 1 else changed.any(axis=1)
    if first.all():
        return Grouped(words, ids, ids[:0], np.zeros(len(ids), np.uint32))
    sharing = ~first
    sharing[:-1] |= ~first[1:]
    code = np.cumsum(first)[sharing]
    ids[sharing] = ids[sharing][np.lexsort((ids[sharing], code))]
    counts = np.diff(np.flatnonzero(first), append=len(ids)).astype(np.uint32) - 1
    return Grouped(words[first], ids[first], ids[~first], counts)


def distinct(words: Words, ids: Ids) -> Segment:
    """A segment of distinct ascending codes with posting lists of ascending ids, without tables."""
    codes, ids, others, counts = group(words, ids)
    shared, starts = _NO_MARKS, _NO_NUMBERS
    if len(others):
        shared = mark(counts)[0]
        starts = len(codes) + np.cumsum(np.append(0, counts[counts > 0])).astype(np.uint32)
        ids = np.concatenate([ids, others])
    by_id = _ranked(ids)
    return frozen(Segment(_aligned(codes), narrow(ids), shared, starts, by_id, _ALL_LIVE, *_NO_TABLES))


def workspace(segment: Segment, queries: int) -> Workspace:
    """What a search of the segment scribbles on: this thread's, made anew only when it is too small."""
    budget, tables, balls = int(segment.plan[_BUDGET]), len(segment.cuts), len(segment.radii)
    work: Workspace | None = getattr(_mine, "work", None)
    if (
        work is None
        or len(work.met) < budget
        or len(work.ends) <= tables
        or len(work.least) < queries
        or len(work.gaps) < balls
    ):
        if work is not None:  # nor shall it be made anew for each of two segments in turn
            budget, tables = max(budget, len(work.met)), max(tables, len(work.ends) - 1)
            queries, balls = max(queries, len(work.least)), max(balls, len(work.gaps))
        eights = np.zeros(SIFTED // 8, np.uint64)
        work = _mine.work = Workspace(
            own=np.empty(tables, np.int64),
            ranges=np.empty((FLIPS, 2), np.int64),
            met=np.empty(budget, np.uint32),
            opened=np.empty(tables + 1, np.int64),
            differ=eights.view(np.uint8),
            eights=eights,
            walked=np.empty(1, np.int64),
            ends=np.empty(tables + 1, np.int64),
            aside=np.empty((max(budget, BLOCK), 2), np.uint32),
            tally=np.empty(FAR, np.int64),
            least=np.empty((queries, STRETCH), np.int16),
            looks=np.zeros(FAR, np.int64),
            probes=np.zeros(1, np.int64),
            gaps=np.empty(balls, np.int32),
        )
        _mine.cuts = None
    if len(segment.cuts) and (_mine.cuts is None or _mine.cuts() is not segment.cuts):
        work.looks[:] = _looks(tuple(segment.cuts[:, 1].tolist()))
        _mine.cuts = weakref.ref(segment.cuts)  # or a file that is mapped would stay so
    return work


@lru_cache
def _looks(widths: tuple[int, ...]) -> NDArray[np.int64]:
    """How many buckets of tables with these widths are looked up before each level begins; the first of each table
    are, together, at level 0."""
    m = len(widths)
    flips = [m, *[0] * (m - 1)] + [math.comb(widths[level % m], level // m) for level in range(m, FAR - 1)]
    return np.cumsum([0, *flips])


def take_probes() -> int:
    """How many buckets this thread has looked up since it was last asked; a level that was begun counts as a whole."""
    work: Workspace | None = getattr(_mine, "work", None)
    if work is None:
        return 0
    probes, work.probes[0] = int(work.probes[0]), 0
    return probes


def is_dead(segment: Segment, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these slots hold removed ids."""
    if not len(segment.dead):
        return np.zeros(len(slots), np.bool_)
    marks: NDArray[np.uint8] = segment.dead[slots >> 3] >> (slots & 7).astype(np.uint8) & 1
    dead: NDArray[np.bool_] = marks != 0
    return dead


def buried(segment: Segment, slots: NDArray[np.int64]) -> Segment:
    """The same segment with these slots marked dead."""
    dead = segment.dead.copy() if len(segment.dead) else np.zeros((len(segment.ids) + 7) // 8, np.uint8)
    np.bitwise_or.at(dead, slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8))
    return frozen(segment._replace(dead=dead))


def items(segment: Segment, slots: NDArray[np.int64] | None = None) -> tuple[Words, Ids]:
    """The code and id of each of these slots, or of every slot whose id was not removed."""
    if slots is None:
        slots = np.arange(len(segment.ids))
        slots = slots[~is_dead(segment, slots)]
    numbers = number_codes(segment, slots) if len(segment.starts) else slots
    return segment.codes[numbers], segment.ids[slots].astype(np.int64)


def as_filter(allowed: Ids | None) -> tuple[Ids, bool]:
    """`allowed` as the kernels take it: ids, and whether they mean anything."""
    return (NO_IDS, False) if allowed is None else (allowed, True)


def offer_nearest(segment: Segment, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
    """Offer the qualifying items of a segment to the heap of each query."""
    work = workspace(segment, len(words))
    nearest(tuple(segment), words, *as_filter(allowed), tuple(heaps), tuple(work))


def within(segment: Segment, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
    """The codes of a segment within a radius of each query: limits (q + 1) and their numbers."""
    limits, matches = matches_within(segment, words, radius, workspace(segment, 0))
    return limits, matches
