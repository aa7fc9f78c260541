"""Tables and balls over the codes of a segment, and what the planner believes that searching with them costs."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.kernels import Plan, Segment
from hashret.indexes.kernels_build import count_buckets, gather_balls, list_members, open_buckets, place_codes
from hashret.indexes.kernels_codes import Words
from hashret.indexes.segments import NO_PLAN, frozen, take_probes, workspace
from hashret.indexes.threads import get_threads

MAX_WIDTH = 24  # a table of 2**24 buckets takes 64 MiB
SIFT_BITS = 128  # the sifts of longer codes tell too little of them
WIDER = 5  # bits by which the substrings are shorter than log2(count) where codes are sifted

# What the planner believes, in nanoseconds: looking one bucket up, checking one code found there; the same where codes
# are sifted; scanning one word.
LOOK_UP, CHECK, OPEN, SIFT, SCAN = 4.0, 16.0, 150.0, 1.5, 0.2  # a scan shared by many queries costs each a fourth
# Shares of a scan that levels cost at most, for the planner; the first codes of large buckets tell little of the next.
SHARES, SIFTED_SHARES = (1 / 400, 1 / 25, 1 / 4, 1, 1 / 4), (1 / 400, 1 / 8, 1 / 4, 1, 4)
SIFT_CODES = 1 << 22  # fewer are found faster in small buckets, without sifting
MIN_CODES = 8192  # fewer are scanned faster than flipping starts
BALL_BITS = 64  # longer codes are gathered in balls
BALL_CODES = 1 << 26  # more are not: there are too many centres


def with_tables(segment: Segment, bits: int) -> Segment:
    """The same segment with tables, if it is worth having them."""
    cuts, plan = cut(len(segment.codes), bits)
    if not len(cuts):
        return segment
    shape = len(cuts) - 1, len(segment.codes)
    postings = np.empty(shape, np.uint32)
    sifts = np.empty(shape if cuts[-1, 4] else (0, 0), np.uint32)
    rows = chain([None], zip(postings, sifts if len(sifts) else repeat(np.empty(0, np.uint32)), strict=False))
    with ThreadPoolExecutor(get_threads()) as pool:
        tables = list(pool.map(lambda cut, row: fill_table(lambda: [segment.codes], cut, row), cuts, rows))
    marks, bounds = (np.concatenate(parts) for parts in zip(*numbered(tables), strict=True))
    segment = segment._replace(cuts=cuts, marks=marks, bounds=bounds, postings=postings, sifts=sifts, plan=plan)
    return with_balls(frozen(segment), bits)


def with_balls(segment: Segment, bits: int) -> Segment:
    """The same segment with balls, if it has tables and it is worth having them."""
    if bits <= BALL_BITS or len(segment.codes) > BALL_CODES or not len(segment.cuts):
        return segment
    centres, radii, ball = gather_balls(segment, bits // 4, workspace(segment, 0))
    take_probes()  # no query has been searched for
    if not len(radii):
        return segment
    begins, members = list_members(ball, len(radii))
    centres = np.ascontiguousarray(centres)
    return frozen(segment._replace(centres=centres, radii=radii, begins=begins, members=members))


def cut(count: int, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The `cuts` and `plan` of tables over so many codes, none if there are too few.

    Without sifts m ≈ bits / log2(count) is best, with them one table more, of buckets that hold about a hundred codes.
    """
    if count < MIN_CODES:
        return np.empty((0, 5), np.int64), NO_PLAN
    sifted = bits <= SIFT_BITS and count >= SIFT_CODES
    width = max(1.0, math.log2(count) - WIDER) if sifted else math.log2(count)
    m = max(round(bits / width), -(-bits // MAX_WIDTH))
    widths = [bits // m + (t < bits % m) for t in range(m)]
    cuts = np.zeros((m, 5), np.int64)
    cuts[:, 0] = np.cumsum([0, *widths[:-1]])
    cuts[:, 1] = widths
    cuts[:, 2] = np.cumsum([0, *(((1 << width) + 63) >> 6 for width in widths[:-1])])
    if sifted and m > 1:  # the bits after the substring, or the first ones, if these are more
        before, after = cuts[:, 0], bits - cuts[:, 0] - cuts[:, 1]
        cuts[:, 3] = np.where(after >= before, cuts[:, 0] + cuts[:, 1], 0)
        cuts[:, 4] = np.minimum(32, np.maximum(before, after))
    return cuts, np.array(_plan(count, bits, widths, bool(cuts[-1, 4])), np.int64)


def fill_table(
    blocks: Callable[[], Iterable[Words]],
    cut: NDArray[np.int64],
    row: tuple[NDArray[np.uint32], NDArray[np.uint32]] | None,
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """The marks and bounds of a table; each but the first fills rows of postings and sifts.

    `blocks` gives all codes, a read-only block after the other, each time it is called.
    """
    ends = np.zeros(1 << cut[1], np.uint32)
    for codes in blocks():
        count_buckets(codes, cut[0], cut[1], ends)
    marks, bounds = open_buckets(ends)
    if row is not None:
        number = 0
        for codes in blocks():
            place_codes(codes, number, cut, ends, *row)
            number += len(codes)
    return marks, bounds


def numbered(
    tables: Iterable[tuple[NDArray[np.uint64], NDArray[np.uint32]]],
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint32]]]:
    """The same tables, their marks as if the bounds of all were one array."""
    filled = 0
    for marks, bounds in tables:
        marks[:, 1] += np.uint64(filled)
        filled += len(bounds)
        yield marks, bounds


def _plan(count: int, bits: int, widths: list[int], sifted: bool) -> Plan:
    """The plan, from what flips cost if buckets are filled evenly."""
    scan = SCAN * count * -(-bits // 64)
    look_up, check, shares = (OPEN, SIFT, SIFTED_SHARES) if sifted else (LOOK_UP, CHECK, SHARES)
    m, spent, levels = len(widths), 0.0, [0] * len(shares)
    for level in range(bits):
        s, width = level // m, widths[level % m]
        spent += math.comb(width, s) * (look_up + check * count / 2**width)
        levels = [level if spent <= share * scan else last for share, last in zip(shares, levels, strict=True)]
    free, cheap, quarter, last, promising = levels
    return Plan(max(free, min(m - 1, last)), cheap, quarter, last, promising, budget=int(scan / CHECK))
