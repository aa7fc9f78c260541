"""What a collection is made of, as its functions take it."""

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
    """Where the items live, the index of their codes, their contents, their models, and who asks for one state."""

    store: ItemStore
    index: IndexCache
    originals: Originals
    models: Models
    reader: Reader

    @property
    def settings(self) -> Settings:
        """The settings as of now."""
        with self.store.snapshot() as rows:
            return rows.settings

    def contents(self, ids: Sequence[int]) -> Iterator[tuple[int, Content]]:
        """Id and content of those of the items that can still be read where they were indexed from, in any order."""
        with self.store.snapshot() as rows:
            paths, items, data_root = rows.paths(ids), rows.items(ids), rows.settings.get("data_root")
        return self.originals.read_all(paths, items, data_root)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep others from writing, and have the index follow at the end, unless that is by an exception."""
        with self.store.exclusive():
            yield
            self.index.persist()


def no_item(item_id: int) -> NotFound:
    """The error for an id that no item has."""
    return NotFound(f"there is no item {item_id}: hashret query IMAGE --json shows the ids")
