"""Switch a collection to another model, or to another index."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.collection.ingest import BATCH_ITEMS
from hashret.collection.parts import Parts
from hashret.collection.pending import PendingRecord, decode, hash_contents
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
    """The contents of some items are no longer readable at any of their paths; `paths` has one path of each."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"{format_count(len(paths), 'item')} cannot be read where they were, such as {paths[0]}: put the files "
            f"back, index them where they are with hashret index SOURCE --prune, or drop them with hashret reindex "
            f"--drop-missing"
        )
        self.paths = paths


class _Unencoded(NamedTuple):
    """An item without a code of the new model, with a record of one of its paths."""

    item_id: int
    sha256: str
    pending: PendingRecord


def reindex(
    parts: Parts, hasher: "Hasher", *, drop_missing: bool, progress: Callable[[Progress], None] | None = None
) -> int:
    """Encode every item with another model, and switch to it in one commit; return the number of removed items.

    See `Collection.reindex`.
    """
    model = ModelKey(hasher.fingerprint, hasher.bits)
    parts.models.save(hasher)
    _encode_all(parts, hasher, progress)
    with parts.store.snapshot() as snapshot:
        missing = snapshot.without_code(model.fingerprint).tolist()
        if missing and not drop_missing:
            items = snapshot.items(missing)
            if len(items) < len(missing):
                raise damaged(parts.store.location, "it lists items that it does not hold")
            paths = {i: parts.originals.with_absolute_paths(item).paths for i, item in items.items()}
            raise MissingContents([item_paths[0] if item_paths else f"id:{i}" for i, item_paths in paths.items()])
        generation = snapshot.settings.generation + 1
        cache_record = parts.index.build_ahead(snapshot, snapshot.settings.index, model, generation)
    with parts.store.transaction() as transaction:
        transaction.remove(missing)
        transaction.switch_model(model)
        if cache_record is not None:
            transaction.put_setting("cache", cache_record.to_json(transaction.state))
    return len(missing)


def use_index(parts: Parts, spec: str) -> None:
    """Switch to another index; see `Collection.use_index`."""
    with parts.store.snapshot() as snapshot:
        from_spec(snapshot.settings.model.bits, spec)  # raises ValueError
    with parts.store.exclusive():
        with parts.store.snapshot() as snapshot:
            settings = snapshot.settings
            if settings.index == spec:
                return
            cache_record = parts.index.build_ahead(snapshot, spec, settings.model, settings.generation)
        with parts.store.transaction(advance=False) as transaction:
            transaction.put_setting("index", spec)
            if cache_record is not None:
                transaction.put_setting("cache", cache_record.to_json(transaction.state))
        parts.index.persist()


def _encode_all(parts: Parts, hasher: "Hasher", progress: Callable[[Progress], None] | None) -> None:
    """Store codes of all items whose contents are readable, one batch at a time."""
    with parts.store.snapshot() as snapshot:
        total, data_root = snapshot.count("items"), snapshot.settings.get("data_root")
        roots, missing = snapshot.roots(), snapshot.without_code(hasher.fingerprint)
    done, encoded = 0, set[int]()
    for root in roots:
        records = parts.originals.record_batches(root, data_root, BATCH_ITEMS)
        unencoded = _unencoded(parts, root, records, missing, encoded)
        for batch in batches(_pixels(hasher, unencoded, encoded), BATCH_ITEMS):
            codes = hasher.encode_pixels(np.stack([pixels for _, pixels in batch]))
            with parts.store.transaction(advance=False) as transaction:
                rows = ((i, code.tobytes()) for (i, _), code in zip(batch, codes, strict=True))
                transaction.put_codes(hasher.fingerprint, rows)
            done += len(batch)
            if progress is not None:
                progress(Progress("reindexing", done, total, {}))


def _pixels(hasher: "Hasher", unencoded: Iterator[_Unencoded], encoded: set[int]) -> Iterator[tuple[int, Inputs]]:
    """Iterate over id and pixels of the readable items that are not in `encoded`, and add them to it."""

    def prepare(item: _Unencoded) -> tuple[int, Inputs | None]:
        hashed = hash_contents([item.pending])
        same = hashed[0].sha256 == item.sha256
        return item.item_id, decode(hashed, hasher.preprocessing)[0].pixels if same else None

    for item_id, pixels in ordered_map(prepare, unencoded, weight_of=lambda item: max(1, 16 * item.pending.weight)):
        if pixels is not None and item_id not in encoded:
            encoded.add(item_id)
            yield item_id, pixels


def _unencoded(
    parts: Parts, root: Root, records: Iterator[list[Record]], missing: NDArray[np.int64], encoded: set[int]
) -> Iterator[_Unencoded]:
    """Read the records of items whose ids are among `missing`, ascending, and not in `encoded` yet."""
    for batch in records:
        with parts.store.snapshot() as snapshot:
            known_paths = snapshot.known_paths(root, [record.name for record in batch])
            ids = np.array([path.item_id for path in known_paths.values() if path.item_id is not None], np.int64)
            is_missing = missing.searchsorted(ids) < missing.searchsorted(ids, "right")
            items = snapshot.items({*ids[is_missing].tolist()} - encoded)
        for record in batch:
            path = known_paths.get(record.name)
            if path is not None and path.item_id in items and path.item_id not in encoded:
                sha256 = items[path.item_id].sha256
                yield _Unencoded(path.item_id, sha256, PendingRecord(record, content=read(record)))
