"""What a collection needs of the place where its items live: the `ItemStore` protocol and its value types.

Reads are verbs of a `Snapshot`, in which everything is of one state; writes are verbs of a `Transaction`, which is
durable when it ends. A store knows nothing of models, images or indexes.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.errors import damaged
from hashret.results import Failure, Item, Root

Ids = NDArray[np.int64]
Metadata = dict[str, Any]


class ModelKey(NamedTuple):
    """Which model codes are of, and how many bits they have."""

    fingerprint: str
    bits: int


class Settings(dict[str, str]):
    """The settings of a collection, texts by name; `location` is what an error names as damaged if one is missing."""

    def __init__(self, settings: Mapping[str, str], location: str) -> None:
        super().__init__(settings)
        self._location = location

    def __missing__(self, key: str) -> str:
        raise damaged(self._location, f"it has no setting {key}")

    @cached_property
    def model(self) -> ModelKey:
        """The model that the codes of the items are of."""
        return ModelKey(self["fingerprint"], int(self["bits"]))

    @property
    def generation(self) -> int:
        """How many transactions have changed what answers are made of."""
        return int(self["generation"])

    @property
    def index(self) -> str:
        """The index to search by, as `hashret.indexes.from_spec` takes it."""
        return self["index"]


class ItemRow(NamedTuple):
    """A content as found under a path, ready to be stored; `code` is None where the content is known already."""

    root: str
    name: str
    label: str | None
    size: int
    mtime_ns: int
    sha256: str
    length: int  # of the file, in bytes
    width: int
    height: int
    code: bytes | None
    metadata: Metadata | None = None
    added: str | None = None  # if it was before now
    id: int | None = None  # the id that it gets, if that is above all that were ever given


class KnownPath(NamedTuple):
    """What is known of a path since it was last looked at."""

    item_id: int | None  # None if it never could be read
    size: int
    mtime_ns: int
    failed: bool  # whether it could not be read then


class PathRef(NamedTuple):
    """A path under which something is recorded; `item_id` is None for what never could be read."""

    root: Root
    name: str
    item_id: int | None
    mtime_ns: int


class FailedPath(NamedTuple):
    """A path that could not be read, ready to be stored."""

    root: str
    name: str
    size: int
    mtime_ns: int
    reason: str


class Changes(NamedTuple):
    """How the codes of one generation become those of a later one."""

    removed: Ids  # (r,)
    added: Ids  # (a,)
    codes: Codes  # (a, bits // 8), of those added


class Ranking(NamedTuple):
    """All items, of several copies the one to keep first, and how many paths lead to each: both (n,)."""

    ids: Ids
    paths: Ids


class Snapshot(Protocol):
    """Reads that are all of one state. Ids are never used again, so an id means the same content in every state."""

    @property
    def state(self) -> Hashable:
        """What tells this state from every other: equal states give equal answers. It changes with the generation, and
        with nothing else that one process sees."""

    @property
    def settings(self) -> Settings:
        """All settings."""

    def count(self, table: Literal["items", "paths", "failures", "changes"], after: int = 0) -> int:
        """How many there are; of changes those of generations above `after`."""

    def ids(self, after: int = 0, limit: int | None = None, where: str | None = None) -> Ids:
        """The ids above `after`, ascending, at most `limit`, of the items that the filter `where` holds for.

        Raises HashretError for what is no filter, and in a store that has none.
        """

    def items(self, ids: Iterable[int]) -> dict[int, Item]:
        """The items with these ids, by id; those that do not exist are left out."""

    def codes(
        self, ids: Sequence[int] | None = None, *, model: ModelKey | None = None, max_items: int | None = None
    ) -> tuple[Ids, Codes]:
        """Ids (n,), ascending, and codes, uint8 (n, bits // 8), of all items or of those among `ids`.

        They are of the current model unless another one is named. With `most` they are of at most so many items, spread
        over all ids. Raises HashretError for codes that are not of the model's length.
        """

    def find(self, sha256s: Sequence[str]) -> dict[str, int]:
        """The ids of the items with these contents, by content."""

    def paths(self, ids: Iterable[int]) -> list[PathRef]:
        """The paths of items."""

    def paths_at(self, path: str) -> list[PathRef]:
        """What is recorded at a whole path, or below it if that is a folder, an archive or a file of many images."""

    def roots(self) -> list[Root]:
        """Everything that any path or failure is recorded under."""

    def known_paths(self, root: str, names: Sequence[str]) -> dict[str, KnownPath]:
        """What is known of the paths with these names, by name; those of which nothing is known are left out."""

    def names(self, root: str) -> Iterator[str]:
        """The names of all paths and failures under a root, each once."""

    def failures(self) -> Iterator[tuple[Root, Failure]]:
        """The root of each path that could not be read, and what is known of it, in order."""

    def changes(self, since: int) -> Changes | None:
        """How the codes of generation `since` become those of this state; None if that is no longer recorded."""

    def item_rows(self) -> Iterator[ItemRow]:
        """Everything that `Transaction.put` needs to make the items again, path for path, by id."""

    def verdicts(self, verdict: str) -> Ids:
        """The pairs of ids (n, 2) with this verdict, the lower id first, in ascending order."""

    def ranking(self, keep: str) -> Ranking:
        """All items in the order in which copies are kept: "largest" (in pixels, then bytes), "oldest" (by the date of
        the file), or else what lies under the folder `keep`, then the largest. HashretError if nothing lies there."""

    def without_code(self, fingerprint: str) -> Ids:
        """The ids, ascending, of the items that have no code of a model."""


class Transaction(Snapshot, Protocol):
    """Writes that become durable together when the transaction ends; its reads see them at once."""

    @property
    def generation(self) -> int:
        """The generation that the transaction makes."""

    def put(self, rows: Sequence[ItemRow]) -> list[int | None]:
        """Store contents, with codes of the current model, under their paths; the item's id of each.

        A content that is there already gains a path. A path that led to another item no longer does, and an item
        whose last path is lost goes with it. A content that comes without a code, because it was there, and is there
        no more, is not stored and gets None.
        """

    def put_failures(self, failures: Iterable[FailedPath]) -> None:
        """Record paths that could not be read."""

    def remove(self, ids: Iterable[int] = (), paths: Iterable[tuple[str, str]] = ()) -> list[str]:
        """Remove items with all their paths, and paths and failures by (root, name), and with their last paths further
        items; the contents that went. What does not exist is passed over."""

    def put_metadata(self, metadata: Mapping[int, Metadata]) -> None:
        """Replace the metadata of items."""

    def put_codes(self, fingerprint: str, codes: Iterable[tuple[int, bytes]]) -> None:
        """Add codes, of bits // 8 bytes each, of a model that is not the current one yet, by item."""

    def switch_model(self, model: ModelKey) -> None:
        """Make a model the current one, and drop the codes of all others and what `calibration` says of them."""

    def put_verdict(self, a: int, b: int, verdict: str) -> None:
        """Record what two items are to each other, in place of an earlier verdict."""

    def put_setting(self, key: str, value: str) -> None:
        """Change a setting."""

    def forget_changes(self, up_to: int) -> None:
        """Drop the record of changes up to a generation."""


class ItemStore(Protocol):
    """Where the items of a collection live. Any number of threads may use one object."""

    @property
    def location(self) -> str:
        """What errors and messages name as the place."""

    @property
    def read_only(self) -> bool:
        """Whether there are no transactions."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """A read transaction: everything read in it is of one state. Within another one of the same thread it is a
        part of that."""

    def transaction(self, *, advance: bool = True, rollback: bool = False) -> AbstractContextManager[Transaction]:
        """A write transaction, durable when it ends without an exception, and undone by one.

        With `advance` False it makes no new generation: nothing may change that an answer is made of. With `rollback`
        it is undone in any case. To be used within `exclusive`.
        """

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep all others from writing. Raises HashretError if the store is read-only or was replaced, or if another
        process is writing and the store cannot wait for it."""

    def close(self) -> None:
        """Let go of what is open."""
