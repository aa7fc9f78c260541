"""Records: the images, or vectors, of a source one by one, and what every form of source is to the rest of hashret."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hashret.data.contents import Content
from hashret.data.images import SUFFIXES
from hashret.errors import HashretError
from hashret.results import Root


class Record(NamedTuple):
    """One image of a source: its name there, its size in bytes, and how to read it.

    `size` and `mtime_ns` stay the same while the image does. `read` raises HashretError, which is caused by an OSError
    where the image could not be read now but might be later.
    """

    name: str
    size: int
    mtime_ns: int
    label: str | None
    read: Callable[[], Content]


class Source(ABC):
    """A stream of records, the same at every pass, which holds a few of them at a time.

    A form of source sets `root`, says by the other attributes what is special about it, and gives the records.
    """

    root: Root  # what is in front of a record's name in its full path
    ignored: int = 0  # files passed over in this pass, because of their suffix or because they are hidden
    streaming: bool = False  # a record must be read before the next is taken, and in the thread that iterates
    arrays: bool = False  # contents are arrays, with nothing to decode
    length: int | None = None  # number of records, where it is known beforehand
    numbers: int | None = None  # in every content, where they are vectors

    @abstractmethod
    def __iter__(self) -> Iterator[Record]: ...

    def find(self, name: str) -> Record | None:
        """The record of this name, already read if it must be; None if there is none."""
        for record in self:
            if record.name == name:
                return record._replace(read=partial(bytes, record.read())) if self.streaming else record
        return None

    def describe(self) -> str:
        """What its contents are, in words: "images", or "vectors of 64 numbers"."""
        return "images" if self.numbers is None else f"vectors of {self.numbers:,} numbers"


class LabelledSource(Source):
    """A source whose records have these labels, in its order, instead of their own."""

    def __init__(self, source: Source, labels: Sequence[object]) -> None:
        self.root, self.streaming, self.arrays, self.length = source.root, source.streaming, source.arrays, len(labels)
        self.numbers = source.numbers
        self._source, self._labels = source, labels

    def __iter__(self) -> Iterator[Record]:
        labels = iter(self._labels)
        number = 0
        for number, record in enumerate(self._source, 1):
            if number > len(self._labels):
                break
            label = next(labels)
            yield record._replace(label=None if label is None else str(label))
        self.ignored = self._source.ignored
        if number != len(self._labels):
            more = "more than" if number > len(self._labels) else f"only {number} of"
            raise ValueError(f"there are {more} the {len(self._labels)} images that labels were given for")


def read(record: Record) -> Content | HashretError:
    """The content of a record, or why it has none."""
    try:
        return record.read()
    except HashretError as error:
        return without_traceback(error)


def without_traceback(error: HashretError) -> HashretError:
    """The same error without the calls that led to it, which would keep whole files that they were given in memory."""
    error.__context__ = None
    return error.with_traceback(None)


def check_contents(source: Source, fits: bool, takes: str, advice: str) -> None:
    """Raise HashretError unless the contents of a source are what a model takes, which are given in words."""
    if not fits:
        raise HashretError(f"{source.root.location} has {source.describe()}, and the model takes {takes}: {advice}")


def is_image(name: str) -> bool:
    """Whether a file of this name is an image: by its suffix, unless it or a folder in its name is hidden."""
    _, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() in SUFFIXES and not name.startswith(".") and "/." not in name


def label_of(name: str) -> str | None:
    """The folder that an image lies in directly, if it is one of the source's."""
    return name.split("/")[-2] if "/" in name else None


def absolute(path: Path) -> str:
    """A path from the file system's root, which has one spelling for one folder."""
    return os.path.abspath(path)  # noqa: PTH100  # unlike Path.absolute it takes "..": one folder, one root
