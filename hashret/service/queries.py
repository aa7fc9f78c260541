"""Answer batches of queries: those with equal options share one search.

Answers are concatenated from strings, with the JSON of items cached: `json` takes several times as long.
"""

import json
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from hashret.codes import Codes, to_hex
from hashret.collection import Collection
from hashret.collection.byte_cache import ByteCache
from hashret.collection.search import QueryResult
from hashret.collection.snapshot import View
from hashret.results import QueryOptions
from hashret.service.documents import HIT_FIELDS, Fields, read_members
from hashret.service.faults import check_filter, find_image_fault, isolate_faults
from hashret.service.memory import Memory, RequestMemory
from hashret.service.problems import Problem

MAX_CACHED_BYTES = 64 * 2**20  # of the JSON of items
MAX_READ_AHEAD = 16 * 2**20  # bytes of JSON that are read for a whole batch at once
HIT_BYTES = 50  # of a hit in an answer besides its item and its code
SMALL_IMAGE = 2**12  # bytes of an image that decodes too fast to delay other queries

ITEM_PART: Fields = ("id", "path", "label", "paths", "metadata")  # the fields of a hit that depend on its item alone

PLAIN_HIT = '{"rank":%d,"distance":%d,%s}'  # of most answers, which a string literal formats faster

Answers = list[bytes | Exception]
Render = Callable[[Sequence[Any], View, list[QueryResult]], Answers]


class ImageQuery(NamedTuple):
    """A query by the bytes of an image. The answer repeats `name`; with `codes` it includes codes.

    Its hits have `fields`. Its answer counts in `memory`, that of its request.
    """

    name: str | None
    image: bytes
    options: QueryOptions
    codes: bool = False
    fields: Fields = HIT_FIELDS
    memory: RequestMemory | None = None

    @property
    def batch_key(self) -> Hashable:
        """Queries with equal keys are searched together."""
        return ImageQuery, self.options, self.codes, self.fields

    @property
    def is_small(self) -> bool:
        """Whether this query is fast enough for other queries to wait for it."""
        return len(self.image) <= SMALL_IMAGE

    def code(self, collection: Collection) -> str:
        """Return the code of the query as hex."""
        return to_hex(collection.hasher.encode([self.image]))[0]

    @staticmethod
    def search(collection: Collection, queries: "Sequence[ImageQuery]", render: Render) -> Answers:
        """Return what `render` makes of the results of queries with one key."""
        images = [query.image for query in queries]
        return collection.nearest_images(images, queries[0].options, partial(render, queries))


class CodeQuery(NamedTuple):
    """A query by the bytes of a code. `fingerprint` is that of its model, if known; the rest is as in `ImageQuery`."""

    name: str
    code_bytes: bytes
    options: QueryOptions
    codes: bool = False
    fingerprint: str | None = None
    fields: Fields = HIT_FIELDS
    memory: RequestMemory | None = None

    @property
    def batch_key(self) -> Hashable:
        return CodeQuery, len(self.code_bytes), self.options, self.codes, self.fingerprint, self.fields

    @property
    def is_small(self) -> bool:
        return True

    def code(self, collection: Collection) -> str:
        return self.code_bytes.hex()

    @staticmethod
    def search(collection: Collection, queries: "Sequence[CodeQuery]", render: Render) -> Answers:
        with _checked_model(collection, queries[0].fingerprint):
            return collection.nearest(_codes_of(queries), queries[0].options, partial(render, queries))


class ItemQuery(NamedTuple):
    """A query by an item, which the answer leaves out; the rest is as in `ImageQuery`."""

    name: str
    item_id: int
    options: QueryOptions
    codes: bool = False
    fields: Fields = HIT_FIELDS
    memory: RequestMemory | None = None

    @property
    def batch_key(self) -> Hashable:
        return ItemQuery, self.options, self.codes, self.fields

    @property
    def is_small(self) -> bool:
        return True

    def code(self, collection: Collection) -> str:
        return to_hex(collection.codes([self.item_id]))[0]

    @staticmethod
    def search(collection: Collection, queries: "Sequence[ItemQuery]", render: Render) -> Answers:
        return [collection.nearest_item(query.item_id, query.options, partial(render, [query])) for query in queries]


Query = ImageQuery | CodeQuery | ItemQuery


