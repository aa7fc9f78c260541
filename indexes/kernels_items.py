"""The kernels that go from a code to its items: which of them qualify, and offering them to a heap."""

from typing import NamedTuple

import numpy as np

from hashret.indexes.jit import inlined, prefetch
from hashret.indexes.kernels import Segment, Workspace, rank
from hashret.indexes.kernels_heap import Heap, Ids, push


class Shortlist(NamedTuple):
    """The state of `Workspace.shortlist`, the codes that may be among the nearest."""

    size: int
    n_items: int  # qualifying items within `bound` bits
    bound: int  # the k-th nearest item is at most so far away


@inlined
def contains(ascending: Ids, value: int) -> bool:
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low < len(ascending) and ascending[low] == value


@inlined
def other_slots(segment: Segment, j: int | np.int64) -> tuple[int, int]:
    """Return the begin and end of the slots of code j other than slot j."""
    if len(segment.shared_ranks):
        shared, number = rank(segment.shared_ranks, j >> 6, j & 63)
        if shared:
            return int(segment.shared_offsets[number]), int(segment.shared_offsets[number + 1])
    return 0, 0


@inlined
def qualifies(segment: Segment, slot: int, allowed: Ids, filtered: bool) -> bool:
    tombstones = segment.tombstones
    if len(tombstones) and (tombstones[slot >> 3] >> (slot & 7)) & 1:
        return False
    return not filtered or contains(allowed, segment.ids[slot])


@inlined
def count_qualifying(segment: Segment, j: int, allowed: Ids, filtered: bool) -> int:
    """Return the number of items of code j that qualify."""
    low, high = other_slots(segment, j)
    if not len(segment.tombstones) and not filtered:
        return int(1 + high - low)
    count = int(qualifies(segment, j, allowed, filtered))
    for slot in range(low, high):
        count += qualifies(segment, slot, allowed, filtered)
    return count


@inlined
def offer(segment: Segment, j: int, d: int, heap: Heap, n: int) -> int:
    """Offer the ids of code j, at distance d, to a heap of n items; return its new size."""
    distances, ids = heap.distances, heap.ids
    low, high = other_slots(segment, j)
    slot = j
    for next_slot in range(low, high + 1):
        item = np.int64(segment.ids[slot])
        if n == len(ids) and (d > distances[0] or (d == distances[0] and item > ids[0])):
            break  # ids ascend within a posting list: the others are no better
        if qualifies(segment, slot, heap.allowed, heap.filtered):
            n = push(distances, ids, n, d, item)
        slot = next_slot
    return n


@inlined
def add_to_shortlist(
    segment: Segment, j: int | np.int64, d: int, heap: Heap, shortlist: Shortlist, work: Workspace
) -> Shortlist:
    """Append code j, at distance d, to the shortlist; lower its bound while k items remain within it."""
    work.shortlist[shortlist.size, 0], work.shortlist[shortlist.size, 1] = j, d
    items = count_qualifying(segment, j, heap.allowed, heap.filtered)
    work.histogram[d] += items
    count, bound = shortlist.n_items + items, shortlist.bound
    while count - work.histogram[bound] >= len(heap.ids):
        count -= work.histogram[bound]
        bound -= 1
    return Shortlist(shortlist.size + 1, count, bound)


@inlined
def prune_shortlist(segment: Segment, shortlist: Shortlist, work: Workspace) -> int:
    """Drop the codes beyond the bound, and prefetch the ids of the others; return their number."""
    codes, size = work.shortlist, 0
    for i in range(shortlist.size):
        prefetch(segment.ids, codes[i, 0])
        codes[size, 0], codes[size, 1] = codes[i, 0], codes[i, 1]
        size += codes[i, 1] <= shortlist.bound
    return size


@inlined
def offer_pruned(segment: Segment, size: int, heap: Heap, n: int, work: Workspace) -> int:
    """Offer the codes of a pruned shortlist to a heap of n items; return its new size."""
    for i in range(size):
        j, d = np.int64(work.shortlist[i, 0]), np.int64(work.shortlist[i, 1])
        n = offer(segment, j, d, heap, n)
    return n


@inlined
def offer_shortlist(segment: Segment, shortlist: Shortlist, heap: Heap, n: int, work: Workspace) -> int:
    """Offer the codes of the shortlist within its bound to a heap of n items; return its new size."""
    size = prune_shortlist(segment, shortlist, work)
    offered: int = offer_pruned(segment, size, heap, n, work)
    return offered
