"""The kernels of exact search in Hamming space by flipping bits: multi-index hashing.

Norouzi, Punjani, Fleet: Fast Exact Search in Hamming Space with Multi-Index Hashing (CVPR 2012, PAMI 2014). Ours needs
no visited set, addresses its tables directly (Salakhutdinov and Hinton, Semantic Hashing, 2009), and gives up flipping
for a scan where that is cheaper, even in the middle of a query.

A code is cut into m substrings. **Level** m·s + t flips s bits of substring t of the query in every possible way and
looks the results up in table t. So a code x whose substring u differs from the query's in e(u) bits is met at the
levels m·e(u) + u, and first at ``first_level(x)``, the least of these.

*Freshness.* A code met at a level is new if and only if no lower level meets it, ``first_level(x) == level``; a few
popcounts tell (`is_new`), and no visited set is needed.

*Stop.* ``first_level(x) <= distance(x)``, so after level L every code within L bits has been seen, and k items within L
bits are the k nearest. Proof: let L = m·s + t and suppose x has not been met up to level L. Then e(u) > s for u <= t
and e(u) >= s for u > t, so distance(x) = Σ e(u) >= (t + 1)(s + 1) + (m - t - 1)s = m·s + t + 1 > L.

*Switching.* After level L a scan has to look only at codes farther than L bits.

Codes are uint64 words, the first bit of a code highest: shape (n,) if one word holds a code, else (n, words).
"""

from typing import NamedTuple

import numpy as np
from numba.extending import overload
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, kernel, popcount, trailing_zeros

Words = NDArray[np.uint64]
Ids = NDArray[np.int64]
Distances = NDArray[np.int32]

BLOCK = 1024  # codes compared with every waiting query while they are in the fastest cache
FAR = 1 << 12  # more than any distance


class Segment(NamedTuple):
    """Distinct codes with the ids that share each (a posting list), and the tables of their substrings."""

    codes: Words  # (d,) or (d, words), distinct and ascending if there are tables
    starts: NDArray[np.uint32]  # (d + 1,): code j belongs to the slots starts[j] ... starts[j + 1] - 1
    ids: Ids  # (n,): the id in each slot, ascending within one code
    by_id: NDArray[np.uint32]  # (n,): the slots in the order of their ids
    dead: NDArray[np.uint8]  # one bit a slot, set when its id was removed; empty if none was
    cuts: NDArray[np.int64]  # (m, 3): each substring's first bit, width, and first place in `offsets`
    offsets: NDArray[np.uint32]  # for each table 2**width + 1 bounds into its postings
    postings: NDArray[np.uint32]  # (m - 1, d): numbers of codes; table 0 needs none, as codes are sorted by substring 0
    plan: NDArray[np.int64]  # (3,): patient, deepest, budget; see `flip_nearest`


def distance(codes: Words, j: int | np.int64, queries: Words, q: int) -> int:
    """Hamming distance of code j and query q (compiled below for one word or several)."""
    raise NotImplementedError


def substring(codes: Words, j: int | np.int64, first: int, width: int) -> int:
    """The bits first ... first + width - 1 of code j as a number (compiled below for one word or several)."""
    raise NotImplementedError


def least_distance(codes: Words, queries: Words, q: int) -> int:
    """The distance of the code nearest to query q (compiled below for one word or several)."""
    raise NotImplementedError


@overload(distance)
def _distance(codes, j, queries, q):  # type: ignore[no-untyped-def]
    def one_word(codes, j, queries, q):  # type: ignore[no-untyped-def]
        return popcount(codes[j] ^ queries[q])

    def words(codes, j, queries, q):  # type: ignore[no-untyped-def]
        total = 0
        for w in range(codes.shape[1]):
            total += popcount(codes[j, w] ^ queries[q, w])
        return total

    return one_word if codes.ndim == 1 else words


