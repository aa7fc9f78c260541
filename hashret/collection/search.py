"""Searching a collection: from images, codes and items to the items most similar to them."""

import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes
from hashret.collection.ingest import BATCH_ITEMS
from hashret.collection.opened import Opened
from hashret.collection.ranking import Near, by_certainty, candidates, check_rank
from hashret.data.contents import sha256
from hashret.data.images import as_batch, to_content
from hashret.errors import HashretError, NotFound
from hashret.indexes import CodeIndex, Searched
from hashret.indexes.protocol import check_count
from hashret.results import Hit, Item

KNOWN_ITEMS = 100_000  # that are kept in memory for the next query: some 65 MB


class Nearest(NamedTuple):
    """What was found for one query: distances in bits, and the items, which are the same objects until the collection
    changes."""

    distances: list[int]
    items: list[Item]


class Searching(Opened):
    """A collection that can be asked.

    An answer comes from one generation: if index and database disagree, the query is asked again.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        super().__init__(path, read_only=read_only)
        self._known: tuple[str, dict[int, Item]] = ("", {})  # the generation that these items are of

    @property
    def searched(self) -> Searched:
        """How many queries the index was asked since this object last loaded or built it, and how many buckets it
        looked up for them, none where it scanned."""
        return self._index.searched

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
        return _as_hits(*self._found(images, k, max_distance, where, rank))

    def nearest_images(
        self, images: Any, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[Nearest]:
        """What `query_batch` gives, as `nearest` does."""
        return self._found(images, k, max_distance, where, "distance")[0]

    def query_codes(
        self, codes: Codes, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[list[Hit]]:
        """What `query` gives, for codes, uint8 (n, bits // 8); raises ValueError for codes of another width."""
        return _as_hits(self.nearest(codes, k, max_distance, where=where))

    def nearest(
        self, codes: Codes, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[Nearest]:
        """What `query_codes` gives, as distances and items: for whoever keeps ready what is said of an item."""
        found = self._answer(codes, k, max_distance, None, where)
        return [] if found is None else found[0]

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
            found = self._answer(codes, more, max_distance, settings["fingerprint"], where)
            if found is not None:  # as in _found
                return _as_hits(*_without(*found, [left_out], k))[0]

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

    def items(self, after: int = 0, limit: int = 100, *, where: str | None = None) -> list[Item]:
        """The items whose ids follow `after`, in order of their ids, at most `limit`; with `where` those that this
        SQLite expression holds for, as `matching` says."""
        if where is None:
            return super().items(after, limit)
        while True:
            with self._store.read() as settings:
                ids = self._store.matching(where, settings["generation"])
                if ids is not None:
                    start = int(np.searchsorted(ids, after, side="right"))
                    some: list[int] = ids[start : start + limit].tolist()
                    found = self._store.items(some)
                    return [self._absolute(found[i]) for i in some]

    def _found(
        self, images: Any, k: int | None, max_distance: int | None, where: str | None, rank: str
    ) -> tuple[list[Nearest], list[list[float]] | None]:
        """What is found for each image, with scores unless the rank is by distance."""
        images, apart = self._judged_apart(images)
        more = None if k is None else check_count(k, 1, "k") + max(map(len, apart), default=0)
        while True:
            hasher = self.hasher
            codes, margins = (hasher.encode(images), None) if rank == "distance" else hasher.margins(images)
            found = self._answer(codes, more, max_distance, hasher.fingerprint, where, margins=margins)
            if found is not None:  # None if the collection has changed to another model meanwhile
                return _without(*found, apart, k) if apart else found

    def _answer(
        self,
        codes: Codes,
        k: int | None,
        max_distance: int | None,
        fingerprint: str | None,
        where: str | None,
        *,
        margins: NDArray[np.float32] | None = None,
    ) -> tuple[list[Nearest], list[list[float]] | None] | None:
        """What is found for each code, from one generation, with scores if by its margins; None if the codes are of
        another model than `fingerprint`."""
        if k is None and max_distance is None:
            raise ValueError("give k, max_distance, or both")
        if max_distance is not None:
            check_count(max_distance, 0, "max_distance")
        answers: list[Nearest] = []
        scores: list[list[float]] | None = None if margins is None else []
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
                            if margins is not None and scores is not None:
                                near = self._store.codes(live.fingerprint, live.codes.bits, _ids(found))
                                found, found_scores = by_certainty(found, codes[some], margins[some], *near, k)
                                scores += found_scores
                            whole = self._known_items(_ids(found), settings["generation"])
                            answers += [Nearest(d.tolist(), [whole[i] for i in ids.tolist()]) for d, ids in found]
                            break
        return answers, scores

    def _judged_apart(self, images: Any) -> tuple[Any, list[set[int]]]:
        """A batch of images, and for each that is an item those judged different from it; none if nothing is judged."""
        with self._store.read():
            pairs = self._store.verdicts("different")
        if not len(pairs):
            return images, []
        contents = [to_content(image) for image in as_batch(images)]
        digests = [sha256(content) for content in contents]
        with self._store.read():
            known = self._store.find(digests)
        return contents, [_apart_from(known.get(digest, -1), pairs) for digest in digests]

    def _known_items(self, ids: list[int], generation: str) -> dict[int, Item]:
        """At least these items, with whole paths: from memory, if they were asked for since the last change."""
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


def _as_hits(found: list[Nearest], scores: list[list[float]] | None = None) -> list[list[Hit]]:
    hits = [
        [
            Hit(distance, item.id, item.paths[0] if item.paths else None, item.paths, item.label, item.metadata)
            for distance, item in zip(distances, items, strict=True)
        ]
        for distances, items in found
    ]
    if scores is None:
        return hits
    return [
        [hit._replace(score=score) for hit, score in zip(row, row_scores, strict=True)]
        for row, row_scores in zip(hits, scores, strict=True)
    ]


def _ids(found: list[Near]) -> list[int]:
    """All that was found for any query, in ascending order."""
    ids: list[int] = np.unique(np.concatenate([ids for _, ids in found])).tolist()
    return ids


def _apart_from(item_id: int, pairs: NDArray[np.int64]) -> set[int]:
    """What an item is paired with, of pairs of ids (n, 2)."""
    return set(pairs[(pairs == item_id).any(axis=1)].ravel().tolist()) - {item_id}


def _without(
    found: list[Nearest], scores: list[list[float]] | None, left_out: list[set[int]], k: int | None
) -> tuple[list[Nearest], list[list[float]] | None]:
    """The first k of what was found for each query, without the items that are left out of it."""
    kept = [
        [place for place, item in enumerate(items) if item.id not in out][:k]
        for (_, items), out in zip(found, left_out, strict=True)
    ]
    found = [
        Nearest([distances[place] for place in places], [items[place] for place in places])
        for (distances, items), places in zip(found, kept, strict=True)
    ]
    if scores is not None:
        scores = [[row[place] for place in places] for row, places in zip(scores, kept, strict=True)]
    return found, scores
