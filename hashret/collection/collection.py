"""`Collection`: models, a database and an index in one folder; add images, find similar ones, forget them.

What an open collection rests on is in `opened`, how it is asked in `searching`, how its copies are judged in `judging`.
Here is what changes it; how images get in is in `ingest`, how the index keeps up in `live`, what is stored in `store`.
"""

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hashret.collection.export import Header, format_of, write
from hashret.collection.export import read as read_items
from hashret.collection.index_cache import make_index
from hashret.collection.ingest import (
    BATCH_ITEMS,
    Found,
    decode,
    encoded,
    hash_contents,
    prepare,
    weight,
)
from hashret.collection.judging import Judging
from hashret.collection.opened import locked
from hashret.data.arrays import DATA_SETS
from hashret.data.contents import Content as ImageContent
from hashret.data.contents import Inputs, content_bytes, sha256
from hashret.data.images import as_batch
from hashret.data.metadata import check_metadata, open_metadata
from hashret.data.records import Source, read
from hashret.data.sources import open_source
from hashret.durable import make_folder, write_durably
from hashret.errors import HashretError
from hashret.evaluation.measures import health
from hashret.model_folder import read_config
from hashret.parallel import Progress, batches, in_order
from hashret.process import rarely_collected
from hashret.results import Failure, Indexed, IndexReport
from hashret.results import Hit as Hit
from hashret.stores.sqlite import BLOBS, Content, Place, Seen, Store, damaged

if TYPE_CHECKING:
    from hashret.hasher import Hasher
HEALTH_CODES = 1_000_000  # that `info` looks at


