"""How images get into a collection: the one pass over a source that an index run is.

Records flow through generators. The caller's thread walks the source and reads the store, one pool of threads reads
and hashes, one decodes, and one runs the model; each holds a bounded number of records. Of arrays, with nothing to wait
for, the caller's thread does all but the model, and helps with that.
"""

import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hashret.collection.parts import Parts
from hashret.data.contents import Content, Inputs, Prepared, sha256
from hashret.data.images import as_batch, to_content
from hashret.data.metadata import MetadataRow, check_metadata
from hashret.data.preprocessing import Preprocessing
from hashret.data.records import Record, Source, read, without_traceback
from hashret.errors import HashretError, format_count
from hashret.parallel import Progress, batches, ordered_map
from hashret.results import BLOBS, Indexed, IndexReport, Root
from hashret.stores.protocol import FailedPath, ItemRow, KnownPath, Metadata

if TYPE_CHECKING:
    from hashret.hasher import Hasher

BATCH_ITEMS, BATCH_SECONDS = 1000, 1.0  # what is committed, and so acknowledged, together
MODEL_CHUNK = 1000  # images that the model is given at a time
FILE_CHUNK = 25  # files that a thread reads or decodes at a time
CHUNK_BYTES = 2**25  # and of how many bytes together, unless a single one has more
SHOWN_EVERY = 0.2  # seconds


@dataclass(slots=True)
class PendingRecord:
    """A record on its way into the collection; each stage fills in what it finds out."""

    record: Record
    before: KnownPath | None = None  # what was known of its path
    content: Content | HashretError | None = None  # until it is decoded, or known to be there; or why it has none
    sha256: str = ""
    pixels: Inputs | None = None  # for the model; None for a content that is known already
    width: int = 0
    height: int = 0
    code: bytes | None = None

    @property
    def weight(self) -> float:
        """The share of a chunk's bytes that it takes while its content is in memory."""
        return self.record.size / CHUNK_BYTES


