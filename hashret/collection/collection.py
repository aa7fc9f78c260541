"""`Collection`: items, their codes and an index; add images, find similar ones, forget them.

A collection is made of parts that are passed in. Its methods say what they promise, which makes the file long; how they
keep it is in the modules beside this one, as functions over the parts or over a snapshot.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hashret.codes import Codes
from hashret.collection import calibration, export, ingest, near_duplicates, reindexing, removal, search, summary
from hashret.collection.index_cache import IndexCache
from hashret.collection.models import Models
from hashret.collection.originals import Originals, plain_errors
from hashret.collection.parts import Parts, no_item
from hashret.collection.snapshot import Reader
from hashret.data.contents import Content
from hashret.data.metadata import open_metadata
from hashret.data.sources import open_source
from hashret.durable import make_folder_durably
from hashret.errors import HashretError, NotFound, damaged
from hashret.indexes import Searched, from_spec
from hashret.parallel import Progress, batches
from hashret.process import raised_gc_threshold
from hashret.results import TARGET_PRECISION, Calibration, Failure, Group, Hit, Indexed, IndexReport, Item, QueryOptions
from hashret.stores.protocol import ItemStore
from hashret.stores.sqlite import SqliteStore, locked

if TYPE_CHECKING:
    from hashret.hasher import Hasher

MEMORY = ":memory:"


class Collection:
    """Codes of images that can be searched; make a collection with `create`, use it with `open`.

    `store` is where the items live, `index` finds codes, `originals` has the contents that came without files, and
    `models` the models. Many threads may use one object. Writes take a lock: within a process they wait for each other,
    another process is refused with a HashretError. Raises HashretError if the store names no index that there is.
    """

    def __init__(self, store: ItemStore, index: IndexCache, originals: Originals, models: Models) -> None:
        self._parts = Parts(store, index, originals, models, Reader(store, index, originals))
        settings = self._parts.settings
        try:
            from_spec(settings.model.bits, settings.index)
        except ValueError as error:
            raise damaged(store.location, str(error)) from None
        self._temporary: weakref.finalize[..., Any] | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], hasher: "Hasher", index: str = "bitflip") -> Self:
        """A new collection without items in the folder `path`, for codes of `hasher`.

        With ":memory:" it lies in a temporary folder that goes with the object. `index` is "bitflip", or
        "faiss:FACTORY" with a factory string of FAISS's binary indexes, such as "BFlat". Raises HashretError if there
        is a collection already.
        """
        from_spec(hasher.bits, index)
        in_memory = os.fspath(path) == MEMORY
        folder = Path(tempfile.mkdtemp(prefix="hashret-")) if in_memory else Path(path).absolute()
        model = folder / "models" / hasher.fingerprint
        with plain_errors(folder):
            make_folder_durably(folder)
            with locked(folder):  # or two processes might each put a new store there
                if cls.exists(folder):
                    raise HashretError(f"there is a collection at {folder} already: open it, or choose another folder")
                try:
                    hasher.save(model)
                    settings = {"fingerprint": hasher.fingerprint, "bits": str(hasher.bits), "index": index}
                    SqliteStore.create(folder, settings).close()
                except BaseException:
                    shutil.rmtree(folder if in_memory else model, ignore_errors=True)
                    raise
        collection = cls.open(folder)
        if in_memory:
            collection._temporary = weakref.finalize(collection, shutil.rmtree, folder, ignore_errors=True)
        return collection

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> Self:
        """The collection in the folder `path`; raises HashretError if there is none, or it is damaged or too new."""
        folder = Path(path).absolute()
        store = SqliteStore(folder, read_only=read_only)
        return cls(store, IndexCache(folder / "index", store), Originals(folder), Models(folder / "models", store))

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Whether there is a collection, sound or not, in the folder `path`."""
        return SqliteStore.exists(Path(path))

    def close(self) -> None:
        """Let go of what is open; a collection in memory is gone."""
        self._parts.store.close()
        if self._temporary is not None:
            self._temporary()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many items, that is different contents, there are."""
        with self._parts.store.snapshot() as rows:
            return rows.count("items")

    @property
    def path(self) -> Path:
        """The folder of models, of contents without files, and of the index's cache."""
        return self._parts.originals.folder

    @property
    def read_only(self) -> bool:
        """Whether it was opened so that it cannot be changed."""
        return self._parts.store.read_only

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that the codes are of."""
        return self._parts.settings.model.fingerprint

    @property
    def bits(self) -> int:
        """The width of a code."""
        return self._parts.settings.model.bits

    @property
    def generation(self) -> int:
        """How many times the collection has been written to."""
        return self._parts.settings.generation

    @property
    def hasher(self) -> "Hasher":
        """The model that the codes are of."""
        return self._parts.models.current()

    @property
    def searched(self) -> Searched:
        """How many queries the index was asked since this object last loaded or built it, and how many buckets it
        looked up for them, none where it scanned."""
        return self._parts.index.searched

    def query(
        self,
        image: Any,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        rank: str = "distance",
        where: str | None = None,
    ) -> list[Hit]:
        """The `k` items most similar to an image (a path, a PIL image, a uint8 array or a vector), nearest first.

        With `max_distance` none is farther than that many bits; with `k` None all within it are given. Ordered by
        (distance, id). With `rank` "asymmetric" the `k` are those of the lowest `score` among the nearest max(10 k,
        100), or among all within `max_distance`, in the order of (score, distance, id): the sum, over the bits that
        differ, of how far the image's own number lies from the bit's threshold, in training standard deviations. With
        `where` only items that this SQLite expression holds for are searched, as `matching` says.
        """
        return self.query_batch([image], k, max_distance, rank=rank, where=where)[0]

    def query_batch(
        self,
        images: Any,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        rank: str = "distance",
        where: str | None = None,
    ) -> list[list[Hit]]:
        """What `query` gives, for each of a batch of images as `Hasher.encode` takes them, or as `Hasher.prepare` gives
        them."""
        options = QueryOptions(k, max_distance, rank, where)
        return [search.as_hits(found) for found in self.nearest_images(images, options)]

    def nearest_images(self, images: Any, options: QueryOptions) -> list[search.QueryResult]:
        """What `query_batch` gives, as `nearest` does."""
        found: list[search.QueryResult] = []
        for chunk in search.chunks(images):
            found += search.by_images(self._parts, chunk, options)
        return found

    def query_codes(
        self, codes: Codes, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[list[Hit]]:
        """What `query` gives, for codes, uint8 (n, bits // 8); raises ValueError for codes of another width."""
        options = QueryOptions(k, max_distance, where=where)
        return [search.as_hits(found) for found in self.nearest(codes, options)]

    def nearest(self, codes: Codes, options: QueryOptions) -> list[search.QueryResult]:
        """What `query_codes` gives, as distances and items, which are the same objects until the collection changes:
        for callers that keep the text of an item."""
        return search.by_codes(self._parts, codes, options)

    def query_item(
        self, item_id: int, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[Hit]:
        """What `query` gives for the image of an item, leaving out the item itself; NotFound if there is none."""
        options = QueryOptions(k, max_distance, where=where)
        return search.as_hits(search.by_item(self._parts, item_id, options))

    def matching(self, where: str) -> list[int]:
        """Ids, ascending, of the items that an SQLite expression holds for, such as "label = 'cat' AND width > 800".

        It may use the columns of `items`, those of `paths` and `path`, the whole one (an item qualifies if it does with
        one of its paths), keys of the metadata by name, where they are no columns, and SELECTs from the database's
        tables. Raises HashretError for anything else, and for what takes longer than a second.
        """
        with self._parts.store.snapshot() as rows:
            ids: list[int] = rows.ids(where=where).tolist()
            return ids

    def items(self, after: int = 0, limit: int = 100, *, where: str | None = None) -> list[Item]:
        """The items whose ids follow `after`, in order of their ids, at most `limit`; with `where` those that this
        SQLite expression holds for, as `matching` says."""
        with self._parts.store.snapshot() as rows:
            ids = rows.ids(after, limit, where).tolist()
            items = rows.items(ids)
        return [self._parts.originals.absolute(items[i]) for i in ids]

    def get(self, item_id: int) -> Item:
        """The item with this id; raises NotFound if there is none."""
        with self._parts.store.snapshot() as rows:
            items = rows.items([item_id])
        if item_id not in items:
            raise no_item(item_id)
        return self._parts.originals.absolute(items[item_id])

    def codes(self, ids: Sequence[int]) -> Codes:
        """The codes, uint8 (n, bits // 8), of the items with these ids; raises NotFound if one is missing."""
        with self._parts.store.snapshot() as rows:
            found, codes = rows.codes(ids)
        row_of = {int(item_id): row for row, item_id in enumerate(found)}
        missing = [i for i in ids if i not in row_of]
        if missing:
            raise no_item(missing[0])
        return codes[[row_of[i] for i in ids]]

    def content(self, item_id: int) -> Content:
        """The image of an item as it was indexed, the bytes of a file or a uint8 array; raises NotFound if the item, or
        its image, is not there any more."""
        digest = self.get(item_id).sha256
        with self._parts.store.snapshot() as rows:
            paths, data_root = rows.paths([item_id]), rows.settings.get("data_root")
        for path in paths:
            content = self._parts.originals.read(path, digest, data_root)
            if content is not None:
                return content
        raise NotFound(f"the image of item {item_id} is not where it was: put the file back, or index it again")

    def contents(self, ids: Iterable[int]) -> Iterator[tuple[int, Content]]:
        """Id and content of those of the items that can still be read where they were indexed from, in any order."""
        return self._parts.contents(list(ids))

    def find(self, image: Any) -> int | None:
        """The id of the item that an image is (a path, a PIL image, bytes or a uint8 array), if it is one.

        It is known by its content; a path where there is no file is looked for among those that were indexed.
        """
        return near_duplicates.find_item(self._parts, image)

    def dupes(
        self, max_distance: int = 3, *, by: str = "connected", keep: str | os.PathLike[str] = "largest"
    ) -> list[Group]:
        """Groups of items that are copies of one image, the one to keep first; those of one item have several paths.

        `by` "connected": a chain leads from each to each, every link at most `max_distance` bits long (single linkage);
        by "star": each is within that of the first. `keep` says which is the first: "largest" (in pixels, then bytes),
        "oldest" (by the date of its file), or a folder that it should lie in, and then the largest. Verdicts count:
        "different" removes a link, "same" adds one. Raises HashretError if nothing lies in the folder.
        """
        return near_duplicates.find_groups(self._parts, max_distance, by, keep)

    def verdict(self, a: Any, b: Any, verdict: str) -> None:
        """Record that two items are the "same", or "different", until one of them is removed or another is recorded.

        Each is an id, or an image as in `find`. A verdict is of contents, so it stays when files move. Raises
        HashretError for what is no item, and for two that have the same content.
        """
        near_duplicates.put_verdict(self._parts, a, b, verdict)

    def verdicts(self) -> list[tuple[int, int, str]]:
        """All verdicts: the ids of the two items, and "same" or "different"."""
        return near_duplicates.all_verdicts(self._parts)

    def judged(self) -> list[tuple[Content, Content, bool]]:
        """The pairs of contents that were judged, and whether they are the same: what `Hasher.fit` takes as `pairs`.

        Those that cannot be read any more where they were indexed from are left out.
        """
        return near_duplicates.judged_contents(self._parts)

    def calibrate(
        self,
        pairs: Iterable[tuple[Any, Any, bool]] | None = None,
        *,
        source: str = "pairs",
        images: int = 500,
        seed: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> Calibration:
        """Measure what each radius means on these images, and keep that for `radius` until the model changes.

        `pairs` are judged ones, each an id or an image as in `find` and whether they are the same, from `source`. With
        None, altered copies are made of so many items, drawn with `seed`, and looked for among all. Raises HashretError
        if that leaves nothing to measure.
        """
        if pairs is not None:
            return calibration.by_pairs(self._parts, pairs, source)
        return calibration.by_augmentation(self._parts, images, seed, progress)

    def calibration(self) -> Calibration:
        """What `calibrate` found for the present model; raises NotFound if it was not asked to."""
        text = self._parts.settings.get("calibration")
        if text is None:
            raise NotFound("what a radius means here is not known: run hashret calibrate, or give a number of bits")
        return Calibration.from_json(text)

    def radius(self, target: float = TARGET_PRECISION) -> int:
        """The radius that finds most copies while this share of what it shows is right, as `calibration` has it."""
        return self.calibration().radius(target, len(self))

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
        with self._parts.writing(), raised_gc_threshold():
            if data_root is not None:
                with self._parts.store.transaction(advance=False) as transaction:  # where reindex will look
                    transaction.put_setting("data_root", str(Path(data_root).absolute()))
            opened = open_source(source, data_root=data_root, exclude=self.path)
            rows = open_metadata(metadata, opened.root)
            listing = ingest.Listing() if prune else None
            report = ingest.IndexRun(self._parts, opened, ingest.Watchers(progress, committed), listing).run()
            if listing is not None:
                removed = ingest.prune(self._parts, opened.root, listing, force=force)
                report = report._replace(removed=removed)
            described, unmatched = ingest.describe(self._parts, opened.root, rows)
        return report._replace(described=described, unmatched=unmatched)

    def retry(self, *, progress: Callable[[Progress], None] | None = None) -> list[Indexed]:
        """Try once more to read what could not be read, where its source is still there; what became of each path."""
        lines: list[Indexed] = []
        with self._parts.writing(), raised_gc_threshold():
            ingest.retry(self._parts, ingest.Watchers(progress, lines.extend))
        return lines

    def add(self, images: Any, metadata: Sequence[dict[str, Any] | None] | None = None) -> list[int]:
        """Add contents without files: uint8 arrays, vectors, PIL images, bytes or paths; the item's id of each.

        A single path, PIL image or bytes is a batch of one. Each content is kept in the collection, so that another
        model can code it later; one that is there already keeps its id and its metadata. Raises HashretError for an
        image that cannot be read: of the thousand that it is among, and of those after, nothing is added.
        """
        with self._parts.writing(), raised_gc_threshold():
            return ingest.add_contents(self._parts, images, metadata)

    def remove(
        self,
        items: int | str | os.PathLike[str] | Iterable[int | str | os.PathLike[str]],
        *,
        dry_run: bool = False,
        committed: Callable[[list[Indexed]], None] | None = None,
    ) -> int:
        """Forget items by id, and what was recorded at or below paths; how many items are gone.

        An item goes with its last path, and a content that came without a file goes with it; files of the user's are
        left alone. What is not there is passed over. With `dry_run` nothing changes. `committed` is called with the
        paths that were, or would be, forgotten.
        """
        wanted = [items] if isinstance(items, int | str | os.PathLike) else list(items)
        count, lines = removal.remove(self._parts, wanted, dry_run=dry_run)
        if committed is not None and lines:
            committed(lines)
        return count

    def reindex(
        self, hasher: "Hasher", *, drop_missing: bool = False, progress: Callable[[Progress], None] | None = None
    ) -> int:
        """Code every item with another model, and switch to it in one commit; what was coded is kept if interrupted.

        Queries use the old model until then. Raises MissingContents, and does not switch, if contents cannot be read
        where they were indexed from, unless `drop_missing` has those items forgotten; how many were.
        """
        with self._parts.writing(), raised_gc_threshold():
            return reindexing.reindex(self._parts, hasher, drop_missing=drop_missing, progress=progress)

    def use_index(self, spec: str) -> None:
        """Search by another index from now on: "bitflip", or "faiss:FACTORY"; ValueError if there is none such."""
        reindexing.use_index(self._parts, spec)

    def rebuild_index(self) -> None:
        """Make the index again from the items, and its cache anew."""
        with self._parts.writing():
            self._parts.index.forget()

    def failures(self) -> list[Failure]:
        """The paths that could not be read, why, and when that was found."""
        with self._parts.store.snapshot() as rows:
            return [failure for _, failure in rows.failures()]

    def export(self, path: str | os.PathLike[str], kind: str | None = None) -> int:
        """Write all items, with codes, paths and metadata, as "jsonl", "parquet" or "numpy"; how many they are.

        The format is that of the suffix if none is named; see `hashret.collection.export` for what is in them.
        """
        out = Path(path)
        kind = export.format_of(out, kind)
        with self._parts.store.snapshot() as rows:
            return export.write(out, kind, rows.settings.model, rows.item_rows())

    def import_items(self, path: str | os.PathLike[str]) -> int:
        """Take in what `export` wrote, of the same model, in one commit; how many items are new.

        A content that is there already gains paths and keeps what is known of it. A new one keeps its id if no item
        here ever had as high a one: all do in a collection that has been empty so far.
        """
        model, rows = export.read(Path(path))
        with self._parts.writing(), raised_gc_threshold():
            if model.fingerprint != self.fingerprint:
                raise HashretError(
                    f"{path} holds codes of another model, {model.fingerprint[:16]}: import it into a collection of "
                    f"that one, hashret import {path} -c DIR --model MODEL_DIR"
                )
            before = len(self)
            with self._parts.store.transaction() as transaction:
                for batch in batches(rows, ingest.BATCH_ITEMS):
                    transaction.put(batch)
            return len(self) - before

    def info(self) -> dict[str, Any]:
        """Counts, model, index, size on disk and health of the codes, of at most a million of them."""
        return summary.summary(self._parts)


def locate(path: str | os.PathLike[str] | None = None) -> Path:
    """The collection's folder: `path`, or `$HASHRET_COLLECTION`, or the first `.hashret` from here upwards, or here."""
    named = path or os.environ.get("HASHRET_COLLECTION")
    if named and os.fspath(named) == MEMORY:
        raise HashretError(f"a collection {MEMORY} goes with the program that makes it: name a folder")
    if named:
        return Path(named).absolute()
    here = Path.cwd()
    found = (folder / ".hashret" for folder in (here, *here.parents) if Collection.exists(folder / ".hashret"))
    return next(found, here / ".hashret")