@overload(substring)
def _substring(codes, j, first, width):  # type: ignore[no-untyped-def]
    def one_word(codes, j, first, width):  # type: ignore[no-untyped-def]
        return np.int64((codes[j] << np.uint64(first)) >> np.uint64(64 - width))

    def words(codes, j, first, width):  # type: ignore[no-untyped-def]
        w, shift = first >> 6, first & 63
        bits = codes[j, w] << np.uint64(shift)
        if shift + width > 64:
            bits |= codes[j, w + 1] >> np.uint64(64 - shift)
        return np.int64(bits >> np.uint64(64 - width))

    return one_word if codes.ndim == 1 else words


@overload(least_distance)
def _least_distance(codes, queries, q):  # type: ignore[no-untyped-def]
    def one_word(codes, queries, q):  # type: ignore[no-untyped-def]
        query, least = queries[q], FAR
        for i in range(len(codes)):  # vectorises only because it runs over a whole array
            least = min(least, popcount(codes[i] ^ query))
        return least

    def words(codes, queries, q):  # type: ignore[no-untyped-def]
        least = FAR
        for i in range(len(codes)):
            least = min(least, distance(codes, i, queries, q))
        return least

    return one_word if codes.ndim == 1 else words


@inlined
def is_new(codes: Words, j: int | np.int64, queries: Words, q: int, cuts: NDArray[np.int64], level: int) -> bool:
    """Whether no level before this one meets code j: first_level(j) >= level."""
    m = len(cuts)
    for u in range(min(m, level)):
        first, width = cuts[u, 0], cuts[u, 1]
        differing = popcount(np.uint64(substring(codes, j, first, width) ^ substring(queries, q, first, width)))
        if m * differing + u < level:
            return False
    return True


@inlined
def next_flip(flip: int) -> int:
    """The next greater number with as many ones (Gosper's hack, HAKMEM 175)."""
    ripple, zeros = flip + (flip & -flip), int(trailing_zeros(flip))
    return ripple | ((flip ^ ripple) >> 2 >> zeros)


@inlined
def contains(ascending: Ids, wanted: int) -> bool:
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low < len(ascending) and ascending[low] == wanted


@inlined
def qualifies(segment: Segment, slot: int, allowed: Ids, filtered: bool) -> bool:
    dead = segment.dead
    if len(dead) and (dead[slot >> 3] >> (slot & 7)) & 1:
        return False
    return not filtered or contains(allowed, segment.ids[slot])


@inlined
def sift_down(distances: Distances, ids: Ids, place: int, size: int) -> None:
    """Let the pair at `place` sink in the max-heap by (distance, id) of the first `size` pairs."""
    d, i = distances[place], ids[place]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and (
            distances[child + 1] > distances[child]
            or (distances[child + 1] == distances[child] and ids[child + 1] > ids[child])
        ):
            child += 1
        if distances[child] < d or (distances[child] == d and ids[child] < i):
            break
        distances[place], ids[place] = distances[child], ids[child]
        place = child
    distances[place], ids[place] = d, i