class Listing:
    """The names that a pass over a source came by, eight bytes each: a hash that two names share keeps a path too
    many, once in some 10¹⁹ names."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._unreadable: list[str] = []  # folders, whose files are not gone for that

    def add(self, name: str) -> None:
        self._hashes.append(hash(name))
        if name.endswith("/"):
            self._unreadable.append(name)

    def lacking(self, names: Iterable[str]) -> tuple[int, list[str]]:
        """How many names there are, and those of them that are gone."""
        present = np.sort(np.frombuffer(self._hashes, np.int64))
        unreadable = tuple(self._unreadable)
        total, gone = 0, list[str]()
        for chunk in batches(names, 10_000):
            hashes = np.fromiter(map(hash, chunk), np.int64, len(chunk))
            listed = present.searchsorted(hashes) < present.searchsorted(hashes, "right")
            total += len(chunk)
            gone += [chunk[i] for i in np.flatnonzero(~listed) if not chunk[i].startswith(unreadable)]
        return total, gone


class Watchers(NamedTuple):
    """Whom a run keeps informed: of how far it is, and of what each batch did once that is durable."""

    progress: Callable[[Progress], None] | None = None
    committed: Callable[[list[Indexed]], None] | None = None


SILENT = Watchers()


@dataclass
class IndexRun:
    """A run that stores what is new in a source, or in those of its whole paths that are in `only`."""

    parts: Parts
    source: Source
    watchers: Watchers = SILENT
    listing: Listing | None = None  # that is to hold the names that it comes by
    only: Set[str] | None = None
    retrying: bool = False  # whether what could not be read is read again though it has not changed
    _counts: Counter[str] = field(init=False, default_factory=Counter)
    _failures: list[tuple[str, str]] = field(init=False, default_factory=list)
    _model: "Hasher | None" = field(init=False, default=None)
    _broken: HashretError | None = field(init=False, default=None)
    _shown: float = field(init=False, default_factory=time.monotonic)

    def run(self) -> IndexReport:
        """Store it; what was done. Raises HashretError where the source breaks off, with all before it stored."""
        wanted = self.only
        while wanted is None or wanted:  # a content may lose its last path on its way to another: that is done again
            again: set[str] = set()
            with closing(self._encoded(wanted)) as stream:
                for batch in stream:
                    again |= self._commit(batch)
                    self._show()
            wanted = again
        self._show(every=0)
        kinds = ("added", "unchanged", "updated", "removed", "failed", "decoded")
        counts = {kind: self._counts[kind] for kind in kinds}
        return IndexReport(**counts, ignored=self.source.ignored, failures=self._failures)

    def _encoded(self, wanted: Set[str] | None) -> Generator[list[PendingRecord], None, None]:
        """The records that are new or have changed, with codes of the contents that are new, in batches to be
        committed. Where the source breaks off, what it gave before comes first, and then the HashretError."""
        self._broken = None
        changed = chain.from_iterable(self._readable(wanted))
        decoded: Iterable[list[PendingRecord]]
        if self.source.arrays:  # nothing to wait for and little to compute: threads would fight for the interpreter
            hashed = map(hash_contents, batches(changed, MODEL_CHUNK))
            decoded = map(self._decode_new, map(self._drop_known, hashed))
        else:
            chunks = batches(changed, FILE_CHUNK, lambda pending: pending.weight)
            read_chunks = ordered_map(hash_contents, chunks, max_pending=4, weight_of=weigh_chunk)
            decoded = ordered_map(
                self._decode_new, map(self._drop_known, read_chunks), max_pending=4, weight_of=weigh_chunk
            )
        chunks_to_encode = _timed(decoded, MODEL_CHUNK)
        yield from _timed(
            ordered_map(self._encode, chunks_to_encode, max_pending=4, caller_runs=self.source.arrays), BATCH_ITEMS
        )
        if self._broken is not None:
            raise self._broken

    def _readable(self, wanted: Set[str] | None) -> Iterator[list[PendingRecord]]:
        try:
            yield from self._changed(wanted)
        except HashretError as error:
            self._broken = error

    def _changed(self, wanted: Set[str] | None) -> Iterator[list[PendingRecord]]:
        """The records that are new or have changed; all others are counted."""
        root, first_pass = self.source.root, wanted is self.only
        with self.parts.store.snapshot() as rows:
            look_up = wanted is not None or root in rows.roots()
        for records in batches(self._listed(wanted, first_pass), 1 if self.source.streaming else MODEL_CHUNK):
            known: dict[str, KnownPath] = {}
            if look_up:
                with self.parts.store.snapshot() as rows:
                    known = rows.known_paths(root, [record.name for record in records])
            changed = list[PendingRecord]()
            for record in records:
                before = known.get(record.name)
                if before is not None and self._is_unchanged(record, before):
                    self._counts["failed" if before.failed else "unchanged"] += 1
                else:
                    changed.append(PendingRecord(record, before, read(record) if self.source.streaming else None))
            self._show()
            yield changed

    def _listed(self, wanted: Set[str] | None, first_pass: bool) -> Iterator[Record]:
        for record in self.source:
            if first_pass and self.listing is not None:
                self.listing.add(record.name)
            if wanted is None or self.source.root + record.name in wanted:
                yield record

    def _is_unchanged(self, record: Record, before: KnownPath) -> bool:
        same = (before.size, before.mtime_ns) == (record.size, record.mtime_ns)
        return same and not (before.failed and self.retrying)

    def _drop_known(self, chunk: list[PendingRecord]) -> list[PendingRecord]:
        """Let go of contents that are stored already; load the model when the first comes that is not."""
        with self.parts.store.snapshot() as rows:
            known = rows.find([pending.sha256 for pending in chunk])
        for pending in chunk:
            if pending.sha256 in known:
                pending.content = None
        if self._model is None and len(known) < len(chunk):
            self._model = self.parts.models.current()
            self._model.preprocessing.check_source(self.source)
        return chunk

    def _decode_new(self, chunk: list[PendingRecord]) -> list[PendingRecord]:
        return chunk if self._model is None else decode(chunk, self._model.preprocessing)

    def _encode(self, chunk: list[PendingRecord]) -> list[PendingRecord]:
        new = [pending for pending in chunk if pending.pixels is not None]
        if new and self._model is not None:
            pixels = np.stack([pending.pixels for pending in new if pending.pixels is not None])
            codes = self._model.encode_pixels(pixels, single_thread=True)  # the other cores have chunks of their own
            for pending, code in zip(new, codes, strict=True):
                pending.code = code.tobytes()
        return chunk

    def _commit(self, batch: list[PendingRecord]) -> set[str]:
        """Store a batch; the whole paths of those that need another look."""
        root = self.source.root
        lines = commit(self.parts, batch, root)
        self._counts.update(line.status for line in lines)
        self._counts["decoded"] += sum(pending.pixels is not None for pending in batch)
        self._failures += [(line.path, line.reason) for line in lines if line.reason is not None]
        if self.watchers.committed is not None:
            self.watchers.committed(lines)
        if len(lines) == len(batch):
            return set()
        return {root + pending.record.name for pending in batch} - {line.path for line in lines}

    def _show(self, every: float = SHOWN_EVERY) -> None:
        if self.watchers.progress is not None and time.monotonic() - self._shown >= every:
            self._shown = time.monotonic()
            terms = {key: float(self._counts[key]) for key in ("added", "updated", "unchanged", "failed")}
            self.watchers.progress(Progress("indexing", int(sum(terms.values())), self.source.length, terms))


def retry(parts: Parts, watchers: Watchers) -> None:
    """Read once more what could not be read, where its source is still there."""
    with parts.store.snapshot() as rows:
        data_root = rows.settings.get("data_root")
        failed: dict[Root, set[str]] = {}
        for root, failure in rows.failures():
            failed.setdefault(root, set()).add(failure.path)
    for root, paths in failed.items():
        source = parts.originals.source(root, data_root)
        if source is not None:
            IndexRun(parts, source, watchers, only=paths, retrying=True).run()


def commit(parts: Parts, batch: list[PendingRecord], root: Root) -> list[Indexed]:
    """Store a batch; what became of each record, once that is durable, but for those that need another look."""
    good = [pending for pending in batch if not isinstance(pending.content, HashretError)]
    bad = [pending for pending in batch if isinstance(pending.content, HashretError)]
    # What could not be read for a passing reason, such as a permission, is tried again by the next run.
    lasting = [pending for pending in bad if not isinstance(getattr(pending.content, "__cause__", None), OSError)]
    with parts.store.transaction() as transaction:
        ids = transaction.put([_item_row(pending, root) for pending in good])
        transaction.put_failures(
            FailedPath(root, p.record.name, p.record.size, p.record.mtime_ns, str(p.content)) for p in lasting
        )
    lines = [Indexed(root + pending.record.name, "failed", None, str(pending.content)) for pending in bad]
    for pending, item_id in zip(good, ids, strict=True):
        if item_id is not None:
            old = None if pending.before is None else pending.before.item_id
            status = "added" if old is None else "unchanged" if old == item_id else "updated"
            lines.append(Indexed(root + pending.record.name, status, item_id))
    return lines


def _item_row(pending: PendingRecord, root: Root) -> ItemRow:
    record = pending.record
    path = (root, record.name, record.label, record.size, record.mtime_ns)
    return ItemRow(*path, pending.sha256, record.size, pending.width, pending.height, pending.code)


def prune(parts: Parts, root: Root, listing: Listing, *, force: bool) -> int:
    """Forget the paths under `root` that a listing lacks; how many. Raises HashretError if those are more than half,
    unless `force`."""
    with parts.store.transaction() as transaction:
        total, gone = listing.lacking(transaction.names(root))
        if not force and 2 * len(gone) > total:
            raise HashretError(
                f"{len(gone)} of {format_count(total, 'path')} under {root} would be forgotten: check that the source "
                f"is whole, then add --force"
            )
        transaction.remove(paths=((root, name) for name in gone))
    return len(gone)


def describe(parts: Parts, root: Root, rows: Iterable[MetadataRow]) -> tuple[int, int]:
    """Give images under `root` the metadata of rows by name; how many items changed, and how many rows name none."""
    described, unmatched, done = 0, 0, set[int]()
    for batch in batches(rows, BATCH_ITEMS):
        with parts.store.snapshot() as snapshot:
            known = snapshot.known_paths(root, [name for name, _ in batch])
            fresh: dict[int, Metadata] = {}
            for name, metadata in batch:
                item_id = known[name].item_id if name in known else None
                if item_id is None:
                    unmatched += 1
                elif item_id not in done:  # of several rows for equal images the first counts
                    done.add(item_id)
                    fresh[item_id] = metadata
            items = snapshot.items(fresh)
        # As JSON, in which 1 is not 1.0 nor true, and the order of keys is one of the text.
        changed = {i: row for i, row in fresh.items() if json.dumps(items[i].metadata) != json.dumps(row)}
        if changed:
            with parts.store.transaction() as transaction:
                transaction.put_metadata(changed)
        described += len(changed)
    return described, unmatched


def add_contents(parts: Parts, images: Any, metadata: Sequence[Metadata | None] | None) -> list[int]:
    """Store contents without files; the item's id of each. See `Collection.add`."""
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
        extra = [None] * len(batch) if metadata is None else metadata[len(ids) : len(ids) + len(batch)]
        rows = []
        for content, image, code, row in zip(contents, prepared, codes, extra, strict=True):
            digest, length = parts.originals.keep(content)
            where = (BLOBS, digest, None, length, 0)
            rows.append(ItemRow(*where, digest, length, image.width, image.height, code.tobytes(), row))
        with parts.store.transaction() as transaction:
            ids += [i for i in transaction.put(rows) if i is not None]
    return ids


