"""`Collection`: models, a database and an index in one folder; add images, find similar ones, forget them.

The file is longer than most because it is all that a user holds: how images get in is in `ingest`, how the index keeps
up in `live`, what is stored in `store`; here is only what ties them together.
"""

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from hashret.codes import Codes, check_codes
from hashret.errors import HashretError
from hashret.files import write_durably
from hashret.images import Content as ImageContent
from hashret.images import Inputs, Prepared, content_bytes, read_file, sha256, to_content
from hashret.indexes import CodeIndex
from hashret.indexes.protocol import check_count
from hashret.ingest import BATCH_ITEMS, Found, batches, decode, encoded, hash_contents, read
from hashret.live import LiveIndex, make_index
from hashret.progress import Progress
from hashret.ranking import Near, by_certainty, candidates, check_rank
from hashret.sources import Record, in_order, open_source
from hashret.store import Content, Item, Seen, Store, sqlite_errors
from hashret.vectors import AnyPreprocessing

if TYPE_CHECKING:
    from hashret.hasher import Hasher
BLOBS = "blobs/"  # the root of contents that came without a file, inside the collection


class Hit(NamedTuple):
    """A similar image: `distance` in bits, and where it lies; `path` is the first of `paths`. `score` is what it is
    ordered by where that is not the distance."""

    distance: int
    id: int
    path: str | None
    paths: list[str]
    label: str | None
    metadata: dict[str, Any] | None
    score: float | None = None


class Indexed(NamedTuple):
    """What became of one path: "added", "updated", "unchanged" or "failed", with the reason for a failure."""

    path: str
    status: str
    id: int | None = None
    reason: str | None = None


class IndexReport(NamedTuple):
    """How many paths were added, were there already, led to a new content, were forgotten, and could not be read.

    `failures` are the paths, with reasons, that could not be read in this run; `failed` also counts the ones that an
    earlier run found so and that have not changed. `decoded` counts the images that had to be decoded, and `ignored`
    the files that were passed over because of their names.
    """

    added: int
    unchanged: int
    updated: int
    removed: int
    failed: int
    decoded: int
    ignored: int
    failures: list[tuple[str, str]]


