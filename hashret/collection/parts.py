"""`Parts`: the components of a collection, which its functions take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hashret.collection.index_cache import IndexCache
from hashret.collection.models import Models
from hashret.collection.originals import Originals
from hashret.collection.snapshot import Reader
from hashret.data.contents import Content
from hashret.errors import NotFound
from hashret.stores.protocol import ItemStore, Settings


@dataclass(frozen=True)
class Parts:
    """The store of the items, the index of their codes, their contents, the models, and the reader of snapshots."""

    store: ItemStore
    index: IndexCache
    originals: Originals
    models: Models
    reader: Reader

    @property
    def settings(self) -> Settings:
        """The current settings."""
        with self.store.snapshot() as snapshot:
            return snapshot.settings

    def contents(self, ids: Sequence[int]) -> Iterator[tuple[int, Content]]:
        """Iterate over id and content of the items whose contents are still readable, in any order."""
        with self.store.snapshot() as snapshot:
            paths, items, data_root = snapshot.paths(ids), snapshot.items(ids), snapshot.settings.get("data_root")
        return self.originals.read_all(paths, items, data_root)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock, and bring the index up to date at the end, unless an exception is raised."""
        with self.store.exclusive():
            yield
            self.index.persist()


def no_item(item_id: int) -> NotFound:
    """Return the error for an id that no item has."""
    return NotFound(f"there is no item {item_id}: hashret query IMAGE --json shows the ids")
