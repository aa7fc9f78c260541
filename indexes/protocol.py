"""The protocol of all indexes, their result types, and the checks of their arguments."""

import os
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes

Path = str | os.PathLike[str]


class Hits(NamedTuple):
    """The nearest items of each query, one row per query, ordered by (distance, id)."""

    distances: NDArray[np.int32]  # (q, m), m = min(k, number of items that qualify)
    ids: NDArray[np.int64]  # (q, m)


class RangeHits(NamedTuple):
    """The items within a distance of each query, ordered by (distance, id).

    Those of query q are at positions limits[q] ... limits[q + 1] - 1.
    """

    limits: NDArray[np.int64]  # (q + 1,)
    distances: NDArray[np.int32]  # (limits[-1],)
    ids: NDArray[np.int64]  # (limits[-1],)


class Searched(NamedTuple):
    """Counts of searches since the index was created or loaded."""

    queries: int
    probes: int  # buckets probed; searches of clusters and scans probe none


class CodeIndex(Protocol):
    """An index of codes, each with an id. Threads may search while one thread writes: each search sees the state before
    or after the write.

    Batches of codes may have any memory layout.
    """

    @classmethod
    def from_options(cls, bits: int, options: str) -> Self:
        """Return an empty index for codes of `bits` bits; `options` is the text after the colon of a spec, or empty.

        Raise ValueError, naming the choices, for unknown options.
        """

    @property
    def bits(self) -> int:
        """The length of a code."""

    @property
    def exact(self) -> bool:
        """Whether the distances of hits always equal those of brute force."""

    def __len__(self) -> int:
        """The number of items."""

    def __contains__(self, item_id: object) -> bool:
        """Whether the index has an item with this id; only integers are ids."""

    def get(self, ids: NDArray[np.int64]) -> Codes:
        """Return the codes, uint8 (n, bits // 8), of the items with these ids, int64 (n,), which may be in any order
        and repeat.

        Raise KeyError, naming the id, if one is not in the index.
        """

    @property
    def searched(self) -> Searched:
        """The counts of searches so far."""

    def add(self, codes: Codes, ids: NDArray[np.int64]) -> None:
        """Add codes, uint8 (n, bits // 8), under ids, int64 (n,), not negative.

        Raise ValueError, and change nothing, if an id is in the index already or is repeated.
        """

    def remove(self, ids: NDArray[np.int64]) -> int:
        """Remove the items with these ids, int64 (n,), and return their number; ignore ids without an item."""

    def search(self, queries: Codes, k: int, *, allowed: NDArray[np.int64] | None = None) -> Hits:
        """Return the k nearest items of each query, uint8 (q, bits // 8).

        With `allowed`, ascending ids, int64 (a,), only these items qualify; ids without an item are ignored. Raise
        ValueError for k < 1, for arrays of another dtype or shape, and for `allowed` that does not ascend.
        """

    def within(self, queries: Codes, max_distance: int, *, allowed: NDArray[np.int64] | None = None) -> RangeHits:
        """Return all items within `max_distance` bits of each query, uint8 (q, bits // 8); `allowed` as in `search`.

        Raise ValueError for max_distance < 0 and for arrays that `search` rejects.
        """

    def save(self, path: Path) -> None:
        """Write the index to one file, atomically: an existing file is replaced once the new one is on the disk."""

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> Self:
        """Return the index saved at `path`.

        With `verify`, read the whole file and raise HashretError, naming it, if it was truncated or altered. Without,
        check only the header and the sizes, and map the file into memory.
        """


def check_ids(ids: Any, name: str = "ids") -> NDArray[np.int64]:
    """Return `ids` as the kernels take them, read-only; raise ValueError unless it is an int64 array (n,)."""
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.ndim != 1:
        found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"{name} must be an int64 array of shape (n,), not {found}")
    return read_only(ids)


def check_allowed(allowed: Any) -> NDArray[np.int64]:
    """Return `allowed` as the kernels take it; raise ValueError unless it is an ascending int64 array (a,)."""
    ids = check_ids(allowed, "allowed")
    if not (ids[1:] >= ids[:-1]).all():
        raise ValueError("allowed must be ascending; pass numpy.sort(allowed)")
    return ids


def as_codes(codes: Any, bits: int) -> Codes:
    """Return `codes` in C order, copied only if strided; raise ValueError unless they are codes of `bits` bits."""
    return check_codes(np.ascontiguousarray(codes) if isinstance(codes, np.ndarray) else codes, bits)


def check_items(codes: Any, ids: Any, bits: int) -> Codes:
    """Return `codes` in C order; raise ValueError unless they have `bits` bits and as many ids, none negative."""
    checked = as_codes(codes, bits)
    if len(check_ids(ids)) != len(checked):
        raise ValueError(f"{len(checked)} codes need as many ids, not {len(ids)}")
    if len(ids) and ids.min() < 0:
        raise ValueError(f"an id cannot be negative: {ids.min()}")
    return checked


def check_distinct(ascending: NDArray[np.int64]) -> None:
    """Raise ValueError if one of these ascending ids is repeated."""
    repeated = ascending[1:] == ascending[:-1]
    if repeated.any():
        raise ValueError(f"id {ascending[1:][repeated][0]} is repeated")


def read_only(array: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a contiguous read-only view or copy of an array: kernels are compiled only for such arrays."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