class Collection:
    """A folder of codes that can be searched; make one with `create`, use it with `open`.

    Many threads may use one object. Writes take a lock: within a process they wait for each other, another process is
    refused with a HashretError.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path).absolute()
        self.read_only = read_only
        self._store = Store(self.path / "items.db", read_only=read_only)
        self._index = LiveIndex(self.path / "index", self._store)
        self._lock = threading.Lock()
        self._hasher: Hasher | None = None

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
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):  # or two processes might each put a new database there
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

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many items, that is different contents, there are."""
        return self._store.count("items")

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that the codes are of."""
        return self._settings()["fingerprint"]

    @property
    def bits(self) -> int:
        """The width of a code."""
        return int(self._settings()["bits"])

    @property
    def hasher(self) -> "Hasher":
        """The model that the codes are of."""
        from hashret.hasher import Hasher

        with self._lock:
            fingerprint = self.fingerprint
            if self._hasher is None or self._hasher.fingerprint != fingerprint:
                self._hasher = Hasher.load(self.path / "models" / fingerprint)
                if self._hasher.fingerprint != fingerprint:
                    raise HashretError(f"{self.path / 'models' / fingerprint} holds another model: restore it")
            return self._hasher

    # Adding and removing

    def index(
        self,
        source: Any,
        *,
        prune: bool = False,
        force: bool = False,
        data_root: str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
        committed: Callable[[list[Indexed]], None] | None = None,
    ) -> IndexReport:
        """Add every image of a SOURCE that is new or has changed; the report says what was done.

        Files of the size and time they had are not read again, contents that are known are not decoded again, and
        what could not be read is not tried again until it changes. `prune` forgets paths recorded under this source
        that are no longer there, and refuses if the source is empty or more than half would go, unless `force`.
        `committed` is called with what each batch did once that is durable: at most 1,000 items or one second.
        An exception, KeyboardInterrupt too, loses no batch that was committed.
        """
        counts: Counter[str] = Counter()
        failures: list[tuple[str, str]] = []
        shown = time.monotonic()

        def unchanged(seen: Seen) -> None:
            counts["failed" if seen.failed else "unchanged"] += 1
            show()

        def show(every: float = 0.2) -> None:
            nonlocal shown
            if progress is not None and time.monotonic() - shown >= every:
                shown = time.monotonic()
                told = {key: float(counts[key]) for key in ("added", "updated", "unchanged", "failed")}
                progress(Progress("indexing", int(sum(told.values())), opened.length, told))

        only: set[str] | None = None
        with self._writing():
            fingerprint = self.fingerprint
            if data_root is not None:
                with self._store.write(step=0):  # where reindex will look
                    self._store.put_setting("data_root", str(Path(data_root).absolute()))
            while only is None or only:  # a content may lose its last path on its way to another: that is done again
                opened = open_source(source, data_root=data_root, exclude=self.path)
                stream = encoded(opened, self._store, lambda: self.hasher, unchanged, only)
                only = set()
                with closing(stream):
                    for batch in stream:
                        lines = self._commit(batch, opened.root, fingerprint)
                        only |= {opened.root + found.record.name for found in batch} - {line.path for line in lines}
                        counts.update(line.status for line in lines)
                        counts["decoded"] += sum(found.pixels is not None for found in batch)
                        failures += [(line.path, line.reason) for line in lines if line.reason is not None]
                        if committed is not None:
                            committed(lines)
                        show()
            show(every=0)
            if prune:
                names = (record.name for record in open_source(source, data_root=data_root, exclude=self.path))
                counts["removed"] = self._prune(opened.root, names, force)
            self._index.keep()
        kinds = ("added", "unchanged", "updated", "removed", "failed", "decoded")
        return IndexReport(**{kind: counts[kind] for kind in kinds}, ignored=opened.ignored, failures=failures)

    def add(self, images: Any, metadata: Sequence[dict[str, Any] | None] | None = None) -> list[int]:
        """Add contents without files: uint8 arrays, vectors, PIL images, bytes or paths; the item's id of each.

        A single path, PIL image or bytes is a batch of one. Each content is kept in the collection, so that another
        model can code it later; one that is there already keeps its id and its metadata. Raises HashretError for an
        image that cannot be read: of the thousand that it is among, and of those after, nothing is added.
        """
        ids: list[int] = []
        if isinstance(images, str | os.PathLike | bytes | Image.Image):
            images = [images]
        if metadata is not None:
            images = list(images)
            if len(metadata) != len(images):
                raise ValueError(f"{len(images)} images need as many metadata, not {len(metadata)}")
        with self._writing():
            hasher = self.hasher
            for batch in batches(images, BATCH_ITEMS):
                contents, prepared = zip(*in_order(partial(_prepare, hasher.preprocessing), batch), strict=True)
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

    def remove(self, ids: Iterable[int]) -> int:
        """Forget items; how many of them were there. Files of the user's are left alone."""
        with self._writing():
            with self._store.write() as generation:
                gone = self._store.remove_items([int(i) for i in ids], generation)
            for digest in gone:
                (self.path / BLOBS / digest).unlink(missing_ok=True)
            self._index.keep()
        return len(gone)

    def reindex(self, hasher: "Hasher", *, progress: Callable[[Progress], None] | None = None) -> None:
        """Code every item with another model, and switch to it in one commit; what was coded is kept if interrupted.

        Queries use the old model until then. Raises HashretError, and does not switch, if contents cannot be found
        where they were indexed from.
        """
        with self._writing():
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
            if missing:
                item = self._store.items(missing[:1])[missing[0]]
                raise HashretError(
                    f"{len(missing)} items cannot be read where they were, such as {(item.paths or ['?'])[0]}: put the "
                    f"files back, or forget them with hashret index SOURCE --prune, and run hashret reindex again"
                )
            with self._store.write() as generation:
                self._store.switch(fingerprint, hasher.bits, generation)
            self._index.keep()

    def use_index(self, kind: str) -> None:
        """Search by another index from now on: "bitflip", or "faiss:FACTORY"; ValueError if there is none such."""
        make_index(kind, self.bits)
        with self._writing():
            if self._settings()["index"] != kind:
                with self._store.write(step=0):
                    self._store.put_setting("index", kind)
                self._index.forget()
                self._index.keep()

    # Searching

    def query(
        self, image: Any, k: int | None = 10, max_distance: int | None = None, *, rank: str = "distance"
    ) -> list[Hit]:
        """The `k` items most similar to an image (a path, a PIL image, a uint8 array or a vector), nearest first.

        With `max_distance` none is farther than that many bits; with `k` None all within it are given. Ordered by
        (distance, id). With `rank` "asymmetric" the `k` are those of the lowest `score` among the nearest max(10 k,
        100), or among all within `max_distance`, in the order of (score, distance, id): the sum, over the bits that
        differ, of how far the image's own number lies from the bit's threshold, in training standard deviations.
        """
        return self.query_batch([image], k, max_distance, rank=rank)[0]

    def query_batch(
        self, images: Any, k: int | None = 10, max_distance: int | None = None, *, rank: str = "distance"
    ) -> list[list[Hit]]:
        """What `query` gives, for each of a batch of images as `Hasher.encode` takes them."""
        check_rank(rank)
        while True:
            hasher = self.hasher
            codes, margins = (hasher.encode(images), None) if rank == "distance" else hasher.margins(images)
            hits = self._answer(codes, k, max_distance, hasher.fingerprint, margins=margins)
            if hits is not None:  # None if the collection has changed to another model meanwhile
                return hits

    def query_codes(self, codes: Codes, k: int | None = 10, max_distance: int | None = None) -> list[list[Hit]]:
        """What `query` gives, for codes, uint8 (n, bits // 8); raises ValueError for codes of another width."""
        return self._answer(codes, k, max_distance, None) or []

    def query_item(self, item_id: int, k: int | None = 10, max_distance: int | None = None) -> list[Hit]:
        """What `query` gives for the image of an item, leaving out the item itself; HashretError if there is none."""
        more = None if k is None else check_count(k, 1, "k") + 1
        while True:
            with self._store.read() as settings:
                ids, codes = self._store.codes(settings["fingerprint"], int(settings["bits"]), [item_id])
            if not len(ids):
                raise HashretError(f"there is no item {item_id}: hashret query IMAGE --json shows the ids")
            hits = self._answer(codes, more, max_distance, settings["fingerprint"])
            if hits is not None:  # as in query_batch
                return [hit for hit in hits[0] if hit.id != item_id][:k]

    def get(self, item_id: int) -> Item:
        """The item with this id; raises HashretError if there is none."""
        with self._store.read():
            items = self._store.items([item_id])
        if item_id not in items:
            raise HashretError(f"there is no item {item_id}: hashret query IMAGE --json shows the ids")
        return self._absolute(items[item_id])

    def info(self) -> dict[str, Any]:
        """Counts, model, index and size on disk."""
        config = json.loads((self.path / "models" / self.fingerprint / "config.json").read_text())
        with self._store.read() as settings:
            return {
                "path": str(self.path),
                "items": self._store.count("items"),
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
                "bytes_on_disk": sum(map(_size, self.path.rglob("*"))),
            }

    # How an index run goes

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
        for item_id, pixels in in_order(prepare, wanted()):
            if pixels is not None and item_id not in done:
                done.add(item_id)
                yield item_id, pixels

    def _records(self, root: str) -> Iterator[Record]:
        """What is under a root now; nothing if it is gone."""
        if root == BLOBS:
            for file in sorted((self.path / BLOBS).glob("*")):
                status = file.stat()
                yield Record(file.name, status.st_size, status.st_mtime_ns, None, partial(read_file, file))
        else:
            source = root if Path(root).is_dir() else root.removesuffix("!/").removesuffix("#")
            with suppress(HashretError):
                yield from open_source(source, data_root=self._settings().get("data_root"), exclude=self.path)

    def _keep_blob(
        self, content: ImageContent, width: int, height: int, code: bytes, metadata: dict[str, Any] | None
    ) -> Content:
        """Store a content that has no file of its own under its SHA-256, durably, and describe it."""
        data, digest = content_bytes(content), sha256(content)
        blob = self.path / BLOBS / digest
        with _plain_errors(self.path):
            blob.parent.mkdir(exist_ok=True)
            if not blob.exists():
                write_durably(blob, data)
        return Content(BLOBS, digest, None, len(data), 0, digest, len(data), width, height, code, metadata)

    # How an answer comes about

    def _settings(self) -> dict[str, str]:
        with self._store.read() as settings:
            return settings

    def _answer(
        self,
        codes: Codes,
        k: int | None,
        max_distance: int | None,
        fingerprint: str | None,
        *,
        margins: NDArray[np.float32] | None = None,
    ) -> list[list[Hit]] | None:
        """The hits of each code, from one generation, by its margins if there are any; None if the codes are of another
        model than `fingerprint`."""
        if k is None and max_distance is None:
            raise ValueError("give k, max_distance, or both")
        if max_distance is not None:
            check_count(max_distance, 0, "max_distance")
        answers: list[list[Hit]] = []
        for start in range(0, len(codes), BATCH_ITEMS):
            while True:
                with self._store.read() as settings:
                    if fingerprint not in (None, settings["fingerprint"]):
                        return None
                    check_codes(codes, int(settings["bits"]))
                    live = self._index.at(settings)
                    if live is not None:
                        some = slice(start, start + BATCH_ITEMS)
                        most = k if margins is None else candidates(k)
                        found = _search(live.codes, codes[some], most, max_distance)
                        if self._index.holds(live):
                            scores = None
                            if margins is not None:
                                near = self._store.codes(live.fingerprint, live.codes.bits, _ids(found))
                                found, scores = by_certainty(found, codes[some], margins[some], *near, k)
                            answers += self._hits(found, scores)
                            break
        return answers

    def _hits(self, found: list[Near], scores: list[list[float]] | None = None) -> list[list[Hit]]:
        wanted = _ids(found)
        items = self._store.items(wanted)
        if len(items) < len(wanted):
            raise HashretError(f"{self._store.path} is damaged: restore it from a backup")
        whole = {i: self._absolute(item) for i, item in items.items()}
        hits = [
            [
                Hit(int(d), int(i), next(iter(whole[i].paths), None), whole[i].paths, whole[i].label, whole[i].metadata)
                for d, i in zip(distances.tolist(), ids.tolist(), strict=True)
            ]
            for distances, ids in found
        ]
        if scores is None:
            return hits
        return [
            [hit._replace(score=score) for hit, score in zip(row, row_scores, strict=True)]
            for row, row_scores in zip(hits, scores, strict=True)
        ]

    def _absolute(self, item: Item) -> Item:
        """The item with paths that start from the file system's root."""
        return item._replace(paths=[str(self.path / p) if p.startswith(BLOBS) else p for p in item.paths])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the collection's lock: threads wait for it, another process is refused."""
        if self.read_only:
            raise HashretError(f"{self.path} was opened read-only: open it for writing to change it")
        with _locked(self.path), sqlite_errors(self._store.path):
            yield


