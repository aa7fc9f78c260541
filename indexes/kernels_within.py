"""The kernels of radius search.

They search clusters (see `kernels_clusters`), or flip bits and scan for the remaining codes (see `kernels`).
"""

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import allocating, inlined, kernel, prefetch
from hashret.indexes.kernels import (
    Segment,
    Workspace,
    is_new,
    prefetch_next,
    probe_level,
    split_query,
    unpack_plan,
)
from hashret.indexes.kernels_clusters import match_clusters
from hashret.indexes.kernels_codes import BLOCK, SUBBLOCK, ZERO, Query, Words, distance, min_distance
from hashret.indexes.kernels_heap import Distances, Ids
from hashret.indexes.kernels_items import other_slots, qualifies

Numbers = NDArray[np.uint32]  # numbers of codes

MAX_RANKED = 256  # ids that are sorted faster by comparing each with all others


@kernel
def flip_within(
    segment: Segment, query: Query, radius: int, last_level: int, matches: Numbers, work: Workspace
) -> tuple[int, int, int]:
    """Find the codes within `radius` bits of a query by flipping bits.

    Probe one level after another up to the radius or `last_level`, or until the budget of candidates is spent. Return
    the number of matches, the level a scan must start from, and the number of candidates. Each code is found once (see
    `kernels`).
    """
    n, level, budget, high = 0, ZERO, unpack_plan(segment).candidate_budget, 0
    room = budget
    split_query(segment, query, work)
    if last_level >= 0:
        prefetch_next(segment, query.queries, query.q)
    while level <= min(radius, last_level):
        low, high = probe_level(segment, query, level, radius, room, work)
        if high < 0:
            break
        if level >= len(segment.layout) - 1 or len(segment.signatures):
            room -= high
        for i in range(low, high):
            j = np.int64(work.candidates[i])
            if distance(segment.codes, j, query.queries, query.q) <= radius and is_new(segment, j, level, work):
                matches[n] = j
                n += 1
        level += 1
    work.probes[0] += work.probes_before[level + (high < 0)]
    return n, level, budget - (room if high >= 0 else 0)


@kernel
def scan_within(
    segment: Segment, query: Query, radius: int, level: int, matches: Numbers, n: int, work: Workspace
) -> int:
    """Append the codes within `radius` bits of a query first found at `level` or later to n matches; return their
    number."""
    for begin in range(0, len(segment.codes), BLOCK):
        block = segment.codes[begin : begin + BLOCK]
        if min_distance(block, query.queries, query.q) > radius:
            continue
        for low in range(0, len(block), SUBBLOCK):
            part = block[low : low + SUBBLOCK]
            if min_distance(part, query.queries, query.q) > radius:
                continue
            for i in range(len(part)):
                if distance(part, i, query.queries, query.q) <= radius and is_new(
                    segment, begin + low + i, level, work
                ):
                    matches[n] = begin + low + i
                    n += 1
    return n


@allocating
def search_within(segment: Segment, queries: Words, radius: int, work: Workspace) -> tuple[Ids, Numbers]:
    """Return the codes within `radius` bits of each query, in no order: limits (q + 1,) and their numbers."""
    limits = np.zeros(len(queries) + 1, np.int64)
    found = np.empty(len(segment.codes), np.uint32)  # each code is found once at most
    matches = np.empty(1024, np.uint32)
    for q in range(len(queries)):
        n, level, query = 0, 0, Query(queries, q)
        if len(segment.radii) and radius >= len(segment.layout):  # below that no bit has to be flipped
            n, level = match_clusters(segment, query, radius, found, work)
        if level == 0:
            last_level = unpack_plan(segment).last_level  # flip only if that can find all codes, or else scan
            n, level, _ = flip_within(segment, query, radius, last_level if radius <= last_level else -1, found, work)
        if level <= radius:
            n = scan_within(segment, query, radius, level, found, n, work)
        limits[q + 1] = limits[q] + n
        if limits[q + 1] > len(matches):
            longer = np.empty(2 * limits[q + 1], np.uint32)
            copy(matches[: limits[q]], longer)
            matches = longer
        copy(found[:n], matches[limits[q] :])
    return limits, matches[: limits[-1]]


