"""The kernels of clusters: where codes form clusters, a search skips all codes around one pivot at once.

Fukunaga, Narendra: A Branch and Bound Algorithm for Computing k-Nearest Neighbors (1975); Chávez, Navarro: A compact
space decomposition for effective metric indexing (list of clusters, 2005). The longer codes are, the more bits the
nearest ones differ in, and the more buckets flipping has to probe, however far the next cluster is away. Clusters suit
these codes.

A **cluster** is a pivot c, which need not be a code of the index, and member codes, none farther than the cluster's
radius from c. By the triangle inequality a member x is at least distance(q, c) - distance(c, x) >= distance(q, c) -
radius bits away from query q. That, or 0 if it is negative, is the cluster's *lower bound*. Every code is a member of
one cluster. The outliers, which fit in no other, form one whose radius is FAR and whose lower bound is 0.

*Stop.* Once k items within r bits are known, clusters with a lower bound above r hold none of the k nearest. The number
of codes in the other clusters is known before any of them is read: if it is too high, flipping does the whole search.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, popcount, prefetch
from hashret.indexes.kernels import Segment, Workspace, unpack_plan
from hashret.indexes.kernels_codes import FAR, ZERO, Query, Words, distance, max_distance
from hashret.indexes.kernels_heap import Heap
from hashret.indexes.kernels_items import Shortlist, add_to_shortlist, offer_shortlist

UPPER: Any = np.int64(1 << 32)  # a lower bound times this, plus the number of a cluster, orders clusters by the bound
SCAN_FRACTION = 8  # clusters may cost 1 / SCAN_FRACTION of a scan before flipping does the whole search
BOUNDS_PER_CHECK = 64  # lower bounds compared, or words of pivots, in the time of one distance
PREFETCH_AHEAD = 64  # members prefetched before they are compared


@inlined
def compute_pivot_distances(pivots: Words, queries: Words, q: int, out: NDArray[np.int32]) -> None:
    """Write the distance of each pivot, (words, c), from query q."""
    words = len(pivots)
    query = queries.reshape(queries.size)[q * words : (q + 1) * words]
    out[:] = 0
    for w in range(words):
        row, word = pivots[w], query[w]
        for i in range(len(row)):  # vectorises, as it runs over a whole array
            out[i] += popcount(row[i] ^ word)


@inlined
def compute_lower_bounds(segment: Segment, query: Query, work: Workspace) -> None:
    """Write the lower bound of each cluster."""
    radii, bounds = segment.radii, work.lower_bounds[: len(segment.radii)]
    compute_pivot_distances(segment.pivots, query.queries, query.q, bounds)
    for i in range(len(radii)):
        bounds[i] = max(0, bounds[i] - radii[i])


@inlined
def find_closest(segment: Segment, bound: int, work: Workspace) -> tuple[int, int, int]:
    """Return the least lower bound, its cluster, and the number of codes in clusters with bounds up to `bound`."""
    bounds, offsets = work.lower_bounds[: len(segment.radii)], segment.member_offsets
    closest, codes = FAR * UPPER, 0 * UPPER
    for i in range(len(bounds)):  # vectorises, as the minimum is taken over bound and cluster together
        closest = min(closest, bounds[i] * UPPER + i)
        codes += np.int64(offsets[i + 1]) - np.int64(offsets[i]) if bounds[i] <= bound else 0
    return closest >> 32, closest & (UPPER - 1), codes


@inlined
def read_member(segment: Segment, cluster: int, i: int) -> int:
    """Prefetch member i of a cluster; return the member prefetched `PREFETCH_AHEAD` calls ago, -1 if there is none."""
    begin = np.int64(segment.member_offsets[cluster])
    size = np.int64(segment.member_offsets[cluster + 1]) - np.int64(segment.member_offsets[cluster])
    if i < size:
        prefetch(segment.codes, segment.members[begin + i])
    return int(segment.members[begin + i - PREFETCH_AHEAD]) if i >= PREFETCH_AHEAD else -1


@inlined
def search_clusters(segment: Segment, query: Query, heap: Heap, n: int, work: Workspace) -> tuple[int, int]:
    """Search clusters for a query; return the heap's new size and the next level: FAR if done, or 0 if given up.

    As in `kernels_nearest.flip_nearest`, codes are shortlisted until it is certain that clusters suffice.
    """
    room, bounds = unpack_plan(segment).candidate_budget // SCAN_FRACTION, work.lower_bounds
    shortlist = Shortlist(ZERO, ZERO, ZERO + max_distance(segment.codes))
    work.histogram[: shortlist.bound + 1] = 0
    compute_lower_bounds(segment, query, work)
    while True:
        closest, cluster, codes = find_closest(segment, shortlist.bound, work)
        if closest > shortlist.bound:
            return offer_shortlist(segment, shortlist, heap, n, work), FAR
        if shortlist.n_items >= len(heap.ids) and codes > room:
            return n, 0
        bounds[cluster] = FAR
        size = np.int64(segment.member_offsets[cluster + 1]) - np.int64(segment.member_offsets[cluster])
        room -= size + len(segment.radii) // BOUNDS_PER_CHECK
        if room < 0:
            return n, 0
        for i in range(size + PREFETCH_AHEAD):
            j = read_member(segment, cluster, i)
            if j >= 0:
                d = distance(segment.codes, j, query.queries, query.q)
                if d <= shortlist.bound:
                    shortlist = add_to_shortlist(segment, j, d, heap, shortlist, work)


@inlined
def match_clusters(
    segment: Segment, query: Query, radius: int, matches: NDArray[np.uint32], work: Workspace
) -> tuple[int, int]:
    """Find the codes within `radius` bits of a query in clusters; return their number and the next level: FAR or 0."""
    n = 0
    compute_lower_bounds(segment, query, work)
    _, _, codes = find_closest(segment, radius, work)
    if codes > unpack_plan(segment).candidate_budget // SCAN_FRACTION:
        return 0, 0
    for cluster in range(len(segment.radii)):
        if work.lower_bounds[cluster] <= radius:
            size = np.int64(segment.member_offsets[cluster + 1]) - np.int64(segment.member_offsets[cluster])
            for i in range(size + PREFETCH_AHEAD):
                j = read_member(segment, cluster, i)
                if j >= 0 and distance(segment.codes, j, query.queries, query.q) <= radius:
                    matches[n] = j
                    n += 1
    return n, FAR
