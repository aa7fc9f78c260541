"""The kernels that go from a code to its items: which of them qualify, and offering these to a heap."""

from typing import NamedTuple

import numpy as np

from hashret.indexes.jit import inlined, prefetch
from hashret.indexes.kernels import Segment, Workspace, marked
from hashret.indexes.kernels_heap import Heap, Ids, push


class Aside(NamedTuple):
    """The codes put aside, which may be among the nearest."""

    size: int
    near: int  # how many qualifying items there are within `tight` bits
    tight: int  # no more than so far is the k-th nearest item


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
def offer(segment: Segment, j: int, d: int, heap: Heap, n: int) -> int:
    """Offer the ids of code j, at distance d, to the heap of the best n so far; its new size."""
    distances, ids = heap.distances, heap.ids
    low, high = other_slots(segment, j)
    slot = j
    for following in range(low, high + 1):
        candidate = np.int64(segment.ids[slot])
        if n == len(ids) and (d > distances[0] or (d == distances[0] and candidate > ids[0])):
            break  # ids ascend within a posting list: the rest is no better
        if qualifies(segment, slot, heap.allowed, heap.filtered):
            n = push(distances, ids, n, d, candidate)
        slot = following
    return n


@inlined
def put_aside(segment: Segment, j: int | np.int64, d: int, heap: Heap, aside: Aside, work: Workspace) -> Aside:
    """Put code j, at distance d, beside those put aside.

    `tally` counts the qualifying items at each distance; `tight` sinks while k are left within it.
    """
    work.aside[aside.size, 0], work.aside[aside.size, 1] = j, d
    items = qualifying(segment, j, heap.allowed, heap.filtered)
    work.tally[d] += items
    near, tight = aside.near + items, aside.tight
    while near - work.tally[tight] >= len(heap.ids):
        near -= work.tally[tight]
        tight -= 1
    return Aside(aside.size + 1, near, tight)


@inlined
def keep_aside(segment: Segment, aside: Aside, work: Workspace) -> int:
    """Keep those of the codes put aside that are within `tight` bits, and ask for their ids: how many they are."""
    codes, kept = work.aside, 0
    for i in range(aside.size):
        prefetch(segment.ids, codes[i, 0])
        codes[kept, 0], codes[kept, 1] = codes[i, 0], codes[i, 1]
        kept += codes[i, 1] <= aside.tight
    return kept


@inlined
def offer_kept(segment: Segment, kept: int, heap: Heap, n: int, work: Workspace) -> int:
    """Offer the codes kept to the heap; its new size."""
    for i in range(kept):
        j, d = np.int64(work.aside[i, 0]), np.int64(work.aside[i, 1])
        n = offer(segment, j, d, heap, n)
    return n


@inlined
def offer_aside(segment: Segment, aside: Aside, heap: Heap, n: int, work: Workspace) -> int:
    """Offer the codes put aside that are within `tight` bits to the heap; its new size."""
    kept = keep_aside(segment, aside, work)
    offered: int = offer_kept(segment, kept, heap, n, work)
    return offered