@inlined
def copy(numbers: Numbers, out: Numbers) -> None:
    """Copy the numbers to the beginning of `out`: assigning to a slice takes Numba seconds longer to compile."""
    for i in range(len(numbers)):
        out[i] = numbers[i]


@kernel
def write_items(
    segment: Segment,
    query: Query,
    matches: Numbers,
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    n: int,
) -> int:
    """Append the items of the codes that match a query to the n items written; return their number."""
    for match in matches:
        prefetch(segment.ids, match)
    for match in matches:
        j = np.int64(match)
        d = distance(segment.codes, j, query.queries, query.q)
        low, high = other_slots(segment, j)
        slot = int(j)
        for next_slot in range(low, high + 1):
            if qualifies(segment, slot, allowed, filtered):
                distances[n], ids[n] = d, segment.ids[slot]
                n += 1
            slot = next_slot
    return n


@allocating
def expand_within(
    segment: Segment, queries: Words, limits: Ids, matches: Numbers, allowed: Ids, filtered: bool
) -> tuple[Ids, Distances, Ids]:
    """Return the items of matching codes, in no order: limits (q + 1,), distances and ids."""
    total = 0
    for match in matches:
        low, high = other_slots(segment, np.int64(match))
        total += int(1 + high - low)
    distances, ids = np.empty(total, np.int32), np.empty(total, np.int64)
    item_limits = np.zeros(len(limits), np.int64)
    for q in range(len(queries)):
        query, codes = Query(queries, q), matches[limits[q] : limits[q + 1]]
        item_limits[q + 1] = write_items(segment, query, codes, allowed, filtered, distances, ids, item_limits[q])
    return item_limits, distances[: item_limits[-1]], ids[: item_limits[-1]]


@inlined
def sort_ids(ids: Ids, spare: Ids) -> None:
    """Sort distinct ids in place: few by their ranks, more by Shell's method; `spare` is working memory."""
    if len(ids) <= MAX_RANKED:
        for i in range(len(ids)):
            value, rank = ids[i], ZERO
            for j in range(len(ids)):  # vectorises, as it runs over a whole array
                rank += ids[j] < value
            spare[rank] = value
        for i in range(len(ids)):
            ids[i] = spare[i]
        return
    gap = len(ids)
    while gap > 1:
        gap = max(1, gap * 5 // 11)
        for i in range(gap, len(ids)):
            value, position = ids[i], i
            while position >= gap and ids[position - gap] > value:
                ids[position] = ids[position - gap]
                position -= gap
            ids[position] = value


@kernel
def sort_rows(
    limits: Ids, distances: Distances, ids: Ids, ends: Ids, sorted_distances: Distances, sorted_ids: Ids
) -> None:
    """Sort each row limits[q] ... limits[q + 1] - 1 by (distance, id): counting sort by distance, then each run by id.

    Distances are less than len(ends). `ends` is working memory, and so is `ids` after the counting sort.
    """
    for q in range(len(limits) - 1):
        ends[:] = 0
        for i in range(limits[q], limits[q + 1]):
            ends[distances[i]] += 1
        end = limits[q]
        for d in range(len(ends)):
            ends[d], end = end, end + ends[d]  # until the run of d is written, its begin
        for i in range(limits[q], limits[q + 1]):
            position = ends[distances[i]]
            sorted_distances[position], sorted_ids[position] = distances[i], ids[i]
            ends[distances[i]] += 1
        begin = limits[q]
        for d in range(len(ends)):
            sort_ids(sorted_ids[begin : ends[d]], ids[begin : ends[d]])
            begin = ends[d]
