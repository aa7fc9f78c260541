"""`View`, a consistent snapshot of a collection, and `Reader`, which runs queries against views."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.collection.index_cache import IndexCache, IndexSnapshot
from hashret.collection.originals import Originals
from hashret.errors import HashretError, damaged
from hashret.indexes import RangeHits
from hashret.results import Item, State
from hashret.stores.protocol import ItemStore, Settings, Snapshot

MAX_ATTEMPTS = 100  # per query; each takes a new snapshot, so a second one is rare
MAX_CACHED_ITEMS = 100_000  # some 65 MB
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


class ItemCache:
    """The items of recent results, with absolute paths: the same objects until the state changes."""

    def __init__(self) -> None:
        self._cached: tuple[State | None, dict[int, Item]] = None, {}

    def items(self, state: State) -> dict[int, Item]:
        """Return the cached items of a state, by id; the caller adds to them."""
        cached = self._cached
        if cached[0] != state or len(cached[1]) > MAX_CACHED_ITEMS:
            cached = self._cached = state, {}
        return cached[1]


class View:
    """A consistent snapshot of a collection: a snapshot of the store, and the index of the same state."""

    def __init__(
        self,
        location: str,
        snapshot: Snapshot,
        index: IndexCache,
        index_before: IndexSnapshot | None,
        originals: Originals,
        cache: ItemCache,
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

    def items(self, ids: list[int]) -> dict[int, Item]:
        """Return a dict that has at least these items, by id, with absolute paths.

        Raise HashretError if an item does not exist.
        """
        cached = self._cache.items(self.snapshot.state)
        missing = [i for i in ids if i not in cached]
        if missing:
            items = self.snapshot.items(missing)
            if len(items) < len(missing):
                raise damaged(self._location, "it lists items that it does not hold")
            cached.update((i, self._originals.with_absolute_paths(item)) for i, item in items.items())
        return cached


class Reader:
    """Runs queries against consistent snapshots of a store and an index."""

    def __init__(self, store: ItemStore, index: IndexCache, originals: Originals) -> None:
        self._store = store
        self._index = index
        self._originals = originals
        self._cache = ItemCache()

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