class MissingContents(HashretError):
    """The contents of items cannot be read where they were; `paths` are one of each."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"{len(paths):,} items cannot be read where they were, such as {paths[0]}: put the files back, index "
            f"them where they are with hashret index SOURCE --prune, or forget them with hashret reindex --drop-missing"
        )
        self.paths = paths


class Collection(Judging):
    """A folder of codes that can be searched; make one with `create`, use it with `open`.

    Many threads may use one object. Writes take a lock: within a process they wait for each other, another process is
    refused with a HashretError.
    """

    @classmethod
    def create(cls, path: str | os.PathLike[str], hasher: "Hasher", index: str = "bitflip") -> Self:
        """A new collection without items in the folder `path`, for codes of `hasher`.

        `index` is "bitflip", or "faiss:FACTORY" with a factory string of FAISS's binary indexes, such as "BFlat".
        Raises HashretError if there is a collection already.
        """
        folder = Path(path).absolute()
        model = folder / "models" / hasher.fingerprint
        make_index(index, hasher.bits)
        with _plain_errors(folder):
            make_folder(folder)
            with locked(folder):  # or two processes might each put a new database there
                if (folder / "items.db").exists():
                    raise HashretError(f"there is a collection at {folder} already: open it, or choose another folder")
                try:
                    hasher.save(model)
                    settings = {"fingerprint": hasher.fingerprint, "bits": str(hasher.bits), "index": index}
                    Store.create(folder / "items.db", settings).close()
                except BaseException:
                    shutil.rmtree(model, ignore_errors=True)
                    raise
        return cls(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> Self:
        """The collection in the folder `path`; raises HashretError if there is none, or it is damaged or too new."""
        return cls(path, read_only=read_only)

    # Adding and removing

    def index(
        self,
        source: Any,
        *,
        prune: bool = False,
        force: bool = False,
        metadata: Mapping[str, Mapping[str, Any]] | str | os.PathLike[str] | None = None,
        data_root: str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
        committed: Callable[[list[Indexed]], None] | None = None,
    ) -> IndexReport:
        """Add every image of a SOURCE that is new or has changed; the report says what was done.

        Files of the size and time they had are not read again, contents that are known are not decoded again, and
        what could not be read is not tried again until it changes. `metadata` is a dict for each name in the source, or
        a file, or else what lies beside the source (see `hashret.data.metadata`); a row replaces what was known of its
        image, and of several rows for equal images the first counts. `prune` forgets paths recorded under this source
        that are no longer there, and refuses if the source is empty or more than half would go, unless `force`.
        `committed` is called with what each batch did once that is durable: at most 1,000 items or one second.
        An exception, KeyboardInterrupt too, loses no batch that was committed.
        """
        with self._writing(), rarely_collected():
            if data_root is not None:
                with self._store.write(step=0):  # where reindex will look
                    self._store.put_setting("data_root", str(Path(data_root).absolute()))
            opened = open_source(source, data_root=data_root, exclude=self.path)
            rows = open_metadata(metadata, opened.root)
            report = self._take_in(opened, None, progress, committed)
            if prune:
                names = (record.name for record in open_source(source, data_root=data_root, exclude=self.path))
                report = report._replace(removed=self._prune(opened.root, names, force))
            described, unmatched = self._describe(opened.root, rows)
            self._index.keep()
        return report._replace(described=described, unmatched=unmatched)

    def retry(self, *, progress: Callable[[Progress], None] | None = None) -> list[Indexed]:
        """Try once more to read what could not be read, where its source is still there; what became of each path."""
        lines: list[Indexed] = []
        with self._writing(), rarely_collected():
            failed: dict[str, set[str]] = {}
            for root, failure in self._store.failures():
                failed.setdefault(root, set()).add(failure.path)
            for root, paths in failed.items():
                source = self._source(root)
                if source is not None:
                    with self._store.write(step=0):
                        self._store.doubt_failures(root)
                    self._take_in(source, paths, progress, lines.extend)
            self._index.keep()
        return lines

    def add(self, images: Any, metadata: Sequence[dict[str, Any] | None] | None = None) -> list[int]:
        """Add contents without files: uint8 arrays, vectors, PIL images, bytes or paths; the item's id of each.

        A single path, PIL image or bytes is a batch of one. Each content is kept in the collection, so that another
        model can code it later; one that is there already keeps its id and its metadata. Raises HashretError for an
        image that cannot be read: of the thousand that it is among, and of those after, nothing is added.
        """
        ids: list[int] = []
        images = as_batch(images)
        if metadata is not None:
            images = list(images)
            if len(metadata) != len(images):
                raise ValueError(f"{len(images)} images need as many metadata, not {len(metadata)}")
            metadata = [None if one is None else check_metadata(one) for one in metadata]
        with self._writing(), rarely_collected():
            hasher = self.hasher
            for batch in batches(images, BATCH_ITEMS):
                contents, prepared = zip(*in_order(partial(prepare, hasher.preprocessing), batch), strict=True)
                codes = hasher.encode_pixels(np.stack([one.pixels for one in prepared]))
                told = [None] * len(batch) if metadata is None else metadata[len(ids) : len(ids) + len(batch)]
                rows = [
                    self._keep_blob(content, one.width, one.height, code.tobytes(), extra)
                    for content, one, code, extra in zip(contents, prepared, codes, told, strict=True)
                ]
                with self._store.write() as generation:
                    ids += [i for i in self._store.put(rows, hasher.fingerprint, generation) if i is not None]
            self._index.keep()
        return ids

    def remove(
        self,
        what: int | str | os.PathLike[str] | Iterable[int | str | os.PathLike[str]],
        *,
        dry_run: bool = False,
        committed: Callable[[list[Indexed]], None] | None = None,
    ) -> int:
        """Forget items by id, and what was recorded at or below paths; how many items are gone.

        An item goes with its last path, and a content that came without a file goes with it; files of the user's are
        left alone. What is not there is passed over. With `dry_run` nothing changes. `committed` is called with the
        paths that were, or would be, forgotten.
        """
        several = [what] if isinstance(what, int | str | os.PathLike) else list(what)
        ids = [int(one) for one in several if not isinstance(one, str | os.PathLike)]
        with self._writing():
            found = self._store.places(ids)
            for path in several:
                if isinstance(path, str | os.PathLike):
                    found += self._recorded(os.fspath(path))
            names: dict[str, dict[str, int | None]] = {}
            for place in found:  # a path that led to an item, and can no longer be read, is found twice
                names.setdefault(place.root, {}).setdefault(place.name, place.item_id)
            gone: list[str] = []
            with suppress(_DryRun), self._store.write(step=1 if names else 0) as generation:
                gone += self._store.remove_items(ids, generation)
                for root in names:
                    gone += self._store.remove_paths(root, list(names[root]), generation)
                if dry_run:
                    raise _DryRun
            if not dry_run:
                for digest in {*gone, *names.get(BLOBS, {})}:
                    if re.fullmatch("[0-9a-f]{64}", digest):  # no path to who knows where
                        (self.path / BLOBS / digest).unlink(missing_ok=True)
                self._index.keep()
        if committed is not None and names:
            whole = {self._whole(root + name): i for root, some in names.items() for name, i in some.items()}
            committed([Indexed(path, "removed", whole[path]) for path in sorted(whole)])
        return len(gone)

    def reindex(
        self, hasher: "Hasher", *, drop_missing: bool = False, progress: Callable[[Progress], None] | None = None
    ) -> int:
        """Code every item with another model, and switch to it in one commit; what was coded is kept if interrupted.

        Queries use the old model until then. Raises MissingContents, and does not switch, if contents cannot be read
        where they were indexed from, unless `drop_missing` has those items forgotten; how many were.
        """
        with self._writing(), rarely_collected():
            fingerprint = hasher.fingerprint
            if not (self.path / "models" / fingerprint).exists():
                hasher.save(self.path / "models" / fingerprint)
            total, done = len(self), 0
            for root in self._store.roots():
                for batch in batches(self._uncoded(root, hasher), BATCH_ITEMS):
                    codes = hasher.encode_pixels(np.stack([pixels for _, pixels in batch]))
                    with self._store.write(step=0):
                        coded = [(i, code.tobytes()) for (i, _), code in zip(batch, codes, strict=True)]
                        self._store.put_codes(fingerprint, coded)
                    done += len(batch)
                    if progress is not None:
                        progress(Progress("reindexing", done, total, {}))
            missing = self._store.without_code(fingerprint)
            if missing and not drop_missing:
                items = self._store.items(missing).values()
                if len(items) < len(missing):
                    raise damaged(self._store.path, "it lists items that it does not hold")
                raise MissingContents([(self._absolute(item).paths or [f"id:{item.id}"])[0] for item in items])
            settings = self._settings()
            cache = self._index.prepare(settings["index"], fingerprint, hasher.bits, int(settings["generation"]) + 1)
            with self._store.write() as generation:
                self._store.remove_items(missing, generation)
                self._store.switch(fingerprint, hasher.bits, generation)
                if cache is not None:
                    self._store.put_setting("cache", cache)
            self._index.keep()
        return len(missing)

    def use_index(self, kind: str) -> None:
        """Search by another index from now on: "bitflip", or "faiss:FACTORY"; ValueError if there is none such."""
        make_index(kind, self.bits)
        with self._writing():
            settings = self._settings()
            if settings["index"] != kind:
                generation = int(settings["generation"])
                cache = self._index.prepare(kind, settings["fingerprint"], int(settings["bits"]), generation)
                with self._store.write(step=0):
                    self._store.put_setting("index", kind)
                    if cache is not None:
                        self._store.put_setting("cache", cache)
                self._index.keep()

    def rebuild_index(self) -> None:
        """Make the index again from the database, and its cache anew."""
        with self._writing():
            shutil.rmtree(self.path / "index", ignore_errors=True)
            self._index.forget()
            self._index.keep()

    def failures(self) -> list[Failure]:
        """The paths that could not be read, why, and when that was found."""
        with self._store.read():
            return [failure for _, failure in self._store.failures()]

    def export(self, path: str | os.PathLike[str], kind: str | None = None) -> int:
        """Write all items, with codes, paths and metadata, as "jsonl", "parquet" or "numpy"; how many they are.

        The format is that of the suffix if none is named; see `hashret.collection.export` for what is in them.
        """
        out = Path(path)
        kind = format_of(out, kind)
        with self._store.read() as settings:
            header = Header(settings["fingerprint"], int(settings["bits"]))
            return write(out, kind, header, self._store.contents(header.fingerprint))

    def import_items(self, path: str | os.PathLike[str]) -> int:
        """Take in what `export` wrote, of the same model, in one commit; how many items are new.

        A content that is there already gains paths and keeps what is known of it. A new one keeps its id if no item
        here ever had as high a one: all do in a collection that has been empty so far.
        """
        header, contents = read_items(Path(path))
        with self._writing(), rarely_collected():
            if header.fingerprint != self.fingerprint:
                raise HashretError(
                    f"{path} holds codes of another model, {header.fingerprint[:16]}: import it into a collection of "
                    f"that one, hashret import {path} -c DIR --model MODEL_DIR"
                )
            before = len(self)
            with self._store.write() as generation:
                for batch in batches(contents, BATCH_ITEMS):
                    self._store.put(batch, header.fingerprint, generation)
            self._index.keep()
            return len(self) - before

    def info(self) -> dict[str, Any]:
        """Counts, model, index, size on disk and health of the codes, of at most a million of them."""
        config = read_config(self.path / "models" / self.fingerprint)
        on_disk = sum(map(_size, self.path.rglob("*")))
        with self._store.read() as settings:
            items, highest = self._store.count("items"), self._store.highest()
            sample = range(1, highest + 1, -(-items // HEALTH_CODES)) if items > HEALTH_CODES else None
            _, codes = self._store.codes(settings["fingerprint"], int(settings["bits"]), sample)
            return {
                "path": str(self.path),
                "items": items,
                "paths": self._store.count("paths"),
                "failures": self._store.count("failures"),
                "model": config["model"],
                "head": config["head"],
                "bits": int(settings["bits"]),
                "fingerprint": settings["fingerprint"],
                "preprocessing": config["preprocessing"],
                "training": config["training"],
                "index": settings["index"],
                "generation": int(settings["generation"]),
                "bytes_on_disk": on_disk,
                "bytes_per_item": on_disk / items if items else 0.0,
                "health": health(codes)._asdict(),
            }

    # How an index run goes

    def _take_in(
        self,
        source: Source,
        only: set[str] | None,
        progress: Callable[[Progress], None] | None,
        committed: Callable[[list[Indexed]], None] | None,
    ) -> IndexReport:
        """Store what is new of a source, or of those of its whole paths that are in `only`."""
        counts: Counter[str] = Counter()
        failures: list[tuple[str, str]] = []
        fingerprint = self.fingerprint
        shown = time.monotonic()

        def unchanged(seen: Seen) -> None:
            counts["failed" if seen.failed else "unchanged"] += 1
            show()

        def show(every: float = 0.2) -> None:
            nonlocal shown
            if progress is not None and time.monotonic() - shown >= every:
                shown = time.monotonic()
                told = {key: float(counts[key]) for key in ("added", "updated", "unchanged", "failed")}
                progress(Progress("indexing", int(sum(told.values())), source.length, told))

        while only is None or only:  # a content may lose its last path on its way to another: that is done again
            stream = encoded(source, self._store, lambda: self.hasher, unchanged, only)
            only = set()
            with closing(stream):
                for batch in stream:
                    lines = self._commit(batch, source.root, fingerprint)
                    if len(lines) < len(batch):
                        only |= {source.root + found.record.name for found in batch} - {line.path for line in lines}
                    counts.update(line.status for line in lines)
                    counts["decoded"] += sum(found.pixels is not None for found in batch)
                    failures += [(line.path, line.reason) for line in lines if line.reason is not None]
                    if committed is not None:
                        committed(lines)
                    show()
        show(every=0)
        kinds = ("added", "unchanged", "updated", "removed", "failed", "decoded")
        return IndexReport(**{kind: counts[kind] for kind in kinds}, ignored=source.ignored, failures=failures)

    def _commit(self, batch: list[Found], root: str, fingerprint: str) -> list[Indexed]:
        """Write a batch; what became of each record, once that is durable, but for those that need another look."""
        good = [found for found in batch if not isinstance(found.content, HashretError)]
        bad = [found for found in batch if isinstance(found.content, HashretError)]
        # What could not be read for a passing reason, such as a permission, is tried again by the next run.
        lasting = [found for found in bad if not isinstance(getattr(found.content, "__cause__", None), OSError)]
        with self._store.write() as generation:
            ids = self._store.put([_stored(found, root) for found in good], fingerprint, generation)
            self._store.put_failures(
                (root, found.record.name, found.record.size, found.record.mtime_ns, str(found.content))
                for found in lasting
            )
        lines = [Indexed(root + found.record.name, "failed", None, str(found.content)) for found in bad]
        for found, item_id in zip(good, ids, strict=True):
            if item_id is not None:
                old = None if found.before is None else found.before.item_id
                status = "added" if old is None else "unchanged" if old == item_id else "updated"
                lines.append(Indexed(root + found.record.name, status, item_id))
        return lines

    def _prune(self, root: str, names: Iterator[str], force: bool) -> int:
        """Forget the paths under `root` that are not among `names`; how many."""
        with self._store.write() as generation:
            there = list[str]()  # folders that cannot be looked into, whose files are not gone for that
            total, gone = self._store.paths_not_in(root, (_note_folder(name, there) for name in names))
            gone = [name for name in gone if not name.startswith(tuple(there))]
            if not force and 2 * len(gone) > total:
                raise HashretError(
                    f"{len(gone)} of {total} paths under {root} would be forgotten: check that the source is whole, "
                    f"then add --force"
                )
            self._store.remove_paths(root, gone, generation)
        return len(gone)

    def _describe(self, root: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> tuple[int, int]:
        """Give images under `root` the metadata of rows by name; how many changed, and how many rows name none."""
        described, unmatched, told = 0, 0, set[int]()
        for batch in batches(rows, BATCH_ITEMS):
            changed, unknown = self._store.undescribed(root, batch, told)
            if changed:
                with self._store.write():
                    self._store.describe(changed)
            described, unmatched = described + len(changed), unmatched + unknown
        return described, unmatched

    def _uncoded(self, root: str, hasher: "Hasher") -> Iterator[tuple[int, Inputs]]:
        """Id and pixels of the items under a root that have no code of this model yet and can still be read there."""

        def wanted() -> Iterator[tuple[int, str, Found]]:
            for record in self._records(root):
                item = self._store.uncoded(root, record.name, hasher.fingerprint)
                if item is not None:
                    yield *item, Found(record, content=read(record))

        def prepare(item: tuple[int, str, Found]) -> tuple[int, Inputs | None]:
            item_id, digest, found = item
            hashed = hash_contents([found])
            same = hashed[0].sha256 == digest
            return item_id, decode(hashed, hasher.preprocessing)[0].pixels if same else None

        done = set()
        for item_id, pixels in in_order(prepare, wanted(), weigh=lambda item: max(1, 16 * weight(item[2]))):
            if pixels is not None and item_id not in done:
                done.add(item_id)
                yield item_id, pixels

    def _recorded(self, path: str) -> list[Place]:
        """What is recorded at or below a path as a user would write it."""
        whole = os.path.abspath(path)  # noqa: PTH100  # as sources have it
        blobs = self._whole(BLOBS)
        found = self._store.recorded(BLOBS + whole.removeprefix(blobs) if whole.startswith(blobs) else whole)
        named = path.partition("#")[0].partition(":")[0] in (*DATA_SETS, "array")
        return found or (self._store.recorded(path) if named else [])

    def _keep_blob(
        self, content: ImageContent, width: int, height: int, code: bytes, metadata: dict[str, Any] | None
    ) -> Content:
        """Store a content that has no file of its own under its SHA-256, durably, and describe it."""
        data, digest = content_bytes(content), sha256(content)
        blob = self.path / BLOBS / digest
        with _plain_errors(self.path):
            make_folder(blob.parent)
            if not blob.exists():
                write_durably(blob, data)
        return Content(BLOBS, digest, None, len(data), 0, digest, len(data), width, height, code, metadata)


class _DryRun(Exception):
    """Raised to leave a transaction without what it did."""


def locate(path: str | os.PathLike[str] | None = None) -> Path:
    """The collection's folder: `path`, or `$HASHRET_COLLECTION`, or the first `.hashret` from here upwards, or here."""
    named = path or os.environ.get("HASHRET_COLLECTION")
    if named:
        return Path(named).absolute()
    here = Path.cwd()
    found = (folder / ".hashret" for folder in (here, *here.parents) if (folder / ".hashret" / "items.db").is_file())
    return next(found, here / ".hashret")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # a writer has just replaced it
        return 0


def _note_folder(name: str, folders: list[str]) -> str:
    if name.endswith("/"):
        folders.append(name)
    return name


def _stored(found: Found, root: str) -> Content:
    record, size = found.record, found.record.size
    where = (root, record.name, record.label, size, record.mtime_ns)
    return Content(*where, found.sha256, size, found.width, found.height, found.code)


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Say what the operating system's errors mean for a collection."""
    try:
        yield
    except OSError as error:
        raise HashretError(f"{folder} cannot be written ({error.strerror}): check the disk and permissions") from error
