"""The contents of items, read again from their sources, or stored in the collection's own folder.

Nothing else can be read this way: a symbolic link that leads out of the indexed folder is not followed, and a content
is returned only if its SHA-256 is the item's.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path

from hashret.data.contents import Content, content_bytes, read_file, sha256
from hashret.data.records import Record, Source, read
from hashret.data.sources import open_source
from hashret.durable import delete_leftovers, make_folder_durably, write_durably
from hashret.errors import HashretError
from hashret.parallel import batches
from hashret.results import BLOBS, Item, Root
from hashret.stores.protocol import PathRef

ABSENT = -1  # the recorded size of a content whose bytes are stored nowhere, as after an import
MAX_OPEN = 2  # archives and array files that stay open between reads


class Originals:
    """The contents of the items of the collection in `folder`. One object may be used by any number of threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._cleaned = False  # the folder of stored contents, of what killed processes left in it
        self._opened: OrderedDict[tuple[str, int], Source] = OrderedDict()

    def read(self, path: PathRef, digest: str, data_root: str | None) -> Content | None:
        """Read the content with this SHA-256 at a path; return None if it is no longer there."""
        content: Content | None = None
        with suppress(HashretError):
            folder = self.folder / path.root  # a root is absolute, except that of the collection's own contents
            if folder.is_dir():
                file = folder / path.name
                if Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
                    content = read_file(file)
            else:
                record = self._open_source(path.root, data_root).find(path.name)
                content = None if record is None else record.read()
        return content if content is not None and sha256(content) == digest else None

    def read_all(
        self, paths: Iterable[PathRef], items: Mapping[int, Item], data_root: str | None
    ) -> Iterator[tuple[int, Content]]:
        """Iterate over id and content of the items that are still readable at one of the paths, in any order."""
        by_root: dict[Root, dict[str, PathRef]] = {}
        for path in paths:
            by_root.setdefault(path.root, {})[path.name] = path
        done: set[int] = set()
        for root, named in by_root.items():
            for name, content in self._contents(root, named, items, data_root, done):
                item_id = named[name].item_id
                if content is None or isinstance(content, HashretError) or item_id is None or item_id in done:
                    continue
                if sha256(content) == items[item_id].sha256:
                    done.add(item_id)
                    yield item_id, content

    def _contents(
        self,
        root: Root,
        named: Mapping[str, PathRef],
        items: Mapping[int, Item],
        data_root: str | None,
        done: set[int],
    ) -> Iterator[tuple[str, Content | HashretError | None]]:
        """Iterate over the names of one root with their contents, except of items in `done`."""
        if (self.folder / root).is_dir():
            for name, path in named.items():
                if path.item_id is not None and path.item_id not in done:
                    yield name, self.read(path, items[path.item_id].sha256, data_root)
        else:  # in the order of the archive, which may have to be read sequentially
            for record in self.records(root, data_root):
                if record.name in named:
                    yield record.name, read(record)

    def records(self, root: Root, data_root: str | None) -> Iterator[Record]:
        """Iterate over the records that are under a root now: none if its source no longer exists."""
        return chain.from_iterable(self.record_batches(root, data_root, 1))

    def record_batches(self, root: Root, data_root: str | None, size: int) -> Iterator[list[Record]]:
        """Iterate over the records under a root in lists of `size`, or of 1 if the source must be read sequentially."""
        if root == BLOBS:
            yield from batches(self._blobs(), size)
        elif (source := self.source(root, data_root)) is not None:
            with suppress(HashretError):
                yield from batches(source, 1 if source.streaming else size)

    def _blobs(self) -> Iterator[Record]:
        for file in sorted((self.folder / BLOBS).glob("*")):
            status = file.stat()
            yield Record(file.name, status.st_size, status.st_mtime_ns, None, partial(read_file, file))

    def source(self, root: Root, data_root: str | None) -> Source | None:
        """Open the source of a root; return None if it no longer exists."""
        with suppress(HashretError):
            return open_source(root.location, data_root=data_root, exclude=self.folder)
        return None

    def store(self, content: Content) -> tuple[str, int]:
        """Store a content that has no file of its own, durably; return its SHA-256 and its length in bytes."""
        data, digest = content_bytes(content), sha256(content)
        blob = self.folder / BLOBS / digest
        with reported_errors(self.folder):
            make_folder_durably(blob.parent)
            if not self._cleaned:  # once, because the folder may be large
                delete_leftovers(blob.parent)
                self._cleaned = True
            if not blob.exists():
                write_durably(blob, data, clean=False)
        return digest, len(data)

    def discard(self, digests: Iterable[str]) -> None:
        """Delete the contents with these SHA-256 that are stored in the collection."""
        for digest in digests:
            if re.fullmatch("[0-9a-f]{64}", digest):  # never a path out of the folder
                (self.folder / BLOBS / digest).unlink(missing_ok=True)

    def absolute_path(self, path: str) -> str:
        """Return a recorded path as an absolute one; contents without files lie in the collection's folder."""
        return f"{self.folder}/{path}" if path.startswith(BLOBS) else path

    def with_absolute_paths(self, item: Item) -> Item:
        """Return the item with absolute paths."""
        return item._replace(paths=[self.absolute_path(path) for path in item.paths])

    def recorded_as(self, path: str) -> str:
        """Convert a user's path to its recorded form."""
        absolute, blobs = os.path.abspath(path), self.absolute_path(BLOBS)  # noqa: PTH100  # as sources do
        return BLOBS + absolute.removeprefix(blobs) if absolute.startswith(blobs) else absolute

    def _open_source(self, root: Root, data_root: str | None) -> Source:
        """Open an archive, an array file or a data set, or return it if it is still open."""
        file = Path(root.location)
        key = root, file.stat().st_mtime_ns if file.is_file() else 0
        with self._lock:
            self._opened[key] = self._opened.get(key) or open_source(root.location, data_root=data_root)
            self._opened.move_to_end(key)
            while len(self._opened) > MAX_OPEN:
                self._opened.popitem(last=False)
            return self._opened[key]


@contextmanager
def reported_errors(folder: Path) -> Iterator[None]:
    """Translate errors of the operating system into HashretError with advice."""
    try:
        yield
    except OSError as error:
        raise HashretError(f"{folder} cannot be written ({error.strerror}): check the disk and permissions") from error
