"""Moving a collection to another model, or to another index."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.collection.ingest import BATCH_ITEMS, PendingRecord, decode, hash_contents
from hashret.collection.parts import Parts
from hashret.data.contents import Inputs
from hashret.data.records import Record, read
from hashret.errors import HashretError, damaged, format_count
from hashret.indexes import from_spec
from hashret.parallel import Progress, batches, ordered_map
from hashret.results import Root
from hashret.stores.protocol import ModelKey

if TYPE_CHECKING:
    from hashret.hasher import Hasher


class MissingContents(HashretError):
    """The contents of items cannot be read where they were; `paths` are one of each."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"{format_count(len(paths), 'item')} cannot be read where they were, such as {paths[0]}: put the files "
            f"back, index them where they are with hashret index SOURCE --prune, or drop them with hashret reindex "
            f"--drop-missing"
        )
        self.paths = paths


class _Uncoded(NamedTuple):
    """An item that has no code of the new model yet, as it lies under a path."""

    item_id: int
    sha256: str
    record: PendingRecord


def reindex(
    parts: Parts, hasher: "Hasher", *, drop_missing: bool, progress: Callable[[Progress], None] | None = None
) -> int:
    """Code every item with another model, and switch to it in one commit; how many items were forgotten.

    See `Collection.reindex`.
    """
    model = ModelKey(hasher.fingerprint, hasher.bits)
    parts.models.keep(hasher)
    _code_all(parts, hasher, progress)
    with parts.store.snapshot() as rows:
        missing = rows.without_code(model.fingerprint).tolist()
        if missing and not drop_missing:
            items = rows.items(missing)
            if len(items) < len(missing):
                raise damaged(parts.store.location, "it lists items that it does not hold")
            paths = [parts.originals.absolute(item).paths for item in items.values()]
            raise MissingContents([own[0] if own else f"id:{i}" for i, own in zip(items, paths, strict=True)])
        generation = rows.settings.generation + 1
        cache = parts.index.build_ahead(rows, rows.settings.index, model, generation)
    with parts.store.transaction() as transaction:
        transaction.remove(missing)
        transaction.switch_model(model)
        if cache is not None:
            transaction.put_setting("cache", cache)
    return len(missing)


def use_index(parts: Parts, spec: str) -> None:
    """Search by another index from now on; see `Collection.use_index`."""
    with parts.store.snapshot() as rows:
        from_spec(rows.settings.model.bits, spec)  # raises ValueError
    with parts.store.exclusive():
        with parts.store.snapshot() as rows:
            if rows.settings.index == spec:
                return
            cache = parts.index.build_ahead(rows, spec, rows.settings.model, rows.settings.generation)
        with parts.store.transaction(advance=False) as transaction:
            transaction.put_setting("index", spec)
            if cache is not None:
                transaction.put_setting("cache", cache)
        parts.index.persist()


def _code_all(parts: Parts, hasher: "Hasher", progress: Callable[[Progress], None] | None) -> None:
    """Store codes of all items whose contents can be read, a batch after the other."""
    with parts.store.snapshot() as rows:
        total, data_root = rows.count("items"), rows.settings.get("data_root")
        roots, pending = rows.roots(), rows.without_code(hasher.fingerprint)
    done, coded = 0, set[int]()
    for root in roots:
        records = parts.originals.record_batches(root, data_root, BATCH_ITEMS)
        uncoded = _uncoded(parts, root, records, pending, coded)
        for batch in batches(_pixels(hasher, uncoded, coded), BATCH_ITEMS):
            codes = hasher.encode_pixels(np.stack([pixels for _, pixels in batch]))
            with parts.store.transaction(advance=False) as transaction:
                rows_of = ((i, code.tobytes()) for (i, _), code in zip(batch, codes, strict=True))
                transaction.put_codes(hasher.fingerprint, rows_of)
            done += len(batch)
            if progress is not None:
                progress(Progress("reindexing", done, total, {}))


def _pixels(hasher: "Hasher", uncoded: Iterator[_Uncoded], coded: set[int]) -> Iterator[tuple[int, Inputs]]:
    """Id and pixels of those of the items that can still be read and are not `coded`, to which they are added."""

    def prepare(item: _Uncoded) -> tuple[int, Inputs | None]:
        hashed = hash_contents([item.record])
        same = hashed[0].sha256 == item.sha256
        return item.item_id, decode(hashed, hasher.preprocessing)[0].pixels if same else None

    for item_id, pixels in ordered_map(prepare, uncoded, weight_of=lambda item: max(1, 16 * item.record.weight)):
        if pixels is not None and item_id not in coded:
            coded.add(item_id)
            yield item_id, pixels


def _uncoded(
    parts: Parts, root: Root, records: Iterator[list[Record]], pending: NDArray[np.int64], coded: set[int]
) -> Iterator[_Uncoded]:
    """The records, read, of items that have no code yet, whose ids are `pending`, ascending, and not `coded` since."""
    for batch in records:
        with parts.store.snapshot() as rows:
            known = rows.known_paths(root, [record.name for record in batch])
            ids = np.array([path.item_id for path in known.values() if path.item_id is not None], np.int64)
            listed = pending.searchsorted(ids) < pending.searchsorted(ids, "right")
            items = rows.items({*ids[listed].tolist()} - coded)
        for record in batch:
            path = known.get(record.name)
            if path is not None and path.item_id in items and path.item_id not in coded:
                sha256 = items[path.item_id].sha256
                yield _Uncoded(path.item_id, sha256, PendingRecord(record, content=read(record)))
