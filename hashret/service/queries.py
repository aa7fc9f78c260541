"""Queries as they are answered: of those that wait at the same time, the ones that are alike by one search.

The usual answers are written by hand, with the text of an item kept ready: `json` would take several times as long.
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
from hashret.service.faults import check_filter, fault_of_images, result_of_each
from hashret.service.problems import Problem

MOST_TEXTS = 100_000  # of items, that are kept ready: some 35 MB
SMALL_IMAGE = 2**12  # bytes of an image that cannot keep others waiting for long


class ImageQuery(NamedTuple):
    """A query by the bytes of an image. `name` is what its answer repeats, `codes` whether the answer gives codes."""

    name: str | None
    image: bytes
    options: QueryOptions
    codes: bool = False

    @property
    def batch_key(self) -> Hashable:
        """Queries of equal keys are searched together."""
        return ImageQuery, self.options, self.codes

    @property
    def is_small(self) -> bool:
        """Whether other queries may wait for this one."""
        return len(self.image) <= SMALL_IMAGE

    def code(self, collection: Collection) -> str:
        """The code of what is asked for, in hex."""
        return to_hex(collection.hasher.encode([self.image]))[0]

    @staticmethod
    def nearest(collection: Collection, queries: "Sequence[ImageQuery]") -> list[QueryResult]:
        """What is found for queries of one key."""
        return collection.nearest_images([query.image for query in queries], queries[0].options)

    @staticmethod
    def hits(collection: Collection, queries: "Sequence[ImageQuery]") -> list[list[Hit]]:
        """The hits of queries of one key."""
        return [as_hits(found) for found in ImageQuery.nearest(collection, queries)]


class CodeQuery(NamedTuple):
    """A query by the bytes of a code, of the model `fingerprint` if that is not None; else as `ImageQuery`."""

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
        with _one_model(collection, queries[0].fingerprint):
            return collection.nearest(_codes_of(queries), queries[0].options)

    @staticmethod
    def hits(collection: Collection, queries: "Sequence[CodeQuery]") -> list[list[Hit]]:
        return [as_hits(found) for found in CodeQuery.nearest(collection, queries)]


class ItemQuery(NamedTuple):
    """A query by an item, which is left out of its own answer; else as `ImageQuery`."""

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


class Answers:
    """Answers queries to a collection."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._texts: dict[int, tuple[Item, str]] = {}

    def __call__(self, queries: list[Query]) -> list[bytes | Exception]:
        """The answer to each, as JSON."""
        answers: list[bytes | Exception] = [b""] * len(queries)
        batches: dict[Hashable, list[int]] = {}
        for position, query in enumerate(queries):
            batches.setdefault(query.batch_key, []).append(position)
        for positions in batches.values():
            batch = [queries[position] for position in positions]
            results = result_of_each(self._answer, batch, self._fault)
            for position, result in zip(positions, results, strict=True):
                answers[position] = result
        return answers

    def _answer(self, queries: list[Any]) -> list[bytes | Exception]:
        """The answers to queries of one key."""
        first: Query = queries[0]
        check_filter(self._collection, first.options.where)
        if isinstance(first, ItemQuery) or first.codes or first.options.rank != "distance":
            hits = first.hits(self._collection, queries)
            return [self._document(query, row) for query, row in zip(queries, hits, strict=True)]
        nearest = first.nearest(self._collection, queries)
        return [self._plain_document(query, found) for query, found in zip(queries, nearest, strict=True)]

    def _plain_document(self, query: Query, found: QueryResult) -> bytes:
        """The answer to a query by distance and without codes."""
        hits = [
            f'{{"rank":{rank},"distance":{distance},{self._text(item)}'
            for rank, (distance, item) in enumerate(zip(found.distances, found.items, strict=True), 1)
        ]
        return f'{{"query":{json.dumps(query.name)},"k":{query.options.k},"hits":[{",".join(hits)}]}}'.encode()

    def _text(self, item: Item) -> str:
        """The end of a hit's JSON, which is the item's."""
        kept = self._texts.get(item.id)
        if kept is not None and kept[0] is item:
            return kept[1]
        if kept is not None or len(self._texts) > MOST_TEXTS:  # the collection has changed, or has too many
            self._texts.clear()
        text = json.dumps(_members(item), separators=(",", ":"))[1:]
        self._texts[item.id] = item, text
        return text

    def _document(self, query: Query, hits: list[Hit]) -> bytes | Exception:
        """Any answer."""
        answer: dict[str, Any] = {"query": query.name, "k": query.options.k, "hits": []}
        documents: list[dict[str, Any]] = [
            {"rank": rank, "distance": hit.distance} | _members(hit) for rank, hit in enumerate(hits, 1)
        ]
        if query.options.rank != "distance":
            documents = [document | {"score": hit.score} for document, hit in zip(documents, hits, strict=True)]
        if query.codes:
            try:
                answer["code"] = query.code(self._collection)
                codes = to_hex(self._collection.codes([hit.id for hit in hits]))
                documents = [document | {"code": code} for document, code in zip(documents, codes, strict=True)]
            except HashretError as error:  # an item was removed meanwhile
                return error
        return json.dumps(answer | {"hits": documents}, separators=(",", ":")).encode()

    def _fault(self, query: Query) -> Exception | None:
        return fault_of_images(self._collection, [query.image] if isinstance(query, ImageQuery) else [])


def _members(found: Hit | Item) -> dict[str, Any]:
    """What an answer says of an item."""
    path = found.paths[0] if found.paths else None
    return {
        "id": found.id,
        "path": path,
        "label": found.label,
        "paths": found.paths,
        "metadata": found.metadata,
    }


def _codes_of(queries: Sequence[CodeQuery]) -> Codes:
    """The codes, uint8 (n, bits // 8), of queries of one key."""
    joined = b"".join(query.code_bytes for query in queries)
    return np.frombuffer(joined, np.uint8).reshape(len(queries), -1)


@contextmanager
def _one_model(collection: Collection, fingerprint: str | None) -> Iterator[None]:
    """A search for codes; raises Problem 409 if they are of another model than the collection's, before or after it,
    and 422 if they are of another width."""
    _check_model(collection, fingerprint)
    try:
        yield
    except ValueError as error:
        raise Problem(422, str(error), "ValueError") from None
    _check_model(collection, fingerprint)  # so that no other model came in between


def _check_model(collection: Collection, fingerprint: str | None) -> None:
    if fingerprint is not None and fingerprint != (ours := collection.fingerprint):
        text = f"the code is of model {fingerprint[:64]}, and the collection uses {ours}: encode again"
        raise Problem(409, text)
