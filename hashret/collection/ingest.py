"""Ingestion: index the images of a source in one pass, and add contents without files.

Records flow through generators. The caller's thread walks the source and reads the store, one pool of threads reads
and hashes, one decodes, and one runs the model; each holds a bounded number of records. For arrays, which involve no
waiting, the caller's thread does everything but the model, and helps with that.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hashret.collection.parts import Parts
from hashret.collection.pending import PendingRecord, chunk_weight, decode, hash_contents, prepare_image, timed_batches
from hashret.collection.removal import SeenNames
from hashret.data.images import as_batch
from hashret.data.metadata import MetadataRow, check_metadata
from hashret.data.records import Record, Source, read
from hashret.errors import HashretError
from hashret.parallel import Progress, batches, ordered_map
from hashret.results import BLOBS, Indexed, IndexReport, Root
from hashret.stores.protocol import FailedPath, ItemRow, KnownPath, Metadata

if TYPE_CHECKING:
    from hashret.hasher import Hasher

BATCH_ITEMS = 1000  # committed, and so acknowledged, together
MODEL_CHUNK = 1000  # images that the model encodes at a time
FILE_CHUNK = 25  # files that a thread reads or decodes at a time
PROGRESS_SECONDS = 0.2  # between two reports


class Callbacks(NamedTuple):
    """The caller's functions: `progress` for progress reports, `committed` for the result of each committed batch."""

    progress: Callable[[Progress], None] | None = None
    committed: Callable[[list[Indexed]], None] | None = None


NO_CALLBACKS = Callbacks()


