"""Remove items and paths, on request or because their source no longer has them."""

import os
from array import array
from collections.abc import Iterable

import numpy as np

from hashret.collection.parts import Parts
from hashret.data.arrays import DATA_SETS
from hashret.errors import HashretError, format_count
from hashret.parallel import batches
from hashret.results import BLOBS, Indexed, Root
from hashret.stores.protocol import PathRef, Snapshot


def remove(parts: Parts, items: Iterable[int | str | os.PathLike[str]], *, dry_run: bool) -> tuple[int, list[Indexed]]:
    """Remove items by id, and everything at or below paths; return the number of removed items, and the removed paths.

    See `Collection.remove`.
    """
    ids = [int(item) for item in items if not isinstance(item, str | os.PathLike)]
    paths = [os.fspath(item) for item in items if isinstance(item, str | os.PathLike)]
    with parts.store.exclusive():
        with parts.store.snapshot() as snapshot:
            refs = snapshot.paths(ids)
            for path in paths:
                refs += _paths_at(parts, snapshot, path)
        item_ids: dict[tuple[Root, str], int | None] = {}
        for ref in refs:  # a path that has an item and has become unreadable comes twice, the item first
            item_ids.setdefault((ref.root, ref.name), ref.item_id)
        with parts.store.transaction(advance=bool(item_ids), rollback=dry_run) as transaction:
            removed = transaction.remove(ids, item_ids)
        if not dry_run:
            parts.originals.discard({*removed, *(name for root, name in item_ids if root == BLOBS)})
            parts.index.persist()
    absolute = {parts.originals.absolute_path(root + name): item_id for (root, name), item_id in item_ids.items()}
    return len(removed), [Indexed(path, "removed", absolute[path]) for path in sorted(absolute)]


def _paths_at(parts: Parts, snapshot: Snapshot, path: str) -> list[PathRef]:
    """Return what is recorded at or below a user's path, or under the name of a data set."""
    refs = snapshot.paths_at(parts.originals.recorded_as(path))
    names_data_set = path.partition("#")[0].partition(":")[0] in (*DATA_SETS, "array")
    return refs or (snapshot.paths_at(path) if names_data_set else [])


class SeenNames:
    """The names of the records that a pass over a source has seen, as hashes of eight bytes.

    A collision, one in some 10¹⁹ names, only keeps a path that could be pruned.
    """

    def __init__(self) -> None:
        self._hashes = array("q")
        self._unreadable: list[str] = []  # folders: their files are not missing

    def add(self, name: str) -> None:
        self._hashes.append(hash(name))
        if name.endswith("/"):
            self._unreadable.append(name)

    def missing(self, names: Iterable[str]) -> tuple[int, list[str]]:
        """Return the number of `names`, and those of them that were not seen."""
        seen = np.sort(np.frombuffer(self._hashes, np.int64))
        unreadable = tuple(self._unreadable)
        total, missing = 0, list[str]()
        for chunk in batches(names, 10_000):
            hashes = np.fromiter(map(hash, chunk), np.int64, len(chunk))
            is_seen = seen.searchsorted(hashes) < seen.searchsorted(hashes, "right")
            total += len(chunk)
            missing += [chunk[i] for i in np.flatnonzero(~is_seen) if not chunk[i].startswith(unreadable)]
        return total, missing


def prune(parts: Parts, root: Root, seen: SeenNames, *, force: bool) -> int:
    """Remove the paths under `root` that were not seen; return their number.

    Raise HashretError if they are more than half, unless `force`.
    """
    with parts.store.transaction() as transaction:
        total, missing = seen.missing(transaction.names(root))
        if not force and 2 * len(missing) > total:
            raise HashretError(
                f"{len(missing)} of {format_count(total, 'path')} under {root} would be removed: check that the source "
                f"is complete, then add --force"
            )
        transaction.remove(paths=((root, name) for name in missing))
    return len(missing)
