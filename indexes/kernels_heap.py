"""Max-heaps by (distance, id), which hold the k nearest items offered."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, kernel

Ids = NDArray[np.int64]
Distances = NDArray[np.int32]


class Heap(NamedTuple):
    """The heap of one query, and the filter of its items."""

    distances: Distances  # (k,)
    ids: Ids  # (k,)
    allowed: Ids  # ascending
    filtered: bool  # whether only ids in `allowed` qualify


class Heaps(NamedTuple):
    """The k nearest items so far of each query: max-heaps by (distance, id), a row each."""

    distances: Distances  # (q, k)
    ids: Ids  # (q, k)
    sizes: Ids  # (q,): the number of items in each
    next_levels: Ids  # (q,): the level from which on the current segment is still to be searched; FAR if none

    def rows(self, low: int, high: int) -> "Heaps":
        """Return the heaps of queries low ... high - 1."""
        if low == 0 and high == len(self.sizes):
            return self
        return Heaps(self.distances[low:high], self.ids[low:high], self.sizes[low:high], self.next_levels[low:high])


@inlined
def sift_down(distances: Distances, ids: Ids, position: int, size: int) -> None:
    """Sift down the pair at `position` in the heap of the first `size` pairs."""
    d, i = distances[position], ids[position]
    while 2 * position + 1 < size:
        child = 2 * position + 1
        if child + 1 < size and (
            distances[child + 1] > distances[child]
            or (distances[child + 1] == distances[child] and ids[child + 1] > ids[child])
        ):
            child += 1
        if distances[child] < d or (distances[child] == d and ids[child] < i):
            break
        distances[position], ids[position] = distances[child], ids[child]
        position = child
    distances[position], ids[position] = d, i


@inlined
def push(distances: Distances, ids: Ids, size: int, d: int, i: int) -> int:
    """Push a pair to the heap of the first `size` pairs, replacing the greatest if it is full; return the new size."""
    if size == len(ids):
        distances[0], ids[0] = d, i
        sift_down(distances, ids, 0, size)
        return size
    position = size
    while position > 0:
        parent = (position - 1) >> 1
        if distances[parent] > d or (distances[parent] == d and ids[parent] > i):
            break
        distances[position], ids[position] = distances[parent], ids[parent]
        position = parent
    distances[position], ids[position] = d, i
    return size + 1


@kernel
def sort_heaps(distances: Distances, ids: Ids, sizes: Ids) -> None:
    """Sort the first sizes[q] pairs of each row, a heap, by (distance, id) in place: the second half of heapsort."""
    for q in range(len(sizes)):
        d, i = distances[q], ids[q]
        for last in range(sizes[q] - 1, 0, -1):
            d[0], d[last] = d[last], d[0]
            i[0], i[last] = i[last], i[0]
            sift_down(d, i, 0, last)
