"""`Collection`: index images, search for similar ones, find near-duplicates, and manage the items.

The class is the public interface, and long because each method is documented here. The implementations are functions in
the other modules of this package.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from hashret.codes import Codes
from hashret.collection import (
    backup,
    calibration,
    export,
    ingest,
    near_duplicates,
    reindexing,
    removal,
    search,
    summary,
)
from hashret.collection.index_cache import IndexCache
from hashret.collection.models import Models
from hashret.collection.originals import Originals, reported_errors
from hashret.collection.parts import Parts, no_item
from hashret.collection.snapshot import Reader, View
from hashret.data.contents import Content
from hashret.data.metadata import open_metadata
from hashret.data.sources import open_source
from hashret.durable import make_folder_durably
from hashret.errors import HashretError, NotFound, damaged
from hashret.indexes import Searched, from_spec
from hashret.parallel import Progress, batches
from hashret.process import raised_gc_threshold
from hashret.results import (
    TARGET_PRECISION,
    Backup,
    Calibration,
    Failure,
    Group,
    Hit,
    Indexed,
    IndexReport,
    Item,
    QueryOptions,
    State,
)
from hashret.stores.protocol import ItemStore
from hashret.stores.sqlite import SqliteStore, locked

if TYPE_CHECKING:
    from hashret.hasher import Hasher

MEMORY = ":memory:"
R = TypeVar("R")


class Collection:
    """A searchable collection of images: items, their codes, and an index. Make one with `create` or `open`.

    An item is a distinct content, identified by its SHA-256, with any number of paths and one code. Ids are positive
    and never reused. One object may be used by any number of threads. Reads see one consistent state each and never
    wait for writes. Writes take a lock: a write in the same process waits for it, and a write in another process raises
    HashretError.

    The components can be passed in: `store` holds the items, `index` caches the index of their codes, `originals` reads
    their contents, and `models` loads the models. Raise HashretError if the store names an unknown index.
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
        """Create an empty collection in the folder `path`, for codes of `hasher`.

        With ":memory:" the folder is temporary, and deleted with the object. `index` is "bitflip", or "faiss:FACTORY"
        with a factory string of FAISS's binary indexes, such as "BFlat". Raise HashretError if there is a collection
        already, and ValueError for an unknown index.
        """
        from_spec(hasher.bits, index)
        in_memory = os.fspath(path) == MEMORY
        folder = Path(tempfile.mkdtemp(prefix="hashret-")) if in_memory else Path(path).absolute()
        model = folder / "models" / hasher.fingerprint
        with reported_errors(folder):
            make_folder_durably(folder)
            with locked(folder):  # otherwise two processes could both create a store
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
        """Open the collection in the folder `path`; with `read_only` it cannot be written to.

        Raise HashretError if there is none, or it is damaged, or was made by a newer version of hashret.
        """
        folder = Path(path).absolute()
        store = SqliteStore(folder, read_only=read_only)
        return cls(store, IndexCache(folder / "index", store), Originals(folder), Models(folder / "models", store))

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """Return whether the folder `path` contains a collection, intact or damaged."""
        return SqliteStore.exists(Path(path))

    def close(self) -> None:
        """Close all files; a collection in ":memory:" is deleted."""
        self._parts.store.close()
        if self._temporary is not None:
            self._temporary()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of items, that is, of distinct contents."""
        with self._parts.store.snapshot() as snapshot:
            return snapshot.count("items")

    @property
    def path(self) -> Path:
        """The folder of the collection: models, contents without files, and the index cache."""
        return self._parts.originals.folder

    @property
    def read_only(self) -> bool:
        """Whether the collection was opened read-only."""
        return self._parts.store.read_only

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the collection's model, 64 hex digits."""
        return self._parts.settings.model.fingerprint

    @property
    def bits(self) -> int:
        """The width of the codes in bits."""
        return self._parts.settings.model.bits

    @property
    def generation(self) -> int:
        """The version of the data: the number of committed transactions that could change results.

        Each read sees the data of one generation (multi-version concurrency control).
        """
        return self._parts.settings.generation

    @property
    def state(self) -> State:
        """The state of the data, a tuple of the generation and a random id: the same state gives the same results.

        After a backup was restored, a generation may be reached a second time, but no state is.
        """
        with self._parts.store.snapshot() as snapshot:
            return snapshot.state

    @property
    def hasher(self) -> "Hasher":
        """The collection's model, loaded at first use."""
        return self._parts.models.current()

    @property
    def searched(self) -> Searched:
        """The numbers of queries, and of hash buckets probed for them (none in scans), since the index was loaded."""
        return self._parts.index.searched

    def check_ready(self) -> None:
        """Search for one code. Raise HashretError if queries cannot be answered at present."""
        search.check_ready(self._parts)

    def query(
        self,
        image: Any,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        rank: str = "distance",
        where: str | None = None,
    ) -> list[Hit]:
        """Return the `k` items most similar to an image, ordered by (distance, id).

        `image` is a path, a PIL image, a uint8 array or a vector. `max_distance`, in bits and inclusive, limits the
        hits; with `k` None all hits within it are returned. `where` restricts the search to items that match an SQLite
        expression, see `matching`. Items whose verdict with the image is "different" are left out.

        `rank` "asymmetric" orders by (score, distance, id): the score is the sum, over the differing bits, of the
        distance of the image's real-valued output from the bit's threshold, in training standard deviations. The hits
        are then the best `k` of the nearest max(10 k, 100) items, or of all within `max_distance` if `k` is None.

        Raise HashretError for an unreadable image or an invalid `where`, and ValueError for other invalid arguments.
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
        """Return the hits of each image of a batch; see `query`.

        `images` is a batch as `Hasher.encode` takes it, or the result of `Hasher.prepare`.
        """
        return self.nearest_images(images, QueryOptions(k, max_distance, rank, where), search.hits)

    def nearest_images(self, images: Any, options: QueryOptions, render: search.Render[R]) -> list[R]:
        """Return what `render` makes of the results of each image of a batch; see `query_batch` and `nearest`."""
        return [
            result
            for chunk in search.chunks(images)
            for result in search.by_images(self._parts, chunk, options, render)
        ]

    def query_codes(
        self, codes: Codes, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[list[Hit]]:
        """Return the hits of each code, uint8 (n, bits // 8); see `query`. Raise ValueError for another width."""
        return self.nearest(codes, QueryOptions(k, max_distance, where=where), search.hits)

    def nearest(self, codes: Codes, options: QueryOptions, render: search.Render[R]) -> list[R]:
        """Return what `render` makes of the results of each code, uint8 (n, bits // 8); see `query_codes`.

        `render(view, results)` returns a value for each result, and reads the items from the view, whose state is that
        of the search. It may be called again if the collection changes meanwhile.
        """
        return search.by_codes(self._parts, codes, options, render)

    def query_item(
        self, item_id: int, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[Hit]:
        """Return the hits of an item's code, without the item itself; see `query`. Raise NotFound if it is missing."""
        return self.nearest_item(item_id, QueryOptions(k, max_distance, where=where), search.hits)

    def nearest_item(self, item_id: int, options: QueryOptions, render: search.Render[R]) -> R:
        """Return what `render` makes of the result of an item's code; see `query_item` and `nearest`."""
        return search.by_item(self._parts, item_id, options, render)

    def read(self, query: Callable[[View], R]) -> R:
        """Return the result of `query` on a view of the current state; it is called again if the state changes."""
        return self._parts.reader.read(query)

    def matching(self, where: str) -> list[int]:
        """Return the ids, ascending, of the items that match an SQLite expression.

        An example is "label = 'cat' AND width > 800". Names are columns of `items`, columns of `paths`, `path` for the
        full path (an item matches if one of its paths does), or else keys of the metadata. SELECTs from the database's
        tables are allowed. Raise HashretError for anything else, and after one second of CPU time.
        """
        with self._parts.store.snapshot() as snapshot:
            ids: list[int] = snapshot.ids(where=where).tolist()
            return ids

    def items(self, after: int = 0, limit: int = 100, *, where: str | None = None) -> list[Item]:
        """Return items ordered by id: at most `limit`, with ids above `after`, that match `where` if it is given.

        `where` is an SQLite expression, see `matching`.
        """
        with self._parts.store.snapshot() as snapshot:
            ids = snapshot.ids(after, limit, where).tolist()
            items = snapshot.items(ids)
        return [self._parts.originals.with_absolute_paths(items[i]) for i in ids]

    def get(self, item_id: int) -> Item:
        """Return the item with this id. Raise NotFound if there is none."""
        with self._parts.store.snapshot() as snapshot:
            items = snapshot.items([item_id])
        if item_id not in items:
            raise no_item(item_id)
        return self._parts.originals.with_absolute_paths(items[item_id])

    def codes(self, ids: Sequence[int]) -> Codes:
        """Return the codes, uint8 (n, bits // 8), of the items with these ids. Raise NotFound if one is missing."""
        with self._parts.store.snapshot() as snapshot:
            sorted_ids, codes = snapshot.codes(ids)
        rows = {int(item_id): row for row, item_id in enumerate(sorted_ids)}
        missing = [i for i in ids if i not in rows]
        if missing:
            raise no_item(missing[0])
        return codes[[rows[i] for i in ids]]

    def content(self, item_id: int) -> Content:
        """Return the content of an item: the bytes of its file, or a uint8 array.

        Raise NotFound if there is no such item, or its content is no longer at any of its paths.
        """
        digest = self.get(item_id).sha256
        with self._parts.store.snapshot() as snapshot:
            paths, data_root = snapshot.paths([item_id]), snapshot.settings.get("data_root")
        for path in paths:
            content = self._parts.originals.read(path, digest, data_root)
            if content is not None:
                return content
        raise NotFound(f"the image of item {item_id} is not where it was: put the file back, or index it again")

    def contents(self, ids: Iterable[int]) -> Iterator[tuple[int, Content]]:
        """Iterate over id and content of those items whose contents are still readable, in any order."""
        return self._parts.contents(list(ids))

    def find(self, image: Any) -> int | None:
        """Return the id of the item with the content of an image, or None.

        `image` is a path, a PIL image, bytes or a uint8 array. If there is no file at a path, the recorded paths are
        searched for it.
        """
        return near_duplicates.find_item(self._parts, image)

    def dupes(
        self, max_distance: int = 3, *, by: str = "connected", keep: str | os.PathLike[str] = "largest"
    ) -> list[Group]:
        """Return groups of near-duplicates, in each the item to keep first; a group of one item has several paths.

        `max_distance` is in bits and inclusive. `by` "connected" groups the connected components of the graph whose
        links are pairs within `max_distance` (single linkage); `by` "star" groups items within `max_distance` of the
        first one (star, or leader, clustering). `keep` determines the first: "largest" (by pixels, then bytes),
        "oldest" (by modification time), or a folder whose items take precedence, the largest leading. A verdict
        "different" removes a link, and "same" adds one. Raise HashretError if no path lies in the folder.
        """
        return near_duplicates.find_groups(self._parts, max_distance, by, keep)

    def verdict(self, a: Any, b: Any, verdict: str) -> None:
        """Record that two items are the "same" or "different", replacing an earlier verdict on them.

        `a` and `b` are ids, or images as in `find`. A verdict belongs to the contents, so it survives moved files; it
        is deleted with either item. Raise HashretError if one is not an item, or both are the same item.
        """
        near_duplicates.put_verdict(self._parts, a, b, verdict)

    def verdicts(self) -> list[tuple[int, int, str]]:
        """Return all verdicts as (id, id, "same" or "different"), in ascending order."""
        return near_duplicates.all_verdicts(self._parts)

    def judged(self) -> list[tuple[Content, Content, bool]]:
        """Return the contents of the pairs with a verdict, as labelled pairs for `Hasher.fit`.

        Each is (content, content, whether they are the same). Pairs with an unreadable content are left out.
        """
        return near_duplicates.labelled_pairs(self._parts)

    def calibrate(
        self,
        pairs: Iterable[tuple[Any, Any, bool]] | None = None,
        *,
        source: str = "pairs",
        images: int = 500,
        seed: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> Calibration:
        """Measure precision and recall at each radius on these images, and store the result until the model changes.

        `pairs` are labelled pairs, each two ids or images as in `find` and whether they are the same; `source` is their
        name in the result. With `pairs` None, augmented copies of `images` items, drawn with `seed`, are searched for
        among all items. Raise HashretError if `pairs` lacks one of the labels, or no item can be augmented.
        """
        if pairs is not None:
            return calibration.by_pairs(self._parts, pairs, source)
        return calibration.by_augmentation(self._parts, images, seed, progress)

    def calibration(self) -> Calibration:
        """Return the stored result of `calibrate` for the current model. Raise NotFound if there is none."""
        text = self._parts.settings.get("calibration")
        if text is None:
            raise NotFound("the collection is not calibrated: run hashret calibrate, or give a radius in bits")
        return Calibration.from_json(text)

    def radius(self, target: float = TARGET_PRECISION) -> int:
        """Return the smallest radius in bits that has the highest recall among those with a precision of at least
        `target`; see `Calibration`.

        Raise NotFound without a calibration, and HashretError if no radius has that precision.
        """
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
        """Index the new and changed images of a source; return a report.

        `source` is anything that `hashret.data.sources.open_source` opens: a folder, an archive, an array file, an
        array, or the name of a data set; `data_root` is the folder of data sets. A file of unchanged size and
        modification time is not read again, a stored content is not decoded again, and an unreadable file is not read
        again until it changes.

        `metadata` is a dict by name in the source, or a file; by default a file beside the source is read, see
        `hashret.data.metadata`. The metadata of each listed image is replaced; if several rows are for equal images,
        the first is used. `prune` removes recorded paths under this source whose files no longer exist. It raises
        HashretError if the source is empty or more than half of the paths would be removed, unless `force`.

        `committed` is called with the results of each batch, at most 1,000 items or one second, once it is durable. An
        exception, including KeyboardInterrupt, loses no committed batch.
        """
        with self._parts.writing(), raised_gc_threshold():
            if data_root is not None:
                with self._parts.store.transaction(advance=False) as transaction:  # `reindex` opens data sets there
                    transaction.put_setting("data_root", str(Path(data_root).absolute()))
            opened = open_source(source, data_root=data_root, exclude=self.path)
            rows = open_metadata(metadata, opened.root)
            seen = removal.SeenNames() if prune else None
            report = ingest.IndexRun(self._parts, opened, ingest.Callbacks(progress, committed), seen).run()
            if seen is not None:
                removed = removal.prune(self._parts, opened.root, seen, force=force)
                report = report._replace(removed=removed)
            described, unmatched = ingest.put_metadata(self._parts, opened.root, rows)
        return report._replace(described=described, unmatched=unmatched)

    def retry(self, *, progress: Callable[[Progress], None] | None = None) -> list[Indexed]:
        """Read the unreadable paths again whose sources still exist; return the result for each path."""
        results: list[Indexed] = []
        with self._parts.writing(), raised_gc_threshold():
            ingest.retry(self._parts, ingest.Callbacks(progress, results.extend))
        return results

    def add(self, images: Any, metadata: Sequence[dict[str, Any] | None] | None = None) -> list[int]:
        """Store images in the collection itself, instead of indexing their files; return their item ids.

        `images` are uint8 arrays, vectors, PIL images, bytes or paths; a single path, PIL image or bytes is a batch of
        one. `metadata` has one dict or None for each. An existing content keeps its id and its metadata. Raises
        HashretError for an unreadable image; images are added in batches of 1,000, and the batch of the unreadable
        image and all later ones are not added.
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
        """Remove items by id, and everything recorded at or below paths; return the number of removed items.

        An item is removed with its last path, and its content with it if the collection stores it; the user's files are
        never deleted. Ids and paths that do not exist are ignored. With `dry_run` nothing changes. `committed` is
        called with the paths that are, or would be, removed.
        """
        targets = [items] if isinstance(items, int | str | os.PathLike) else list(items)
        count, results = removal.remove(self._parts, targets, dry_run=dry_run)
        if committed is not None and results:
            committed(results)
        return count

    def reindex(
        self, hasher: "Hasher", *, drop_missing: bool = False, progress: Callable[[Progress], None] | None = None
    ) -> int:
        """Encode every item with another model, and switch to it in one commit; return the number of removed items.

        Queries use the old model until the switch. An interrupted run keeps its codes, and the next one continues.
        Raise MissingContents, and does not switch, if contents are no longer readable, unless `drop_missing`, which
        removes those items.
        """
        with self._parts.writing(), raised_gc_threshold():
            return reindexing.reindex(self._parts, hasher, drop_missing=drop_missing, progress=progress)

    def use_index(self, spec: str) -> None:
        """Switch to another index, "bitflip" or "faiss:FACTORY"; see `create`. Raise ValueError for any other."""
        reindexing.use_index(self._parts, spec)

    def rebuild_index(self) -> None:
        """Rebuild the index and its cache from the stored codes."""
        with self._parts.writing():
            self._parts.index.clear()

    def failures(self) -> list[Failure]:
        """Return the unreadable paths, with the reason and the time of the last attempt."""
        with self._parts.store.snapshot() as snapshot:
            return [failure for _, failure in snapshot.failures()]

    def export(self, path: str | os.PathLike[str], kind: str | None = None) -> int:
        """Write all items, with codes, paths and metadata, to a file; return their number.

        `kind` is the format, "jsonl", "parquet" or "numpy"; by default it follows from the suffix. The formats are
        described in `hashret.collection.export`. Raise ValueError for an unknown format.
        """
        out = Path(path)
        file_format = export.format_of(out, kind)
        with self._parts.store.snapshot() as snapshot:
            return export.write(out, file_format, snapshot.settings.model, snapshot.item_rows())

    def import_items(self, path: str | os.PathLike[str]) -> int:
        """Add the items of a file that `export` wrote, in one commit; return the number of new items.

        An existing content gains paths, and keeps its id and metadata. A new one keeps its exported id if that is above
        every id that the collection ever assigned, as in a new collection. Raise HashretError for a damaged file, and
        for one with codes of another model.
        """
        model, rows = export.read(Path(path))
        with self._parts.writing(), raised_gc_threshold():
            if model.fingerprint != self.fingerprint:
                raise HashretError(
                    f"{path} holds codes of another model, {model.fingerprint[:16]}: import it into a collection of "
                    f"that model, hashret import {path} -c DIR --model MODEL_DIR"
                )
            before = len(self)
            with self._parts.store.transaction() as transaction:
                for batch in batches(rows, ingest.BATCH_ITEMS):
                    transaction.put(batch)
            return len(self) - before

    def backup(self, to: str | os.PathLike[str], progress: Callable[[Progress], None] | None = None) -> Backup:
        """Copy the collection to a new folder, while it may be written to; return what was copied.

        The copy is a collection of one state, with its model and the contents that the collection stores itself,
        without the index cache. Your own files are not copied. Raise HashretError if `to` exists or cannot be written.
        """
        return backup.back_up(self.path, Path(to).absolute(), progress)

    def info(self) -> dict[str, Any]:
        """Return counts, model, index, size on disk in bytes, and the health of the codes, of a sample of at most 10⁶
        items."""
        return summary.summary(self._parts)


def locate(path: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the collection: `path`, or `$HASHRET_COLLECTION`, or a `.hashret`.

    The last is the nearest existing one in the working directory and its parents, or else that of the working
    directory. Raise HashretError for ":memory:".
    """
    explicit = path or os.environ.get("HASHRET_COLLECTION")
    if explicit and os.fspath(explicit) == MEMORY:
        raise HashretError(f"a collection in {MEMORY} ends with the program that creates it: give a folder")
    if explicit:
        return Path(explicit).absolute()
    cwd = Path.cwd()
    existing = (folder / ".hashret" for folder in (cwd, *cwd.parents) if Collection.exists(folder / ".hashret"))
    return next(existing, cwd / ".hashret")