def prepare_image(preprocessing: Preprocessing, image: Any) -> tuple[Content, Prepared]:
    """An image as anyone may give it, and its pixels; a HashretError names it."""
    try:
        content = to_content(image)
        return content, preprocessing(content)
    except HashretError as error:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"a {type(image).__name__}"
        raise type(error)(f"{name}: {error}") from error


def hash_contents(chunk: list[PendingRecord]) -> list[PendingRecord]:
    """Read the contents that were not read yet, and find out what they are known by."""
    for pending in chunk:
        if pending.content is None:
            pending.content = read(pending.record)
        if not isinstance(pending.content, HashretError):
            pending.sha256 = sha256(pending.content)
    return chunk


def decode(chunk: list[PendingRecord], preprocessing: Preprocessing) -> list[PendingRecord]:
    """Turn contents into the pixels that the model sees, or into the reason why that cannot be done."""
    size = preprocessing.height, preprocessing.width
    fitting = [pending for pending in chunk if _is_of_size(pending.content, size)]
    if fitting:  # the rows of one array: all at once costs a tenth
        rows = np.stack([pending.content for pending in fitting])  # type: ignore[misc]
        for pending, pixels in zip(fitting, preprocessing.batch(rows.reshape(len(rows), *size, -1)), strict=True):
            pending.pixels, pending.content = pixels, None
            pending.height, pending.width = size
    for pending in chunk:
        if pending.content is not None and not isinstance(pending.content, HashretError):
            try:
                pending.pixels, pending.width, pending.height = preprocessing(pending.content)
                pending.content = None
            except HashretError as error:
                pending.content = without_traceback(error)
    return chunk


def _is_of_size(content: object, size: tuple[int, int]) -> bool:
    return isinstance(content, np.ndarray) and content.shape[:2] == size


def weigh_chunk(chunk: list[PendingRecord]) -> float:
    """How many full chunks a chunk is as heavy as, but at least one."""
    return max(1.0, sum(pending.weight for pending in chunk))


def _timed(chunks: Iterable[list[PendingRecord]], most: int) -> Iterator[list[PendingRecord]]:
    """Chunks put together while they make at most so many records and a second is not over."""
    batch, began = list[PendingRecord](), time.monotonic()
    for chunk in chunks:
        if len(batch) + len(chunk) > most:
            yield batch
            batch, began = [], time.monotonic()
        batch += chunk
        if len(batch) == most or time.monotonic() - began >= BATCH_SECONDS:
            yield batch
            batch, began = [], time.monotonic()
    if batch:
        yield batch
