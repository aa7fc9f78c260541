"""Searching: from images, codes and items to the items most similar to them, as functions over a `View`."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes
from hashret.collection.parts import Parts, no_item
from hashret.collection.snapshot import ModelChanged, Neighbours, View
from hashret.data.contents import PreparedImages
from hashret.data.images import as_batch
from hashret.parallel import batches
from hashret.results import Hit, Item, QueryOptions

CHUNK = 1000  # queries that are answered from one state


class Queries(NamedTuple):
    """Images as they are asked for: their codes, uint8 (n, bits // 8), by a model, the certainties of the bits, float32
    (n, bits), where these rank, and the SHA-256 of each content."""

    fingerprint: str
    codes: Codes
    margins: NDArray[np.float32] | None
    digests: Sequence[str]


class QueryResult(NamedTuple):
    """What was found for one query: distances in bits, and the items, which are the same objects until the collection
    changes, with what they are ordered by where that is not the distance."""

    distances: list[int]
    items: list[Item]
    scores: list[float] | None = None


def chunks(images: Any) -> Iterator[Any]:
    """A batch of images in parts of a thousand, each a batch of the same kind."""
    images = as_batch(images)
    if isinstance(images, np.ndarray | PreparedImages):
        yield from (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
    elif isinstance(images, Iterable):
        yield from batches(images, CHUNK)
    else:
        yield images  # which `Hasher.prepare` refuses


def by_images(parts: Parts, images: Any, options: QueryOptions) -> list[QueryResult]:
    """What is found for each of a batch of images, without the items that were judged different from it."""

    def encode(model_changed: bool) -> Queries:
        hasher = parts.models.current() if model_changed else parts.models.last
        prepared = images if isinstance(images, PreparedImages) else hasher.prepare(images)
        if options.rank == "distance":
            return Queries(hasher.fingerprint, hasher.encode(prepared), None, prepared.digests)
        return Queries(hasher.fingerprint, *hasher.margins(prepared), prepared.digests)

    return parts.reader.ask_with(encode, lambda view, queries: _nearest_unless_different(view, queries, options))


def by_codes(parts: Parts, codes: Codes, options: QueryOptions) -> list[QueryResult]:
    """What is found for each code, uint8 (n, bits // 8). Raises ValueError for codes of another width."""
    found: list[QueryResult] = []
    for start in range(0, len(codes), CHUNK):
        found += parts.reader.ask(partial(nearest, codes=codes[start : start + CHUNK], options=options))
    return found


def by_item(parts: Parts, item_id: int, options: QueryOptions) -> QueryResult:
    """What is found for the image of an item, without the item itself and those judged different from it.

    Raises NotFound if there is none.
    """
    return parts.reader.ask(lambda view: _nearest_to_item(view, item_id, options))


def _nearest_unless_different(view: View, queries: Queries, options: QueryOptions) -> list[QueryResult]:
    if queries.fingerprint != view.settings.model.fingerprint:
        raise ModelChanged
    pairs = view.rows.verdicts("different")
    if not len(pairs):
        return nearest(view, queries.codes, options, margins=queries.margins)
    known = view.rows.find(queries.digests)
    left_out = [_partners(known.get(digest, -1), pairs) for digest in queries.digests]
    return _nearest_but(view, queries, options, left_out)


def _nearest_to_item(view: View, item_id: int, options: QueryOptions) -> QueryResult:
    _, codes = view.rows.codes([item_id])
    if not len(codes):
        raise no_item(item_id)
    left_out = {item_id} | _partners(item_id, view.rows.verdicts("different"))
    queries = Queries(view.settings.model.fingerprint, codes, None, ())
    return _nearest_but(view, queries, options, [left_out])[0]


def nearest(
    view: View, codes: Codes, options: QueryOptions, *, margins: NDArray[np.float32] | None = None
) -> list[QueryResult]:
    """What is found for each code, by its margins if they are given. Raises ValueError for codes of another width."""
    check_codes(codes, view.settings.model.bits)
    allowed = None if options.where is None else view.rows.ids(where=options.where)
    scores: list[list[float]] | None = None
    if margins is None:
        found = view.search(codes, options.k, options.max_distance, allowed)
    else:
        found = view.search(codes, candidate_count(options.k), options.max_distance, allowed)
        found, scores = rerank(found, codes, margins, *view.rows.codes(_ids(found)), options.k)
    items = view.items(_ids(found))
    return [
        QueryResult(
            near.distances.tolist(), [items[i] for i in near.ids.tolist()], None if scores is None else scores[row]
        )
        for row, near in enumerate(found)
    ]


def _nearest_but(view: View, queries: Queries, options: QueryOptions, left_out: list[set[int]]) -> list[QueryResult]:
    """What is found for each query without the items that are left out of it."""
    more = None if options.k is None else options.k + max(map(len, left_out), default=0)
    found = nearest(view, queries.codes, options.with_k(more), margins=queries.margins)
    return [_without(row, out, options.k) for row, out in zip(found, left_out, strict=True)]


def _without(found: QueryResult, left_out: set[int], k: int | None) -> QueryResult:
    """The first k of what was found, without the items that are left out."""
    kept = [position for position, item in enumerate(found.items) if item.id not in left_out][:k]
    return QueryResult(
        [found.distances[position] for position in kept],
        [found.items[position] for position in kept],
        None if found.scores is None else [found.scores[position] for position in kept],
    )


def candidate_count(k: int | None) -> int | None:
    """How many of the nearest are looked at for the first `k` of another order."""
    return None if k is None else max(10 * k, 100)


def rerank(
    near: list[Neighbours],
    queries: Codes,
    margins: NDArray[np.float32],
    ids: NDArray[np.int64],
    codes: Codes,
    k: int | None,
) -> tuple[list[Neighbours], list[list[float]]]:
    """The first `k` of what is near to each query, and their scores, lowest first: weighted Hamming distances, in which
    a bit that differs costs how sure the query is of it, the size of its margin, (queries, bits).

    Gordo, Perronnin, Gong and Lazebnik, "Asymmetric Distances for Binary Embeddings", PAMI 2014,
    https://doi.org/10.1109/TPAMI.2013.101. `ids`, ascending, and `codes` are of all that is near to any query. Equal
    scores are in the order of (distance, id).
    """
    found: list[Neighbours] = []
    scores: list[list[float]] = []
    for (distances, row), query, margin in zip(near, queries, np.abs(margins).astype(np.float64), strict=True):
        differing = np.unpackbits(codes[np.searchsorted(ids, row)] ^ query, axis=1)
        costs = (differing * margin).sum(axis=1)
        order = np.lexsort((row, distances, costs))[:k]
        found.append(Neighbours(distances[order], row[order]))
        scores.append(costs[order].tolist())
    return found, scores


def as_hits(found: QueryResult) -> list[Hit]:
    """What was found for a query, as it is public."""
    hits = [
        Hit(distance, item.id, item.paths[0] if item.paths else None, item.paths, item.label, item.metadata)
        for distance, item in zip(found.distances, found.items, strict=True)
    ]
    if found.scores is None:
        return hits
    return [hit._replace(score=score) for hit, score in zip(hits, found.scores, strict=True)]


def _ids(found: list[Neighbours]) -> list[int]:
    """All that was found for any query, in ascending order."""
    ids: list[int] = np.unique(np.concatenate([near.ids for near in found])).tolist()
    return ids


def _partners(item_id: int, pairs: NDArray[np.int64]) -> set[int]:
    """What an item is paired with, of pairs of ids (n, 2)."""
    return set(pairs[(pairs == item_id).any(axis=1)].ravel().tolist()) - {item_id}
