"""What every index takes and gives."""

import os
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes

Path = str | os.PathLike[str]


class Hits(NamedTuple):
    """The nearest items of each query, a row each, ordered by (distance, id)."""

    distances: NDArray[np.int32]  # (q, m), m = min(k, items that qualify)
    ids: NDArray[np.int64]  # (q, m)


class RangeHits(NamedTuple):
    """The items within a distance of each query; query q has limits[q] ... limits[q + 1] - 1, by (distance, id)."""

    limits: NDArray[np.int64]  # (q + 1,)
    distances: NDArray[np.int32]  # (limits[-1],)
    ids: NDArray[np.int64]  # (limits[-1],)


class Searched(NamedTuple):
    """What an index has been asked since it was made or loaded."""

    queries: int
    probes: int  # buckets that were looked up for them; none where balls told all, or codes were scanned


class CodeIndex(Protocol):
    """Codes in, nearest ids out. Any number of threads may search while one writes: they see before or after.

    Batches of codes may have any memory layout.
    """

    @classmethod
    def from_options(cls, bits: int, options: str) -> Self:
        """An empty index for codes of `bits` bits; `options` is empty, or the text after the colon of "faiss:BFlat".

        Raises ValueError, naming what can be chosen, for options that this class does not have.
        """

    @property
    def bits(self) -> int:
        """The length of a code."""

    @property
    def exact(self) -> bool:
        """Whether answers always equal brute force by distance."""

    def __len__(self) -> int:
        """The number of items."""

    def __contains__(self, item_id: object) -> bool:
        """Whether there is an item with this id; no object but an integer is an id."""

    def get(self, ids: NDArray[np.int64]) -> Codes:
        """The codes, uint8 (n, bits // 8), of the items with these ids, int64 (n,), in any order and repeated at will.

        Raises KeyError, naming the id, if one is not there.
        """

    @property
    def searched(self) -> Searched:
        """What it has been asked so far."""

    def add(self, codes: Codes, ids: NDArray[np.int64]) -> None:
        """Add codes, uint8 (n, bits // 8), under ids, int64 (n,), not negative.

        Raises ValueError, and changes nothing, if an id is there already or comes twice.
        """

    def remove(self, ids: NDArray[np.int64]) -> int:
        """Remove the items with these ids, int64 (n,), and return how many were there; others are ignored."""

    def search(self, queries: Codes, k: int, *, allowed: NDArray[np.int64] | None = None) -> Hits:
        """The k nearest items of each query, uint8 (q, bits // 8).

        Only items in `allowed` qualify, if given: ids, int64 (a,), ascending; unknown ones are ignored. Raises
        ValueError for k < 1, for arrays of another dtype or shape, and for `allowed` that does not ascend.
        """

    def within(self, queries: Codes, max_distance: int, *, allowed: NDArray[np.int64] | None = None) -> RangeHits:
        """All items at most `max_distance` bits from each query, uint8 (q, bits // 8); `allowed` as in `search`.

        Raises ValueError for max_distance < 0 and for arrays that `search` refuses.
        """

    def save(self, path: Path) -> None:
        """Write the index to one file, replacing it only when all is on the disk."""

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> Self:
        """The index saved at `path`.

        `verify` reads the whole file and raises HashretError, naming it, if it was truncated or altered; without it
        only header and sizes are checked, and the file is mapped, not read.
        """


def check_ids(ids: Any, name: str = "ids") -> NDArray[np.int64]:
    """`ids` as the kernels take them, read-only, when it is an int64 array (n,); raises ValueError otherwise."""
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.ndim != 1:
        found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"{name} must be an int64 array of shape (n,), not {found}")
    return read_only(ids)


def check_allowed(allowed: Any) -> NDArray[np.int64]:
    """`allowed` as the kernels take it, when it is an ascending int64 array (a,); raises ValueError otherwise."""
    ids = check_ids(allowed, "allowed")
    if not (ids[1:] >= ids[:-1]).all():
        raise ValueError("allowed must be ascending; pass numpy.sort(allowed)")
    return ids


def as_codes(codes: Any, bits: int) -> Codes:
    """`codes` in C order, copied only if strided, when they have `bits` bits each; raises ValueError otherwise."""
    return check_codes(np.ascontiguousarray(codes) if isinstance(codes, np.ndarray) else codes, bits)


def check_items(codes: Any, ids: Any, bits: int) -> Codes:
    """`codes` in C order, when they have `bits` bits each and `ids` are as many ids, none negative; raises ValueError
    otherwise."""
    checked = as_codes(codes, bits)
    if len(check_ids(ids)) != len(checked):
        raise ValueError(f"{len(checked)} codes need as many ids, not {len(ids)}")
    if len(ids) and ids.min() < 0:
        raise ValueError(f"an id cannot be negative: {ids.min()}")
    return checked


def check_once(ascending: NDArray[np.int64]) -> None:
    """Raise ValueError if an id comes twice among these."""
    twice = ascending[1:] == ascending[:-1]
    if twice.any():
        raise ValueError(f"id {ascending[1:][twice][0]} comes twice")


def read_only(array: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same numbers in a contiguous array that cannot be written: kernels are compiled for this kind alone."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
