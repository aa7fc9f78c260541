"""The heart of hashret: exact search by flipping bits of the query and looking the results up.

Norouzi, Punjani, Fleet: Fast Exact Search in Hamming Space with Multi-Index Hashing (CVPR 2012, PAMI 2014). Ours can be
updated, keeps each distinct code once, and scans where flipping would cost more (see `hashret.indexes.kernels`).
"""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Ids
from hashret.indexes.segments import with_tables
from hashret.indexes.updatable import Heaps, State, UpdatableIndex, offer_nearest, within


class BitFlipIndex(UpdatableIndex):
    """Exact k-nearest-neighbour and radius search over codes of `bits` bits: equal to brute force by (distance, id)."""

    kind: ClassVar[str] = "bitflip"
    tail_share: ClassVar[int] = 128
    exact: ClassVar[bool] = True

    def _engine(self, base: Segment) -> tuple[Segment, Any]:
        return with_tables(base, self.bits), None

    def _nearest(self, state: State, queries: Codes, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
        offer_nearest(state.base, words, allowed, heaps)

    def _matches(self, state: State, queries: Codes, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
        return within(state.base, words, radius)
