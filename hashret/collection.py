"""`Collection`: models, a database and an index in one folder; add images, find similar ones, forget them.

The file is longer than most because it is all that a user holds: how images get in is in `ingest`, how the index keeps
up in `live`, what is stored in `store`; here is only what ties them together.
"""

import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from hashret.arrays import DATA_SETS
from hashret.calibration import TARGET, Calibration, from_pairs
from hashret.codes import Codes, check_codes
from hashret.config import read_config
from hashret.contents import Contents
from hashret.copies import VERDICTS, Group, calibrate_by_altering, find_groups
from hashret.errors import HashretError, NotFound
from hashret.evaluation import health
from hashret.files import make_folder, write_durably
from hashret.images import Content as ImageContent
from hashret.images import Inputs, Prepared, content_bytes, read_file, sha256, to_content
from hashret.indexes import CodeIndex
from hashret.indexes.protocol import check_count
from hashret.ingest import BATCH_ITEMS, Found, batches, decode, encoded, hash_contents, read, weight
from hashret.live import LiveIndex, make_index
from hashret.metadata import check_metadata, open_metadata
from hashret.progress import Progress
from hashret.ranking import Near, by_certainty, candidates, check_rank
from hashret.sources import Record, Source, in_order, open_source
from hashret.store import BLOBS, Content, Failure, Item, Place, Seen, Store, damaged, sqlite_errors
from hashret.transfer import Header, format_of, write
from hashret.transfer import read as read_items
from hashret.vectors import AnyPreprocessing

if TYPE_CHECKING:
    from hashret.hasher import Hasher
KNOWN_ITEMS = 20_000  # that are kept in memory for the next query
HEALTH_CODES = 1_000_000  # that `info` looks at


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
    """What became of one path: "added", "updated", "unchanged", "removed" or "failed", with the reason for that."""

    path: str
    status: str
    id: int | None = None
    reason: str | None = None


