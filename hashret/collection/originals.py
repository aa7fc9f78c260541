"""The contents of items: read again from where they were indexed, or kept in the collection's own folder.

Nothing else can be read this way: a link that leads out of the folder that was indexed is not followed, and what was
read counts only if it is, by its SHA-256, the item's content.
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
from hashret.durable import make_folder_durably, write_durably
from hashret.errors import HashretError
from hashret.parallel import batches
from hashret.results import BLOBS, Item, Root
from hashret.stores.protocol import PathRef

OPEN = 2  # archives and arrays that are kept open


class Originals:
    """The contents of the items of the collection in `folder`; many threads may use one object."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._opened: OrderedDict[tuple[str, int], Source] = OrderedDict()

    def read(self, path: PathRef, digest: str, data_root: str | None) -> Content | None:
        """The content with this SHA-256 at a path; None if that is not there any more."""
        content: Content | None = None
        with suppress(HashretError):
            folder = self.folder / path.root  # the root itself, unless it is that of the collection's own files
            if folder.is_dir():
                file = folder / path.name
                if Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
                    content = read_file(file)
            else:
                record = self._kept_open(path.root, data_root).find(path.name)
                content = None if record is None else record.read()
        return content if content is not None and sha256(content) == digest else None

    def read_all(
        self, paths: Iterable[PathRef], items: Mapping[int, Item], data_root: str | None
    ) -> Iterator[tuple[int, Content]]:
        """Id and content of those of the items that can still be read at one of the paths, in any order."""
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
        """What lies at paths of one root, by name, but for those of items that are `done`."""
        if (self.folder / root).is_dir():
            for name, path in named.items():
                if path.item_id is not None and path.item_id not in done:
                    yield name, self.read(path, items[path.item_id].sha256, data_root)
        else:  # in the order of an archive, which may have no other
            for record in self.records(root, data_root):
                if record.name in named:
                    yield record.name, read(record)

    def records(self, root: Root, data_root: str | None) -> Iterator[Record]:
        """What is under a root now; nothing if it is gone."""
        return chain.from_iterable(self.record_batches(root, data_root, 1))

    def record_batches(self, root: Root, data_root: str | None, size: int) -> Iterator[list[Record]]:
        """The same in lists of `size`; one at a time where each must be read before the next is taken."""
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
        """The source whose records are recorded under `root`; None if it is gone."""
        with suppress(HashretError):
            return open_source(root.location, data_root=data_root, exclude=self.folder)
        return None

    def keep(self, content: Content) -> tuple[str, int]:
        """Store a content that has no file of its own, durably; its SHA-256, and its length in bytes."""
        data, digest = content_bytes(content), sha256(content)
        blob = self.folder / BLOBS / digest
        with plain_errors(self.folder):
            make_folder_durably(blob.parent)
            if not blob.exists():
                write_durably(blob, data)
        return digest, len(data)

    def discard(self, digests: Iterable[str]) -> None:
        """Delete those of the contents that are kept here."""
        for digest in digests:
            if re.fullmatch("[0-9a-f]{64}", digest):  # no path to who knows where
                (self.folder / BLOBS / digest).unlink(missing_ok=True)

    def whole(self, path: str) -> str:
        """A path as it is for others: those of contents without files lie in the collection's folder."""
        return f"{self.folder}/{path}" if path.startswith(BLOBS) else path

    def absolute(self, item: Item) -> Item:
        """The item with paths that start from the file system's root."""
        return item._replace(paths=[self.whole(path) for path in item.paths])

    def recorded_as(self, path: str) -> str:
        """A path as a user writes it in the form in which it is recorded."""
        whole, blobs = os.path.abspath(path), self.whole(BLOBS)  # noqa: PTH100  # as sources have it
        return BLOBS + whole.removeprefix(blobs) if whole.startswith(blobs) else whole

    def _kept_open(self, root: Root, data_root: str | None) -> Source:
        """An archive, an array file or a data set, open already if it was one of the last."""
        file = Path(root.location)
        key = root, file.stat().st_mtime_ns if file.is_file() else 0
        with self._lock:
            self._opened[key] = self._opened.get(key) or open_source(root.location, data_root=data_root)
            self._opened.move_to_end(key)
            while len(self._opened) > OPEN:
                self._opened.popitem(last=False)
            return self._opened[key]


@contextmanager
def plain_errors(folder: Path) -> Iterator[None]:
    """Say what the operating system's errors mean for a collection."""
    try:
        yield
    except OSError as error:
        raise HashretError(f"{folder} cannot be written ({error.strerror}): check the disk and permissions") from error