class QueryHandler:
    """Answers batches of queries to a collection."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._members = ByteCache[str](MAX_CACHED_BYTES, sys.getsizeof)

    def __call__(self, queries: list[Query]) -> Answers:
        """Return the answer to each query as JSON, or its error."""
        answers: Answers = [b""] * len(queries)
        batches: dict[Hashable, list[int]] = {}
        for position, query in enumerate(queries):
            batches.setdefault(query.batch_key, []).append(position)
        for positions in batches.values():
            batch = [queries[position] for position in positions]
            results = isolate_faults(self._answer, batch, self._find_fault)
            for position, result in zip(positions, results, strict=True):
                answers[position] = result
        return answers

    def _answer(self, queries: list[Any]) -> Answers:
        """Return the answers to queries with one key."""
        check_filter(self._collection, queries[0].options.where)
        answers: Answers = queries[0].search(self._collection, queries, self._render)
        return answers

    def _render(self, queries: Sequence[Any], view: View, results: list[QueryResult]) -> Answers:
        """Return the answers to queries with one key, given their results."""
        first: Query = queries[0]
        layout = _layout(first.fields, first.options.rank != "distance", first.codes)
        cached = self._members.values(view.snapshot.state).get
        members = [list(map(cached, layout.keys(result.ids))) for result in results]
        if len(results) > 1 and any(None in row for row in members):
            self._read_ahead(view, results, members, layout)
        answers: Answers = []
        for query, result, row in zip(queries, results, members, strict=True):
            try:
                answers.append(self._document(query, view, result, row, layout))
            except Problem as problem:
                answers.append(problem)
        return answers

    def _document(
        self, query: Query, view: View, result: QueryResult, members: list[str | None], layout: "_Layout"
    ) -> bytes:
        """Return the answer to a query, given what is cached of its items. Raise Problem if it is too large."""
        memory = query.memory or RequestMemory(Memory())
        start = f'{{"query":{json.dumps(query.name)},"k":{query.options.k},"hits":['
        hit_bytes = HIT_BYTES + (view.settings.model.bits // 4 if query.codes else 0)
        texts = [text for text in members if text is not None] if layout.item_fields else []
        memory.answer(len(start) + hit_bytes * (1 + len(result.ids)) + sum(map(len, texts)))
        if layout.item_fields and len(texts) < len(result.ids):
            texts = self._read_missing(view, result.ids, members, layout, memory)
        ranks = range(1, len(result.ids) + 1)
        if layout.hit == PLAIN_HIT:
            hits = [
                f'{{"rank":{rank},"distance":{distance},{text}}}'
                for rank, distance, text in zip(ranks, result.distances, texts, strict=True)
            ]
        else:
            columns: dict[str, Any] = {"rank": ranks, "distance": result.distances, "item": texts}
            columns["score"] = map(json.dumps, result.scores or ())
            if "code" in layout.columns:
                columns["code"] = to_hex(self._collection.codes(result.ids))
            hits = [layout.hit % row for row in zip(*(columns[name] for name in layout.columns), strict=True)]
        code = f',"code":"{query.code(self._collection)}"' if query.codes else ""
        return f"{start}{','.join(hits)}]{code}}}".encode()

    def _read_missing(
        self, view: View, ids: list[int], members: list[str | None], layout: "_Layout", memory: RequestMemory
    ) -> list[str]:
        """Return the JSON of items, and count what is not cached as it is read."""
        state = view.snapshot.state
        cached = self._members.values(state).get  # since, a batch may have been read ahead
        read: dict[int, str] = {}
        missing: list[int] = []
        for item_id, key, text in zip(ids, layout.keys(ids), members, strict=True):
            if text is None and (text := cached(key)) is not None:
                memory.answer(len(text))
                read[item_id] = text
            elif text is None:
                missing.append(item_id)
        for item_id, text in read_members(view, missing, layout.item_fields):
            memory.answer(len(text))
            read[item_id] = text
            self._members.put(layout.keys([item_id])[0], text, state)
        return [read[item_id] if text is None else text for item_id, text in zip(ids, members, strict=True)]

    def _read_ahead(
        self, view: View, results: list[QueryResult], members: list[list[str | None]], layout: "_Layout"
    ) -> None:
        """Cache the items of a batch that are not cached, because one read takes less time than one for each query."""
        pairs = (zip(result.ids, row, strict=True) for result, row in zip(results, members, strict=True))
        missing = {item_id: None for row in pairs for item_id, text in row if text is None}
        size, state = 0, view.snapshot.state
        with suppress(Problem):  # an item is too large: `_read_missing` raises the error again
            for item_id, text in read_members(view, missing, layout.item_fields):
                self._members.put(layout.keys([item_id])[0], text, state)
                size += len(text)
                if size > MAX_READ_AHEAD:
                    break

    def _find_fault(self, query: Query) -> Exception | None:
        return find_image_fault(self._collection, [query.image] if isinstance(query, ImageQuery) else [])


class _Layout(NamedTuple):
    """How hits are written: a template with a place for a value of each column."""

    hit: str
    columns: tuple[str, ...]
    item_fields: Fields  # of the column "item"

    def keys(self, ids: list[int]) -> Sequence[Hashable]:
        """Return the keys of items in the cache."""
        return ids if self.item_fields == ITEM_PART else [(item_id, self.item_fields) for item_id in ids]


@lru_cache(maxsize=128)
def _layout(fields: Fields, scores: bool, codes: bool) -> _Layout:
    """Return the layout of hits with `fields`, as far as they have scores and codes."""
    item_fields = tuple(name for name in fields if name in ITEM_PART)
    places: dict[str, str] = {name: f'"{name}":%d' for name in ("rank", "distance") if name in fields}
    places |= {"item": "%s"} if item_fields else {}
    places |= {"score": '"score":%s'} if scores and "score" in fields else {}
    places |= {"code": '"code":"%s"'} if codes and "code" in fields else {}
    counted = "" if "rank" in places else "%.0s"  # the ranks without a place are written in no characters
    return _Layout(f"{{{counted}{','.join(places.values())}}}", tuple({"rank": "", **places}), item_fields)


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