def locate(path: str | os.PathLike[str] | None = None) -> Path:
    """The collection's folder: `path`, or `$HASHRET_COLLECTION`, or the first `.hashret` from here upwards, or here."""
    named = path or os.environ.get("HASHRET_COLLECTION")
    if named:
        return Path(named).absolute()
    here = Path.cwd()
    found = (folder / ".hashret" for folder in (here, *here.parents) if (folder / ".hashret" / "items.db").is_file())
    return next(found, here / ".hashret")


_locks: dict[str, threading.RLock] = {}
_locks_lock = threading.Lock()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: other threads wait for it, another process is refused."""
    with _locks_lock:
        ours = _locks.setdefault(os.path.realpath(folder), threading.RLock())
    with ours:
        try:
            lock = FileLock(folder / "lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise HashretError(
                f"another process is writing to {folder}: run the command again when it has finished"
            ) from None
        except OSError as error:
            raise HashretError(f"{folder} cannot be written to ({error.strerror}): check its permissions") from None
        try:
            yield
        finally:
            lock.release()


def _search(index: CodeIndex, codes: Codes, k: int | None, max_distance: int | None) -> list[Near]:
    """Distances and ids for each code: the nearest k, those within a distance, or both."""
    if k is None:
        assert max_distance is not None
        limits, distances, ids = index.within(codes, max_distance)
        return list(zip(np.split(distances, limits[1:-1]), np.split(ids, limits[1:-1]), strict=True))
    hits = index.search(codes, k)
    near = [slice(None) if max_distance is None else row <= max_distance for row in hits.distances]
    return [(hits.distances[i][keep], hits.ids[i][keep]) for i, keep in enumerate(near)]


def _ids(found: list[Near]) -> list[int]:
    """All that was found for any query, in ascending order."""
    ids: list[int] = np.unique(np.concatenate([ids for _, ids in found])).tolist()
    return ids


def _prepare(preprocessing: AnyPreprocessing, image: Any) -> tuple[ImageContent, Prepared]:
    try:
        content = to_content(image)
        return content, preprocessing(content)
    except HashretError as error:
        where = os.fspath(image) if isinstance(image, str | os.PathLike) else f"a {type(image).__name__}"
        raise HashretError(f"{where}: {error}") from error


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
