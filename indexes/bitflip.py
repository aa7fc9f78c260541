"""The heart of hashret: exact search by flipping bits of the query and looking the results up.

Norouzi, Punjani, Fleet: Fast Exact Search in Hamming Space with Multi-Index Hashing (CVPR 2012, PAMI 2014). Ours can be
updated, keeps each distinct code once, passes over whole balls of long codes, and scans where that and flipping would
cost more (see `hashret.indexes.kernels` and `kernels_balls`).
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.indexes import streaming
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Heaps, Ids
from hashret.indexes.protocol import Path
from hashret.indexes.segments import offer_nearest, within
from hashret.indexes.states import State
from hashret.indexes.tables import with_tables
from hashret.indexes.updatable import UpdatableIndex


class BitFlipIndex(UpdatableIndex):
    """Exact k-nearest-neighbour and radius search over codes of `bits` bits: equal to brute force by (distance, id)."""

    kind: ClassVar[str] = "bitflip"
    tail_share: ClassVar[int] = 256
    exact: ClassVar[bool] = True

    @classmethod
    def build(
        cls,
        path: Path,
        bits: int,
        batches: Iterable[tuple[Codes, NDArray[np.int64]]],
        *,
        progress: Callable[[str, int], None] | None = None,
    ) -> Self:
        """The index that `add` and `save` would leave at `path`, mapped, made of more items than memory holds.

        `batches` gives codes, uint8 (n, bits // 8), with their ids, int64 (n,), not negative, and is read once. Items
        are sorted in temporary files beside `path`, twice as large as codes and ids together; the index appears there
        whole or, on any error, not at all. Memory holds one table at a time, 8 bytes for each distinct code (16 for
        balls), or a part being sorted, some 4 GB at most. `progress` is told what is going on, and for how many items,
        tables or balls it is done. The index can be updated like any other, but is built anew, in memory, once a 256th
        has been added.

        Raises ValueError for what `add` refuses, though for an id that comes twice only when all have been read.
        """
        streaming.build(path, cls.kind, bits, batches, progress or (lambda stage, done: None))
        return cls.load(path, verify=False)

    def _engine(self, base: Segment) -> tuple[Segment, Any]:
        return with_tables(base, self.bits), None

    def _nearest(self, state: State, queries: Codes, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
        offer_nearest(state.base, words, allowed, heaps)

    def _matches(self, state: State, queries: Codes, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
        return within(state.base, words, radius)