@dataclass
class IndexRun:
    """A pass over a source that stores the new and changed records, or only those whose full paths are in `paths`."""

    parts: Parts
    source: Source
    callbacks: Callbacks = NO_CALLBACKS
    seen: SeenNames | None = None  # collects the names of all records
    paths: Set[str] | None = None
    retry_failed: bool = False  # read unreadable paths again even if they have not changed
    _counts: Counter[str] = field(init=False, default_factory=Counter)
    _failures: list[tuple[str, str]] = field(init=False, default_factory=list)
    _model: "Hasher | None" = field(init=False, default=None)
    _source_error: HashretError | None = field(init=False, default=None)
    _last_report: float = field(init=False, default_factory=time.monotonic)

    def run(self) -> IndexReport:
        """Run the pass, and again for records whose content was removed, with its last path, while they were pending.

        Raise HashretError if the source fails; all records before the error are stored then.
        """
        paths = self.paths
        while paths is None or paths:
            again: set[str] = set()
            with closing(self._encoded(paths)) as stream:
                for batch in stream:
                    again |= self._commit(batch)
                    self._report_progress()
            paths = again
        self._report_progress(interval=0)
        names = ("added", "unchanged", "updated", "removed", "failed", "decoded")
        counts = {name: self._counts[name] for name in names}
        return IndexReport(**counts, ignored=self.source.ignored, failures=self._failures)

    def _encoded(self, paths: Set[str] | None) -> Generator[list[PendingRecord], None, None]:
        """Iterate over the new and changed records, with codes of the new contents, in batches to be committed.

        An error of the source is raised after the records that come before it.
        """
        self._source_error = None
        changed = chain.from_iterable(self._until_error(paths))
        decoded: Iterable[list[PendingRecord]]
        if self.source.arrays:  # no waiting and little computing: threads would only compete for the interpreter
            hashed = map(hash_contents, batches(changed, MODEL_CHUNK))
            decoded = map(self._decode_new, map(self._drop_stored, hashed))
        else:
            chunks = batches(changed, FILE_CHUNK, lambda pending: pending.weight)
            hashed_chunks = ordered_map(hash_contents, chunks, max_pending=4, weight_of=chunk_weight)
            decoded = ordered_map(
                self._decode_new, map(self._drop_stored, hashed_chunks), max_pending=4, weight_of=chunk_weight
            )
        to_encode = timed_batches(decoded, MODEL_CHUNK)
        yield from timed_batches(
            ordered_map(self._encode, to_encode, max_pending=4, caller_runs=self.source.arrays), BATCH_ITEMS
        )
        if self._source_error is not None:
            raise self._source_error

    def _until_error(self, paths: Set[str] | None) -> Iterator[list[PendingRecord]]:
        try:
            yield from self._changed(paths)
        except HashretError as error:
            self._source_error = error

    def _changed(self, paths: Set[str] | None) -> Iterator[list[PendingRecord]]:
        """Iterate over the new and changed records, and count all others."""
        root, first_pass = self.source.root, paths is self.paths
        with self.parts.store.snapshot() as snapshot:
            look_up = paths is not None or root in snapshot.roots()
        for records in batches(self._records(paths, first_pass), 1 if self.source.streaming else MODEL_CHUNK):
            known_paths: dict[str, KnownPath] = {}
            if look_up:
                with self.parts.store.snapshot() as snapshot:
                    known_paths = snapshot.known_paths(root, [record.name for record in records])
            changed = list[PendingRecord]()
            for record in records:
                path = known_paths.get(record.name)
                if path is not None and self._is_unchanged(record, path):
                    self._counts["failed" if path.failed else "unchanged"] += 1
                else:
                    changed.append(PendingRecord(record, path, read(record) if self.source.streaming else None))
            self._report_progress()
            yield changed

    def _records(self, paths: Set[str] | None, first_pass: bool) -> Iterator[Record]:
        for record in self.source:
            if first_pass and self.seen is not None:
                self.seen.add(record.name)
            if paths is None or self.source.root + record.name in paths:
                yield record

    def _is_unchanged(self, record: Record, known_path: KnownPath) -> bool:
        same = (known_path.size, known_path.mtime_ns) == (record.size, record.mtime_ns)
        return same and not (known_path.failed and self.retry_failed)

    def _drop_stored(self, chunk: list[PendingRecord]) -> list[PendingRecord]:
        """Drop contents that are stored already; load the model at the first one that is not."""
        with self.parts.store.snapshot() as snapshot:
            stored = snapshot.find([pending.sha256 for pending in chunk])
        for pending in chunk:
            if pending.sha256 in stored:
                pending.content = None
        if self._model is None and len(stored) < len(chunk):
            self._model = self.parts.models.current()
            self._model.preprocessing.check_source(self.source)
        return chunk

    def _decode_new(self, chunk: list[PendingRecord]) -> list[PendingRecord]:
        return chunk if self._model is None else decode(chunk, self._model.preprocessing)

    def _encode(self, chunk: list[PendingRecord]) -> list[PendingRecord]:
        new = [pending for pending in chunk if pending.pixels is not None]
        if new and self._model is not None:
            pixels = np.stack([pending.pixels for pending in new if pending.pixels is not None])
            codes = self._model.encode_pixels(pixels, single_thread=True)  # the other cores encode other chunks
            for pending, code in zip(new, codes, strict=True):
                pending.code = code.tobytes()
        return chunk

    def _commit(self, batch: list[PendingRecord]) -> set[str]:
        """Commit a batch; return the full paths of the records that must be visited again."""
        root = self.source.root
        results = commit(self.parts, batch, root)
        self._counts.update(result.status for result in results)
        self._counts["decoded"] += sum(pending.pixels is not None for pending in batch)
        self._failures += [(result.path, result.reason) for result in results if result.reason is not None]
        if self.callbacks.committed is not None:
            self.callbacks.committed(results)
        if len(results) == len(batch):
            return set()
        return {root + pending.record.name for pending in batch} - {result.path for result in results}

    def _report_progress(self, interval: float = PROGRESS_SECONDS) -> None:
        if self.callbacks.progress is not None and time.monotonic() - self._last_report >= interval:
            self._last_report = time.monotonic()
            terms = {key: float(self._counts[key]) for key in ("added", "updated", "unchanged", "failed")}
            self.callbacks.progress(Progress("indexing", int(sum(terms.values())), self.source.length, terms))


def retry(parts: Parts, callbacks: Callbacks) -> None:
    """Read unreadable paths again whose sources still exist."""
    with parts.store.snapshot() as snapshot:
        data_root = snapshot.settings.get("data_root")
        failed: dict[Root, set[str]] = {}
        for root, failure in snapshot.failures():
            failed.setdefault(root, set()).add(failure.path)
    for root, paths in failed.items():
        source = parts.originals.source(root, data_root)
        if source is not None:
            IndexRun(parts, source, callbacks, paths=paths, retry_failed=True).run()


