"""The public value types that a collection and a client return."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hashret.errors import HashretError, check_count

TARGET_PRECISION = 0.95  # the default precision for which a radius is chosen

# The limits of one request to a service, which clients respect.
MAX_QUERIES = 256  # images or codes
MAX_K = 1000  # hits per query
MAX_HITS = 25_600  # hits of all queries together

_KEY = re.compile(r'[^"\\\x00-\x1f]{1,200}')

Counts = NDArray[np.float64]  # (bits + 1,), one for each distance or radius


def is_key(text: str) -> bool:
    """Return whether a text can be a metadata key: 1 to 200 characters, no quotation marks, backslashes or controls."""
    return _KEY.fullmatch(text) is not None


class Root(str):
    """The root of paths: the text before each name, so that root + name is the whole path.

    The root of a folder ends in "/", of an archive in "!/", of the rows of a file or a data set in "#". It is stored as
    text, and only this class parses it. `BLOBS`, relative to the collection's folder, is the root of contents that were
    added without a file.
    """

    __slots__ = ()

    @classmethod
    def of_folder(cls, path: str) -> Self:
        return cls(path.rstrip("/") + "/")

    @classmethod
    def of_archive(cls, path: str) -> Self:
        return cls(f"{path}!/")

    @classmethod
    def of_rows(cls, name: str) -> Self:
        """Return the root of the rows of an array file, given its path, or of a data set, given its name."""
        return cls(f"{name}#")

    @property
    def location(self) -> str:
        """The path of the folder or file, or the name of the data set, as `open_source` takes it.

        A root that ends in "x!/" can be of a folder "x!" or of an archive "x": it is the folder's while that exists.
        """
        if self.endswith("#"):
            return self[:-1]
        if self.endswith("!/") and not self.is_folder:
            return self[:-2]
        return self.rstrip("/") or "/"

    @property
    def is_folder(self) -> bool:
        """Return whether this is the root of an existing folder."""
        return self.endswith("/") and Path(self).is_dir()

    def within(self, path: str) -> bool:
        """Return whether this is the root of the folder, archive or file at `path`, or of one inside it."""
        folder = path.rstrip("/") + "/"
        if self == folder and self.endswith("!/"):  # of a folder "x!", unless only an archive "x" exists
            return self.is_folder or not Path(self.removesuffix("!/")).is_file()
        if self in (f"{path}!/", f"{path}#"):
            return not self.is_folder
        return self.startswith(folder)


BLOBS = Root("blobs/")


class Hit(NamedTuple):
    """A similar image: its `distance` in bits and its paths, of which `path` is the first.

    If hits are not ordered by distance, `score` is the value that they are ordered by.
    """

    distance: int
    id: int
    path: str | None
    paths: list[str]
    label: str | None
    metadata: dict[str, Any] | None
    score: float | None = None


RANKS = ("distance", "asymmetric")


@dataclass(frozen=True)
class QueryOptions:
    """The options of a query. `k` limits the number of hits, and `max_distance` their distance in bits; one of them may
    be None.

    Hits are ordered by `rank`. With `where`, only items that match this filter are hits. Raise ValueError for invalid
    values.
    """

    k: int | None = 10
    max_distance: int | None = None
    rank: str = "distance"
    where: str | None = None

    def __post_init__(self) -> None:
        if self.rank not in RANKS:
            raise ValueError(f"there is no rank {self.rank!r}; choose {' or '.join(RANKS)}")
        if self.k is None and self.max_distance is None:
            raise ValueError("give k, max_distance, or both")
        if self.k is not None:
            check_count(self.k, 1, "k")
        if self.max_distance is not None:
            check_count(self.max_distance, 0, "max_distance")

    def with_k(self, k: int | None) -> Self:
        """Return the same options with another `k`."""
        return replace(self, k=k)


class Item(NamedTuple):
    """An item: one distinct content, identified by its SHA-256, and the paths where it was found."""

    id: int
    sha256: str
    width: int
    height: int
    bytes: int
    added: str
    metadata: dict[str, Any] | None
    paths: list[str]
    label: str | None


class Failure(NamedTuple):
    """A path that could not be read, with the reason and the time."""

    path: str
    reason: str
    seen: str


class Group(NamedTuple):
    """Near-duplicates: the item to keep, then the others by distance from it. The path to keep leads the paths of the
    first item.

    A group of one item has several paths with equal contents.
    """

    items: list[Item]
    distances: list[int]  # from the first


class Indexed(NamedTuple):
    """The result for one path: "added", "updated", "unchanged", "removed", or "failed" with the reason."""

    path: str
    status: str
    id: int | None = None
    reason: str | None = None


class State(NamedTuple):
    """A state of a collection: its generation, and a random id.

    The generation alone does not identify a state: a store that was restored from a backup reaches it a second time.
    """

    generation: int
    id: str


class Backup(NamedTuple):
    """The numbers of items and of files in a backup, besides the database, and the files that were missing."""

    items: int
    files: int  # the folder of the model, and contents that the collection stores itself
    missing: list[str]


class IndexReport(NamedTuple):
    """The numbers of paths that an index run added, left unchanged, updated because the file changed, removed, or
    failed to read.

    `failures` lists the paths that could not be read in this run, with reasons. `failed` also counts paths that failed
    in an earlier run and have not changed. `decoded` counts decoded images, `ignored` files skipped because of their
    names, `described` items whose metadata changed, and `unmatched` rows of metadata without an image in the source.
    """

    added: int
    unchanged: int
    updated: int
    removed: int
    failed: int
    decoded: int
    ignored: int
    failures: list[tuple[str, str]]
    described: int = 0
    unmatched: int = 0


class Calibration(NamedTuple):
    """The distribution of Hamming distances: the number of copies at each distance, 0 to bits, from their original, and
    of other images at each distance from a copy."""

    source: str  # of the copies: "altered copies" for augmented ones, "verdicts", or a file of labelled pairs
    copies: dict[str, list[int]]  # by transform
    others: list[float]
    items: int | None  # the size of the collection of the others; None for labelled pairs

    @property
    def recall(self) -> Counts:
        """The share of copies within each radius, (bits + 1,)."""
        return _share(np.sum(list(self.copies.values()), axis=0))

    @property
    def recalls(self) -> dict[str, Counts]:
        """The share of copies within each radius for each transform."""
        return {transform: _share(np.array(counts)) for transform, counts in self.copies.items()}

    def precision(self, items: int | None = None) -> Counts:
        """Return the precision at each radius, (bits + 1,): the share of copies among all images within it; 1 if there
        are none.

        With `items`, the number of other images is scaled to a collection of that many items.
        """
        copies = np.sum(list(self.copies.values()), axis=0).cumsum()
        others = np.cumsum(self.others)
        if items is not None and self.items is not None:
            others = others * max(0, items - 1) / max(1, self.items - 1)
        total = copies + others
        return np.asarray(np.divide(copies, total, out=np.ones(len(total)), where=total > 0))

    def radius(self, target: float = TARGET_PRECISION, items: int | None = None) -> int:
        """Return the least radius with the highest recall at a precision of at least `target`, among `items` items.

        Raise HashretError if no radius has this precision, and ValueError for a target outside (0, 1].
        """
        if not 0 < target <= 1:
            raise ValueError(f"a target is a precision above 0 and at most 1, not {target!r}")
        precision = self.precision(items)
        good = np.flatnonzero((precision >= target) & (self.recall > 0))
        if not len(good):
            best = precision[self.recall > 0].max()
            raise HashretError(f"no radius has precision {target:g}: the best there is has {best:.3f}, so aim lower")
        return int(np.searchsorted(self.recall, self.recall[good[-1]]))

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def _share(counts: NDArray[np.int64]) -> Counts:
    """Return the share found within each radius."""
    return np.asarray(counts.cumsum() / max(1, counts.sum()), np.float64)
