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

*Sifting.* Beside the number of a code, a table may keep a **sift**, some bits of the code outside its substring.
A code met after s flips is at least s bits away, and as many more as its sift differs in from the query's, because no
bit is counted twice. So most codes of large buckets are rejected unread, and far fewer buckets have to be looked up.

*Waiting.* Nearly every read is of memory that no cache holds, so time goes by the reads waited for one after another.
A level therefore reads all its buckets' bounds side by side, then asks for all sifts, then for the postings of what
they let through, or for all postings if there are no sifts, then for the codes; and what the first look-ups of the next
two queries read is asked for while this one is searched (`announce`).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, popcount, prefetch, trailing_zeros
from hashret.indexes.kernels_codes import ZERO, Query, Words, distance, substring
from hashret.indexes.kernels_heap import Ids

STRETCH = 1024  # blocks, an even number, whose least distances are known before any of them is looked at closely
SIFTED = 256  # codes of a bucket of which is known how they differ before any of them is looked at closely
WALKED = 32  # so many codes are sifted while one is checked
FLIPS = 256  # buckets whose bounds are read side by side
LINE = 8  # a line of the cache holds at most so many codes, and twice as many postings or sifts


class Segment(NamedTuple):
    """Distinct codes with the ids that share each (a posting list), and the tables of their substrings.

    *Marks* say which few of many have something, and number them (the rank of Jacobson, 1989): a row for 64, of a bit
    for each, lowest first, and the number of the first that has it set. They are small enough to stay in a cache.
    """

    codes: Words  # (d,) or (d, words), distinct and ascending if there are tables
    ids: Ids  # (n,), uint32 if all fit: the id in each slot: slot j has the least of code j, those from d on the others
    shared: NDArray[np.uint64]  # marks of the codes that have more than one id; no rows if none has
    starts: NDArray[np.uint32]  # (such codes + 1,): where the other ids of each begin, ascending, in the order of codes
    by_id: NDArray[np.uint32]  # (n,): the slots in the order of their ids
    dead: NDArray[np.uint8]  # one bit a slot, set when its id was removed; empty if none was
    cuts: NDArray[np.int64]  # (m, 5): each substring's first bit, width, and first row in `marks`; its sift's first two
    marks: NDArray[np.uint64]  # marks of the buckets that are not empty, table after table
    bounds: NDArray[np.uint32]  # where the postings of each such bucket begin, and, a table's last, end
    postings: NDArray[np.uint32]  # (m - 1, d): numbers of codes; table 0 needs none, as codes are sorted by substring 0
    sifts: NDArray[np.uint32]  # (m - 1, d): the sift beside each posting; or empty
    plan: NDArray[np.int64]  # (6,): a `Plan`
    centres: Words  # (words, b), word after word: of balls, see `kernels_balls`; none if codes do not gather in them
    radii: NDArray[np.int32]  # (b,): of the balls; FAR where there is no centre
    begins: NDArray[np.uint32]  # (b + 1,): where the members of each begin, and the last one's end; or empty
    members: NDArray[np.uint32]  # (d,): numbers of codes, ball after ball; or empty


class Plan(NamedTuple):
    """How far flipping goes before a scan is cheaper, worked out once per segment."""

    free: int  # the level up to which flipping costs next to nothing beside a scan
    cheap: int  # the level up to which it costs a small part of one
    quarter: int  # the level up to which it costs a fourth: the share of each of many queries that share a scan
    last: int  # the level up to which it costs no more than one
    promising: int  # the distance of the nearest code met up to which flipping goes on from `free` to `cheap`
    budget: int  # candidates that cost as much as a scan


class Workspace(NamedTuple):
    """What a search scribbles on; kernels cannot allocate."""

    own: Ids  # (m,): the substrings of the query at hand
    ranges: NDArray[np.int64]  # (FLIPS, 2): of places in the postings
    met: NDArray[np.uint32]  # (budget,): numbers of the codes met at one level, or at the first m; first, their places
    opened: NDArray[np.int64]  # (m + 1,): where the ranges of each of the first m levels end, from 0 on
    differ: NDArray[np.uint8]  # (SIFTED,): in how many bits codes differ from the query, at least
    eights: NDArray[np.uint64]  # (SIFTED / 8,): the same memory, eight at once
    walked: NDArray[np.int64]  # (1,): how many postings were sifted for the query
    ends: NDArray[np.int64]  # (m + 1,): where those met at each of the first m levels end, from 0 on; -1: no room
    aside: NDArray[np.uint32]  # (budget, 2), BLOCK at least: codes that may be among the nearest, with their distances
    tally: NDArray[np.int64]  # (FAR,): how many items there are of each distance
    least: NDArray[np.int16]  # (q, STRETCH): the distance of the code in each block nearest to each query
    looks: NDArray[np.int64]  # (FAR,): how many buckets are looked up before a level begins
    probes: NDArray[np.int64]  # (1,): how many have been, for all queries
    gaps: NDArray[np.int32]  # (b,): at how many bits from the query each ball begins, at least


@inlined
def plan_of(segment: Segment) -> Plan:
    plan = segment.plan
    return Plan(plan[0], plan[1], plan[2], plan[3], plan[4], plan[5])


