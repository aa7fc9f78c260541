"""Folders of image files."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hashret.data.contents import Content, read_file
from hashret.data.records import Record, Source, absolute, is_image, label_of
from hashret.errors import HashretError
from hashret.results import Root


class Folder(Source):
    """All images below a folder, in the order of their names.

    Links to files are read, links to folders are not followed.
    """

    def __init__(self, path: Path, exclude: Path | None) -> None:
        self.root = Root.of_folder(absolute(path))
        self._exclude = exclude

    def __iter__(self) -> Iterator[Record]:
        self.ignored = 0
        stack = [iter([""])]
        while stack:
            name = next(stack[-1], None)
            if name is None:
                stack.pop()
            elif name and not name.endswith("/"):
                yield self._record(name)
            else:
                try:
                    stack.append(iter(self._list(name)))
                except OSError as error:
                    if not name:
                        raise HashretError(f"{self.root}: cannot be read: {error.strerror}") from error
                    # A record that fails to read, so the images in the folder are not removed.
                    yield Record(name, 0, 0, None, partial(_fail, error))

    def _list(self, folder: str) -> list[str]:
        """Return the sorted names in a folder. Names of folders end in "/", so a depth-first walk is sorted too."""
        names = []
        with contextlib.suppress(OSError):
            if self._exclude and self._exclude.samefile(self.root + folder):
                return []
        with os.scandir(self.root + folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        names.append(f"{folder}{entry.name}/")
                elif is_image(entry.name) and not entry.is_dir():
                    names.append(folder + entry.name)
                else:
                    self.ignored += 1
        return sorted(names)

    def _record(self, name: str) -> Record:
        path = self.root + name
        try:
            status = os.stat(path)  # noqa: PTH116  # once per file: Path.stat takes twice as long
        except OSError:  # a broken link: reading it raises the error
            return Record(name, 0, 0, label_of(name), partial(read_file, path))
        return Record(name, status.st_size, status.st_mtime_ns, label_of(name), partial(read_file, path))


def _fail(error: OSError) -> Content:
    raise HashretError(f"cannot be read: {error.strerror}") from error
