"""The storage interface of a collection: the `ItemStore` protocol and its value types.

A `Snapshot` reads one consistent state. A `Transaction` reads and writes, and is durable when it ends. A store does not
depend on models, images or indexes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes
from hashret.errors import damaged
from hashret.results import Failure, Item, Root, State

Ids = NDArray[np.int64]
Metadata = dict[str, Any]


class ModelKey(NamedTuple):
    """The model of a set of codes, by its fingerprint, and the width of its codes in bits."""

    fingerprint: str
    bits: int


class Settings(dict[str, str]):
    """The settings of a collection: texts by key.

    Reading a missing key raises HashretError, which names `location` as damaged.
    """

    def __init__(self, settings: Mapping[str, str], location: str) -> None:
        super().__init__(settings)
        self._location = location

    def __missing__(self, key: str) -> str:
        raise damaged(self._location, f"it has no setting {key}")

    @cached_property
    def model(self) -> ModelKey:
        """The current model."""
        return ModelKey(self["fingerprint"], int(self["bits"]))

    @property
    def generation(self) -> int:
        """The version of the data: the number of committed transactions that changed items, codes, paths or verdicts.

        As in multi-version concurrency control, each snapshot reads the data of one generation.
        """
        return int(self["generation"])

    @property
    def index(self) -> str:
        """The specification of the index, as `hashret.indexes.from_spec` takes it."""
        return self["index"]


class ItemRow(NamedTuple):
    """A content at one path, as it is stored; `code` is None for a content that the store has already."""

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
    added: str | None = None  # UTC, in ISO 8601; None for the current time
    id: int | None = None  # of a new item: used if it is above every id that was ever assigned


class KnownPath(NamedTuple):
    """The recorded state of a path."""

    item_id: int | None  # None if it was never readable
    size: int
    mtime_ns: int
    failed: bool  # whether the last attempt to read it failed


class PathRef(NamedTuple):
    """A recorded path; `item_id` is None if it was never readable."""

    root: Root
    name: str
    item_id: int | None
    mtime_ns: int


class FailedPath(NamedTuple):
    """An unreadable path, as it is stored."""

    root: str
    name: str
    size: int
    mtime_ns: int
    reason: str


class Changes(NamedTuple):
    """The difference between the codes of two generations."""

    removed: Ids  # (r,)
    added: Ids  # (a,)
    codes: Codes  # (a, bits // 8), of the added items


class Ranking(NamedTuple):
    """All items, best first, with the number of paths of each."""

    ids: Ids  # (n,)
    paths: Ids  # (n,)


class Snapshot(Protocol):
    """Reads of one consistent state. Ids are never reused: an id means the same content in every state."""

    @property
    def state(self) -> State:
        """The state that is read: equal states give equal reads. Within a transaction, the state that it commits."""

    @property
    def settings(self) -> Settings:
        """All settings."""

    def count(self, table: Literal["items", "paths", "failures", "changes"], after: int = 0) -> int:
        """Count the rows of a table; of "changes" only those of generations above `after`."""

    def ids(self, after: int = 0, limit: int | None = None, where: str | None = None) -> Ids:
        """Return item ids above `after`, ascending, at most `limit`; with `where`, only of items that match the filter.

        Raise HashretError for an invalid filter, and for any filter if the store has none.
        """

    def items(self, ids: Iterable[int], *, metadata: bool = True, max_bytes: int | None = None) -> dict[int, Item]:
        """Return the items with these ids, by id, without those that do not exist.

        With `metadata` False, theirs is None. Raise TooLarge once their paths and metadata are longer than `max_bytes`
        in all, before the rest is read.
        """

    def codes(
        self, ids: Sequence[int] | None = None, *, model: ModelKey | None = None, max_items: int | None = None
    ) -> tuple[Ids, Codes]:
        """Return ids (n,), ascending, and codes, uint8 (n, bits // 8), of all items or of those among `ids`.

        The codes are of the current model unless `model` is given. `max_items` limits n to a sample that is spread
        evenly over all ids. Raise HashretError if a code does not have the model's length.
        """

    def find(self, sha256s: Sequence[str]) -> dict[str, int]:
        """Return the ids of the items with these contents, by SHA-256."""

    def paths(self, ids: Iterable[int]) -> list[PathRef]:
        """Return all paths of these items."""

    def paths_at(self, path: str) -> list[PathRef]:
        """Return what is recorded at a full path, or below it if it is a folder, an archive or a multi-image file."""

    def roots(self) -> list[Root]:
        """Return the roots of all paths and failures."""

    def known_paths(self, root: str, names: Sequence[str]) -> dict[str, KnownPath]:
        """Return the recorded state of the paths with these names, by name, without those that are not recorded."""

    def names(self, root: str) -> Iterator[str]:
        """Iterate over the distinct names of all paths and failures under a root."""

    def failures(self) -> Iterator[tuple[Root, Failure]]:
        """Iterate over all unreadable paths, each with its root, ordered by root and name."""

    def changes(self, since: State) -> Changes | None:
        """Return the difference from `since` to this state; None if `since` is of another history, or the record of the
        changes has been deleted."""

    def item_rows(self) -> Iterator[ItemRow]:
        """Iterate over all items, one row for each path, ordered by id: `Transaction.put` recreates them from these."""

    def verdicts(self, verdict: str) -> Ids:
        """Return the pairs of ids (n, 2) with this verdict, the lower id first, in ascending order."""

    def ranking(self, keep: str) -> Ranking:
        """Rank all items by which copy to keep.

        `keep` is "largest" (by pixels, then bytes), "oldest" (by modification time), or a folder whose items come
        first, the largest leading. Raise HashretError if no path lies in the folder.
        """

    def without_code(self, fingerprint: str) -> Ids:
        """Return the ids, ascending, of the items without a code of this model."""


class Transaction(Snapshot, Protocol):
    """Writes that become durable together when the transaction ends; its own reads see them at once."""

    def put(self, rows: Sequence[ItemRow]) -> list[int | None]:
        """Store contents, with codes of the current model, under their paths; return the item id of each row.

        An existing content gains a path. A path that belonged to another item is moved, and an item without paths is
        removed. A row without a code whose content is no longer stored is skipped, and its id is None.
        """

    def put_failures(self, failures: Iterable[FailedPath]) -> None:
        """Record unreadable paths."""

    def remove(self, ids: Iterable[int] = (), paths: Iterable[tuple[str, str]] = ()) -> list[str]:
        """Remove items with all their paths, and paths and failures by (root, name); return the removed contents.

        An item that loses its last path is removed too. Ids and paths that do not exist are ignored.
        """

    def put_metadata(self, metadata: Mapping[int, Metadata]) -> None:
        """Replace the metadata of items, given by id."""

    def put_codes(self, fingerprint: str, codes: Iterable[tuple[int, bytes]]) -> None:
        """Add codes of a model that is not the current one yet, as (item id, bits // 8 bytes)."""

    def switch_model(self, model: ModelKey) -> None:
        """Make `model` the current one, and delete the codes of all others and the setting "calibration"."""

    def put_verdict(self, a: int, b: int, verdict: str) -> None:
        """Record the verdict on two items, replacing an earlier one."""

    def put_setting(self, key: str, value: str) -> None:
        """Set a setting."""

    def forget_changes(self, up_to: int) -> None:
        """Delete the record of changes up to and including generation `up_to`."""


class ItemStore(Protocol):
    """The storage of a collection's items. One object may be used by any number of threads."""

    @property
    def location(self) -> str:
        """The name of the store in messages, such as the path of its file."""

    @property
    def read_only(self) -> bool:
        """Whether the store was opened without write access."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Begin a read transaction. Nested in another of the same thread, it reads the same state."""

    def transaction(self, *, advance: bool = True, rollback: bool = False) -> AbstractContextManager[Transaction]:
        """Begin a write transaction, within `exclusive`: committed when it ends, rolled back by an exception.

        `advance` False keeps the generation; the transaction must then change nothing that query results depend on.
        `rollback` True rolls back in any case.
        """

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the write lock.

        Raise HashretError if the store is read-only, has been replaced, or cannot wait for the lock, which another
        process holds.
        """

    def close(self) -> None:
        """Close all connections and files."""
