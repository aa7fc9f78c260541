"""FAISS's binary indexes, by factory string, made complete: removal, filters, radius, full lists, colliding codes.

Douze et al.: The Faiss library (2024). FAISS sees each distinct code once, so that graphs stay connected when
thousands of items share a code. What it leaves short, a scan fills. Its OpenMP threads are not used: batches are split
among ours.
"""

import re
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Heaps, Ids
from hashret.indexes.kernels_nearest import expand_nearest
from hashret.indexes.segments import as_filter, from_words, offer_nearest, within
from hashret.indexes.states import State
from hashret.indexes.updatable import UpdatableIndex
from hashret.process import one_faiss_thread

_MIN_PER_LIST = 39  # FAISS complains about training a list on fewer
_EF_SEARCH = 64


class FaissIndex(UpdatableIndex):
    """k-nearest-neighbour and radius search by a FAISS binary index over the distinct codes.

    `factory` is "BFlat", "BIVF<lists>" or "BHNSW<links>"; `probe` is how many lists a search visits (1 in 16 by
    default), or how many candidates it keeps in the graph (64). Only BFlat is exact, then by distance: which of several
    items at the last distance are found may differ from `BitFlipIndex`. A radius search of BHNSW is a scan, and exact.
    Raises ValueError for another factory.
    """

    kind: ClassVar[str] = "faiss"
    tail_share: ClassVar[int] = 8  # a scan costs little beside FAISS, building much

    def __init__(self, bits: int, factory: str = "BFlat", probe: int | None = None) -> None:
        if not re.fullmatch(r"BFlat|BIVF[1-9]\d*|BHNSW[1-9]\d*", factory):
            raise ValueError(f'factory must be "BFlat", "BIVF<lists>" or "BHNSW<links>", not {factory!r}')
        if probe is not None and probe < 1:
            raise ValueError(f"probe must be at least 1, not {probe!r}")
        self.factory = factory
        self.probe = probe
        super().__init__(bits)

    @classmethod
    def from_options(cls, bits: int, options: str) -> Self:
        """An empty index for codes of `bits` bits; `options` is the factory string, BFlat unless given."""
        return cls(bits, options or "BFlat")

    @property
    def exact(self) -> bool:
        """Whether answers always equal brute force by distance."""
        return self.factory == "BFlat"

    def _engine(self, base: Segment) -> tuple[Segment, Any]:
        import faiss

        lists = int(self.factory[4:]) if self.factory.startswith("BIVF") else 0
        if len(base.codes) <= lists * _MIN_PER_LIST:
            return base, None  # too few codes to train on: they are scanned
        codes = from_words(base.codes, self.bits)
        with one_faiss_thread():
            engine = faiss.index_binary_factory(self.bits, self.factory)
            engine.train(codes)
            engine.add(codes)
        return base, self._tuned(engine)

    def _tuned(self, engine: Any) -> Any:
        if self.factory.startswith("BIVF"):
            engine.nprobe = self.probe or -(-engine.nlist // 16)
        elif self.factory.startswith("BHNSW"):
            engine.hnsw.efSearch = self.probe or _EF_SEARCH
        return engine

    def _nearest(self, state: State, queries: Codes, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
        if state.engine is not None:
            with one_faiss_thread():
                _, matches = state.engine.search(queries, min(heaps.ids.shape[1], len(state.base.codes)))
            expand_nearest(state.base, words, matches, *as_filter(allowed), heaps)
        offer_nearest(state.base, words, allowed, heaps)  # the rows left short

    def _matches(self, state: State, queries: Codes, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
        if state.engine is None or self.factory.startswith("BHNSW"):
            return within(state.base, words, radius)
        with one_faiss_thread():
            limits, _, matches = state.engine.range_search(queries, radius + 1)  # FAISS leaves the radius itself out
        return limits.astype(np.int64), matches.astype(np.uint32)

    def _settings(self) -> dict[str, Any]:
        return {"factory": self.factory, "probe": self.probe}

    def _engine_arrays(self, engine: Any) -> dict[str, NDArray[Any]]:
        import faiss

        return {} if engine is None else {"faiss": faiss.serialize_index_binary(engine)}

    def _engine_from(self, arrays: dict[str, NDArray[Any]], base: Segment) -> Any:
        import faiss

        return self._tuned(faiss.deserialize_index_binary(arrays["faiss"])) if "faiss" in arrays else None
