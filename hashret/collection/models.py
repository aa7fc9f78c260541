"""The models that a collection stores; it uses one at a time."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from hashret.errors import HashretError, damaged
from hashret.stores.protocol import ItemStore

if TYPE_CHECKING:
    from hashret.hasher import Hasher


class Models:
    """The model folders in `folder`; one model is loaded at a time."""

    def __init__(self, folder: Path, store: ItemStore) -> None:
        self.folder = folder
        self._store = store
        self._lock = threading.Lock()
        self._loaded: Hasher | None = None

    @property
    def last_loaded(self) -> "Hasher":
        """The model in memory, which may no longer be the collection's; loads the collection's if there is none."""
        return self.current() if self._loaded is None else self._loaded

    def current(self) -> "Hasher":
        """Return the collection's model, loading it if necessary. Raise HashretError if its folder is not intact."""
        from hashret.hasher import Hasher

        with self._lock:
            with self._store.snapshot() as snapshot:
                model = snapshot.settings.model
            if self._loaded is None or self._loaded.fingerprint != model.fingerprint:
                loaded = Hasher.load(self.folder / model.fingerprint)
                if loaded.fingerprint != model.fingerprint:
                    raise HashretError(f"{self.folder / model.fingerprint} holds another model: restore it")
                if loaded.bits != model.bits:
                    raise damaged(self._store.location, f"codes of {loaded.bits} bits have {model.bits} there")
                self._loaded = loaded
            return self._loaded

    def save(self, hasher: "Hasher") -> None:
        """Save a model, unless its folder exists already."""
        if not (self.folder / hasher.fingerprint).exists():
            hasher.save(self.folder / hasher.fingerprint)
