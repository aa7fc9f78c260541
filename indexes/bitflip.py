"""The heart of hashret: exact search by flipping bits of the query and probing the buckets of the results.

Norouzi, Punjani, Fleet: Fast Exact Search in Hamming Space with Multi-Index Hashing (CVPR 2012, PAMI 2014). Ours can be
updated, stores each distinct code once, skips whole clusters of long codes, and scans where clusters and flipping cost
more (see `hashret.indexes.kernels` and `kernels_clusters`).
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
from hashret.indexes.segments import match_within, offer_nearest
from hashret.indexes.states import State
from hashret.indexes.tables import add_tables
from hashret.indexes.updatable import UpdatableIndex


class BitFlipIndex(UpdatableIndex):
    """Exact k-nearest-neighbour and radius search over codes of `bits` bits: equal to brute force by (distance, id)."""

    backend: ClassVar[str] = "bitflip"
    delta_divisor: ClassVar[int] = 256
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
        """Build an index at `path`, which may be larger than memory, with the same content as `add` and `save` would
        write, and return it memory-mapped.

        `batches` yields codes, uint8 (n, bits // 8), with their ids, int64 (n,), not negative, and is read once. Items
        are sorted in temporary files in the folder of `path`, which take twice the size of codes and ids. On an error
        no file appears at `path`. Memory holds either one table, of 8 bytes per distinct code (16 with clusters), or a
        part that is being sorted, of about 4 GB at most. `progress` is called with the stage and the number of items,
        tables or clusters done. The index can be updated like any other, but once the added items exceed 1/256 of the
        index, it is rebuilt in memory.

        Raise ValueError for items that `add` rejects; a repeated id is detected only after all items have been read.
        """
        streaming.build(path, cls.backend, bits, batches, progress or (lambda stage, done: None))
        return cls.load(path, verify=False)

    def _build_engine(self, main: Segment) -> tuple[Segment, Any]:
        return add_tables(main, self.bits), None

    def _offer_main(self, state: State, queries: Codes, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
        offer_nearest(state.main, words, allowed, heaps)

    def _match_main(self, state: State, queries: Codes, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
        return match_within(state.main, words, radius)