class MissingContents(HashretError):
    """The contents of items cannot be read where they were; `paths` are one of each."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(
            f"{len(paths):,} items cannot be read where they were, such as {paths[0]}: put the files back, index "
            f"them where they are with hashret index SOURCE --prune, or forget them with hashret reindex --drop-missing"
        )
        self.paths = paths


class IndexReport(NamedTuple):
    """How many paths were added, were there already, led to a new content, were forgotten, and could not be read.

    `failures` are the paths, with reasons, that could not be read in this run; `failed` also counts the ones that an
    earlier run found so and that have not changed. `decoded` counts the images that had to be decoded, and `ignored`
    the files that were passed over because of their names. `described` counts the items whose metadata changed, and
    `unmatched` the rows of metadata that name no image of this source.
    """

    added: int
    unchanged: int
    updated: int
    removed: int
    failed: int
    decoded: int
    ignored: int
    failures: list[tuple[str, str]]
    described: int = 0
    unmatched: int = 0


class Collection:
    """A folder of codes that can be searched; make one with `create`, use it with `open`.

    Many threads may use one object. Writes take a lock: within a process they wait for each other, another process is
    refused with a HashretError.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path).absolute()
        self.read_only = read_only
        self._store = Store(self.path / "items.db", read_only=read_only)
        settings = self._settings()
        try:
            make_index(settings["index"], int(settings["bits"]))
        except ValueError as error:
            raise damaged(self._store.path, str(error)) from None
        self._index = LiveIndex(self.path / "index", self._store)
        self._contents = Contents(self.path)
        self._lock = threading.Lock()
        self._hasher: Hasher | None = None
        self._known: tuple[str, dict[int, Item]] = ("", {})  # the generation that these items are of

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
    def generation(self) -> int:
        """How many times the collection has been written to."""
        return int(self._settings()["generation"])

    @property
    def hasher(self) -> "Hasher":
        """The model that the codes are of."""
        from hashret.hasher import Hasher

        with self._lock:
            settings = self._settings()
            fingerprint = settings["fingerprint"]
            if self._hasher is None or self._hasher.fingerprint != fingerprint:
                loaded = Hasher.load(self.path / "models" / fingerprint)
                if loaded.fingerprint != fingerprint:
                    raise HashretError(f"{self.path / 'models' / fingerprint} holds another model: restore it")
                if str(loaded.bits) != settings["bits"]:
                    raise damaged(self._store.path, f"codes of {loaded.bits} bits have {settings['bits']} there")
                self._hasher = loaded
            return self._hasher

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
        a file, or else what lies beside the source (see `hashret.metadata`); a row replaces what was known of its
        image, and of several rows for equal images the first counts. `prune` forgets paths recorded under this source
        that are no longer there, and refuses if the source is empty or more than half would go, unless `force`.
        `committed` is called with what each batch did once that is durable: at most 1,000 items or one second.
        An exception, KeyboardInterrupt too, loses no batch that was committed.
        """
        with self._writing():
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
        with self._writing():
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
        images = _as_batch(images)
        if metadata is not None:
            images = list(images)
            if len(metadata) != len(images):
                raise ValueError(f"{len(images)} images need as many metadata, not {len(metadata)}")
            metadata = [None if one is None else check_metadata(one) for one in metadata]
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
            if missing and not drop_missing:
                items = self._store.items(missing).values()
                raise MissingContents([self._absolute(item).paths[0] for item in items])
            with self._store.write() as generation:
                self._store.remove_items(missing, generation)
                self._store.switch(fingerprint, hasher.bits, generation)
            self._index.keep()
        return len(missing)

    def use_index(self, kind: str) -> None:
        """Search by another index from now on: "bitflip", or "faiss:FACTORY"; ValueError if there is none such."""
        make_index(kind, self.bits)
        with self._writing():
            if self._settings()["index"] != kind:
                with self._store.write(step=0):
                    self._store.put_setting("index", kind)
                self._index.forget()
                self._index.keep()

    def rebuild_index(self) -> None:
        """Make the index again from the database, and its cache anew."""
        with self._writing():
            shutil.rmtree(self.path / "index", ignore_errors=True)
            self._index.forget()
            self._index.keep()

    # Copies and verdicts

    def dupes(
        self, max_distance: int = 3, *, by: str = "connected", keep: str | os.PathLike[str] = "largest"
    ) -> list[Group]:
        """Groups of items that are copies of one image, the one to keep first; those of one item have several paths.

        `by` "connected": a chain leads from each to each, every link at most `max_distance` bits long; by "star": each
        is within that of the first. `keep` says which is the first: "largest" (in pixels, then bytes), "oldest" (by
        the date of its file), or a folder that it should lie in, and then the largest. Verdicts count: "different"
        removes a link, "same" adds one. Raises HashretError if nothing lies in the folder.
        """
        check_count(max_distance, 0, "max_distance")
        if by not in ("connected", "star"):
            raise ValueError(f"by is 'connected' or 'star', not {by!r}")
        best = os.fspath(keep)
        with self._store.read():
            found = find_groups(
                self._store, max_distance, by, best if best in ("largest", "oldest") else str(Path(best).absolute())
            )
        return [Group([self._absolute(item) for item in group.items], group.distances) for group in found]

    def verdict(self, a: Any, b: Any, verdict: str) -> None:
        """Remember that two items are the "same", or "different", until one of them is removed or this is said anew.

        Each is an id, or an image as in `find`. A verdict is of contents, so it stays when files move. Raises
        HashretError for what is no item, and for two that have the same content.
        """
        if verdict not in VERDICTS:
            raise ValueError(f"a verdict is 'same' or 'different', not {verdict!r}")
        with self._writing():
            first, second = (self._item_id(image) for image in (a, b))
            if first == second:
                raise HashretError(f"both are item {first}, one content: a verdict is of two")
            with self._store.write():
                self._store.put_verdict(first, second, verdict)

    def verdicts(self) -> list[tuple[int, int, str]]:
        """All verdicts: the ids of the two items, and "same" or "different"."""
        with self._store.read():
            found = {verdict: self._store.verdicts(verdict).tolist() for verdict in VERDICTS}
        return sorted((a, b, verdict) for verdict, pairs in found.items() for a, b in pairs)

    def judged(self) -> list[tuple[ImageContent, ImageContent, bool]]:
        """The pairs of contents that were judged, and whether they are the same: what `Hasher.fit` takes as `pairs`.

        Those that cannot be read any more where they were indexed from are left out.
        """
        verdicts = self.verdicts()
        contents = dict(self.contents({i for a, b, _ in verdicts for i in (a, b)}))
        readable = [told for told in verdicts if told[0] in contents and told[1] in contents]
        return [(contents[a], contents[b], verdict == "same") for a, b, verdict in readable]

    def find(self, image: Any) -> int | None:
        """The id of the item that an image is (a path, a PIL image, bytes or a uint8 array), if it is one.

        It is known by its content; a path where there is no file is looked for among those that were indexed.
        """
        if isinstance(image, str | os.PathLike) and not os.path.isfile(image):  # noqa: PTH113  # takes any text
            path = os.fspath(image)
            with self._store.read():
                return self._store.at(path) or self._store.at(str(Path(path).absolute()))
        digest = sha256(to_content(image))
        with self._store.read():
            return self._store.find([digest]).get(digest)

    def contents(self, ids: Iterable[int]) -> Iterator[tuple[int, ImageContent]]:
        """Id and content of those of the items that can still be read where they were indexed from, in any order."""
        with self._store.read():
            places = dict[str, dict[str, int]]()
            for place in self._store.places(ids):
                places.setdefault(place.root, {})[place.name] = place.item_id or 0
            items = self._store.items({i for names in places.values() for i in names.values()})
        done = set[int]()
        for root, names in places.items():
            folder = self.path / BLOBS if root == BLOBS else Path(root)
            records: Iterable[tuple[str, ImageContent | HashretError]]
            if folder.is_dir():
                files = ((name, folder / name) for name, i in names.items() if i not in done)
                records = ((name, read(Record(name, 0, 0, None, partial(read_file, file)))) for name, file in files)
            else:
                records = ((record.name, read(record)) for record in self._records(root) if record.name in names)
            for name, content in records:
                item_id = names[name]
                if isinstance(content, HashretError) or item_id in done or sha256(content) != items[item_id].sha256:
                    continue
                done.add(item_id)
                yield item_id, content

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
        None, altered copies are made of so many items, drawn with `seed`, and looked for among all. Raises
        HashretError if that leaves nothing to measure.
        """
        hasher = self.hasher
        if pairs is None:
            with self._store.read():
                ids, codes = self._store.codes(hasher.fingerprint, hasher.bits)
            drawn = np.random.default_rng(seed).permutation(ids)[: check_count(images, 1, "images")]
            contents = self.contents(drawn.tolist())

            def altered(done: int) -> None:
                if progress is not None:
                    progress(Progress("altering", done, len(drawn), {}))

            found = calibrate_by_altering(hasher, contents, ids, codes, seed, altered)
        else:
            judged = list(pairs)
            a, b = (self._codes_of([pair[side] for pair in judged], hasher) for side in (0, 1))
            found = from_pairs(source, a, b, np.array([same for _, _, same in judged], np.bool_))
        with self._writing(), self._store.write(step=0):
            if self._store.settings()["fingerprint"] != hasher.fingerprint:
                raise HashretError(f"{self.path} has changed to another model meanwhile: calibrate again")
            self._store.put_setting("calibration", found.to_json())
        return found

    def calibration(self) -> Calibration:
        """What `calibrate` found for the present model; raises HashretError if it was not asked to."""
        text = self._settings().get("calibration")
        if text is None:
            raise HashretError("what a radius means here is not known: run hashret calibrate, or give a number of bits")
        return Calibration.from_json(text)

    def radius(self, target: float = TARGET) -> int:
        """The radius that finds most copies while this share of what it shows is right, as `calibration` has it."""
        return self.calibration().radius(target, len(self))

    def _item_id(self, image: Any) -> int:
        if isinstance(image, int | np.integer):
            return self.get(int(image)).id
        found = self.find(image)
        if found is None:
            what = os.fspath(image) if isinstance(image, str | os.PathLike) else "the image"
            raise HashretError(f"{what} is not in the collection: hashret index its folder first")
        return found

    def _codes_of(self, images: list[Any], hasher: "Hasher") -> Codes:
        """The codes of items, by ids or images, and of other images."""
        known = [int(image) if isinstance(image, int | np.integer) else self.find(image) for image in images]
        with self._store.read():
            ids, codes = self._store.codes(hasher.fingerprint, hasher.bits, [i for i in known if i is not None])
        row = dict(zip(ids.tolist(), codes, strict=True))
        rest = [image for image, i in zip(images, known, strict=True) if i not in row]
        prepared = list(in_order(partial(_prepare, hasher.preprocessing), rest))
        fresh = iter(hasher.encode_pixels(np.stack([one.pixels for _, one in prepared])) if prepared else ())
        return np.array([row[i] if i in row else next(fresh) for i in known], np.uint8).reshape(-1, hasher.bits // 8)

    # Searching

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
        """What `query` gives, for each of a batch of images as `Hasher.encode` takes them."""
        check_rank(rank)
        images, apart = self._judged_apart(images)
        more = None if k is None else check_count(k, 1, "k") + max(map(len, apart), default=0)
        while True:
            hasher = self.hasher
            codes, margins = (hasher.encode(images), None) if rank == "distance" else hasher.margins(images)
            hits = self._answer(codes, more, max_distance, hasher.fingerprint, where, margins=margins)
            if hits is not None:  # None if the collection has changed to another model meanwhile
                return _without(hits, apart, k) if apart else hits

    def query_codes(
        self, codes: Codes, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[list[Hit]]:
        """What `query` gives, for codes, uint8 (n, bits // 8); raises ValueError for codes of another width."""
        return self._answer(codes, k, max_distance, None, where) or []

    def query_item(
        self, item_id: int, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[Hit]:
        """What `query` gives for the image of an item, leaving out the item itself; NotFound if there is none."""
        while True:
            with self._store.read() as settings:
                left_out = {item_id, *_apart_from(item_id, self._store.verdicts("different"))}
                ids, codes = self._store.codes(settings["fingerprint"], int(settings["bits"]), [item_id])
            if not len(ids):
                raise NotFound(f"there is no item {item_id}: hashret query IMAGE --json shows the ids")
            more = None if k is None else check_count(k, 1, "k") + len(left_out)
            hits = self._answer(codes, more, max_distance, settings["fingerprint"], where)
            if hits is not None:  # as in query_batch
                return _without(hits, [left_out], k)[0]

    def matching(self, where: str) -> list[int]:
        """Ids, ascending, of the items that an SQLite expression holds for, such as "label = 'cat' AND width > 800".

        It may use the columns of `items`, those of `paths` and `path`, the whole one (an item qualifies if it does with
        one of its paths), keys of the metadata by name, where they are no columns, and SELECTs from the database's
        tables. Raises HashretError for anything else, and for what takes longer than a second.
        """
        while True:
            with self._store.read() as settings:
                ids = self._store.matching(where, settings["generation"])
            if ids is not None:
                found: list[int] = ids.tolist()
                return found

    def get(self, item_id: int) -> Item:
        """The item with this id; raises NotFound if there is none."""
        with self._store.read():
            items = self._store.items([item_id])
        if item_id not in items:
            raise NotFound(f"there is no item {item_id}: hashret query IMAGE --json shows the ids")
        return self._absolute(items[item_id])

    def items(self, after: int = 0, limit: int = 100) -> list[Item]:
        """The items whose ids follow `after`, in order of their ids, at most `limit`."""
        with self._store.read():
            ids = self._store.ids(after, limit)
            found = self._store.items(ids)
        return [self._absolute(found[i]) for i in ids]

    def codes(self, ids: Sequence[int]) -> Codes:
        """The codes, uint8 (n, bits // 8), of the items with these ids; raises NotFound if one is missing."""
        with self._store.read() as settings:
            found, codes = self._store.codes(settings["fingerprint"], int(settings["bits"]), ids)
        rows = {int(item_id): row for row, item_id in enumerate(found)}
        missing = [i for i in ids if i not in rows]
        if missing:
            raise NotFound(f"there is no item {missing[0]}: hashret query IMAGE --json shows the ids")
        return codes[[rows[i] for i in ids]]

    def content(self, item_id: int) -> ImageContent:
        """The image of an item as it was indexed, the bytes of a file or a uint8 array; raises NotFound if the item, or
        its image, is not there any more."""
        digest = self.get(item_id).sha256
        with self._store.read() as settings:
            places = self._store.places([item_id])
        for place in places:
            content = self._contents.read(place.root, place.name, digest, settings.get("data_root"))
            if content is not None:
                return content
        raise NotFound(f"the image of item {item_id} is not where it was: put the file back, or index it again")

    def failures(self) -> list[Failure]:
        """The paths that could not be read, why, and when that was found."""
        with self._store.read():
            return [failure for _, failure in self._store.failures()]

    def export(self, path: str | os.PathLike[str], kind: str | None = None) -> int:
        """Write all items, with codes, paths and metadata, as "jsonl", "parquet" or "numpy"; how many they are.

        The format is that of the suffix if none is named; see `hashret.transfer` for what is in them.
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
        with self._writing():
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

    def _records(self, root: str) -> Iterator[Record]:
        """What is under a root now; nothing if it is gone."""
        if root == BLOBS:
            for file in sorted((self.path / BLOBS).glob("*")):
                status = file.stat()
                yield Record(file.name, status.st_size, status.st_mtime_ns, None, partial(read_file, file))
        else:
            with suppress(HashretError):
                yield from self._source(root) or ()

    def _source(self, root: str) -> Source | None:
        """The source whose records' names begin with `root`; None if it is gone."""
        source = root if Path(root).is_dir() else root.removesuffix("!/").removesuffix("#")
        with suppress(HashretError):
            return open_source(source, data_root=self._settings().get("data_root"), exclude=self.path)
        return None

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
        where: str | None,
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
                    allowed = None if where is None else self._store.matching(where, settings["generation"])
                    live = self._index.at(settings)
                    if live is not None and (where is None or allowed is not None):
                        some = slice(start, start + BATCH_ITEMS)
                        most = k if margins is None else candidates(k)
                        found = _search(live.codes, codes[some], most, max_distance, allowed)
                        if self._index.holds(live):
                            scores = None
                            if margins is not None:
                                near = self._store.codes(live.fingerprint, live.codes.bits, _ids(found))
                                found, scores = by_certainty(found, codes[some], margins[some], *near, k)
                            answers += self._hits(found, scores)
                            break
        return answers

    def _judged_apart(self, images: Any) -> tuple[Any, list[set[int]]]:
        """A batch of images, and for each that is an item those judged different from it; none if nothing is judged."""
        with self._store.read():
            pairs = self._store.verdicts("different")
        if not len(pairs):
            return images, []
        contents = [to_content(image) for image in _as_batch(images)]
        digests = [sha256(content) for content in contents]
        with self._store.read():
            known = self._store.find(digests)
        return contents, [_apart_from(known.get(digest, -1), pairs) for digest in digests]

    def _hits(self, found: list[Near], scores: list[list[float]] | None = None) -> list[list[Hit]]:
        whole = self._known_items(_ids(found))
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

    def _known_items(self, ids: list[int]) -> dict[int, Item]:
        """At least these items, with whole paths: from memory, if they were asked for since the last change."""
        generation = self._store.settings()["generation"]
        known = self._known
        if known[0] != generation or len(known[1]) > KNOWN_ITEMS:
            known = self._known = generation, {}
        missing = [i for i in ids if i not in known[1]]
        if missing:
            items = self._store.items(missing)
            if len(items) < len(missing):
                raise HashretError(f"{self._store.path} is damaged: hashret doctor says what can be saved")
            known[1].update((i, self._absolute(item)) for i, item in items.items())
        return known[1]

    def _absolute(self, item: Item) -> Item:
        """The item with paths that start from the file system's root."""
        return item._replace(paths=[self._whole(path) for path in item.paths])

    def _whole(self, path: str) -> str:
        """A path as it is for others: those of contents without files lie in the collection's folder."""
        return f"{self.path}/{path}" if path.startswith(BLOBS) else path

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the collection's lock: threads wait for it, another process is refused."""
        if self.read_only:
            raise HashretError(f"{self.path} was opened read-only: open it for writing to change it")
        self._store.check_in_place()  # before a lock would make the folder anew
        with locked(self.path), sqlite_errors(self._store.path):
            self._store.check_in_place()
            yield


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


_locks: dict[str, threading.RLock] = {}
_locks_lock = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
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


def _search(
    index: CodeIndex,
    codes: Codes,
    k: int | None,
    max_distance: int | None,
    allowed: NDArray[np.int64] | None,
) -> list[Near]:
    """Distances and ids for each code: the nearest k, those within a distance, or both."""
    if k is None:
        assert max_distance is not None
        limits, distances, ids = index.within(codes, max_distance, allowed=allowed)
        return list(zip(np.split(distances, limits[1:-1]), np.split(ids, limits[1:-1]), strict=True))
    hits = index.search(codes, k, allowed=allowed)
    near = [slice(None) if max_distance is None else row <= max_distance for row in hits.distances]
    return [(hits.distances[i][keep], hits.ids[i][keep]) for i, keep in enumerate(near)]


def _ids(found: list[Near]) -> list[int]:
    """All that was found for any query, in ascending order."""
    ids: list[int] = np.unique(np.concatenate([ids for _, ids in found])).tolist()
    return ids


def _as_batch(images: Any) -> Iterable[Any]:
    """The images of a batch, which a path, a PIL image or bytes is by itself."""
    return [images] if isinstance(images, str | os.PathLike | bytes | Image.Image) else images


def _apart_from(item_id: int, pairs: NDArray[np.int64]) -> set[int]:
    """What an item is paired with, of pairs of ids (n, 2)."""
    return set(pairs[(pairs == item_id).any(axis=1)].ravel().tolist()) - {item_id}


def _without(hits: list[list[Hit]], left_out: list[set[int]], k: int | None) -> list[list[Hit]]:
    """The first k hits of each query without the items that are left out of it."""
    return [[hit for hit in row if hit.id not in out][:k] for row, out in zip(hits, left_out, strict=True)]


def _prepare(preprocessing: AnyPreprocessing, image: Any) -> tuple[ImageContent, Prepared]:
    try:
        content = to_content(image)
        return content, preprocessing(content)
    except HashretError as error:
        where = os.fspath(image) if isinstance(image, str | os.PathLike) else f"a {type(image).__name__}"
        raise type(error)(f"{where}: {error}") from error


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
