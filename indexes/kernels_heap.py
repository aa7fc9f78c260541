"""Max-heaps by (distance, id): the k best of what was offered."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.jit import inlined, kernel

Ids = NDArray[np.int64]
Distances = NDArray[np.int32]


class Heap(NamedTuple):
    """Room for the k best items of a query, and which items may be among them."""

    distances: Distances  # (k,)
    ids: Ids  # (k,)
    allowed: Ids  # ascending
    filtered: bool  # whether only ids in `allowed` may


class Heaps(NamedTuple):
    """The best k items so far of each query: max-heaps by (distance, id), a row each."""

    distances: Distances  # (q, k)
    ids: Ids  # (q, k)
    sizes: Ids  # (q,): how many there are
    reached: Ids  # (q,): the first level at which the segment at hand is still to be searched

    def rows(self, low: int, high: int) -> "Heaps":
        """The heaps of some queries."""
        if low == 0 and high == len(self.sizes):
            return self
        return Heaps(self.distances[low:high], self.ids[low:high], self.sizes[low:high], self.reached[low:high])


@inlined
def sift_down(distances: Distances, ids: Ids, place: int, size: int) -> None:
    """Let the pair at `place` sink in the heap of the first `size` pairs."""
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
def push(distances: Distances, ids: Ids, size: int, d: int, i: int) -> int:
    """Put a pair into the heap of the first `size` pairs, in place of the greatest if it is full; its new size."""
    if size == len(ids):
        distances[0], ids[0] = d, i
        sift_down(distances, ids, 0, size)
        return size
    place = size
    while place > 0:
        parent = (place - 1) >> 1
        if distances[parent] > d or (distances[parent] == d and ids[parent] > i):
            break
        distances[place], ids[place] = distances[parent], ids[parent]
        place = parent
    distances[place], ids[place] = d, i
    return size + 1


@kernel
def sort_heaps(distances: Distances, ids: Ids, sizes: Ids) -> None:
    """Sort the first sizes[q] pairs of each row, a heap, by (distance, id), in place: heapsort's second half."""
    for q in range(len(sizes)):
        d, i = distances[q], ids[q]
        for last in range(sizes[q] - 1, 0, -1):
            d[0], d[last] = d[last], d[0]
            i[0], i[last] = i[last], i[0]
            sift_down(d, i, 0, last)
