"""Indexes of codes: exact search by flipping bits, and FAISS's binary indexes."""

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
    """Return the class named in an index spec: a name in `INDEXES`, and options after a colon as in "faiss:BFlat".

    Raise ValueError, listing the names, for another name.
    """
    name = spec.partition(":")[0]
    if name not in INDEXES:
        choices = " or ".join(INDEXES)
        raise ValueError(f"there is no index {spec!r}; choose {choices}, with options after a colon as in faiss:BFlat")
    return INDEXES[name]


def from_spec(bits: int, spec: str) -> CodeIndex:
    """Return an empty index for codes of `bits` bits from a spec such as "bitflip" or "faiss:BHNSW16".

    Raise ValueError for an unknown name or unknown options.
    """
    return index_class(spec).from_options(bits, spec.partition(":")[2])
