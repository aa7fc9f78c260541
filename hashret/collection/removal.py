"""Forgetting items and paths."""

import os
from collections.abc import Iterable

from hashret.collection.parts import Parts
from hashret.data.arrays import DATA_SETS
from hashret.results import BLOBS, Indexed, Root
from hashret.stores.protocol import PathRef, Snapshot


def remove(parts: Parts, items: Iterable[int | str | os.PathLike[str]], *, dry_run: bool) -> tuple[int, list[Indexed]]:
    """Forget items by id, and what is recorded at or below paths; how many items are gone, and the paths that are.

    See `Collection.remove`.
    """
    ids = [int(item) for item in items if not isinstance(item, str | os.PathLike)]
    paths = [os.fspath(item) for item in items if isinstance(item, str | os.PathLike)]
    with parts.store.exclusive():
        with parts.store.snapshot() as rows:
            found = rows.paths(ids)
            for path in paths:
                found += _recorded(parts, rows, path)
        named: dict[tuple[Root, str], int | None] = {}
        for ref in found:  # a path that led to an item, and can no longer be read, is found twice
            named.setdefault((ref.root, ref.name), ref.item_id)
        with parts.store.transaction(advance=bool(named), rollback=dry_run) as transaction:
            gone = transaction.remove(ids, named)
        if not dry_run:
            parts.originals.discard({*gone, *(name for root, name in named if root == BLOBS)})
            parts.index.persist()
    whole = {parts.originals.whole(root + name): item_id for (root, name), item_id in named.items()}
    return len(gone), [Indexed(path, "removed", whole[path]) for path in sorted(whole)]


def _recorded(parts: Parts, rows: Snapshot, path: str) -> list[PathRef]:
    """What is recorded at or below a path as a user would write it."""
    found = rows.paths_at(parts.originals.recorded_as(path))
    names_data_set = path.partition("#")[0].partition(":")[0] in (*DATA_SETS, "array")
    return found or (rows.paths_at(path) if names_data_set else [])
