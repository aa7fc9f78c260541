"""The kernels that build tables and balls, and find items by their ids."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import allocating, inlined, kernel, trailing_zeros
from hashret.indexes.kernels import Segment, Workspace
from hashret.indexes.kernels_balls import COMPARED, measure
from hashret.indexes.kernels_codes import FAR, Query, Words, distance, substring
from hashret.indexes.kernels_heap import Ids
from hashret.indexes.kernels_within import flip_within

FEW = 32  # a ball has at least so many members
OUTLIERS, BESIDE = 64, 512  # so many codes in none are always put up with, and one beside so many that are in one
SPENT = 128  # codes that are met, for each there is, cost too much; so does what costs as much
VOTERS = 64  # as many codes tell where their centre is

Numbers = NDArray[np.uint32]  # of codes


@allocating
def locate(ids: Ids, by_id: Numbers, wanted: Ids) -> Ids:
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


@inlined
def upper_bound(ascending: NDArray[Any], value: int, low: int) -> int:
    """How many of these numbers are not greater than `value`, `low` at least: searched for from there in doubling steps
    (Bentley and Yao, 1976)."""
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
def number_codes(segment: Segment, slots: Ids) -> Ids:
    """The number of the code whose posting list each slot is in: fastest for ascending slots."""
    numbers, previous, posting_lists, rows = slots.copy(), 0, 0, 0
    for i in range(len(slots)):
        if slots[i] < len(segment.codes):
            continue
        if slots[i] < previous:
            posting_lists, rows = 0, 0
        previous = slots[i]
        posting_lists = upper_bound(segment.starts, slots[i], posting_lists)
        rows = upper_bound(segment.shared[:, 1], posting_lists - 1, rows)
        bits = np.int64(segment.shared[rows - 1, 0])
        for _ in range(posting_lists - 1 - np.int64(segment.shared[rows - 1, 1])):
            bits &= bits - 1
        numbers[i] = (rows - 1 << 6) + trailing_zeros(bits)
    return numbers


@allocating
def mark(counts: Numbers) -> tuple[Words, int]:
    """The marks (see `Segment`) of what has a count, and how many these are."""
    marks, number = np.zeros(((len(counts) + 63) >> 6, 2), np.uint64), 0
    for i in range(len(counts)):
        if i & 63 == 0:
            marks[i >> 6, 1] = number
        if counts[i]:
            marks[i >> 6, 0] |= np.uint64(1) << np.uint64(i & 63)
            number += 1
    return marks, number


@kernel
def count_buckets(codes: Words, first: int, width: int, ends: Numbers) -> None:
    """Add to the number of codes in each bucket of the table of a substring."""
    for j in range(len(codes)):
        ends[substring(codes, j, first, width)] += 1


@allocating
def open_buckets(ends: Numbers) -> tuple[Words, Numbers]:
    """The marks and bounds of a table of so many codes in each bucket; `ends` becomes where each filled one begins."""
    marks, filled = mark(ends)
    bounds, total, filled = np.empty(filled + 1, np.uint32), 0, 0
    for bucket in range(len(ends)):
        if ends[bucket]:
            bounds[filled] = total
            total += int(ends[bucket])
            ends[bucket] = bounds[filled]
            filled += 1
    bounds[filled] = total
    return marks, bounds


@kernel
def place_codes(codes: Words, number: int, cut: Ids, ends: Numbers, postings: Numbers, sifts: Numbers) -> None:
    """Write the numbers of these codes, from `number` on, and their sifts where their buckets end by now."""
    first, width, sift_first, sift_width = cut[0], cut[1], cut[3], cut[4]
    for j in range(len(codes)):
        bucket = substring(codes, j, first, width)
        place = ends[bucket]
        ends[bucket] += 1
        postings[place] = number + j
        if sift_width:
            sifts[place] = substring(codes, j, sift_first, sift_width)


@inlined
def take_centre(codes: Words, chosen: Numbers, n: int, votes: Ids, centre: Words) -> None:
    """Write the middle of n chosen codes, in each bit what most have; `votes` is working space.

    Of many, some `VOTERS` evenly spaced ones stand for all.
    """
    words, step, voters = len(votes) >> 6, max(1, n // VOTERS), 0
    flat, out = codes.reshape(codes.size), centre.reshape(centre.size)
    votes[:] = 0
    for i in range(0, n, step):
        voters += 1
        for w in range(words):
            word = flat[np.int64(chosen[i]) * words + w]
            for bit in range(64):
                votes[(w << 6) + bit] += np.int64(word >> np.uint64(bit) & np.uint64(1))
    for w in range(words):
        out[w] = 0
        for bit in range(64):
            out[w] |= np.uint64(2 * votes[(w << 6) + bit] > voters) << np.uint64(bit)


class Balls(NamedTuple):
    """Room for balls, and for what finding one scribbles on."""

    centres: Words  # (words, most)
    radii: NDArray[np.int32]  # (most,)
    ball: Numbers  # (d,): the number of each code's ball; of a code in none, `most`, or how many there are at last
    apart: NDArray[np.int32]  # (most,): the distances of a code from the centres
    found: Numbers  # (d,): codes near a centre
    votes: Ids  # (64 words,)
    centre: Words  # (1,) or (1, words)


@inlined
def join(codes: Words, j: int, balls: Balls, number: int, reach: int) -> bool:
    """Put code j into the one of so many balls whose centre is nearest, if that is within `reach` bits."""
    apart, radii, nearest = balls.apart[:number], balls.radii[:number], -1
    measure(balls.centres[:, :number], codes, j, apart)
    for b in range(len(radii)):
        if apart[b] <= reach:
            nearest, reach = b, apart[b] - 1
    if nearest >= 0:
        radii[nearest] = max(radii[nearest], reach + 1)
        balls.ball[j] = nearest
    return nearest >= 0


@inlined
def find_members(segment: Segment, founder: int, balls: Balls, reach: int, work: Workspace) -> tuple[int, int]:
    """Set `found` to codes in no ball within reach of `centre`, the middle of those around a founder: how many, and how
    many codes were met on the way."""
    m, query, found, members = len(segment.cuts), Query(balls.centre, 0), balls.found, 0
    found[0] = founder
    take_centre(segment.codes, found, 1, balls.votes, balls.centre)
    n, _, around = flip_within(segment, query, reach, m - 1, found, work)
    if n:
        take_centre(segment.codes, found, n, balls.votes, balls.centre)
    n, _, met = flip_within(segment, query, reach, 2 * m - 1, found, work)
    for i in range(n):
        found[members] = found[i]
        members += balls.ball[found[i]] == len(balls.radii)
    return members, around + met


@inlined
def found_ball(codes: Words, balls: Balls, number: int, members: int) -> None:
    """Make the ball of this number of the members found around `centre`."""
    for i in range(members):
        balls.ball[balls.found[i]] = number
        apart = distance(codes, np.int64(balls.found[i]), balls.centre, 0)
        balls.radii[number] = max(balls.radii[number], apart)
    for w in range(len(balls.centres)):
        balls.centres[w, number] = balls.centre.reshape(len(balls.centres))[w]


@allocating
def gather_balls(segment: Segment, reach: int, work: Workspace) -> tuple[Words, NDArray[np.int32], Numbers]:
    """The centres and radii of balls, and the ball of each code; no balls where too many codes fit in none, or it takes
    too long.

    One code after the other, if it is in no ball yet, joins the nearest centre within `reach` bits, or founds a ball.
    The ball's centre is the middle of the codes within reach of the founder that share a substring with it. Members are
    the codes within reach of the centre, be the founder one or not, that share a substring with it but for a bit. If
    they are few, there is no ball, and the founder is an outlier; but it may join a ball that is founded later. The
    outliers left at last are in a ball whose radius is FAR and whose centre means nothing.
    """
    count, words = len(segment.codes), segment.codes.size // len(segment.codes)
    most = count // FEW + 1
    balls = Balls(
        np.zeros((words, most), np.uint64),
        np.zeros(most, np.int32),
        np.full(count, most, np.uint32),
        np.empty(most, np.int32),
        np.empty(count, np.uint32),
        np.empty(64 * words, np.int64),
        np.empty_like(segment.codes[:1]),
    )
    centres, radii, ball = balls.centres, balls.radii, balls.ball
    number = 0  # of balls
    gathered = 0  # codes
    outliers = 0
    spent = 0  # codes met, or distances that cost as much
    for j in range(count):
        if ball[j] < most:
            continue
        spent += number * words // COMPARED
        if join(segment.codes, j, balls, number, reach):
            gathered += 1
            continue
        members, met = find_members(segment, j, balls, reach, work)
        spent += met
        outliers += members < FEW
        if outliers > OUTLIERS + gathered // BESIDE or spent > SPENT * count:
            return centres[:, :0], radii[:0], ball
        if members >= FEW:
            found_ball(segment.codes, balls, number, members)
            number, gathered = number + 1, gathered + members
    outliers = 0
    for j in range(count):
        if number and ball[j] == most and not join(segment.codes, j, balls, number, reach):
            ball[j] = number
            outliers += 1
    if outliers:
        radii[number] = FAR
        number += 1
    return centres[:, :number], radii[:number], ball


@allocating
def list_members(ball: Numbers, balls: int) -> tuple[Numbers, Numbers]:
    """Where the members of each ball begin, and the last one's end, and their numbers, ball after ball."""
    begins, members = np.zeros(balls + 2, np.uint32), np.empty(len(ball), np.uint32)
    for b in ball:
        begins[b + 2] += 1
    for b in range(1, balls + 1):
        begins[b + 1] += begins[b]
    for j in range(len(ball)):
        members[begins[ball[j] + 1]] = j
        begins[ball[j] + 1] += 1
    return begins[: balls + 1], members
