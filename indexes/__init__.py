"""Codes in, nearest ids out."""

from hashret.indexes.binary_faiss import FaissIndex
from hashret.indexes.bitflip import BitFlipIndex
from hashret.indexes.protocol import CodeIndex, Hits, RangeHits, Searched
from hashret.indexes.threads import get_threads, set_threads

INDEXES: dict[str, type[BitFlipIndex] | type[FaissIndex]] = {"bitflip": BitFlipIndex, "faiss": FaissIndex}

__all__ = [
    "INDEXES",
    "BitFlipIndex",
    "CodeIndex",
    "FaissIndex",
    "Hits",
    "RangeHits",
    "Searched",
    "get_threads",
    "set_threads",
]
