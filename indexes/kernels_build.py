"""The kernels that build tables, and find items by their ids."""

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import allocating, kernel
from hashret.indexes.kernels_codes import Words, substring
from hashret.indexes.kernels_heap import Ids

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
def place_codes(
    codes: Words, number: int, cut: Ids, ends: Numbers, postings: Numbers, sifts: NDArray[np.uint8]
) -> None:
    """Write the numbers of these codes, from `number` on, and their sifts where their buckets end by now."""
    first, width, sift_first, sift_width = cut[0], cut[1], cut[3], cut[4]
    shift = np.uint64(32 - max(0, sift_width - 24))
    for j in range(len(codes)):
        bucket = substring(codes, j, first, width)
        place = ends[bucket]
        ends[bucket] += 1
        postings[place] = number + j
        if sift_width:
            sift = np.uint64(substring(codes, j, sift_first, sift_width))
            for byte in range(3):
                sifts[byte, place] = sift >> np.uint64(8 * byte)
            postings[place] |= sift >> np.uint64(24) << shift
