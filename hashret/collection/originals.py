"""The image of an item, read again from where it was indexed.

Nothing else can be read this way: a link that leads out of the folder that was indexed is not followed, and what was
read counts only if it is, by its SHA-256, the item's content.
"""

import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from hashret.data.contents import Content, read_file, sha256
from hashret.data.records import Source
from hashret.data.sources import open_source
from hashret.errors import HashretError

OPEN = 2  # archives and arrays that are kept open


class Contents:
    """Reads contents of the collection in `folder`; many threads may use one object."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._opened: OrderedDict[tuple[str, int], Source] = OrderedDict()

    def read(self, root: str, name: str, digest: str, data_root: str | None) -> Content | None:
        """The content with this SHA-256 at a path as the database has it; None if that is not there any more."""
        content: Content | None = None
        with suppress(HashretError):
            folder = self._folder / root  # which is `root` itself, unless it is that of the collection's own files
            if folder.is_dir():
                file = folder / name
                if Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
                    content = read_file(file)
            else:
                record = self._source(root, data_root).find(name)
                content = None if record is None else record.read()
        return content if content is not None and sha256(content) == digest else None

    def _source(self, root: str, data_root: str | None) -> Source:
        """An archive, an array file or a data set, open already if it was one of the last."""
        source = root.removesuffix("!/").removesuffix("#")
        file = Path(source)
        key = root, file.stat().st_mtime_ns if file.is_file() else 0
        with self._lock:
            self._opened[key] = self._opened.get(key) or open_source(source, data_root=data_root)
            self._opened.move_to_end(key)
            while len(self._opened) > OPEN:
                self._opened.popitem(last=False)
            return self._opened[key]
