"""Answer batches of queries: those with equal options share one search.

The usual answers are concatenated from strings, with the JSON of items cached: `json` takes several times as long.
"""

import json
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from hashret.codes import Codes, to_hex
from hashret.collection import Collection
from hashret.collection.search import QueryResult, as_hits
from hashret.errors import HashretError
from hashret.results import Hit, Item, QueryOptions
from hashret.service.faults import check_filter, find_image_fault, isolate_faults
from hashret.service.problems import Problem

MAX_CACHED_ITEMS = 100_000  # items whose JSON is cached: about 35 MB
SMALL_IMAGE = 2**12  # bytes of an image that decodes too fast to delay other queries


class ImageQuery(NamedTuple):
    """A query by the bytes of an image. The answer repeats `name`; with `codes` it includes codes."""

    name: str | None
    image: bytes
    options: QueryOptions
    codes: bool = False

    @property
    def batch_key(self) -> Hashable:
        """Queries with equal keys are searched together."""
        return ImageQuery, self.options, self.codes

    @property
    def is_small(self) -> bool:
        """Whether this query is fast enough for other queries to wait for it."""
        return len(self.image) <= SMALL_IMAGE

    def code(self, collection: Collection) -> str:
        """Return the code of the query as hex."""
        return to_hex(collection.hasher.encode([self.image]))[0]

    @staticmethod
    def nearest(collection: Collection, queries: "Sequence[ImageQuery]") -> list[QueryResult]:
        """Return the nearest items for queries with one key."""
        return collection.nearest_images([query.image for query in queries], queries[0].options)

    @staticmethod
    def hits(collection: Collection, queries: "Sequence[ImageQuery]") -> list[list[Hit]]:
        """Return the hits of queries with one key."""
        return [as_hits(nearest) for nearest in ImageQuery.nearest(collection, queries)]


class CodeQuery(NamedTuple):
    """A query by the bytes of a code. `fingerprint` is that of its model, if known; the rest is as in `ImageQuery`."""

    name: str
    code_bytes: bytes
    options: QueryOptions
    codes: bool = False
    fingerprint: str | None = None

    @property
    def batch_key(self) -> Hashable:
        return CodeQuery, len(self.code_bytes), self.options, self.codes, self.fingerprint

    @property
    def is_small(self) -> bool:
        return True

    def code(self, collection: Collection) -> str:
        return self.code_bytes.hex()

    @staticmethod
    def nearest(collection: Collection, queries: "Sequence[CodeQuery]") -> list[QueryResult]:
        with _checked_model(collection, queries[0].fingerprint):
            return collection.nearest(_codes_of(queries), queries[0].options)

    @staticmethod
    def hits(collection: Collection, queries: "Sequence[CodeQuery]") -> list[list[Hit]]:
        return [as_hits(nearest) for nearest in CodeQuery.nearest(collection, queries)]


class ItemQuery(NamedTuple):
    """A query by an item, which the answer leaves out; the rest is as in `ImageQuery`."""

    name: str
    item_id: int
    options: QueryOptions
    codes: bool = False

    @property
    def batch_key(self) -> Hashable:
        return ItemQuery, self.options, self.codes

    @property
    def is_small(self) -> bool:
        return True

    def code(self, collection: Collection) -> str:
        return to_hex(collection.codes([self.item_id]))[0]

    @staticmethod
    def hits(collection: Collection, queries: "Sequence[ItemQuery]") -> list[list[Hit]]:
        k, max_distance, where = queries[0].options.k, queries[0].options.max_distance, queries[0].options.where
        return [collection.query_item(query.item_id, k, max_distance, where=where) for query in queries]


Query = ImageQuery | CodeQuery | ItemQuery


