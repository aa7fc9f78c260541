"""The kernels of k-nearest-neighbour search.

They search clusters (see `kernels_clusters`), or flip bits and scan for the remaining codes (see `kernels`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, kernel
from hashret.indexes.kernels import (
    CHUNK_BLOCKS,
    Plan,
    Segment,
    Workspace,
    is_new,
    prefetch_next,
    probe_level,
    split_query,
    unpack_plan,
)
from hashret.indexes.kernels_clusters import search_clusters
from hashret.indexes.kernels_codes import (
    BLOCK,
    FAR,
    SUBBLOCK,
    ZERO,
    Query,
    Words,
    distance,
    max_distance,
    min_distance,
    min_distances,
)
from hashret.indexes.kernels_heap import Heap, Heaps, Ids
from hashret.indexes.kernels_items import (
    Shortlist,
    add_to_shortlist,
    offer,
    offer_pruned,
    offer_shortlist,
    prune_shortlist,
)

MIN_SHARING = 8  # queries for which one scan costs each a quarter of a scan of its own


@inlined
def shared_plan(plan: Plan) -> Plan:
    """Return the plan of a query that gives up flipping once its share of a scan for many queries is cheaper."""
    return Plan(
        plan.free_until,
        plan.free_until,
        plan.shared_until,
        plan.shared_until,
        plan.promising_distance,
        plan.candidate_budget,
    )


@inlined
def worth_flipping(plan: Plan, level: int, bound: int, closest: int) -> bool:
    """Whether to flip at a level rather than scan.

    The k-th nearest item is within `bound` bits, and the nearest code found is `closest` bits away.
    """
    if bound <= plan.last_level:
        return True  # flipping up to level `bound` finds all, and costs no more than a scan
    return level <= plan.cheap_until and (level <= plan.free_until or closest <= plan.promising_distance)


@inlined
def flip_nearest(segment: Segment, query: Query, heap: Heap, n: int, shared: bool, work: Workspace) -> tuple[int, int]:
    """Search a query by flipping bits; return the heap's new size and the level a scan must start from, FAR if none.

    New codes are shortlisted with their distances. Once k items have been found within `bound` bits, farther codes are
    dropped at once. Posting lists are read at the end.
    """
    split_query(segment, query, work)
    plan = shared_plan(unpack_plan(segment)) if shared else unpack_plan(segment)
    level, room = ZERO, plan.candidate_budget
    shortlist = Shortlist(ZERO, ZERO, ZERO + max_distance(segment.codes))
    closest = shortlist.bound
    work.histogram[: shortlist.bound + 1] = 0
    while level <= shortlist.bound and worth_flipping(plan, level, shortlist.bound, closest):
        low, high = probe_level(segment, query, level, shortlist.bound, room, work)
        if high < 0:
            break
        if level >= len(segment.layout) - 1 or len(segment.signatures):
            room -= high
        for i in range(low, high):
            j = np.int64(work.candidates[i])
            d = distance(segment.codes, j, query.queries, query.q)
            if d <= shortlist.bound and is_new(segment, j, level, work):
                closest = min(closest, d)
                shortlist = add_to_shortlist(segment, j, d, heap, shortlist, work)
        level += 1
    work.probes[0] += work.probes_before[level + (high < 0)]
    size = prune_shortlist(segment, shortlist, work)
    prefetch_next(segment, query.queries, query.q + 1)
    n = offer_pruned(segment, size, heap, n, work)
    return n, level if level <= shortlist.bound else FAR


@inlined
def kth_smallest(distances: NDArray[np.int16], k: int, farthest: int) -> int:
    """Return the k-th smallest of at least k distances, or `farthest` if that is smaller."""
    low, high = 0, farthest
    while low < high:
        middle, within = (low + high) >> 1, 0
        for i in range(len(distances)):  # vectorises, as it runs over a whole array
            within += distances[i] <= middle
        if within < k:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def scan_block(
    segment: Segment, begin: int, query: Query, heap: Heap, level: int, shortlist: Shortlist, work: Workspace
) -> Shortlist:
    """Shortlist the codes of the block from `begin` on within the bound that `level` or a later one finds first."""
    split_query(segment, query, work)
    for low in range(begin, min(begin + BLOCK, len(segment.codes)), SUBBLOCK):
        codes = segment.codes[low : low + SUBBLOCK]
        if min_distance(codes, query.queries, query.q) > shortlist.bound:
            continue
        for i in range(len(codes)):
            d = distance(codes, i, query.queries, query.q)
            if d <= shortlist.bound and is_new(segment, low + i, level, work):
                shortlist = add_to_shortlist(segment, low + i, d, heap, shortlist, work)
    return shortlist


@inlined
def scan_chunk(
    segment: Segment,
    begin: int,
    minima: NDArray[np.int16],
    query: Query,
    heap: Heap,
    n: int,
    level: int,
    work: Workspace,
) -> int:
    """Offer the codes of the blocks from `begin` on, with these minimum distances, first found at `level` or later.

    The k-th distance in the heap is an upper bound of the k-th nearest; so is, if all items qualify, the k-th smallest
    of the minimum distances. Codes within the bound are shortlisted, and lower it, as in `flip_nearest`. Return the
    heap's new size.
    """
    k, count, bound = len(heap.ids), ZERO, ZERO + max_distance(segment.codes)
    if n == k:
        bound = min(bound, np.int64(heap.distances[0]))
    if len(minima) >= k and not len(segment.tombstones) and not heap.filtered:
        bound = kth_smallest(minima, k, bound)
    work.histogram[: bound + 1] = 0
    for i in range(n):
        if heap.distances[i] <= bound:
            work.histogram[heap.distances[i]] += 1
            count += 1
    shortlist = Shortlist(ZERO, count, bound)
    for b in range(len(minima)):
        if minima[b] <= shortlist.bound:
            if shortlist.size + BLOCK > len(work.shortlist):
                n = offer_shortlist(segment, shortlist, heap, n, work)
                shortlist = Shortlist(ZERO, shortlist.n_items, shortlist.bound)
            shortlist = scan_block(segment, begin + b * BLOCK, query, heap, level, shortlist, work)
    offered: int = offer_shortlist(segment, shortlist, heap, n, work)
    return offered


@inlined
def scan_nearest(segment: Segment, queries: Words, allowed: Ids, filtered: bool, heaps: Heaps, work: Workspace) -> None:
    """Offer to each query's heap the codes first found at level next_levels[q] or later: all of them if it is 0."""
    codes, minima, levels = segment.codes, work.block_minima, heaps.next_levels
    blocks = -(-len(codes) // BLOCK)
    for first in range(0, blocks, CHUNK_BLOCKS):
        size = min(CHUNK_BLOCKS, blocks - first)
        full = min(size, len(codes) // BLOCK - first) & -2
        for b in range(0, full, 2):
            for q in range(len(queries)):
                if levels[q] < FAR:
                    minima[q, b], minima[q, b + 1] = min_distances(codes, (first + b) * BLOCK, queries, q)
        for b in range(full, size):
            block = codes[(first + b) * BLOCK : (first + b + 1) * BLOCK]
            for q in range(len(queries)):
                if levels[q] < FAR:
                    minima[q, b] = min_distance(block, queries, q)
        for q in range(len(queries)):
            if levels[q] < FAR:
                heap = Heap(heaps.distances[q], heaps.ids[q], allowed, filtered)
                heaps.sizes[q] = scan_chunk(
                    segment, first * BLOCK, minima[q, :size], Query(queries, q), heap, heaps.sizes[q], levels[q], work
                )


@kernel
def search_nearest(
    segment_fields: tuple[Any, ...],
    queries: Words,
    allowed: Ids,
    filtered: bool,
    heaps_fields: tuple[Any, ...],
    work_fields: tuple[Any, ...],
) -> None:
    """Offer the items of a segment to each query's heap, a row each.

    A `Segment`, `Heaps` and a `Workspace` come as plain tuples, as Numba takes 2 microseconds longer to find the types
    of named ones. Only codes first found at level next_levels[q] or later are offered; FAR means none. If flipping for
    half of the first queries of many costs more than their share of a scan, the other queries give it up for a scan.
    """
    segment, heaps, work = Segment(*segment_fields), Heaps(*heaps_fields), Workspace(*work_fields)
    sizes, levels, shared_until = heaps.sizes, heaps.next_levels, unpack_plan(segment).shared_until
    unfinished, expensive, shared = 0, 0, False
    for q in range(len(queries)):
        query, heap = Query(queries, q), Heap(heaps.distances[q], heaps.ids[q], allowed, filtered)
        if levels[q] == 0 and len(segment.radii):
            sizes[q], levels[q] = search_clusters(segment, query, heap, sizes[q], work)
        if levels[q] == 0 and len(segment.layout):
            shared = shared or (expensive >= max(MIN_SHARING, q // 2) and len(queries) >= 4 * MIN_SHARING)
            sizes[q], levels[q] = flip_nearest(segment, query, heap, sizes[q], shared, work)
            expensive += levels[q] == FAR and heap.distances[0] > shared_until
        unfinished += levels[q] < FAR
    if unfinished:
        scan_nearest(segment, queries, allowed, filtered, heaps, work)


@kernel
def offer_matches(
    segment: Segment,
    queries: Words,
    matches: NDArray[np.int64],
    allowed: Ids,
    filtered: bool,
    heaps: Heaps,
) -> None:
    """Offer the items of the codes matches[q], (m,) numbers of codes or -1 for none, to the heap of query q.

    If that fills the heap, no scan is needed: next_levels[q] = FAR.
    """
    sizes = heaps.sizes
    for q in range(len(queries)):
        heap = Heap(heaps.distances[q], heaps.ids[q], allowed, filtered)
        for i in range(matches.shape[1]):
            j = matches[q, i]
            if j >= 0:
                sizes[q] = offer(segment, j, distance(segment.codes, j, queries, q), heap, sizes[q])
        if sizes[q] == len(heap.ids):
            heaps.next_levels[q] = FAR
        else:
            sizes[q] = 0
