"""Public value types: what a collection gives, and what a client gives too."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hashret.errors import HashretError, check_count

TARGET_PRECISION = 0.95  # the precision that a radius is chosen for, if no other is asked for

# What a service takes and gives in one request, which its clients keep to.
MAX_QUERIES = 256  # images or codes
MAX_K = 1000  # hits of a query
MAX_HITS = 25_600  # of all queries together

_KEY = re.compile(r'[^"\\\x00-\x1f]{1,200}')

Counts = NDArray[np.float64]  # (bits + 1,), one for each distance or radius


def is_key(text: str) -> bool:
    """Whether a text can be a key of metadata: 1 to 200 characters, no quotation mark, backslash or control."""
    return _KEY.fullmatch(text) is not None


class Root(str):
    """What paths are recorded under: the text in front of each name, which together make the whole path.

    A folder's ends in "/", an archive's in "!/", that of the rows of a file or a data set in "#". It is text wherever
    it is stored; that grammar is read here alone. `BLOBS` is the root of contents that came without a file, relative to
    the collection's folder.
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
        """That of an array file, by its path, or of a data set, by its name."""
        return cls(f"{name}#")

    @property
    def location(self) -> str:
        """The folder, file or data set itself, as a user would write it: what `open_source` opens again.

        The root of a folder called "x!" reads like that of an archive "x": it is the folder's while there is one.
        """
        if self.endswith("#"):
            return self[:-1]
        if self.endswith("!/") and not self.is_folder:
            return self[:-2]
        return self.rstrip("/") or "/"

    @property
    def is_folder(self) -> bool:
        """Whether it is that of a folder that exists now."""
        return self.endswith("/") and Path(self).is_dir()

    def within(self, path: str) -> bool:
        """Whether this is the root of the folder, archive or file at `path`, or of one below it."""
        folder = path.rstrip("/") + "/"
        if self == folder and self.endswith("!/"):  # that of a folder called "x!", unless there is an archive "x"
            return self.is_folder or not Path(self.removesuffix("!/")).is_file()
        if self in (f"{path}!/", f"{path}#"):
            return not self.is_folder
        return self.startswith(folder)


BLOBS = Root("blobs/")


class Hit(NamedTuple):
    """A similar image: `distance` in bits, and where it lies; `path` is the first of `paths`. `score` is what it is
    ordered by where that is not the distance."""

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
    """What is asked of a query: the `k` nearest, all within `max_distance` bits (`k` None), or both; in the order of a
    rank; and only among the items that the filter `where` holds for. Raises ValueError for impossible values."""

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
        """The same for another `k`."""
        return replace(self, k=k)


class Item(NamedTuple):
    """One content and where it lies."""

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
    """A path that could not be read, why, and when that was found."""

    path: str
    reason: str
    seen: str


class Group(NamedTuple):
    """Items that are copies of one image: first the one to keep, its best path first, then the others, nearest first.

    A group of one item has several paths, of equal contents.
    """

    items: list[Item]
    distances: list[int]  # from the first


class Indexed(NamedTuple):
    """What became of one path: "added", "updated", "unchanged", "removed" or "failed", with the reason for that."""

    path: str
    status: str
    id: int | None = None
    reason: str | None = None


class IndexReport(NamedTuple):
    """How many paths were added, were there already, led to a new content, were forgotten, and could not be read.

    `failures` are the paths, with reasons, that could not be read in this run; `failed` also counts the ones that an
    earlier run found so and that have not changed. `decoded` counts the images that had to be decoded, and `ignored`
    the files that were passed over because of their names. `described` counts the items whose metadata changed, and
    `unmatched` the rows of metadata that name no image of this source.
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
    """How many copies of images, and how many other images, were found at each distance from 0 to bits."""

    source: str  # what the copies were: "altered copies", "verdicts", or a file of pairs
    copies: dict[str, list[int]]  # by kind
    others: list[float]
    items: int | None  # among which the others were; None for judged pairs, where it does not matter

    @property
    def recall(self) -> Counts:
        """The share of copies within each radius, (bits + 1,)."""
        return _share(np.sum(list(self.copies.values()), axis=0))

    @property
    def recalls(self) -> dict[str, Counts]:
        """The same for each kind of copies."""
        return {kind: _share(np.array(found)) for kind, found in self.copies.items()}

    def precision(self, items: int | None = None) -> Counts:
        """The share of copies in what lies within each radius, (bits + 1,), among so many items, if not as many as
        there were; 1 where nothing lies within it."""
        right = np.sum(list(self.copies.values()), axis=0).cumsum()
        wrong = np.cumsum(self.others)
        if items is not None and self.items is not None:
            wrong = wrong * max(0, items - 1) / max(1, self.items - 1)
        shown = right + wrong
        return np.asarray(np.divide(right, shown, out=np.ones(len(shown)), where=shown > 0))

    def radius(self, target: float = TARGET_PRECISION, items: int | None = None) -> int:
        """The radius that finds most copies at this precision or better, among so many items; of several the least.

        Raises HashretError if there is none, and ValueError for a target that is no share.
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


def _share(found: NDArray[np.int64]) -> Counts:
    """The share that is found within each radius."""
    return np.asarray(found.cumsum() / max(1, found.sum()), np.float64)
