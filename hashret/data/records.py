"""Records and sources: `Source` is the interface of all sources, and a `Record` is one image or vector of a source."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hashret.data.contents import Content
from hashret.data.images import SUFFIXES
from hashret.errors import HashretError, format_count
from hashret.results import Root


class Record(NamedTuple):
    """One image or vector of a source: its name, size in bytes, modification time in ns, label, and reader.

    An unchanged image keeps its `size` and `mtime_ns`. `read` returns the content. It raises HashretError, whose cause
    is an OSError if reading may succeed later.
    """

    name: str
    size: int
    mtime_ns: int
    label: str | None
    read: Callable[[], Content]


class Source(ABC):
    """An iterable of records that yields the same records in the same order in every pass, and holds few in memory.

    A subclass sets `root` and the attributes that differ from the defaults, and implements `__iter__`.
    """

    root: Root  # prefix of the full path of a record, before its name
    ignored: int = 0  # files that this pass ignored, because of their suffix or because they are hidden
    streaming: bool = False  # a record must be read before the next one is requested, in the iterating thread
    arrays: bool = False  # contents are arrays, which need no decoding
    length: int | None = None  # number of records, if known in advance
    dim: int | None = None  # of every vector; None for images

    @abstractmethod
    def __iter__(self) -> Iterator[Record]: ...

    def find(self, name: str) -> Record | None:
        """Return the record with this name, or None. The record of a streaming source is already read."""
        for record in self:
            if record.name == name:
                return record._replace(read=partial(bytes, record.read())) if self.streaming else record
        return None

    def describe(self) -> str:
        """Return the type of its contents as text: "images", or "vectors of 64 numbers"."""
        return "images" if self.dim is None else f"vectors of {format_count(self.dim, 'number')}"


class LabelledSource(Source):
    """A source whose labels are replaced by `labels`, in order. A pass raises ValueError if their number differs."""

    def __init__(self, source: Source, labels: Sequence[object]) -> None:
        self.root, self.streaming, self.arrays, self.length = source.root, source.streaming, source.arrays, len(labels)
        self.dim = source.dim
        self._source, self._labels = source, labels

    def __iter__(self) -> Iterator[Record]:
        labels = iter(self._labels)
        count = 0
        for count, record in enumerate(self._source, 1):
            if count > len(self._labels):
                break
            label = next(labels)
            yield record._replace(label=None if label is None else str(label))
        self.ignored = self._source.ignored
        if count != len(self._labels):
            n_labels = format_count(len(self._labels), "label")
            images = "more images than" if count > len(self._labels) else f"only {format_count(count, 'image')} for"
            raise ValueError(f"there are {images} the {n_labels}: give one label per image")


def read(record: Record) -> Content | HashretError:
    """Return the content of a record, or the error of reading it."""
    try:
        return record.read()
    except HashretError as error:
        return without_traceback(error)


def without_traceback(error: HashretError) -> HashretError:
    """Return the error without its traceback and context, whose frames would keep file contents in memory."""
    error.__context__ = None
    return error.with_traceback(None)


def check_contents(source: Source, accepted: bool, description: str, advice: str) -> None:
    """Raise HashretError unless the contents of a source are accepted; `description` says what the model takes."""
    if not accepted:
        raise HashretError(
            f"{source.root.location} has {source.describe()}, and the model takes {description}: {advice}"
        )


def is_image(name: str) -> bool:
    """Return whether a name is that of an image, by its suffix; a hidden file, or one in a hidden folder, is not."""
    _, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() in SUFFIXES and not name.startswith(".") and "/." not in name


def label_of(name: str) -> str | None:
    """Return the innermost folder in the name of an image as its label; None without a folder."""
    return name.split("/")[-2] if "/" in name else None


def absolute(path: Path) -> str:
    """Return the absolute path without "..", so that a folder has one spelling."""
    return os.path.abspath(path)  # noqa: PTH100  # Path.absolute keeps ".."
