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

*Switching.* After level L a scan has to offer only codes that are first met later, ``first_level(x) > L``.

*Waiting.* Nearly every read is of memory that no cache holds, so time goes by the reads waited for one after another.
A level therefore reads all its buckets' bounds side by side, then asks for all postings, then for all codes; and what
the first look-ups of the next two queries read is asked for while this one is searched (`announce`).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, popcount, prefetch, trailing_zeros
from hashret.indexes.kernels_codes import Words, substring
from hashret.indexes.kernels_heap import Distances, Ids, push

BLOCK = 2048  # codes compared with every waiting query while they are in the fastest cache
STRETCH = 1024  # blocks whose least distances are known before any of them is looked at closely
PART = 64  # codes of such a block compared once more to find which are near
FLIPS = 256  # buckets whose bounds are read side by side
LINE = 8  # a line of the cache holds at most so many codes, and twice as many postings


class Segment(NamedTuple):
    """Distinct codes with the ids that share each (a posting list), and the tables of their substrings.

    *Marks* say which few of many have something, and number them (the rank of Jacobson, 1989): a row for 64, of a bit
    for each, lowest first, and the number of the first that has it set. They are small enough to stay in a cache.
    """

    codes: Words  # (d,) or (d, words), distinct and ascending if there are tables
    ids: Ids  # (n,): the id in each slot: slot j has the least of code j, the slots from d on have the others
    shared: NDArray[np.uint64]  # marks of the codes that have more than one id; no rows if none has
    starts: NDArray[np.uint32]  # (such codes + 1,): where the other ids of each begin, ascending, in the order of codes
    by_id: NDArray[np.uint32]  # (n,): the slots in the order of their ids
    dead: NDArray[np.uint8]  # one bit a slot, set when its id was removed; empty if none was
    cuts: NDArray[np.int64]  # (m, 3): each substring's first bit, width, and first row in `marks`
    marks: NDArray[np.uint64]  # marks of the buckets that are not empty, table after table
    bounds: NDArray[np.uint32]  # where the postings of each such bucket begin, and, a table's last, end
    postings: NDArray[np.uint32]  # (m - 1, d): numbers of codes; table 0 needs none, as codes are sorted by substring 0
    plan: NDArray[np.int64]  # (5,): careless, patient, hopeful, deepest, budget; see `flip_nearest`


class Workspace(NamedTuple):
    """What a search scribbles on; kernels cannot allocate."""

    own: Ids  # (m,): the substrings of the query at hand
    ranges: NDArray[np.int64]  # (FLIPS, 2): of places in the postings
    met: NDArray[np.uint32]  # (budget,): numbers of the codes met at one level, or at the first m
    ends: NDArray[np.int64]  # (m + 1,): where those met at each of the first m levels end, from 0 on; -1: no room
    aside: NDArray[np.uint32]  # (budget, 2): codes that may be among the nearest, with their distances
    tally: NDArray[np.int64]  # (FAR,): how many items or blocks there are of each distance
    least: NDArray[np.int16]  # (q, STRETCH): the distance of the code in each block nearest to each query
    looks: NDArray[np.int64]  # (FAR,): how many buckets are looked up before a level begins
    probes: NDArray[np.int64]  # (1,): how many have been, for all queries


@inlined
def cut_query(segment: Segment, queries: Words, q: int, work: Workspace) -> None:
    """Set `own` for query q."""
    for t in range(len(segment.cuts)):
        work.own[t] = substring(queries, q, segment.cuts[t, 0], segment.cuts[t, 1])


@inlined
def is_new(segment: Segment, j: int | np.int64, level: int, work: Workspace) -> bool:
    """Whether no level before this one meets code j: first_level(j) >= level."""
    m = len(segment.cuts)
    for u in range(min(m, level)):
        own = substring(segment.codes, j, segment.cuts[u, 0], segment.cuts[u, 1])
        if m * popcount(np.uint64(own ^ work.own[u])) + u < level:
            return False
    return True


@inlined
def next_flip(flip: int) -> int:
    """The next greater number with as many ones (Gosper's hack, HAKMEM 175)."""
    ripple, zeros = flip + (flip & -flip), int(trailing_zeros(flip))
    return ripple | ((flip ^ ripple) >> 2 >> zeros)


@inlined
def marked(marks: NDArray[np.uint64], row: int, place: int) -> tuple[int, int]:
    """Whether this place of a row is marked, 1 or 0, and what number it has among the marked ones, if it is."""
    bits, bit = marks[row, 0], np.uint64(place)
    number: int = int(marks[row, 1]) + popcount(bits & ((np.uint64(1) << bit) - np.uint64(1)))
    return int(bits >> bit & np.uint64(1)), number


