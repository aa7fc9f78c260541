"""The kernels of the search for the k nearest.

By balls (see `kernels_balls`), or by flipping bits, then scanning for what is left (see `kernels`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, kernel
from hashret.indexes.kernels import (
    STRETCH,
    Plan,
    Segment,
    Workspace,
    announce,
    cut_query,
    is_new,
    meet,
    plan_of,
)
from hashret.indexes.kernels_balls import balls_nearest
from hashret.indexes.kernels_codes import (
    BLOCK,
    FAR,
    PART,
    ZERO,
    Query,
    Words,
    distance,
    least_distance,
    least_distances,
    longest,
)
from hashret.indexes.kernels_heap import Heap, Heaps, Ids
from hashret.indexes.kernels_items import Aside, keep_aside, offer, offer_aside, offer_kept, put_aside

SHARING = 8  # queries that make a scan for all of them together cost each a fourth of one of its own


@inlined
def sharing(plan: Plan) -> Plan:
    """The plan of a query that gives up as soon as a scan that many share, each a fourth of it, is cheaper."""
    return Plan(plan.free, plan.free, plan.quarter, plan.quarter, plan.promising, plan.budget)


@inlined
def worth_flipping(plan: Plan, level: int, tight: int, closest: int) -> bool:
    """Whether to flip at a level, rather than scan, while the k-th nearest item is within `tight` bits, and the
    closest code met is `closest` bits away."""
    if tight <= plan.last:
        return True  # flipping up to level `tight` finds all, and costs no more than a scan
    return level <= plan.cheap and (level <= plan.free or closest <= plan.promising)


@inlined
def flip_nearest(segment: Segment, query: Query, heap: Heap, n: int, shared: bool, work: Workspace) -> tuple[int, int]:
    """Search a query by flipping bits: the heap's new size, and the level a scan must start from (FAR if none must).

    New codes are put aside with their distances, and counted, until k items have been met within `tight` bits: so far
    is the k-th nearest at most. Whatever is farther is dropped at once, and posting lists are read at the end.
    """
    cut_query(segment, query, work)
    plan = sharing(plan_of(segment)) if shared else plan_of(segment)
    level, room, aside = ZERO, plan.budget, Aside(ZERO, ZERO, ZERO + longest(segment.codes))
    closest = aside.tight
    work.tally[: aside.tight + 1] = 0
    while level <= aside.tight and worth_flipping(plan, level, aside.tight, closest):
        low, high = meet(segment, query, level, aside.tight, room, work)
        if high < 0:
            break
        if level >= len(segment.cuts) - 1 or len(segment.sifts):
            room -= high
        for i in range(low, high):
            j = np.int64(work.met[i])
            d = distance(segment.codes, j, query.queries, query.q)
            if d <= aside.tight and is_new(segment, j, level, work):
                closest = min(closest, d)
                aside = put_aside(segment, j, d, heap, aside, work)
        level += 1
    work.probes[0] += work.looks[level + (high < 0)]
    kept = keep_aside(segment, aside, work)
    announce(segment, query.queries, query.q + 1)
    n = offer_kept(segment, kept, heap, n, work)
    return n, level if level <= aside.tight else FAR


@inlined
def kth_least(least: NDArray[np.int16], k: int, farthest: int) -> int:
    """The k-th least of at least k distances, or `farthest` if that is less."""
    low, high = 0, farthest
    while low < high:
        middle, within = (low + high) >> 1, 0
        for i in range(len(least)):  # vectorises, as it runs over a whole array
            within += least[i] <= middle
        if within < k:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def scan_block(
    segment: Segment, begin: int, query: Query, heap: Heap, level: int, aside: Aside, work: Workspace
) -> Aside:
    """Put aside the codes of the block from `begin` on within `tight` bits, first met at `level` or later."""
    cut_query(segment, query, work)
    for low in range(begin, min(begin + BLOCK, len(segment.codes)), PART):
        part = segment.codes[low : low + PART]
        if least_distance(part, query.queries, query.q) > aside.tight:
            continue
        for i in range(len(part)):
            d = distance(part, i, query.queries, query.q)
            if d <= aside.tight and is_new(segment, low + i, level, work):
                aside = put_aside(segment, low + i, d, heap, aside, work)
    return aside


@inlined
def scan_stretch(
    segment: Segment,
    begin: int,
    least: NDArray[np.int16],
    query: Query,
    heap: Heap,
    n: int,
    level: int,
    work: Workspace,
) -> int:
    """Offer the codes of the blocks from `begin` on, whose least distances are known, first met at `level` or later.

    The k-th distance in the heap is a bound, beyond which nothing matters; if all items qualify, so is the k-th least
    of these distances: there are k codes within it. Codes within it are put aside, and sink it, as in `flip_nearest`.
    Returns the heap's new size.
    """
    k, near, tight = len(heap.ids), ZERO, ZERO + longest(segment.codes)
    if n == k:
        tight = min(tight, np.int64(heap.distances[0]))
    if len(least) >= k and not len(segment.dead) and not heap.filtered:
        tight = kth_least(least, k, tight)
    work.tally[: tight + 1] = 0
    for i in range(n):
        if heap.distances[i] <= tight:
            work.tally[heap.distances[i]] += 1
            near += 1
    aside = Aside(ZERO, near, tight)
    for b in range(len(least)):
        if least[b] <= aside.tight:
            if aside.size + BLOCK > len(work.aside):
                n = offer_aside(segment, aside, heap, n, work)
                aside = Aside(ZERO, aside.near, aside.tight)
            aside = scan_block(segment, begin + b * BLOCK, query, heap, level, aside, work)
    offered: int = offer_aside(segment, aside, heap, n, work)
    return offered


@inlined
def scan_nearest(segment: Segment, queries: Words, allowed: Ids, filtered: bool, heaps: Heaps, work: Workspace) -> None:
    """Offer to each query's heap the codes first met at level reached[q] or later: all of them where it is 0."""
    codes, least, blocks, reached = segment.codes, work.least, -(-len(segment.codes) // BLOCK), heaps.reached
    for stretch in range(0, blocks, STRETCH):
        size = min(STRETCH, blocks - stretch)
        full = min(size, len(codes) // BLOCK - stretch) & -2
        for b in range(0, full, 2):
            for q in range(len(queries)):
                if reached[q] < FAR:
                    least[q, b], least[q, b + 1] = least_distances(codes, (stretch + b) * BLOCK, queries, q)
        for b in range(full, size):
            block = codes[(stretch + b) * BLOCK : (stretch + b + 1) * BLOCK]
            for q in range(len(queries)):
                if reached[q] < FAR:
                    least[q, b] = least_distance(block, queries, q)
        for q in range(len(queries)):
            if reached[q] < FAR:
                heap, nearest_of = Heap(heaps.distances[q], heaps.ids[q], allowed, filtered), least[q, :size]
                heaps.sizes[q] = scan_stretch(
                    segment, stretch * BLOCK, nearest_of, Query(queries, q), heap, heaps.sizes[q], reached[q], work
                )


@kernel
def nearest(
    its_segment: tuple[Any, ...],
    queries: Words,
    allowed: Ids,
    filtered: bool,
    its_heaps: tuple[Any, ...],
    its_work: tuple[Any, ...],
) -> None:
    """Offer the items of a segment to each query's heap, a row each; a `Segment`, `Heaps` and a `Workspace` as plain
    tuples, as Numba takes 2 microseconds longer to tell what named ones are.

    Only codes first met at level reached[q] or later are offered; FAR means none. Where half of the first queries of
    many cost more by flipping than their share of a scan for all, the others make way for that scan.
    """
    segment, heaps, work = Segment(*its_segment), Heaps(*its_heaps), Workspace(*its_work)
    sizes, reached, quarter = heaps.sizes, heaps.reached, plan_of(segment).quarter
    waiting, dear, shared = 0, 0, False
    for q in range(len(queries)):
        query, heap = Query(queries, q), Heap(heaps.distances[q], heaps.ids[q], allowed, filtered)
        if reached[q] == 0 and len(segment.radii):
            sizes[q], reached[q] = balls_nearest(segment, query, heap, sizes[q], work)
        if reached[q] == 0 and len(segment.cuts):
            shared = shared or (dear >= max(SHARING, q // 2) and len(queries) >= 4 * SHARING)
            sizes[q], reached[q] = flip_nearest(segment, query, heap, sizes[q], shared, work)
            dear += reached[q] == FAR and heap.distances[0] > quarter
        waiting += reached[q] < FAR
    if waiting:
        scan_nearest(segment, queries, allowed, filtered, heaps, work)


@kernel
def expand_nearest(
    segment: Segment,
    queries: Words,
    matches: NDArray[np.int64],
    allowed: Ids,
    filtered: bool,
    heaps: Heaps,
) -> None:
    """Offer the items behind matches[q], numbers of distinct codes (-1: none), to the heap of query q.

    Where that fills the heap, nothing is left for a scan: reached[q] = FAR.
    """
    sizes = heaps.sizes
    for q in range(len(queries)):
        heap = Heap(heaps.distances[q], heaps.ids[q], allowed, filtered)
        for i in range(matches.shape[1]):
            j = matches[q, i]
            if j >= 0:
                sizes[q] = offer(segment, j, distance(segment.codes, j, queries, q), heap, sizes[q])
        if sizes[q] == len(heap.ids):
            heaps.reached[q] = FAR
        else:
            sizes[q] = 0
