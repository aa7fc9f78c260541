"""What a collection is made of, as its functions take it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hashret.collection.index_cache import IndexCache
from hashret.collection.models import Models
from hashret.collection.originals import Originals
from hashret.collection.snapshot import Reader
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

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep others from writing, and have the index follow at the end, unless that is by an exception."""
        with self.store.exclusive():
            yield
            self.index.persist()
