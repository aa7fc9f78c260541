"""Codes in, nearest ids out."""

from hashret.indexes.binary_faiss import FaissIndex
from hashret.indexes.bitflip import BitFlipIndex
from hashret.indexes.protocol import CodeIndex, Hits, RangeHits, Searched
from hashret.indexes.threads import get_threads, set_threads

INDEXES: dict[str, type[CodeIndex]] = {"bitflip": BitFlipIndex, "faiss": FaissIndex}

__all__ = [
    "INDEXES",
    "BitFlipIndex",
    "CodeIndex",
    "FaissIndex",
    "Hits",
    "RangeHits",
    "Searched",
    "from_spec",
    "get_threads",
    "index_class",
    "set_threads",
]


def index_class(spec: str) -> type[CodeIndex]:
    """The class of an index by its name in `INDEXES`, which options may follow after a colon: "faiss:BFlat".

    Raises ValueError, listing the choices, if there is no such index.
    """
    name = spec.partition(":")[0]
    if name not in INDEXES:
        choices = " or ".join(INDEXES)
        raise ValueError(f"there is no index {spec!r}; choose {choices}, with options after a colon as in faiss:BFlat")
    return INDEXES[name]


def from_spec(bits: int, spec: str) -> CodeIndex:
    """An empty index for codes of `bits` bits by its name in `INDEXES` and its options: "bitflip", "faiss:BHNSW16".

    Raises ValueError if there is no such index, or if it does not have these options.
    """
    return index_class(spec).from_options(bits, spec.partition(":")[2])
