"""The kernels of radius search, and of what surrounds a search: posting lists, ids and tables."""

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import allocating, kernel
from hashret.indexes.kernels import (
    BLOCK,
    FAR,
    Distances,
    Ids,
    Segment,
    Words,
    distance,
    is_new,
    least_distance,
    next_flip,
    offer,
    qualifies,
    substring,
)


@kernel
def flip_within(segment: Segment, queries: Words, q: int, radius: int, found: NDArray[np.uint32]) -> tuple[int, int]:
    """Find the codes within `radius` bits of query q by flipping bits: how many, and the level a scan must start from.

    Level after level up to the radius, unless flipping costs more than a scan (see `kernels` for the levels, the plan,
    and why this finds each code, once).
    """
    codes, cuts, offsets = segment.codes, segment.cuts, segment.offsets
    n, m, level, budget = 0, len(cuts), 0, segment.plan[2]
    while level <= radius <= segment.plan[1] and budget >= 0:
        s, t = level // m, level % m
        first, width, table = cuts[t, 0], cuts[t, 1], cuts[t, 2]
        own = substring(queries, q, first, width)
        flip = (1 << s) - 1
        while flip < 1 << width:
            bucket = table + (own ^ flip)
            low, high = np.int64(offsets[bucket]), np.int64(offsets[bucket + 1])
            budget -= high - low
            for place in range(low, high):
                j = place if t == 0 else np.int64(segment.postings[t - 1, place])
                if distance(codes, j, queries, q) <= radius and is_new(codes, j, queries, q, cuts, level):
                    found[n] = j
                    n += 1
            if s == 0:
                break
            flip = next_flip(flip)
        level += 1
    return n, level


@kernel
def scan_within(
    segment: Segment, queries: Words, q: int, radius: int, level: int, found: NDArray[np.uint32], n: int
) -> int:
    """Find the codes within `radius` bits of query q first met at `level` or later; how many with the n before."""
    for begin in range(0, len(segment.codes), BLOCK):
        block = segment.codes[begin : begin + BLOCK]
        if least_distance(block, queries, q) > radius:
            continue
        for i in range(len(block)):
            if distance(block, i, queries, q) <= radius and is_new(block, i, queries, q, segment.cuts, level):
                found[n] = begin + i
                n += 1
    return n


@allocating
def matches_within(segment: Segment, queries: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
    """The codes within `radius` bits of each query: limits (q + 1) and numbers of codes, in no order."""
    limits = np.zeros(len(queries) + 1, np.int64)
    found = np.empty(len(segment.codes), np.uint32)  # each code is found once at most
    matches = np.empty(1024, np.uint32)
    for q in range(len(queries)):
        n, level = flip_within(segment, queries, q, radius, found)
        if level <= radius:
            n = scan_within(segment, queries, q, radius, level, found, n)
        limits[q + 1] = limits[q] + n
        if limits[q + 1] > len(matches):
            longer = np.empty(2 * limits[q + 1], np.uint32)
            longer[: limits[q]] = matches[: limits[q]]
            matches = longer
        matches[limits[q] : limits[q + 1]] = found[:n]
    return limits, matches[: limits[-1]]


@kernel
def write_items(
    segment: Segment,
    queries: Words,
    q: int,
    matches: NDArray[np.uint32],
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    n: int,
) -> int:
    """Write the items behind the codes matching query q after the n written; how many in all."""
    for match in matches:
        j = np.int64(match)
        d = distance(segment.codes, j, queries, q)
        for slot in range(np.int64(segment.starts[j]), np.int64(segment.starts[j + 1])):
            if qualifies(segment, slot, allowed, filtered):
                distances[n], ids[n] = d, segment.ids[slot]
                n += 1
    return n


@allocating
def expand_within(
    segment: Segment, queries: Words, limits: Ids, matches: NDArray[np.uint32], allowed: Ids, filtered: bool
) -> tuple[Ids, Distances, Ids]:
    """The items behind matching codes: limits (q + 1), distances and ids, in no order."""
    starts, total = segment.starts, np.int64(0)
    for j in matches:
        total += np.int64(starts[j + 1]) - np.int64(starts[j])
    distances, ids = np.empty(total, np.int32), np.empty(total, np.int64)
    bounds = np.zeros(len(limits), np.int64)
    for q in range(len(queries)):
        some = matches[limits[q] : limits[q + 1]]
        bounds[q + 1] = write_items(segment, queries, q, some, allowed, filtered, distances, ids, bounds[q])
    return bounds, distances[: bounds[-1]], ids[: bounds[-1]]


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


@allocating
def locate(ids: Ids, by_id: NDArray[np.uint32], wanted: Ids) -> Ids:
    """The slot of each wanted id, -1 if it has none."""
    slots = np.empty(len(wanted), np.int64)
    for i in range(len(wanted)):
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) >> 1
            if ids[by_id[middle]] < wanted[i]:
                low = middle + 1
            else:
                high = middle
        slots[i] = by_id[low] if low < len(ids) and ids[by_id[low]] == wanted[i] else -1
    return slots


@allocating
def fill_table(codes: Words, first: int, width: int, offsets: NDArray[np.uint32], postings: NDArray[np.uint32]) -> None:
    """Sort the numbers of the codes by a substring, by counting: each bucket's bounds, and postings if wanted."""
    offsets[:] = 0
    for j in range(len(codes)):
        offsets[substring(codes, j, first, width) + 1] += 1
    for bucket in range(1, len(offsets)):
        offsets[bucket] += offsets[bucket - 1]
    if len(postings):
        cursor = offsets.copy()
        for j in range(len(codes)):
            bucket = substring(codes, j, first, width)
            postings[cursor[bucket]] = j
            cursor[bucket] += 1