@inlined
def announce(segment: Segment, queries: Words, q: int) -> None:
    """Ask for what the first look-ups of the next query read, and for what tells where that of the one after is."""
    for t in range(len(segment.cuts)):
        first, width, table = segment.cuts[t, 0], segment.cuts[t, 1], segment.cuts[t, 2]
        if q + 2 < len(queries):
            bucket = substring(queries, q + 2, first, width)
            _, number = marked(segment.marks, table + (bucket >> 6), bucket & 63)
            prefetch(segment.bounds, number)
        if q + 1 < len(queries):
            bucket = substring(queries, q + 1, first, width)
            filled, number = marked(segment.marks, table + (bucket >> 6), bucket & 63)
            if filled:
                low, high = int(segment.bounds[number]), int(segment.bounds[number + 1])
                for place in range(low, min(high, low + FLIPS), LINE):
                    if t:
                        prefetch(segment.postings[t - 1], place)
                    else:
                        prefetch(segment.codes, place)


@inlined
def look_up(segment: Segment, s: int, t: int, flip: int, work: Workspace, n: int) -> tuple[int, int]:
    """Look up substring t with s bits flipped, from `flip` on, until no room is left for ranges of postings after n.

    Returns the flip to go on with, and how many ranges there are now. Most buckets are empty.
    """
    ranges = work.ranges
    width, table = segment.cuts[t, 1], segment.cuts[t, 2]
    own, begin = work.own[t], n
    while flip < 1 << width and n < FLIPS:
        bucket = own ^ flip
        filled, ranges[n, 0] = marked(segment.marks, table + (bucket >> 6), bucket & 63)
        n += filled
        flip = next_flip(flip) if s else 1 << width
    for i in range(begin, n):
        bound = ranges[i, 0]
        ranges[i, 0], ranges[i, 1] = segment.bounds[bound], segment.bounds[bound + 1]
        if t:
            prefetch(segment.postings[t - 1], ranges[i, 0])
    return flip, n


@inlined
def gather(segment: Segment, t: int, begin: int, end: int, room: int, work: Workspace, n: int) -> int:
    """Write the numbers of the codes in some ranges of table t after the n met; how many then, -1 if over `room`."""
    for i in range(begin, end):
        low, high = work.ranges[i, 0], work.ranges[i, 1]
        if n + high - low > room:
            return -1
        for place in range(low, high):
            j = place if t == 0 else np.int64(segment.postings[t - 1, place])
            prefetch(segment.codes, j)
            work.met[n] = j
            n += 1
    return n


@inlined
def meet(segment: Segment, level: int, room: int, work: Workspace) -> tuple[int, int]:
    """Meet the codes of a level, at most `room`: from where to where in `met` their numbers are (-1: too many).

    Level 0 meets those of the first m levels, for which one look-up each is enough, together.
    """
    m, ends = len(segment.cuts), work.ends
    if level == 0:
        n = ends[0] = 0
        for t in range(m):
            _, n = look_up(segment, 0, t, 0, work, n)
            ends[t + 1] = n
        n = begin = 0
        for t in range(m):
            n = gather(segment, t, begin, ends[t + 1], room, work, n) if n >= 0 else -1
            begin = ends[t + 1]
            ends[t + 1] = n
    if level < m:
        return ends[level], ends[level + 1]
    s, t, n = level // m, level % m, 0
    flip, last = (1 << s) - 1, 1 << segment.cuts[t, 1]
    while flip < last and n >= 0:
        flip, count = look_up(segment, s, t, flip, work, 0)
        n = gather(segment, t, 0, count, room, work, n)
    return 0, n


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
def other_slots(segment: Segment, j: int | np.int64) -> tuple[int, int]:
    """The slots of code j besides slot j: from where to where."""
    if len(segment.shared):
        shared, number = marked(segment.shared, j >> 6, j & 63)
        if shared:
            return int(segment.starts[number]), int(segment.starts[number + 1])
    return 0, 0


@inlined
def qualifies(segment: Segment, slot: int, allowed: Ids, filtered: bool) -> bool:
    dead = segment.dead
    if len(dead) and (dead[slot >> 3] >> (slot & 7)) & 1:
        return False
    return not filtered or contains(allowed, segment.ids[slot])


@inlined
def qualifying(segment: Segment, j: int, allowed: Ids, filtered: bool) -> int:
    """How many items of code j qualify."""
    low, high = other_slots(segment, j)
    if not len(segment.dead) and not filtered:
        return int(1 + high - low)
    count = int(qualifies(segment, j, allowed, filtered))
    for slot in range(low, high):
        count += qualifies(segment, slot, allowed, filtered)
    return count


@inlined
def offer(
    segment: Segment, j: int, d: int, allowed: Ids, filtered: bool, distances: Distances, ids: Ids, n: int
) -> int:
    """Offer the ids of code j, at distance d, to the heap of the best k so far; its new size."""
    low, high = other_slots(segment, j)
    slot = j
    for following in range(low, high + 1):
        candidate = segment.ids[slot]
        if n == len(ids) and (d > distances[0] or (d == distances[0] and candidate > ids[0])):
            break  # ids ascend within a posting list: the rest is no better
        if qualifies(segment, slot, allowed, filtered):
            n = push(distances, ids, n, d, candidate)
        slot = following
    return n
