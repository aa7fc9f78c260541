"""The kernels of radius search: by balls, or by flipping bits, then scanning for what is left (see `kernels`)."""

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import allocating, inlined, kernel, prefetch
from hashret.indexes.kernels import (
    Segment,
    Workspace,
    announce,
    cut_query,
    is_new,
    meet,
    plan_of,
)
from hashret.indexes.kernels_balls import balls_within
from hashret.indexes.kernels_codes import BLOCK, PART, ZERO, Query, Words, distance, least_distance
from hashret.indexes.kernels_heap import Distances, Ids
from hashret.indexes.kernels_items import other_slots, qualifies

Numbers = NDArray[np.uint32]  # of codes

RANKED = 256  # so many ids are compared with each other faster than they are sorted


@kernel
def flip_within(
    segment: Segment, query: Query, radius: int, last: int, found: Numbers, work: Workspace
) -> tuple[int, int, int]:
    """Find the codes within `radius` bits of a query by flipping bits: how many, the level a scan must start from, and
    how many codes were met.

    Level after level up to the radius, or up to `last` if that is less, unless there are too many codes (see `kernels`
    for the levels, and why this finds each code, once).
    """
    n, level, budget, high = 0, ZERO, plan_of(segment).budget, 0
    room = budget
    cut_query(segment, query, work)
    if last >= 0:
        announce(segment, query.queries, query.q)
    while level <= min(radius, last):
        low, high = meet(segment, query, level, radius, room, work)
        if high < 0:
            break
        if level >= len(segment.cuts) - 1 or len(segment.sifts):
            room -= high
        for i in range(low, high):
            j = np.int64(work.met[i])
            if distance(segment.codes, j, query.queries, query.q) <= radius and is_new(segment, j, level, work):
                found[n] = j
                n += 1
        level += 1
    work.probes[0] += work.looks[level + (high < 0)]
    return n, level, budget - (room if high >= 0 else 0)


@kernel
def scan_within(
    segment: Segment, query: Query, radius: int, level: int, found: Numbers, n: int, work: Workspace
) -> int:
    """Find the codes within `radius` bits of a query first met at `level` or later; how many with the n before."""
    for begin in range(0, len(segment.codes), BLOCK):
        block = segment.codes[begin : begin + BLOCK]
        if least_distance(block, query.queries, query.q) > radius:
            continue
        for low in range(0, len(block), PART):
            part = block[low : low + PART]
            if least_distance(part, query.queries, query.q) > radius:
                continue
            for i in range(len(part)):
                if distance(part, i, query.queries, query.q) <= radius and is_new(
                    segment, begin + low + i, level, work
                ):
                    found[n] = begin + low + i
                    n += 1
    return n


@allocating
def matches_within(segment: Segment, queries: Words, radius: int, work: Workspace) -> tuple[Ids, Numbers]:
    """The codes within `radius` bits of each query: limits (q + 1) and numbers of codes, in no order."""
    limits = np.zeros(len(queries) + 1, np.int64)
    found = np.empty(len(segment.codes), np.uint32)  # each code is found once at most
    matches = np.empty(1024, np.uint32)
    for q in range(len(queries)):
        n, level, query = 0, 0, Query(queries, q)
        if len(segment.radii) and radius >= len(segment.cuts):  # else no bit has to be flipped
            n, level = balls_within(segment, query, radius, found, work)
        if level == 0:
            last = plan_of(segment).last  # unless flipping leads to the end, all is scanned
            n, level, _ = flip_within(segment, query, radius, last if radius <= last else -1, found, work)
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
    """Write the numbers to the beginning of `out`: slices that are assigned take Numba seconds more to compile."""
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
    """Write the items behind the codes matching a query after the n written; how many in all."""
    for match in matches:
        prefetch(segment.ids, match)
    for match in matches:
        j = np.int64(match)
        d = distance(segment.codes, j, query.queries, query.q)
        low, high = other_slots(segment, j)
        slot = int(j)
        for following in range(low, high + 1):
            if qualifies(segment, slot, allowed, filtered):
                distances[n], ids[n] = d, segment.ids[slot]
                n += 1
            slot = following
    return n


@allocating
def expand_within(
    segment: Segment, queries: Words, limits: Ids, matches: Numbers, allowed: Ids, filtered: bool
) -> tuple[Ids, Distances, Ids]:
    """The items behind matching codes: limits (q + 1), distances and ids, in no order."""
    total = 0
    for match in matches:
        low, high = other_slots(segment, np.int64(match))
        total += int(1 + high - low)
    distances, ids = np.empty(total, np.int32), np.empty(total, np.int64)
    bounds = np.zeros(len(limits), np.int64)
    for q in range(len(queries)):
        query, own = Query(queries, q), matches[limits[q] : limits[q + 1]]
        bounds[q + 1] = write_items(segment, query, own, allowed, filtered, distances, ids, bounds[q])
    return bounds, distances[: bounds[-1]], ids[: bounds[-1]]


@inlined
def sort_ids(ids: Ids, spare: Ids) -> None:
    """Sort distinct ids in place: a few by counting how many are less than each, more by Shell's method."""
    if len(ids) <= RANKED:
        for i in range(len(ids)):
            own, rank = ids[i], ZERO
            for j in range(len(ids)):  # vectorises, as it runs over a whole array
                rank += ids[j] < own
            spare[rank] = own
        for i in range(len(ids)):
            ids[i] = spare[i]
        return
    gap = len(ids)
    while gap > 1:
        gap = max(1, gap * 5 // 11)
        for i in range(gap, len(ids)):
            moving, place = ids[i], i
            while place >= gap and ids[place - gap] > moving:
                ids[place] = ids[place - gap]
                place -= gap
            ids[place] = moving


@kernel
def sort_rows(
    limits: Ids, distances: Distances, ids: Ids, ends: Ids, sorted_distances: Distances, sorted_ids: Ids
) -> None:
    """Sort each row limits[q] ... limits[q + 1] - 1 by (distance, id): by distance counting, then ids among equals.

    Distances are less than len(ends), which is working space, as `ids` is once they are counted.
    """
    for q in range(len(limits) - 1):
        ends[:] = 0
        for i in range(limits[q], limits[q + 1]):
            ends[distances[i]] += 1
        end = limits[q]
        for d in range(len(ends)):
            ends[d], end = end, end + ends[d]  # so far where the run of d begins
        for i in range(limits[q], limits[q + 1]):
            place = ends[distances[i]]
            sorted_distances[place], sorted_ids[place] = distances[i], ids[i]
            ends[distances[i]] += 1
        begin = limits[q]
        for d in range(len(ends)):
            sort_ids(sorted_ids[begin : ends[d]], ids[begin : ends[d]])
            begin = ends[d]