@inlined
def cut_query(segment: Segment, query: Query, work: Workspace) -> None:
    """Set `own` for the query."""
    for t in range(len(segment.cuts)):
        work.own[t] = substring(query.queries, query.q, segment.cuts[t, 0], segment.cuts[t, 1])


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
                for place in range(low, min(high, low + FLIPS), 2 * LINE if t else LINE):
                    if t == 0:
                        prefetch(segment.codes, place)
                    elif len(segment.sifts):
                        prefetch(segment.sifts[t - 1], place)
                    else:
                        prefetch(segment.postings[t - 1], place)


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
        prefetch(segment.bounds, ranges[n, 0])
        n += filled
        flip = next_flip(flip) if s else 1 << width
    for i in range(begin, n):
        bound = ranges[i, 0]
        ranges[i, 0], ranges[i, 1] = segment.bounds[bound], segment.bounds[bound + 1]
        if len(segment.sifts):
            low, last = ranges[i, 0], min(ranges[i, 1], ranges[i, 0] + FLIPS)
            for place in range(low, last, 2 * LINE if t else LINE):
                if t:
                    prefetch(segment.sifts[t - 1], place)
                else:
                    prefetch(segment.codes, place)
        elif t:
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
def differences(segment: Segment, query: Query, t: int, low: int, high: int, work: Workspace) -> None:
    """Write in how many bits the sifts in places low ... high - 1 of table t differ from the query's.

    For table 0, which has the codes themselves at hand, their distances, 127 at most.
    """
    differ = work.differ  # all loops here run over whole arrays: else they do not vectorise
    if t == 0:
        codes = segment.codes[low:high]
        for i in range(len(codes)):
            differ[i] = min(127, distance(codes, i, query.queries, query.q))
        return
    sifts = segment.sifts[t - 1, low:high]
    own = np.uint64(substring(query.queries, query.q, segment.cuts[t, 3], segment.cuts[t, 4]))
    for i in range(len(sifts)):
        differ[i] = popcount(np.uint64(sifts[i]) ^ own)


@inlined
def sift(segment: Segment, query: Query, t: int, begin: int, end: int, bound: int, work: Workspace, n: int) -> int:
    """Write the places in some ranges of table t of the codes that differ in at most `bound` bits after the n met.

    Returns how many then; -1 if all that was sifted costs more than a scan, or there is no room.
    """
    met, byte, high_bits = work.met, np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    beyond = np.uint64(127 - min(bound, 127)) * byte  # added to eight differences, it sets the high bits of the greater
    for i in range(begin, end):
        first, last = work.ranges[i, 0], work.ranges[i, 1]
        work.walked[0] += last - first
        if work.walked[0] > WALKED * plan_of(segment).budget or n + last - first > len(met):
            return -1
        for low in range(first, last, SIFTED):
            high = min(low + SIFTED, last)
            differences(segment, query, t, low, high, work)
            for eight in range(low, high, 8):
                near = ~(work.eights[(eight - low) >> 3] + beyond) & high_bits
                if high - eight < 8:
                    near &= (np.uint64(1) << np.uint64(8 * (high - eight))) - np.uint64(1)
                while near:
                    met[n] = eight + (trailing_zeros(np.int64(near)) >> 3)
                    n += 1
                    near &= near - np.uint64(1)
    return n


@inlined
def meet(segment: Segment, query: Query, level: int, bound: int, room: int, work: Workspace) -> tuple[int, int]:
    """Meet the codes of a level, at most `room`: from where to where in `met` their numbers are (-1: too many).

    Level 0 looks up the first m levels, for which one look-up each is enough, together, and unless codes are sifted
    meets all their codes. Sifting leaves out codes that are farther than `bound`.
    """
    m, ends, opened, sifted = len(segment.cuts), work.ends, work.opened, len(segment.sifts) > 0
    if level == 0:
        n = opened[0] = ends[0] = work.walked[0] = ZERO
        for t in range(m):
            _, n = look_up(segment, ZERO, t, ZERO, work, n)
            opened[t + 1] = n
        n = ZERO
        for t in range(m if not sifted else 0):
            n = gather(segment, t, opened[t], opened[t + 1], room, work, n) if n >= 0 else -1
            ends[t + 1] = n
    s, t, n = level // m, level % m, ZERO
    if level < m and not sifted:
        return ends[level], ends[level + 1]
    if level < m:
        n = sift(segment, query, t, opened[t], opened[t + 1], bound, work, ZERO)
    else:
        flip, last = (1 << s) - 1, 1 << segment.cuts[t, 1]
        while flip < last and n >= 0:
            flip, count = look_up(segment, s, t, flip, work, ZERO)
            if sifted:
                n = sift(segment, query, t, ZERO, count, bound - s if t else bound, work, n)
            else:
                n = gather(segment, t, ZERO, count, room, work, n)
    if sifted and n > room:
        n = -1
    if sifted and t:
        for i in range(n):
            prefetch(segment.postings[t - 1], work.met[i])
        for i in range(n):
            work.met[i] = segment.postings[t - 1, work.met[i]]
            prefetch(segment.codes, work.met[i])
    return 0, n
