"""FAISS's binary indexes by factory string, with removal, filters, radius search, full rows and colliding codes.

Douze et al.: The Faiss library (2024). FAISS holds each distinct code once, so graphs stay connected when thousands of
items share a code. A scan fills the rows in which FAISS finds fewer than k. Batches are split among our threads, not
FAISS's OpenMP threads.
"""

import re
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Heaps, Ids
from hashret.indexes.kernels_nearest import offer_matches
from hashret.indexes.segments import as_filter, from_words, match_within, offer_nearest
from hashret.indexes.states import State
from hashret.indexes.updatable import UpdatableIndex
from hashret.process import one_faiss_thread

_MIN_PER_LIST = 39  # codes per list: FAISS warns if it trains on fewer
_EF_SEARCH = 64


class FaissIndex(UpdatableIndex):
    """k-nearest-neighbour and radius search by a FAISS binary index over the distinct codes.

    `factory` is "BFlat", "BIVF<lists>" or "BHNSW<links>". `probe` is, for BIVF, the number of lists that a search
    visits (nprobe; by default a sixteenth of them), and for BHNSW the number of candidates (efSearch; by default 64).
    Only BFlat is exact: its distances equal those of brute force, but among items tied at the k-th distance it may
    return others than `BitFlipIndex`. A radius search of BHNSW is an exact scan. Raise ValueError for another factory.
    """

    backend: ClassVar[str] = "faiss"
    delta_divisor: ClassVar[int] = 8  # a scan costs little compared with FAISS, a rebuild much

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
        """Return an empty index for codes of `bits` bits; `options` is the factory string, by default BFlat."""
        return cls(bits, options or "BFlat")

    @property
    def exact(self) -> bool:
        """Whether answers always equal brute force by distance."""
        return self.factory == "BFlat"

    def _build_engine(self, main: Segment) -> tuple[Segment, Any]:
        import faiss

        lists = int(self.factory[4:]) if self.factory.startswith("BIVF") else 0
        if len(main.codes) <= lists * _MIN_PER_LIST:
            return main, None  # too few codes to train on are scanned
        codes = from_words(main.codes, self.bits)
        with one_faiss_thread():
            engine = faiss.index_binary_factory(self.bits, self.factory)
            engine.train(codes)
            engine.add(codes)
        return main, self._set_probe(engine)

    def _set_probe(self, engine: Any) -> Any:
        if self.factory.startswith("BIVF"):
            engine.nprobe = self.probe or -(-engine.nlist // 16)
        elif self.factory.startswith("BHNSW"):
            engine.hnsw.efSearch = self.probe or _EF_SEARCH
        return engine

    def _offer_main(self, state: State, queries: Codes, words: Words, allowed: Ids | None, heaps: Heaps) -> None:
        if state.engine is not None:
            with one_faiss_thread():
                _, matches = state.engine.search(queries, min(heaps.ids.shape[1], len(state.main.codes)))
            offer_matches(state.main, words, matches, *as_filter(allowed), heaps)
        offer_nearest(state.main, words, allowed, heaps)  # fills the short rows

    def _match_main(self, state: State, queries: Codes, words: Words, radius: int) -> tuple[Ids, NDArray[np.uint32]]:
        if state.engine is None or self.factory.startswith("BHNSW"):
            return match_within(state.main, words, radius)
        with one_faiss_thread():
            limits, _, matches = state.engine.range_search(queries, radius + 1)  # FAISS excludes the radius itself
        return limits.astype(np.int64), matches.astype(np.uint32)

    def _settings(self) -> dict[str, Any]:
        return {"factory": self.factory, "probe": self.probe}

    def _engine_arrays(self, engine: Any) -> dict[str, NDArray[Any]]:
        import faiss

        return {} if engine is None else {"faiss": faiss.serialize_index_binary(engine)}

    def _load_engine(self, arrays: dict[str, NDArray[Any]], main: Segment) -> Any:
        import faiss

        return self._set_probe(faiss.deserialize_index_binary(arrays["faiss"])) if "faiss" in arrays else None
