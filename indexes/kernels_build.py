"""The kernels that build tables and clusters, and find items by their ids."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import allocating, inlined, kernel, trailing_zeros
from hashret.indexes.kernels import Segment, Workspace
from hashret.indexes.kernels_clusters import BOUNDS_PER_CHECK, compute_pivot_distances
from hashret.indexes.kernels_codes import FAR, Query, Words, distance, substring
from hashret.indexes.kernels_heap import Ids
from hashret.indexes.kernels_within import flip_within

MIN_MEMBERS = 32  # of a cluster
MIN_OUTLIERS, MEMBERS_PER_OUTLIER = 64, 512  # so many outliers are always accepted, plus one for so many members
MAX_COST = 128  # candidates per code: clusters that cost more to build are given up
PIVOT_SAMPLE = 64  # members, at most, that determine a pivot

Numbers = NDArray[np.uint32]  # numbers of codes


@allocating
def find_slots(ids: Ids, by_id: Numbers, targets: Ids) -> Ids:
    """Return the slot of each target id, -1 if it has none."""
    slots = np.empty(len(targets), np.int64)
    for i in range(len(targets)):
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) >> 1
            if ids[by_id[middle]] < targets[i]:
                low = middle + 1
            else:
                high = middle
        slots[i] = by_id[low] if low < len(ids) and ids[by_id[low]] == targets[i] else -1
    return slots


@inlined
def upper_bound(ascending: NDArray[Any], value: int, low: int) -> int:
    """Return the number of elements that are at most `value`, by galloping search from `low` (Bentley and Yao, 1976).

    At least the first `low` elements must be.
    """
    step, high = 1, low
    while high < len(ascending) and np.int64(ascending[high]) <= value:
        low, high, step = high + 1, high + step, 2 * step
    high = min(high, len(ascending))
    while low < high:
        middle = (low + high) >> 1
        if np.int64(ascending[middle]) <= value:
            low = middle + 1
        else:
            high = middle
    return low


@allocating
def find_codes(segment: Segment, slots: Ids) -> Ids:
    """Return the number of the code whose posting list holds each slot; fastest for ascending slots."""
    numbers, previous, posting_lists, rows = slots.copy(), 0, 0, 0
    for i in range(len(slots)):
        if slots[i] < len(segment.codes):
            continue
        if slots[i] < previous:
            posting_lists, rows = 0, 0
        previous = slots[i]
        posting_lists = upper_bound(segment.shared_offsets, slots[i], posting_lists)
        rows = upper_bound(segment.shared_ranks[:, 1], posting_lists - 1, rows)
        bits = np.int64(segment.shared_ranks[rows - 1, 0])
        for _ in range(posting_lists - 1 - np.int64(segment.shared_ranks[rows - 1, 1])):
            bits &= bits - 1
        numbers[i] = (rows - 1 << 6) + trailing_zeros(bits)
    return numbers


@allocating
def build_rank_bitmap(counts: Numbers) -> tuple[Words, int]:
    """Return the rank bitmap (see `Segment`) of the counts that are not 0, and their number."""
    bitmap, number = np.zeros(((len(counts) + 63) >> 6, 2), np.uint64), 0
    for i in range(len(counts)):
        if i & 63 == 0:
            bitmap[i >> 6, 1] = number
        if counts[i]:
            bitmap[i >> 6, 0] |= np.uint64(1) << np.uint64(i & 63)
            number += 1
    return bitmap, number


@kernel
def count_buckets(codes: Words, first: int, width: int, counts: Numbers) -> None:
    """Add these codes to the number of codes in each bucket of the table of a substring."""
    for j in range(len(codes)):
        counts[substring(codes, j, first, width)] += 1


@allocating
def build_buckets(counts: Numbers) -> tuple[Words, Numbers]:
    """Return the rank bitmap and the offsets of buckets with these counts; replace each count by its offset."""
    bitmap, filled = build_rank_bitmap(counts)
    offsets, total, filled = np.empty(filled + 1, np.uint32), 0, 0
    for bucket in range(len(counts)):
        if counts[bucket]:
            offsets[filled] = total
            total += int(counts[bucket])
            counts[bucket] = offsets[filled]
            filled += 1
    offsets[filled] = total
    return bitmap, offsets


@kernel
def fill_buckets(codes: Words, number: int, layout: Ids, ends: Numbers, postings: Numbers, signatures: Numbers) -> None:
    """Append the numbers of these codes, from `number` on, and their signatures to their buckets, which end at `ends`.

    `layout` is the row of the table's substring in `Segment.layout`.
    """
    first, width, signature_first, signature_width = layout[0], layout[1], layout[3], layout[4]
    for j in range(len(codes)):
        bucket = substring(codes, j, first, width)
        position = ends[bucket]
        ends[bucket] += 1
        postings[position] = number + j
        if signature_width:
            signatures[position] = substring(codes, j, signature_first, signature_width)


@inlined
def write_pivot(codes: Words, numbers: Numbers, n: int, ones: Ids, pivot: Words) -> None:
    """Write the bitwise majority of n codes to `pivot`; `ones`, a count for each bit, is working memory.

    Of many codes only an evenly spaced sample of about `PIVOT_SAMPLE` is read.
    """
    words, step, sample = len(ones) >> 6, max(1, n // PIVOT_SAMPLE), 0
    flat, out = codes.reshape(codes.size), pivot.reshape(pivot.size)
    ones[:] = 0
    for i in range(0, n, step):
        sample += 1
        for w in range(words):
            word = flat[np.int64(numbers[i]) * words + w]
            for bit in range(64):
                ones[(w << 6) + bit] += np.int64(word >> np.uint64(bit) & np.uint64(1))
    for w in range(words):
        out[w] = 0
        for bit in range(64):
            out[w] |= np.uint64(2 * ones[(w << 6) + bit] > sample) << np.uint64(bit)


class Clusters(NamedTuple):
    """Clusters that are being built, and working memory."""

    pivots: Words  # (words, max_clusters)
    radii: NDArray[np.int32]  # (max_clusters,)
    assignment: Numbers  # (d,): the cluster of each code, max_clusters if it has none
    distances: NDArray[np.int32]  # (max_clusters,): from a code to the pivots
    members: Numbers  # (d,): of the next cluster
    ones: Ids  # (64 words,): see `write_pivot`
    pivot: Words  # (1,) or (1, words): of the next cluster


@inlined
def join(codes: Words, j: int, clusters: Clusters, count: int, reach: int) -> bool:
    """Add code j to the one of the first `count` clusters whose pivot is nearest, if that is within `reach` bits."""
    distances, radii, nearest = clusters.distances[:count], clusters.radii[:count], -1
    compute_pivot_distances(clusters.pivots[:, :count], codes, j, distances)
    for c in range(len(radii)):
        if distances[c] <= reach:
            nearest, reach = c, distances[c] - 1
    if nearest >= 0:
        radii[nearest] = max(radii[nearest], reach + 1)
        clusters.assignment[j] = nearest
    return nearest >= 0


@inlined
def find_members(segment: Segment, seed: int, clusters: Clusters, reach: int, work: Workspace) -> tuple[int, int]:
    """Write the members and the pivot of a cluster around a seed code.

    Return the number of members, which are unassigned codes, and the number of candidates compared.
    """
    m, query, members, size = len(segment.layout), Query(clusters.pivot, 0), clusters.members, 0
    members[0] = seed
    write_pivot(segment.codes, members, 1, clusters.ones, clusters.pivot)
    n, _, seed_candidates = flip_within(segment, query, reach, m - 1, members, work)
    if n:
        write_pivot(segment.codes, members, n, clusters.ones, clusters.pivot)
    n, _, pivot_candidates = flip_within(segment, query, reach, 2 * m - 1, members, work)
    for i in range(n):
        members[size] = members[i]
        size += clusters.assignment[members[i]] == len(clusters.radii)
    return size, seed_candidates + pivot_candidates


@inlined
def add_cluster(codes: Words, clusters: Clusters, number: int, size: int) -> None:
    """Assign the `size` members found to the cluster of this number."""
    for i in range(size):
        clusters.assignment[clusters.members[i]] = number
        d = distance(codes, np.int64(clusters.members[i]), clusters.pivot, 0)
        clusters.radii[number] = max(clusters.radii[number], d)
    for w in range(len(clusters.pivots)):
        clusters.pivots[w, number] = clusters.pivot.reshape(len(clusters.pivots))[w]


@allocating
def build_clusters(segment: Segment, reach: int, work: Workspace) -> tuple[Words, NDArray[np.int32], Numbers]:
    """Return the pivots and radii of clusters, and the cluster of each code; no clusters if there are too many outliers
    or building takes too long.

    In order, each code that has no cluster joins the nearest pivot within `reach` bits, or becomes a seed. The pivot of
    a new cluster is the bitwise majority of the codes within reach of the seed that share a substring with it. Its
    members are the codes within reach of the pivot that share a substring with it but for one bit, with or without the
    seed. If they are few, no cluster is made, and the seed is an outlier, which may join a later cluster. The remaining
    outliers form a last cluster with radius FAR and a pivot without meaning.
    """
    count, words = len(segment.codes), segment.codes.size // len(segment.codes)
    max_clusters = count // MIN_MEMBERS + 1
    clusters = Clusters(
        np.zeros((words, max_clusters), np.uint64),
        np.zeros(max_clusters, np.int32),
        np.full(count, max_clusters, np.uint32),
        np.empty(max_clusters, np.int32),
        np.empty(count, np.uint32),
        np.empty(64 * words, np.int64),
        np.empty_like(segment.codes[:1]),
    )
    pivots, radii, assignment = clusters.pivots, clusters.radii, clusters.assignment
    n_clusters = 0
    n_members = 0
    n_outliers = 0
    cost = 0  # in candidates
    for j in range(count):
        if assignment[j] < max_clusters:
            continue
        cost += n_clusters * words // BOUNDS_PER_CHECK
        if join(segment.codes, j, clusters, n_clusters, reach):
            n_members += 1
            continue
        size, candidates = find_members(segment, j, clusters, reach, work)
        cost += candidates
        n_outliers += size < MIN_MEMBERS
        if n_outliers > MIN_OUTLIERS + n_members // MEMBERS_PER_OUTLIER or cost > MAX_COST * count:
            return pivots[:, :0], radii[:0], assignment
        if size >= MIN_MEMBERS:
            add_cluster(segment.codes, clusters, n_clusters, size)
            n_clusters, n_members = n_clusters + 1, n_members + size
    n_outliers = 0
    for j in range(count):
        if n_clusters and assignment[j] == max_clusters and not join(segment.codes, j, clusters, n_clusters, reach):
            assignment[j] = n_clusters
            n_outliers += 1
    if n_outliers:
        radii[n_clusters] = FAR
        n_clusters += 1
    return pivots[:, :n_clusters], radii[:n_clusters], assignment


@allocating
def list_members(assignment: Numbers, n_clusters: int) -> tuple[Numbers, Numbers]:
    """Return the offsets of the members of each cluster, and the numbers of the members, cluster after cluster."""
    offsets, members = np.zeros(n_clusters + 2, np.uint32), np.empty(len(assignment), np.uint32)
    for c in assignment:
        offsets[c + 2] += 1
    for c in range(1, n_clusters + 1):
        offsets[c + 1] += offsets[c]
    for j in range(len(assignment)):
        members[offsets[assignment[j] + 1]] = j
        offsets[assignment[j] + 1] += 1
    return offsets[: n_clusters + 1], members