def commit(parts: Parts, batch: list[PendingRecord], root: Root) -> list[Indexed]:
    """Commit a batch; return the result of each record, without those that must be visited again."""
    readable = [pending for pending in batch if not isinstance(pending.content, HashretError)]
    failed = [pending for pending in batch if isinstance(pending.content, HashretError)]
    # An error of the operating system, such as a missing permission, may be temporary: the next run tries again.
    permanent = [pending for pending in failed if not isinstance(getattr(pending.content, "__cause__", None), OSError)]
    with parts.store.transaction() as transaction:
        ids = transaction.put([_item_row(pending, root) for pending in readable])
        transaction.put_failures(
            FailedPath(root, p.record.name, p.record.size, p.record.mtime_ns, str(p.content)) for p in permanent
        )
    results = [Indexed(root + pending.record.name, "failed", None, str(pending.content)) for pending in failed]
    for pending, item_id in zip(readable, ids, strict=True):
        if item_id is not None:
            old = None if pending.known_path is None else pending.known_path.item_id
            status = "added" if old is None else "unchanged" if old == item_id else "updated"
            results.append(Indexed(root + pending.record.name, status, item_id))
    return results


def _item_row(pending: PendingRecord, root: Root) -> ItemRow:
    record = pending.record
    path = (root, record.name, record.label, record.size, record.mtime_ns)
    return ItemRow(*path, pending.sha256, record.size, pending.width, pending.height, pending.code)


def put_metadata(parts: Parts, root: Root, rows: Iterable[MetadataRow]) -> tuple[int, int]:
    """Set the metadata of the images under `root` by name; return the numbers of changed items and unmatched rows."""
    described, unmatched, done = 0, 0, set[int]()
    for batch in batches(rows, BATCH_ITEMS):
        with parts.store.snapshot() as snapshot:
            known_paths = snapshot.known_paths(root, [name for name, _ in batch])
            new: dict[int, Metadata] = {}
            for name, metadata in batch:
                item_id = known_paths[name].item_id if name in known_paths else None
                if item_id is None:
                    unmatched += 1
                elif item_id not in done:  # the first of several rows for equal images counts
                    done.add(item_id)
                    new[item_id] = metadata
            items = snapshot.items(new)
        # Compare as JSON, in which 1, 1.0 and true differ, and so does the order of keys.
        changed = {i: row for i, row in new.items() if json.dumps(items[i].metadata) != json.dumps(row)}
        if changed:
            with parts.store.transaction() as transaction:
                transaction.put_metadata(changed)
        described += len(changed)
    return described, unmatched


def add_contents(parts: Parts, images: Any, metadata: Sequence[Metadata | None] | None) -> list[int]:
    """Store contents without files; return their item ids. See `Collection.add`."""
    ids: list[int] = []
    images = as_batch(images)
    if metadata is not None:
        images = list(images)
        if len(metadata) != len(images):
            raise ValueError(f"{len(images)} images need as many metadata, not {len(metadata)}")
        metadata = [None if row is None else check_metadata(row) for row in metadata]
    hasher = parts.models.current()
    for batch in batches(images, BATCH_ITEMS):
        contents, prepared = zip(*ordered_map(partial(prepare_image, hasher.preprocessing), batch), strict=True)
        codes = hasher.encode_pixels(np.stack([image.pixels for image in prepared]))
        batch_metadata = [None] * len(batch) if metadata is None else metadata[len(ids) : len(ids) + len(batch)]
        rows = []
        for content, image, code, row in zip(contents, prepared, codes, batch_metadata, strict=True):
            digest, length = parts.originals.store(content)
            path = (BLOBS, digest, None, length, 0)
            rows.append(ItemRow(*path, digest, length, image.width, image.height, code.tobytes(), row))
        with parts.store.transaction() as transaction:
            ids += [i for i in transaction.put(rows) if i is not None]
    return ids
