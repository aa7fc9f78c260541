"""The kernels of the search for the k nearest.

By balls (see `kernels_balls`), or by flipping bits, then scanning for what is left (see `kernels`).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, kernel
from hashret.indexes.kernels import (
    STRETCH,
    Segment,
    Workspace,
    announce,
    cut_query,
    is_new,
    meet,
)
from hashret.indexes.kernels_balls import balls_nearest
from hashret.indexes.kernels_codes import (
    BLOCK,
    FAR,
    PART,
    ZERO,
    Words,
    distance,
    least_distance,
    least_distances,
    longest,
)
from hashret.indexes.kernels_heap import Distances, Ids
from hashret.indexes.kernels_items import keep_aside, offer, offer_aside, offer_kept, put_aside

SHARING = 8  # queries that make a scan for all of them together cost each a fourth of one of its own


@inlined
def flip_nearest(
    segment: Segment,
    queries: Words,
    q: int,
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    n: int,
    shared: bool,
    work: Workspace,
) -> tuple[int, int]:
    """Search query q by flipping bits: the heap's new size, and the level a scan must start from (FAR if none must).

    New codes are put aside with their distances, and counted, until k items have been met within `tight` bits: so far
    is the k-th nearest at most. Whatever is farther is dropped at once, and posting lists are read at the end.

    The plan, six numbers worked out once per segment: up to level `careless` flipping costs next to nothing beside a
    scan, up to `patient` a small part of one, up to `fair` a fourth, and after `deepest` more than one; `budget`
    candidates cost as much as one. After `careless` we go on only if a code within `hopeful` has been met; after
    `patient`, only if `tight` promises an end by `deepest`. If other queries will share a scan, which then costs each
    a fourth, `careless` takes the place of `patient`, and `fair` that of `deepest`.
    """
    cut_query(segment, queries, q, work)
    plan = segment.plan
    careless, patient, fair, deepest, hopeful, room = plan[0], plan[1], plan[2], plan[3], plan[4], plan[5]
    if shared:
        patient, deepest = careless, fair
    m, level, count, near, tight = len(segment.cuts), ZERO, 0, 0, ZERO + longest(segment.codes)
    nearest_yet = tight
    work.tally[: tight + 1] = 0
    while level <= tight and (tight <= deepest or (level <= patient and (level <= careless or nearest_yet <= hopeful))):
        low, high = meet(segment, queries, q, level, tight, room, work)
        if high < 0:
            break
        if level >= m - 1 or len(segment.sifts):
            room -= high
        for i in range(low, high):
            j = np.int64(work.met[i])
            d = distance(segment.codes, j, queries, q)
            if d <= tight and is_new(segment, j, level, work):
                nearest_yet = min(nearest_yet, d)
                count, near, tight = put_aside(segment, j, d, allowed, filtered, len(ids), count, near, tight, work)
        level += 1
    work.probes[0] += work.looks[level + (high < 0)]
    kept = keep_aside(segment, count, tight, work)
    announce(segment, queries, q + 1)
    n = offer_kept(segment, kept, allowed, filtered, distances, ids, n, work)
    return n, level if level <= tight else FAR


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
    segment: Segment,
    begin: int,
    queries: Words,
    q: int,
    allowed: Ids,
    filtered: bool,
    k: int,
    level: int,
    count: int,
    near: int,
    tight: int,
    work: Workspace,
) -> tuple[int, int, int]:
    """Put aside the codes of the block from `begin` on within `tight` bits, first met at `level` or later."""
    cut_query(segment, queries, q, work)
    for low in range(begin, min(begin + BLOCK, len(segment.codes)), PART):
        part = segment.codes[low : low + PART]
        if least_distance(part, queries, q) > tight:
            continue
        for i in range(len(part)):
            d = distance(part, i, queries, q)
            if d <= tight and is_new(segment, low + i, level, work):
                count, near, tight = put_aside(segment, low + i, d, allowed, filtered, k, count, near, tight, work)
    return count, near, tight


@inlined
def scan_stretch(
    segment: Segment,
    begin: int,
    least: NDArray[np.int16],
    queries: Words,
    q: int,
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    n: int,
    level: int,
    work: Workspace,
) -> int:
    """Offer the codes of the blocks from `begin` on, whose least distances are known, first met at `level` or later.

    The k-th distance in the heap is a bound, beyond which nothing matters; if all items qualify, so is the k-th least
    of these distances: there are k codes within it. Codes within it are put aside, and sink it, as in `flip_nearest`.
    Returns the heap's new size.
    """
    k, count, near, tight = len(ids), 0, ZERO, ZERO + longest(segment.codes)
    if n == k:
        tight = min(tight, np.int64(distances[0]))
    if len(least) >= k and not len(segment.dead) and not filtered:
        tight = kth_least(least, k, tight)
    work.tally[: tight + 1] = 0
    for i in range(n):
        if distances[i] <= tight:
            work.tally[distances[i]] += 1
            near += 1
    for b in range(len(least)):
        if least[b] <= tight:
            if count + BLOCK > len(work.aside):
                n, count = offer_aside(segment, count, tight, allowed, filtered, distances, ids, n, work), 0
            count, near, tight = scan_block(
                segment, begin + b * BLOCK, queries, q, allowed, filtered, k, level, count, near, tight, work
            )
    offered: int = offer_aside(segment, count, tight, allowed, filtered, distances, ids, n, work)
    return offered


@inlined
def scan_nearest(
    segment: Segment,
    queries: Words,
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    sizes: Ids,
    reached: Ids,
    work: Workspace,
) -> None:
    """Offer to each query's heap the codes first met at level reached[q] or later: all of them where it is 0."""
    codes, least, blocks = segment.codes, work.least, -(-len(segment.codes) // BLOCK)
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
                sizes[q] = scan_stretch(
                    segment,
                    stretch * BLOCK,
                    least[q, :size],
                    queries,
                    q,
                    allowed,
                    filtered,
                    distances[q],
                    ids[q],
                    sizes[q],
                    reached[q],
                    work,
                )


@kernel
def nearest(
    its_segment: tuple[Any, ...],
    queries: Words,
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    sizes: Ids,
    reached: Ids,
    its_work: tuple[Any, ...],
) -> None:
    """Offer the items of a segment to each query's heap, a row each; a `Segment` and a `Workspace` as plain tuples, as
    Numba takes 2 microseconds longer to tell what named ones are.

    Only codes first met at level reached[q] or later are offered; FAR means none. Where half of the first queries of
    many cost more by flipping than their share of a scan for all, the others make way for that scan.
    """
    segment, work = Segment(*its_segment), Workspace(*its_work)
    waiting, dear, shared = 0, 0, False
    for q in range(len(queries)):
        if reached[q] == 0 and len(segment.radii):
            sizes[q], reached[q] = balls_nearest(
                segment, queries, q, allowed, filtered, distances[q], ids[q], sizes[q], work
            )
        if reached[q] == 0 and len(segment.cuts):
            shared = shared or (dear >= max(SHARING, q // 2) and len(queries) >= 4 * SHARING)
            sizes[q], reached[q] = flip_nearest(
                segment, queries, q, allowed, filtered, distances[q], ids[q], sizes[q], shared, work
            )
            dear += reached[q] == FAR and distances[q, 0] > segment.plan[2]
        waiting += reached[q] < FAR
    if waiting:
        scan_nearest(segment, queries, allowed, filtered, distances, ids, sizes, reached, work)


@kernel
def expand_nearest(
    segment: Segment,
    queries: Words,
    matches: NDArray[np.int64],
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    sizes: Ids,
    reached: Ids,
) -> None:
    """Offer the items behind matches[q], numbers of distinct codes (-1: none), to the heap of query q.

    Where that fills the heap, nothing is left for a scan: reached[q] = FAR.
    """
    for q in range(len(queries)):
        for i in range(matches.shape[1]):
            j = matches[q, i]
            if j >= 0:
                d = distance(segment.codes, j, queries, q)
                sizes[q] = offer(segment, j, d, allowed, filtered, distances[q], ids[q], sizes[q])
        if sizes[q] == ids.shape[1]:
            reached[q] = FAR
        else:
            sizes[q] = 0