@inlined
def offer(
    segment: Segment, j: int, d: int, allowed: Ids, filtered: bool, distances: Distances, ids: Ids, n: int
) -> int:
    """Offer the ids of code j, at distance d, to the heap of the best k so far; its new size."""
    k = len(ids)
    for slot in range(np.int64(segment.starts[j]), np.int64(segment.starts[j + 1])):
        candidate = segment.ids[slot]
        if n == k and (d > distances[0] or (d == distances[0] and candidate > ids[0])):
            break  # ids ascend within a posting list: the rest is no better
        if not qualifies(segment, slot, allowed, filtered):
            continue
        if n == k:
            distances[0], ids[0] = d, candidate
            sift_down(distances, ids, 0, k)
            continue
        place = n
        n += 1
        while place > 0:
            parent = (place - 1) >> 1
            if distances[parent] > d or (distances[parent] == d and ids[parent] > candidate):
                break
            distances[place], ids[place] = distances[parent], ids[parent]
            place = parent
        distances[place], ids[place] = d, candidate
    return n


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
    aside: NDArray[np.uint32],
    last: NDArray[np.int64],
) -> tuple[int, int]:
    """Search query q by flipping bits: the heap's new size, and the distance a scan must start from (FAR if none must).

    A code met at a level is put aside in a list of its distance; after the level of that distance, that list is
    complete, and only then are its posting lists read. Codes too far for that to happen are dropped at once.

    The plan, three numbers worked out once per segment: up to level `patient` flipping costs a small part of a scan;
    after `deepest` it costs more than one; `budget` candidates cost as much as one. Between the first two we go on only
    while enough codes have been put aside to promise an end at `deepest` or before.
    """
    codes, cuts, offsets = segment.codes, segment.cuts, segment.offsets
    patient, deepest, budget = segment.plan[0], segment.plan[1], segment.plan[2]
    k, m, level, count = len(ids), len(cuts), 0, 0
    for d in range(deepest + 1):
        last[d] = -1
    while level <= deepest and (level <= patient or n + count >= k):
        s, t = level // m, level % m
        first, width, table = cuts[t, 0], cuts[t, 1], cuts[t, 2]
        own = substring(queries, q, first, width)
        flip = (1 << s) - 1
        while flip < 1 << width:
            bucket = table + (own ^ flip)
            low, high = np.int64(offsets[bucket]), np.int64(offsets[bucket + 1])
            budget -= high - low
            if budget < 0:
                return n, level
            for place in range(low, high):
                j = place if t == 0 else np.int64(segment.postings[t - 1, place])
                d = distance(codes, j, queries, q)
                if d <= deepest and is_new(codes, j, queries, q, cuts, level):
                    aside[count, 0], aside[count, 1] = j, last[d]
                    last[d] = count
                    count += 1
            if s == 0:
                break
            flip = next_flip(flip)
        found = last[level]
        while found >= 0:
            n = offer(segment, np.int64(aside[found, 0]), level, allowed, filtered, distances, ids, n)
            found = np.int64(np.int32(aside[found, 1]))
        if n == k and distances[0] <= level:
            return n, FAR
        level += 1
    return n, level


@kernel
def nearest(
    segment: Segment,
    queries: Words,
    allowed: Ids,
    filtered: bool,
    distances: Distances,
    ids: Ids,
    sizes: Ids,
    reached: Ids,
    aside: NDArray[np.uint32],
    last: NDArray[np.int64],
) -> None:
    """Offer the items of a segment to each query's heap, a row each: by flipping bits, then scanning for what is left.

    Only codes at reached[q] bits or more are offered; FAR means none. `aside`, (plan's budget, 2), and `last`, (FAR,),
    are working space.
    """
    k, waiting = distances.shape[1], False
    for q in range(len(queries)):
        if reached[q] == 0 and len(segment.cuts):
            sizes[q], reached[q] = flip_nearest(
                segment, queries, q, allowed, filtered, distances[q], ids[q], sizes[q], aside, last
            )
        waiting |= reached[q] < FAR
    for begin in range(0, len(segment.codes) if waiting else 0, BLOCK):
        block = segment.codes[begin : begin + BLOCK]
        for q in range(len(queries)):
            bound = distances[q, 0] if sizes[q] == k else FAR
            if reached[q] == FAR or least_distance(block, queries, q) > bound:
                continue
            for i in range(len(block)):
                d = distance(block, i, queries, q)
                if reached[q] <= d <= bound:
                    sizes[q] = offer(segment, begin + i, d, allowed, filtered, distances[q], ids[q], sizes[q])
                    if sizes[q] == k:
                        bound = distances[q, 0]


@kernel
def sort_rows(begins: Ids, ends: Ids, distances: Distances, ids: Ids) -> None:
    """Sort each row begins[q] ... ends[q] - 1 by (distance, id), in place: heapsort."""
    for q in range(len(begins)):
        d, i = distances[begins[q] : ends[q]], ids[begins[q] : ends[q]]
        for place in range(len(d) // 2 - 1, -1, -1):
            sift_down(d, i, place, len(d))
        for last in range(len(d) - 1, 0, -1):
            d[0], d[last] = d[last], d[0]
            i[0], i[last] = i[last], i[0]
            sift_down(d, i, 0, last)
