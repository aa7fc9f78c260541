"""`View`: a collection as of one state, and `Reader`, which asks until an answer is of one state."""

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.collection.index_cache import IndexCache
from hashret.collection.originals import Originals
from hashret.errors import HashretError, damaged
from hashret.indexes import RangeHits
from hashret.results import Item
from hashret.stores.protocol import ItemStore, Settings, Snapshot

ATTEMPTS = 100  # at an answer of one state; each takes a new one, so a second hardly ever follows
KNOWN_ITEMS = 100_000  # that are kept in memory for the next query: some 65 MB
T = TypeVar("T")
Q = TypeVar("Q")


class SnapshotOutdated(Exception):
    """The index has gone on to a later state than the snapshot's."""


class ModelChanged(SnapshotOutdated):
    """The codes that were asked for are of another model than the collection's."""


class Neighbours(NamedTuple):
    """Distances and ids of what was found for one query, by (distance, id)."""

    distances: NDArray[np.int32]
    ids: NDArray[np.int64]


class ItemCache:
    """Items that answers were made of, with whole paths, until the state changes: the same objects every time."""

    def __init__(self) -> None:
        self._of: tuple[Hashable, dict[int, Item]] = None, {}

    def of(self, state: Hashable) -> dict[int, Item]:
        """Those of a state, to be added to."""
        cached = self._of
        if cached[0] != state or len(cached[1]) > KNOWN_ITEMS:
            cached = self._of = state, {}
        return cached[1]


class View:
    """A collection as of one state: the snapshot of its store, and the index of that state."""

    def __init__(
        self, location: str, rows: Snapshot, index: IndexCache, originals: Originals, items: ItemCache
    ) -> None:
        self.rows = rows
        self._location = location
        self._index = index
        self._originals = originals
        self._items = items

    @property
    def settings(self) -> Settings:
        """The settings of the collection."""
        return self.rows.settings

    def search(
        self, codes: Codes, k: int | None, max_distance: int | None, allowed: NDArray[np.int64] | None
    ) -> list[Neighbours]:
        """What is near to each code: the nearest k, all within a distance, or both. Raises Moved where the index has
        gone on meanwhile."""
        shown = self._index.at(self.rows)
        if shown is None:
            raise SnapshotOutdated
        if k is None:
            assert max_distance is not None
            found = _split(shown.codes.within(codes, max_distance, allowed=allowed))
        else:
            hits = shown.codes.search(codes, k, allowed=allowed)
            found = [Neighbours(*row) for row in zip(hits.distances, hits.ids, strict=True)]
            if max_distance is not None:
                kept = [distances <= max_distance for distances in hits.distances]
                found = [
                    Neighbours(near.distances[keep], near.ids[keep]) for near, keep in zip(found, kept, strict=True)
                ]
        if not self._index.is_current(shown):
            raise SnapshotOutdated
        return found

    def items(self, ids: list[int]) -> dict[int, Item]:
        """At least these items, by id, with whole paths. Raises HashretError if one does not exist."""
        known = self._items.of(self.rows.state)
        missing = [i for i in ids if i not in known]
        if missing:
            items = self.rows.items(missing)
            if len(items) < len(missing):
                raise damaged(self._location, "it lists items that it does not hold")
            known.update((i, self._originals.absolute(item)) for i, item in items.items())
        return known


class Reader:
    """Asks a store and an index for answers that are of one state."""

    def __init__(self, store: ItemStore, index: IndexCache, originals: Originals) -> None:
        self._store = store
        self._index = index
        self._originals = originals
        self._items = ItemCache()

    def ask(self, answer: Callable[[View], T]) -> T:
        """What `answer` makes of the present state, or of a later one if that has passed before it was done."""
        return self.ask_with(lambda model_changed: None, lambda view, _: answer(view))

    def ask_with(self, prepare: Callable[[bool], Q], answer: Callable[[View, Q], T]) -> T:
        """The same with what `prepare` makes beforehand, and once more whenever it turns out that the model changed."""
        prepared = prepare(False)
        for _ in range(ATTEMPTS):
            try:
                with self._store.snapshot() as rows:
                    view = View(self._store.location, rows, self._index, self._originals, self._items)
                    return answer(view, prepared)
            except ModelChanged:
                prepared = prepare(True)
            except SnapshotOutdated:
                continue
        raise HashretError(f"{self._store.location} changed {ATTEMPTS} times while it was asked: ask again")


def _split(hits: RangeHits) -> list[Neighbours]:
    """The hits of each query."""
    parts = (np.split(array, hits.limits[1:-1]) for array in (hits.distances, hits.ids))
    return [Neighbours(distances, ids) for distances, ids in zip(*parts, strict=True)]
