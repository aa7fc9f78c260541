"""Search by images, by codes and by an item, as functions over a `View`.

`render` makes what is returned of the results, within the same view: `hits` makes hits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes
from hashret.collection.parts import Parts, no_item
from hashret.collection.snapshot import ModelChanged, Neighbours, View
from hashret.data.contents import PreparedImages
from hashret.data.images import as_batch
from hashret.parallel import batches
from hashret.results import Hit, Item, QueryOptions

R = TypeVar("R")

CHUNK = 1000  # queries that are answered from one snapshot


class EncodedQueries(NamedTuple):
    """Query images encoded by a model."""

    fingerprint: str  # of the model
    codes: Codes  # uint8 (n, bits // 8)
    margins: NDArray[np.float32] | None  # (n, bits), signed distances to the thresholds; None if not needed
    digests: Sequence[str]  # SHA-256 of each content


class QueryResult(NamedTuple):
    """The result of one query: ids by rank, their distances in bits, and their scores if these determine the rank."""

    distances: list[int]
    ids: list[int]
    scores: list[float] | None = None


Render = Callable[[View, list[QueryResult]], list[R]]


def chunks(images: Any) -> Iterator[Any]:
    """Split a batch of images into batches of at most `CHUNK`, of the same type where it can be sliced."""
    images = as_batch(images)
    if isinstance(images, np.ndarray | PreparedImages):
        yield from (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
    elif isinstance(images, Iterable):
        yield from batches(images, CHUNK)
    else:
        yield images  # `Hasher.prepare` raises an error for it


def by_images(parts: Parts, images: Any, options: QueryOptions, render: Render[R]) -> list[R]:
    """Search by a batch of images, without the items whose verdict with the query image is "different"."""

    def encode(model_changed: bool) -> EncodedQueries:
        hasher = parts.models.current() if model_changed else parts.models.last_loaded
        prepared = images if isinstance(images, PreparedImages) else hasher.prepare(images)
        if options.rank == "distance":
            return EncodedQueries(hasher.fingerprint, hasher.encode(prepared), None, prepared.digests)
        return EncodedQueries(hasher.fingerprint, *hasher.margins(prepared), prepared.digests)

    return parts.reader.read_prepared(
        encode, lambda view, queries: render(view, _search_images(view, queries, options))
    )


def by_codes(parts: Parts, codes: Codes, options: QueryOptions, render: Render[R]) -> list[R]:
    """Search by codes, uint8 (n, bits // 8). Raise ValueError for codes of another width."""

    def search(chunk: Codes, view: View) -> list[R]:
        return render(view, search_view(view, chunk, options))

    rendered: list[R] = []
    for start in range(0, len(codes), CHUNK):
        rendered += parts.reader.read(partial(search, codes[start : start + CHUNK]))
    return rendered


def check_ready(parts: Parts) -> None:
    """Search for the code of zeros. Raise HashretError if that fails."""
    options = QueryOptions(1)
    parts.reader.read(lambda view: search_view(view, np.zeros((1, view.settings.model.bits // 8), np.uint8), options))


def by_item(parts: Parts, item_id: int, options: QueryOptions, render: Render[R]) -> R:
    """Search by an item, without itself and the items whose verdict with it is "different".

    Raise NotFound if the item does not exist.
    """
    return parts.reader.read(lambda view: render(view, [_search_item(view, item_id, options)]))[0]


def _search_images(view: View, queries: EncodedQueries, options: QueryOptions) -> list[QueryResult]:
    if queries.fingerprint != view.settings.model.fingerprint:
        raise ModelChanged
    pairs = view.snapshot.verdicts("different")
    if not len(pairs):
        return search_view(view, queries.codes, options, margins=queries.margins)
    ids = view.snapshot.find(queries.digests)
    excluded = [_partners(ids.get(digest, -1), pairs) for digest in queries.digests]
    return _search_excluding(view, queries, options, excluded)


def _search_item(view: View, item_id: int, options: QueryOptions) -> QueryResult:
    _, codes = view.snapshot.codes([item_id])
    if not len(codes):
        raise no_item(item_id)
    excluded = {item_id} | _partners(item_id, view.snapshot.verdicts("different"))
    queries = EncodedQueries(view.settings.model.fingerprint, codes, None, ())
    return _search_excluding(view, queries, options, [excluded])[0]


def search_view(
    view: View, codes: Codes, options: QueryOptions, *, margins: NDArray[np.float32] | None = None
) -> list[QueryResult]:
    """Search a view by codes, uint8 (n, bits // 8); with `margins`, float32 (n, bits), rank by `rerank`.

    Raise ValueError for codes of another width.
    """
    check_codes(codes, view.settings.model.bits)
    allowed = None if options.where is None else view.snapshot.ids(where=options.where)
    scores: list[list[float]] | None = None
    if margins is None:
        neighbours = view.search(codes, options.k, options.max_distance, allowed)
    else:
        candidates = view.search(codes, candidate_count(options.k), options.max_distance, allowed)
        candidate_ids, candidate_codes = view.snapshot.codes(_all_ids(candidates))
        neighbours, scores = rerank(candidates, codes, margins, candidate_ids, candidate_codes, options.k)
    return [
        QueryResult(row.distances.tolist(), row.ids.tolist(), None if scores is None else scores[query])
        for query, row in enumerate(neighbours)
    ]


def _search_excluding(
    view: View, queries: EncodedQueries, options: QueryOptions, excluded: list[set[int]]
) -> list[QueryResult]:
    """Search by each query without its excluded items: search for that many more, and drop them."""
    k = None if options.k is None else options.k + max(map(len, excluded), default=0)
    results = search_view(view, queries.codes, options.with_k(k), margins=queries.margins)
    return [_without(result, ids, options.k) for result, ids in zip(results, excluded, strict=True)]


def _without(result: QueryResult, excluded: set[int], k: int | None) -> QueryResult:
    """Return the first `k` of a result without the excluded items."""
    kept = [position for position, item_id in enumerate(result.ids) if item_id not in excluded][:k]
    return QueryResult(
        [result.distances[position] for position in kept],
        [result.ids[position] for position in kept],
        None if result.scores is None else [result.scores[position] for position in kept],
    )


def candidate_count(k: int | None) -> int | None:
    """Return how many nearest neighbours `rerank` takes as candidates for the first `k`; None for all."""
    return None if k is None else max(10 * k, 100)


def rerank(
    candidates: list[Neighbours],
    queries: Codes,
    margins: NDArray[np.float32],
    ids: NDArray[np.int64],
    codes: Codes,
    k: int | None,
) -> tuple[list[Neighbours], list[list[float]]]:
    """Rank the candidates of each query by weighted Hamming distance; return the first `k` and their scores, ascending.

    Each differing bit costs the absolute value of the query's margin, float32 (queries, bits), in that bit. Ties are
    ordered by (distance, id). `ids` (n,), ascending, and `codes`, uint8 (n, bits // 8), belong to the candidates of all
    queries.

    Gordo, Perronnin, Gong and Lazebnik, "Asymmetric Distances for Binary Embeddings", PAMI 2014,
    https://doi.org/10.1109/TPAMI.2013.101.
    """
    ranked: list[Neighbours] = []
    scores: list[list[float]] = []
    for (distances, row), query, margin in zip(candidates, queries, np.abs(margins).astype(np.float64), strict=True):
        differing = np.unpackbits(codes[np.searchsorted(ids, row)] ^ query, axis=1)
        costs = (differing * margin).sum(axis=1)
        order = np.lexsort((row, distances, costs))[:k]
        ranked.append(Neighbours(distances[order], row[order]))
        scores.append(costs[order].tolist())
    return ranked, scores


def hits(view: View, results: list[QueryResult]) -> list[list[Hit]]:
    """Return the hits of each query."""
    items = view.items(list({item_id: None for result in results for item_id in result.ids}))
    return [
        list(map(_hit, result.distances, (items[i] for i in result.ids), result.scores or repeat(None)))
        for result in results
    ]


def _hit(distance: int, item: Item, score: float | None) -> Hit:
    path = item.paths[0] if item.paths else None
    return Hit(distance, item.id, path, item.paths, item.label, item.metadata, score)


def _all_ids(neighbours: list[Neighbours]) -> list[int]:
    """Return the distinct ids of the neighbours of all queries, ascending."""
    ids: list[int] = np.unique(np.concatenate([row.ids for row in neighbours])).tolist()
    return ids


def _partners(item_id: int, pairs: NDArray[np.int64]) -> set[int]:
    """Return the ids that are paired with an item in pairs of ids (n, 2)."""
    return set(pairs[(pairs == item_id).any(axis=1)].ravel().tolist()) - {item_id}
