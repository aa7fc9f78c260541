"""What every use of a collection that is there rests on: its folder, its database, its model and its lock."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from filelock import FileLock, Timeout

from hashret.codes import Codes
from hashret.collection.index_cache import LiveIndex, make_index
from hashret.collection.originals import Contents
from hashret.data.contents import Content as ImageContent
from hashret.data.contents import read_file
from hashret.data.records import Record, Source
from hashret.data.sources import open_source
from hashret.errors import HashretError, NotFound
from hashret.results import Item
from hashret.stores.sqlite import BLOBS, Store, damaged, sqlite_errors

if TYPE_CHECKING:
    from hashret.hasher import Hasher


class Opened:
    """A collection that is open: what it holds, item by item."""

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path).absolute()
        self.read_only = read_only
        self._store = Store(self.path / "items.db", read_only=read_only)
        settings = self._settings()
        try:
            make_index(settings["index"], int(settings["bits"]))
        except ValueError as error:
            raise damaged(self._store.path, str(error)) from None
        self._index = LiveIndex(self.path / "index", self._store)
        self._contents = Contents(self.path)
        self._lock = threading.Lock()
        self._hasher: Hasher | None = None

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many items, that is different contents, there are."""
        return self._store.count("items")

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that the codes are of."""
        return self._settings()["fingerprint"]

    @property
    def bits(self) -> int:
        """The width of a code."""
        return int(self._settings()["bits"])

    @property
    def generation(self) -> int:
        """How many times the collection has been written to."""
        return int(self._settings()["generation"])

    @property
    def hasher(self) -> "Hasher":
        """The model that the codes are of."""
        from hashret.hasher import Hasher

        with self._lock:
            settings = self._settings()
            fingerprint = settings["fingerprint"]
            if self._hasher is None or self._hasher.fingerprint != fingerprint:
                loaded = Hasher.load(self.path / "models" / fingerprint)
                if loaded.fingerprint != fingerprint:
                    raise HashretError(f"{self.path / 'models' / fingerprint} holds another model: restore it")
                if str(loaded.bits) != settings["bits"]:
                    raise damaged(self._store.path, f"codes of {loaded.bits} bits have {settings['bits']} there")
                self._hasher = loaded
            return self._hasher

    def get(self, item_id: int) -> Item:
        """The item with this id; raises NotFound if there is none."""
        with self._store.read():
            items = self._store.items([item_id])
        if item_id not in items:
            raise NotFound(f"there is no item {item_id}: hashret query IMAGE --json shows the ids")
        return self._absolute(items[item_id])

    def items(self, after: int = 0, limit: int = 100) -> list[Item]:
        """The items whose ids follow `after`, in order of their ids, at most `limit`."""
        with self._store.read():
            ids = self._store.ids(after, limit)
            found = self._store.items(ids)
        return [self._absolute(found[i]) for i in ids]

    def codes(self, ids: Sequence[int]) -> Codes:
        """The codes, uint8 (n, bits // 8), of the items with these ids; raises NotFound if one is missing."""
        with self._store.read() as settings:
            found, codes = self._store.codes(settings["fingerprint"], int(settings["bits"]), ids)
        rows = {int(item_id): row for row, item_id in enumerate(found)}
        missing = [i for i in ids if i not in rows]
        if missing:
            raise NotFound(f"there is no item {missing[0]}: hashret query IMAGE --json shows the ids")
        return codes[[rows[i] for i in ids]]

    def content(self, item_id: int) -> ImageContent:
        """The image of an item as it was indexed, the bytes of a file or a uint8 array; raises NotFound if the item, or
        its image, is not there any more."""
        digest = self.get(item_id).sha256
        with self._store.read() as settings:
            places = self._store.places([item_id])
        for place in places:
            content = self._contents.read(place.root, place.name, digest, settings.get("data_root"))
            if content is not None:
                return content
        raise NotFound(f"the image of item {item_id} is not where it was: put the file back, or index it again")

    def _records(self, root: str) -> Iterator[Record]:
        """What is under a root now; nothing if it is gone."""
        if root == BLOBS:
            for file in sorted((self.path / BLOBS).glob("*")):
                status = file.stat()
                yield Record(file.name, status.st_size, status.st_mtime_ns, None, partial(read_file, file))
        else:
            with suppress(HashretError):
                yield from self._source(root) or ()

    def _source(self, root: str) -> Source | None:
        """The source whose records' names begin with `root`; None if it is gone."""
        source = root if Path(root).is_dir() else root.removesuffix("!/").removesuffix("#")
        with suppress(HashretError):
            return open_source(source, data_root=self._settings().get("data_root"), exclude=self.path)
        return None

    def _settings(self) -> dict[str, str]:
        with self._store.read() as settings:
            return settings

    def _absolute(self, item: Item) -> Item:
        """The item with paths that start from the file system's root."""
        return item._replace(paths=[self._whole(path) for path in item.paths])

    def _whole(self, path: str) -> str:
        """A path as it is for others: those of contents without files lie in the collection's folder."""
        return f"{self.path}/{path}" if path.startswith(BLOBS) else path

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the collection's lock: threads wait for it, another process is refused."""
        if self.read_only:
            raise HashretError(f"{self.path} was opened read-only: open it for writing to change it")
        self._store.check_in_place()  # before a lock would make the folder anew
        with locked(self.path), sqlite_errors(self._store.path):
            self._store.check_in_place()
            yield


_locks: dict[str, threading.RLock] = {}
_locks_lock = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: other threads wait for it, another process is refused."""
    with _locks_lock:
        ours = _locks.setdefault(os.path.realpath(folder), threading.RLock())
    with ours:
        try:
            lock = FileLock(folder / "lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise HashretError(
                f"another process is writing to {folder}: run the command again when it has finished"
            ) from None
        except OSError as error:
            raise HashretError(f"{folder} cannot be written to ({error.strerror}): check its permissions") from None
        try:
            yield
        finally:
            lock.release()