class QueryHandler:
    """Answers batches of queries to a collection."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._item_json: dict[int, tuple[Item, str]] = {}

    def __call__(self, queries: list[Query]) -> list[bytes | Exception]:
        """Return the answer to each query as JSON, or its error."""
        answers: list[bytes | Exception] = [b""] * len(queries)
        batches: dict[Hashable, list[int]] = {}
        for position, query in enumerate(queries):
            batches.setdefault(query.batch_key, []).append(position)
        for positions in batches.values():
            batch = [queries[position] for position in positions]
            results = isolate_faults(self._answer, batch, self._find_fault)
            for position, result in zip(positions, results, strict=True):
                answers[position] = result
        return answers

    def _answer(self, queries: list[Any]) -> list[bytes | Exception]:
        """Return the answers to queries with one key."""
        first: Query = queries[0]
        check_filter(self._collection, first.options.where)
        if isinstance(first, ItemQuery) or first.codes or first.options.rank != "distance":
            hits = first.hits(self._collection, queries)
            return [self._document(query, row) for query, row in zip(queries, hits, strict=True)]
        nearest = first.nearest(self._collection, queries)
        return [self._plain_document(*pair) for pair in zip(queries, nearest, strict=True)]

    def _plain_document(self, query: Query, nearest: QueryResult) -> bytes:
        """Return the answer to a query that is ranked by distance and without codes."""
        hits = [
            f'{{"rank":{rank},"distance":{distance},{self._item_members(item)}'
            for rank, (distance, item) in enumerate(zip(nearest.distances, nearest.items, strict=True), 1)
        ]
        return f'{{"query":{json.dumps(query.name)},"k":{query.options.k},"hits":[{",".join(hits)}]}}'.encode()

    def _item_members(self, item: Item) -> str:
        """Return the JSON members of a hit that depend on its item alone, up to the closing brace."""
        cached = self._item_json.get(item.id)
        if cached is not None and cached[0] is item:
            return cached[1]
        if cached is not None or len(self._item_json) > MAX_CACHED_ITEMS:  # the collection has changed, or is too large
            self._item_json.clear()
        text = json.dumps(_item_document(item), separators=(",", ":"))[1:]
        self._item_json[item.id] = item, text
        return text

    def _document(self, query: Query, hits: list[Hit]) -> bytes | Exception:
        """Return the answer to any query."""
        answer: dict[str, Any] = {"query": query.name, "k": query.options.k, "hits": []}
        documents: list[dict[str, Any]] = [
            {"rank": rank, "distance": hit.distance} | _item_document(hit) for rank, hit in enumerate(hits, 1)
        ]
        if query.options.rank != "distance":
            documents = [document | {"score": hit.score} for document, hit in zip(documents, hits, strict=True)]
        if query.codes:
            try:
                answer["code"] = query.code(self._collection)
                codes = to_hex(self._collection.codes([hit.id for hit in hits]))
                documents = [document | {"code": code} for document, code in zip(documents, codes, strict=True)]
            except HashretError as error:  # an item has been removed since the search
                return error
        return json.dumps(answer | {"hits": documents}, separators=(",", ":")).encode()

    def _find_fault(self, query: Query) -> Exception | None:
        return find_image_fault(self._collection, [query.image] if isinstance(query, ImageQuery) else [])


def _item_document(item: Hit | Item) -> dict[str, Any]:
    """Return the members of a hit that depend on its item alone."""
    return {
        "id": item.id,
        "path": item.paths[0] if item.paths else None,
        "label": item.label,
        "paths": item.paths,
        "metadata": item.metadata,
    }


def _codes_of(queries: Sequence[CodeQuery]) -> Codes:
    """Return the codes, uint8 (n, bits // 8), of queries with one key."""
    joined = b"".join(query.code_bytes for query in queries)
    return np.frombuffer(joined, np.uint8).reshape(len(queries), -1)


@contextmanager
def _checked_model(collection: Collection, fingerprint: str | None) -> Iterator[None]:
    """Check the model of codes before and after a search for them.

    Raise Problem 409 if it is not the collection's, and Problem 422 for codes of another width.
    """
    _check_model(collection, fingerprint)
    try:
        yield
    except ValueError as error:
        raise Problem(422, str(error), "ValueError") from None
    _check_model(collection, fingerprint)  # the model may have changed during the search


def _check_model(collection: Collection, fingerprint: str | None) -> None:
    if fingerprint is not None and fingerprint != (ours := collection.fingerprint):
        text = f"the code is of model {fingerprint[:64]}, and the collection uses {ours}: encode again"
        raise Problem(409, text)
