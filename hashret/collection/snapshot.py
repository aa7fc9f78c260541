"""`View`, a consistent snapshot of a collection, and `Reader`, which runs queries against views."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.collection.byte_cache import ByteCache
from hashret.collection.index_cache import IndexCache, IndexSnapshot
from hashret.collection.originals import Originals
from hashret.errors import HashretError, damaged
from hashret.indexes import RangeHits
from hashret.parallel import batches
from hashret.results import Item
from hashret.stores.protocol import ItemStore, Settings, Snapshot

MAX_ATTEMPTS = 100  # per query; each takes a new snapshot, so a second one is rare
MAX_CACHED_BYTES = 64 * 2**20  # of items
READ_ITEMS = 64  # at a time: with the most metadata they take some 40 MB
T = TypeVar("T")
Q = TypeVar("Q")


class SnapshotOutdated(Exception):
    """The index in memory is of a later state than the snapshot."""


class ModelChanged(SnapshotOutdated):
    """The query codes are of another model than the collection's."""


class Neighbours(NamedTuple):
    """The neighbours of one query, ordered by (distance, id)."""

    distances: NDArray[np.int32]  # (m,), in bits
    ids: NDArray[np.int64]  # (m,)


def item_size(item: Item) -> int:
    """Return the bytes of an item in memory."""
    return sum(map(sys.getsizeof, (item, *item, *item.paths))) + values_size(item.metadata or {})


def values_size(metadata: Mapping[str, Any]) -> int:
    """Return the bytes of the keys and values of metadata in memory."""
    return sum(sys.getsizeof(key) + sys.getsizeof(value) for key, value in metadata.items())


class View:
    """A consistent snapshot of a collection: a snapshot of the store, and the index of the same state."""

    def __init__(
        self,
        location: str,
        snapshot: Snapshot,
        index: IndexCache,
        index_before: IndexSnapshot | None,
        originals: Originals,
        cache: ByteCache[Item],
    ) -> None:
        self.snapshot = snapshot
        self._index_before = index_before
        self._location = location
        self._index = index
        self._originals = originals
        self._cache = cache

    @property
    def settings(self) -> Settings:
        """The settings of the collection."""
        return self.snapshot.settings

    def search(
        self, codes: Codes, k: int | None, max_distance: int | None, allowed: NDArray[np.int64] | None
    ) -> list[Neighbours]:
        """Search the index for each code: for the `k` nearest, for all within `max_distance` bits, or both.

        `allowed`, ascending, restricts the search to these ids. Raise SnapshotOutdated if the index has moved on to a
        later state.
        """
        current = self._index.index_for(self.snapshot, self._index_before)
        if current is None:
            raise SnapshotOutdated
        if k is None:
            assert max_distance is not None
            neighbours = _split(current.code_index.within(codes, max_distance, allowed=allowed))
        else:
            hits = current.code_index.search(codes, k, allowed=allowed)
            neighbours = [Neighbours(*row) for row in zip(hits.distances, hits.ids, strict=True)]
            if max_distance is not None:
                neighbours = [_within(row, max_distance) for row in neighbours]
        if self._index.current is not current:  # the search may have seen a later state
            raise SnapshotOutdated
        return neighbours

    def items(self, ids: Sequence[int]) -> dict[int, Item]:
        """Return the items with these ids, by id, with absolute paths. Raise HashretError if one does not exist."""
        state = self.snapshot.state
        cached = self._cache.values(state)
        items = {i: item for i in ids if (item := cached.get(i)) is not None}
        if len(items) < len(ids):
            missing = self._read_items([i for i in ids if i not in items])
            for i, item in missing.items():
                self._cache.put(i, item, state)
            items |= missing
        return items

    def iterate_items(
        self, ids: Iterable[int], *, metadata: bool = True, max_bytes: int | None = None
    ) -> Iterator[Item]:
        """Iterate over items in the order of `ids`, with `READ_ITEMS` of them in memory.

        With `metadata` False, theirs is None. Raise TooLarge if those in memory have more than `max_bytes` of paths and
        metadata.
        """
        for chunk in batches(ids, READ_ITEMS):
            items = self._read_items(chunk, metadata, max_bytes)
            yield from (items[i] for i in chunk)

    def _read_items(self, ids: list[int], metadata: bool = True, max_bytes: int | None = None) -> dict[int, Item]:
        items = self.snapshot.items(ids, metadata=metadata, max_bytes=max_bytes)
        if len(items) < len(ids):
            raise damaged(self._location, "it lists items that it does not hold")
        return {i: self._originals.with_absolute_paths(item) for i, item in items.items()}

    def absolute_path(self, path: str) -> str:
        """Return a recorded path as an absolute one."""
        return self._originals.absolute_path(path)


class Reader:
    """Runs queries against consistent snapshots of a store and an index."""

    def __init__(self, store: ItemStore, index: IndexCache, originals: Originals) -> None:
        self._store = store
        self._index = index
        self._originals = originals
        self._cache = ByteCache(MAX_CACHED_BYTES, item_size)

    def read(self, query: Callable[[View], T]) -> T:
        """Return the result of `query` on a view of the current state; retry on a later one if the state changes."""
        return self.read_prepared(lambda model_changed: None, lambda view, _: query(view))

    def read_prepared(self, prepare: Callable[[bool], Q], query: Callable[[View, Q], T]) -> T:
        """Return the result of `query` on a view and on what `prepare` returns, which is called before the snapshot.

        `prepare` is called with False, and again with True whenever `query` raises ModelChanged.
        """
        prepared = prepare(False)
        for _ in range(MAX_ATTEMPTS):
            index_before = self._index.current
            try:
                with self._store.snapshot() as snapshot:
                    view = View(self._store.location, snapshot, self._index, index_before, self._originals, self._cache)
                    return query(view, prepared)
            except ModelChanged:
                prepared = prepare(True)
            except SnapshotOutdated:
                continue
        raise HashretError(f"{self._store.location} changed {MAX_ATTEMPTS} times during one query: query again")


def _within(neighbours: Neighbours, max_distance: int) -> Neighbours:
    near = neighbours.distances <= max_distance
    return Neighbours(neighbours.distances[near], neighbours.ids[near])


def _split(hits: RangeHits) -> list[Neighbours]:
    """Split the hits of a batch by query."""
    parts = (np.split(array, hits.limits[1:-1]) for array in (hits.distances, hits.ids))
    return [Neighbours(distances, ids) for distances, ids in zip(*parts, strict=True)]
