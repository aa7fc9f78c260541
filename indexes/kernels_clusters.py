"""The kernels of balls: of codes that gather, all that lie around one centre are passed over at once.

Fukunaga, Narendra: A Branch and Bound Algorithm for Computing k-Nearest Neighbors (1975). The longer codes are, the
more bits the nearest ones differ in, and the more buckets flipping has to look up, however far the next group of codes
is away. That is where balls are good.

A **ball** is a centre c, any code, and some codes, its members, none more than its radius away from c. So many bits at
least a member x is away from query q, by the triangle inequality: distance(q, c) - distance(c, x) >= distance(q, c) -
radius. This is the ball's *gap*, or 0 if it is negative. Every code is a member of one ball; those that fit in none are
together in one whose radius is FAR, and whose gap is 0.

*Stop.* Once k items within r bits are known, balls with a gap of more than r hold none of the k nearest. How many codes
the others hold is known before any of them is read: where these are too many, flipping is left to do it all.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, popcount, prefetch
from hashret.indexes.kernels import Segment, Workspace, plan_of
from hashret.indexes.kernels_codes import FAR, ZERO, Query, Words, distance, longest
from hashret.indexes.kernels_heap import Heap
from hashret.indexes.kernels_items import Aside, offer_aside, put_aside

ONE: Any = np.int64(1 << 32)  # a bit, where the number of a ball stands in the lower half
SHARE = 8  # of what a scan costs, one part is spent on balls before flipping is left to do it all
COMPARED = 64  # gaps, or words of centres, that are compared while one code is
AHEAD = 64  # so many members are asked for before they are compared


@inlined
def measure(centres: Words, queries: Words, q: int, out: NDArray[np.int32]) -> None:
    """Write the distance of each centre, (words, b), from query q."""
    words = len(centres)
    query = queries.reshape(queries.size)[q * words : (q + 1) * words]
    out[:] = 0
    for w in range(words):
        row, own = centres[w], query[w]
        for i in range(len(row)):  # vectorises, as it runs over a whole array
            out[i] += popcount(row[i] ^ own)


@inlined
def measure_gaps(segment: Segment, query: Query, work: Workspace) -> None:
    """Write the gap of each ball."""
    radii, gaps = segment.radii, work.gaps[: len(segment.radii)]
    measure(segment.centres, query.queries, query.q, gaps)
    for i in range(len(radii)):
        gaps[i] = max(0, gaps[i] - radii[i])


@inlined
def within_reach(segment: Segment, bound: int, work: Workspace) -> tuple[int, int, int]:
    """The least gap of those left, the ball that has it, and how many codes the balls with gaps within `bound` hold."""
    gaps, begins, least, codes = work.gaps[: len(segment.radii)], segment.begins, FAR * ONE, 0 * ONE
    for i in range(len(gaps)):  # vectorises, as the ball is a part of what the least is sought of
        least = min(least, gaps[i] * ONE + i)
        codes += np.int64(begins[i + 1]) - np.int64(begins[i]) if gaps[i] <= bound else 0
    return least >> 32, least & (ONE - 1), codes


@inlined
def member(segment: Segment, ball: int, i: int) -> int:
    """Ask for the i-th member of a ball, and return the one asked for `AHEAD` before that; -1 if there was none."""
    begin, size = np.int64(segment.begins[ball]), np.int64(segment.begins[ball + 1]) - np.int64(segment.begins[ball])
    if i < size:
        prefetch(segment.codes, segment.members[begin + i])
    return int(segment.members[begin + i - AHEAD]) if i >= AHEAD else -1


@inlined
def balls_nearest(segment: Segment, query: Query, heap: Heap, n: int, work: Workspace) -> tuple[int, int]:
    """Search a query by balls: the heap's new size, and the level to go on from: FAR (none), or 0 (all is to be done).

    See `kernels_nearest.flip_nearest` for how codes are put aside until it is known that balls will do.
    """
    room, gaps, aside = plan_of(segment).budget // SHARE, work.gaps, Aside(ZERO, ZERO, ZERO + longest(segment.codes))
    work.tally[: aside.tight + 1] = 0
    measure_gaps(segment, query, work)
    while True:
        least, ball, codes = within_reach(segment, aside.tight, work)
        if least > aside.tight:
            return offer_aside(segment, aside, heap, n, work), FAR
        if aside.near >= len(heap.ids) and codes > room:
            return n, 0
        gaps[ball] = FAR
        size = np.int64(segment.begins[ball + 1]) - np.int64(segment.begins[ball])
        room -= size + len(segment.radii) // COMPARED
        if room < 0:
            return n, 0
        for i in range(size + AHEAD):
            j = member(segment, ball, i)
            if j >= 0:
                d = distance(segment.codes, j, query.queries, query.q)
                if d <= aside.tight:
                    aside = put_aside(segment, j, d, heap, aside, work)


@inlined
def balls_within(
    segment: Segment, query: Query, radius: int, found: NDArray[np.uint32], work: Workspace
) -> tuple[int, int]:
    """Find the codes within `radius` bits of a query by balls: how many, and the level to go on from: FAR, or 0."""
    n = 0
    measure_gaps(segment, query, work)
    _, _, codes = within_reach(segment, radius, work)
    if codes > plan_of(segment).budget // SHARE:
        return 0, 0
    for ball in range(len(segment.radii)):
        if work.gaps[ball] <= radius:
            for i in range(np.int64(segment.begins[ball + 1]) - np.int64(segment.begins[ball]) + AHEAD):
                j = member(segment, ball, i)
                if j >= 0 and distance(segment.codes, j, query.queries, query.q) <= radius:
                    found[n] = j
                    n += 1
    return n, FAR
