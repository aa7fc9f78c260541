"""The kernels of exact search in Hamming space by flipping bits: multi-index hashing.

Norouzi, Punjani, Fleet: Fast Exact Search in Hamming Space with Multi-Index Hashing (CVPR 2012, PAMI 2014). Ours needs
no visited set, addresses its tables directly (Salakhutdinov and Hinton, Semantic Hashing, 2009), and switches from
flipping to a scan where that is cheaper, even in the middle of a query.

A code is cut into m substrings. **Level** m·s + t flips s bits of substring t of the query in every possible way and
probes the buckets of the results in table t. A code x whose substring u differs from the query's in e(u) bits is found
at the levels m·e(u) + u, first at ``first_level(x)``, the minimum of these.

*Freshness.* A code found at a level is new if and only if no lower level finds it, ``first_level(x) == level``. A few
popcounts decide that (`is_new`), and no visited set is needed.

*Stop.* ``first_level(x) <= distance(x)``, so after level L every code within L bits has been found, and k items within
L bits are the k nearest. Proof: let L = m·s + t and suppose x has not been found up to level L. Then e(u) > s for
u <= t and e(u) >= s for u > t, so distance(x) = Σ e(u) >= (t + 1)(s + 1) + (m - t - 1)s = m·s + t + 1 > L.

*Switch.* After level L a scan has to consider only the codes that a later level finds first, ``first_level(x) > L``.

*Prefilter.* Beside the number of a code, a table may store a **signature**, some bits of the code outside its
substring. A code found after s flips is at least s bits away, plus the number of bits in which its signature differs
from the query's, because no bit is counted twice. So most codes of large buckets are rejected unread, and far fewer
buckets have to be probed.

*Latency.* Nearly every read misses all caches, so the time of a query is that of the reads that wait for each other. A
level therefore reads the offsets of all its buckets together, then prefetches all signatures, then the postings of the
codes that pass the prefilter (all postings if there are no signatures), then the codes. While one query is searched,
the first reads of the next two are prefetched (`prefetch_next`).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, popcount, prefetch, trailing_zeros
from hashret.indexes.kernels_codes import ZERO, Query, Words, distance, substring
from hashret.indexes.kernels_heap import Ids

CHUNK_BLOCKS = 1024  # blocks, an even number, whose minimum distances are computed before any of them is read again
PREFILTER_BATCH = 256  # codes of a bucket whose signatures are compared before any code is selected
PREFILTERS_PER_CHECK = 32  # prefiltering so many codes takes as long as computing one distance
MAX_RANGES = 256  # buckets whose offsets are read together
CACHE_LINE = 8  # codes in a cache line, at most; it holds twice as many postings or signatures


class Segment(NamedTuple):
    """Distinct codes with the ids that share each (a posting list), and the tables of their substrings.

    A *rank bitmap* marks members of a range and numbers them (the rank of Jacobson, 1989). It has a row for each 64
    members: a word with a bit for each, lowest first, and the number of bits set in the rows before. It is small enough
    to stay in a cache.
    """

    codes: Words  # (d,) or (d, words), distinct and ascending if there are tables
    ids: Ids  # (n,), uint32 if all fit, by slot: slot j < d has the least id of code j, later slots the other ids
    shared_ranks: NDArray[np.uint64]  # rank bitmap of the codes that have several ids; no rows if none has
    shared_offsets: NDArray[np.uint32]  # the first slot of the other ids, ascending, of each such code, and their end
    by_id: NDArray[np.uint32]  # (n,): the slots in the order of their ids
    tombstones: NDArray[np.uint8]  # one bit a slot, set if its id was removed; empty if none was
    layout: NDArray[
        np.int64
    ]  # (m, 5): a substring's first bit, width, first row in bucket_ranks; its signature's first bit, width
    bucket_ranks: NDArray[np.uint64]  # rank bitmaps of the buckets that are not empty, table after table
    bucket_offsets: NDArray[np.uint32]  # the first posting of each such bucket, and the end of each table's last
    postings: NDArray[np.uint32]  # (m - 1, d): numbers of codes; table 0 needs none, as codes are sorted by substring 0
    signatures: NDArray[np.uint32]  # (m - 1, d): the signature beside each posting; or empty
    plan: NDArray[np.int64]  # (6,): a `Plan`
    pivots: Words  # (words, c), word after word, of the clusters (see `kernels_clusters`); empty without clusters
    radii: NDArray[np.int32]  # (c,): of the clusters; FAR for the cluster of outliers, which has no pivot
    member_offsets: NDArray[np.uint32]  # (c + 1,): the first member of each cluster, and the end of the last; or empty
    members: NDArray[np.uint32]  # (d,): numbers of codes, cluster after cluster; or empty


class Plan(NamedTuple):
    """The levels up to which flipping is cheaper than a scan, computed once per segment."""

    free_until: int  # the level up to which flipping costs next to nothing compared with a scan
    cheap_until: int  # the level up to which it costs a small part of a scan
    shared_until: int  # the level up to which it costs a quarter of a scan, each query's share of a scan for many
    last_level: int  # the level up to which it costs no more than a scan
    promising_distance: int  # flipping goes on from free_until to cheap_until if a code has been found so near
    candidate_budget: int  # candidates that cost as much as a scan


class Workspace(NamedTuple):
    """The working memory of a search, as kernels cannot allocate."""

    substrings: Ids  # (m,): of the current query
    ranges: NDArray[np.int64]  # (MAX_RANGES, 2): ranges of postings
    candidates: NDArray[np.uint32]  # (budget,): codes found at a level, or the first m; before, positions in postings
    range_ends: NDArray[np.int64]  # (m + 1,): the end of the ranges of each of the first m levels, from 0 on
    differences: NDArray[np.uint8]  # (PREFILTER_BATCH,): the least number of bits in which codes differ from the query
    packed_differences: NDArray[np.uint64]  # (PREFILTER_BATCH / 8,): the same memory, eight differences a word
    prefiltered: NDArray[np.int64]  # (1,): the number of postings that the current query has prefiltered
    candidate_ends: NDArray[np.int64]  # (m + 1,): the end of the candidates of each of the first m levels; -1: no room
    shortlist: NDArray[np.uint32]  # (budget or BLOCK, 2): codes that may be among the nearest, and their distances
    histogram: NDArray[np.int64]  # (FAR,): the number of items at each distance
    block_minima: NDArray[np.int16]  # (q, CHUNK_BLOCKS): the least distance in each block to each query
    probes_before: NDArray[np.int64]  # (FAR,): the number of buckets probed before a level begins
    probes: NDArray[np.int64]  # (1,): the number of buckets probed for all queries
    lower_bounds: NDArray[np.int32]  # (c,): of the distances from the query to the members of each cluster


@inlined
def unpack_plan(segment: Segment) -> Plan:
    plan = segment.plan
    return Plan(plan[0], plan[1], plan[2], plan[3], plan[4], plan[5])


@inlined
def split_query(segment: Segment, query: Query, work: Workspace) -> None:
    """Write the substrings of the query."""
    for t in range(len(segment.layout)):
        work.substrings[t] = substring(query.queries, query.q, segment.layout[t, 0], segment.layout[t, 1])


@inlined
def is_new(segment: Segment, j: int | np.int64, level: int, work: Workspace) -> bool:
    """Whether no lower level finds code j: first_level(j) >= level."""
    m = len(segment.layout)
    for u in range(min(m, level)):
        value = substring(segment.codes, j, segment.layout[u, 0], segment.layout[u, 1])
        if m * popcount(np.uint64(value ^ work.substrings[u])) + u < level:
            return False
    return True


@inlined
def next_flip(flip: int) -> int:
    """Return the next greater integer with as many ones (Gosper's hack, HAKMEM 175)."""
    ripple, zeros = flip + (flip & -flip), int(trailing_zeros(flip))
    return ripple | ((flip ^ ripple) >> 2 >> zeros)


@inlined
def rank(bitmap: NDArray[np.uint64], row: int, position: int) -> tuple[int, int]:
    """Return a bit of a rank bitmap, and the number of bits set before it."""
    bits, bit = bitmap[row, 0], np.uint64(position)
    before: int = int(bitmap[row, 1]) + popcount(bits & ((np.uint64(1) << bit) - np.uint64(1)))
    return int(bits >> bit & np.uint64(1)), before


@inlined
def prefetch_next(segment: Segment, queries: Words, q: int) -> None:
    """Prefetch what the first probes of the next query read, and the bucket offsets of the query after it."""
    for t in range(len(segment.layout)):
        first, width, table = segment.layout[t, 0], segment.layout[t, 1], segment.layout[t, 2]
        if q + 2 < len(queries):
            bucket = substring(queries, q + 2, first, width)
            _, number = rank(segment.bucket_ranks, table + (bucket >> 6), bucket & 63)
            prefetch(segment.bucket_offsets, number)
        if q + 1 < len(queries):
            bucket = substring(queries, q + 1, first, width)
            filled, number = rank(segment.bucket_ranks, table + (bucket >> 6), bucket & 63)
            if filled:
                low, high = int(segment.bucket_offsets[number]), int(segment.bucket_offsets[number + 1])
                step = 2 * CACHE_LINE if t else CACHE_LINE
                for position in range(low, min(high, low + PREFILTER_BATCH), step):
                    if t == 0:
                        prefetch(segment.codes, position)
                    elif len(segment.signatures):
                        prefetch(segment.signatures[t - 1], position)
                    else:
                        prefetch(segment.postings[t - 1], position)


@inlined
def probe_buckets(segment: Segment, s: int, t: int, flip: int, work: Workspace, n: int) -> tuple[int, int]:
    """Probe the buckets of substring t with s bits flipped, from `flip` on, until `ranges` is full.

    Append the postings of the buckets that are not empty, which few are, to the n ranges. Return the flip to go on
    with, and the new number of ranges.
    """
    ranges = work.ranges
    width, table = segment.layout[t, 1], segment.layout[t, 2]
    value, begin = work.substrings[t], n
    while flip < 1 << width and n < MAX_RANGES:
        bucket = value ^ flip
        filled, ranges[n, 0] = rank(segment.bucket_ranks, table + (bucket >> 6), bucket & 63)
        prefetch(segment.bucket_offsets, ranges[n, 0])
        n += filled
        flip = next_flip(flip) if s else 1 << width
    for i in range(begin, n):
        number = ranges[i, 0]
        ranges[i, 0], ranges[i, 1] = segment.bucket_offsets[number], segment.bucket_offsets[number + 1]
        if len(segment.signatures):
            low, high = ranges[i, 0], min(ranges[i, 1], ranges[i, 0] + PREFILTER_BATCH)
            for position in range(low, high, 2 * CACHE_LINE if t else CACHE_LINE):
                if t:
                    prefetch(segment.signatures[t - 1], position)
                else:
                    prefetch(segment.codes, position)
        elif t:
            prefetch(segment.postings[t - 1], ranges[i, 0])
    return flip, n


@inlined
def collect(segment: Segment, t: int, begin: int, end: int, room: int, work: Workspace, n: int) -> int:
    """Append the codes of some ranges of table t to the n candidates; return their new number, -1 if over `room`."""
    for i in range(begin, end):
        low, high = work.ranges[i, 0], work.ranges[i, 1]
        if n + high - low > room:
            return -1
        for position in range(low, high):
            j = position if t == 0 else np.int64(segment.postings[t - 1, position])
            prefetch(segment.codes, j)
            work.candidates[n] = j
            n += 1
    return n


@inlined
def compare_signatures(segment: Segment, query: Query, t: int, low: int, high: int, work: Workspace) -> None:
    """Write the number of bits in which the signatures low ... high - 1 of table t differ from the query's.

    Table 0 has the codes themselves at hand: write their distances, 127 at most.
    """
    differences = work.differences  # all loops here run over whole arrays, or they do not vectorise
    if t == 0:
        codes = segment.codes[low:high]
        for i in range(len(codes)):
            differences[i] = min(127, distance(codes, i, query.queries, query.q))
        return
    signatures = segment.signatures[t - 1, low:high]
    signature = np.uint64(substring(query.queries, query.q, segment.layout[t, 3], segment.layout[t, 4]))
    for i in range(len(signatures)):
        differences[i] = popcount(np.uint64(signatures[i]) ^ signature)


@inlined
def prefilter(segment: Segment, query: Query, t: int, begin: int, end: int, bound: int, work: Workspace, n: int) -> int:
    """Append the posting positions, in some ranges of table t, of the codes that differ in at most `bound` bits.

    Return the new number of candidates, or -1 if the query has prefiltered so much that a scan is cheaper, or if there
    is no room.
    """
    candidates, ones, high_bits = work.candidates, np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    beyond = np.uint64(127 - min(bound, 127)) * ones  # added to eight differences, it sets the high bits of the greater
    for i in range(begin, end):
        first, last = work.ranges[i, 0], work.ranges[i, 1]
        work.prefiltered[0] += last - first
        if work.prefiltered[0] > PREFILTERS_PER_CHECK * unpack_plan(segment).candidate_budget or n + last - first > len(
            candidates
        ):
            return -1
        for low in range(first, last, PREFILTER_BATCH):
            high = min(low + PREFILTER_BATCH, last)
            compare_signatures(segment, query, t, low, high, work)
            for position in range(low, high, 8):
                near = ~(work.packed_differences[(position - low) >> 3] + beyond) & high_bits
                if high - position < 8:
                    near &= (np.uint64(1) << np.uint64(8 * (high - position))) - np.uint64(1)
                while near:
                    candidates[n] = position + (trailing_zeros(np.int64(near)) >> 3)
                    n += 1
                    near &= near - np.uint64(1)
    return n


@inlined
def probe_level(segment: Segment, query: Query, level: int, bound: int, room: int, work: Workspace) -> tuple[int, int]:
    """Find the codes of a level; return the begin and end of their numbers in `candidates`, with end -1 if over `room`.

    Level 0 probes the buckets of the first m levels, one for each, together, and collects all their codes unless there
    are signatures. With signatures, codes farther than `bound` may be left out.
    """
    m, ends, range_ends = len(segment.layout), work.candidate_ends, work.range_ends
    filtered = len(segment.signatures) > 0
    if level == 0:
        n = range_ends[0] = ends[0] = work.prefiltered[0] = ZERO
        for t in range(m):
            _, n = probe_buckets(segment, ZERO, t, ZERO, work, n)
            range_ends[t + 1] = n
        n = ZERO
        for t in range(m if not filtered else 0):
            n = collect(segment, t, range_ends[t], range_ends[t + 1], room, work, n) if n >= 0 else -1
            ends[t + 1] = n
    s, t, n = level // m, level % m, ZERO
    if level < m and not filtered:
        return ends[level], ends[level + 1]
    if level < m:
        n = prefilter(segment, query, t, range_ends[t], range_ends[t + 1], bound, work, ZERO)
    else:
        flip, last = (1 << s) - 1, 1 << segment.layout[t, 1]
        while flip < last and n >= 0:
            flip, count = probe_buckets(segment, s, t, flip, work, ZERO)
            if filtered:
                n = prefilter(segment, query, t, ZERO, count, bound - s if t else bound, work, n)
            else:
                n = collect(segment, t, ZERO, count, room, work, n)
    if filtered and n > room:
        n = -1
    if filtered and t:
        for i in range(n):
            prefetch(segment.postings[t - 1], work.candidates[i])
        for i in range(n):
            work.candidates[i] = segment.postings[t - 1, work.candidates[i]]
            prefetch(segment.codes, work.candidates[i])
    return 0, n
