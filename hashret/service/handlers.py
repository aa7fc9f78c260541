"""Process requests in threads: each type of request has a `Batcher`, so that slow ones do not delay fast ones."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from starlette.requests import Request

from hashret.collection import Collection, near_duplicates
from hashret.collection.snapshot import View
from hashret.errors import HashretError
from hashret.process import frozen_objects
from hashret.results import MAX_QUERIES, State
from hashret.service.batcher import Batcher
from hashret.service.documents import Fields, items_document
from hashret.service.faults import check_filter, find_image_fault, isolate_faults
from hashret.service.memory import RequestMemory
from hashret.service.metrics import Metrics
from hashret.service.pictures import Pictures
from hashret.service.queries import Query, QueryHandler


class Addition(NamedTuple):
    """Images to add, with the metadata of each."""

    images: list[bytes]
    metadata: list[dict[str, Any] | None]


class Handlers:
    """The operations of the service on its collection, and the batchers that run them."""

    def __init__(self, collection: Collection, metrics: Metrics) -> None:
        self.collection = collection
        self.pictures = Pictures(collection)
        self._process_settings = ExitStack()  # active while the service runs
        self.ready = threading.Event()
        self.startup_error: str | None = None  # why `ready` is not set
        self._info: tuple[State | None, dict[str, Any]] = None, {}
        handler = QueryHandler(collection)
        self.queries = Batcher("queries", handler, metrics, max_batch_size=MAX_QUERIES, max_queue=4096)
        # A filter may take a second and an image half a minute; other queries must not wait for them.
        self.filtered_queries = Batcher("filtered queries", handler, metrics, max_batch_size=MAX_QUERIES, max_queue=256)
        self.image_queries = Batcher("image queries", handler, metrics, max_batch_size=MAX_QUERIES, max_queue=1024)
        self.images = Batcher("images", self._encode, metrics, max_batch_size=MAX_QUERIES, max_queue=1024)
        self.additions = Batcher("additions", self._add, metrics, max_batch_size=16, max_queue=64)
        self.groupings = Batcher[Callable[[], bytes], bytes]("groupings", _call_all, metrics, max_queue=8)
        self.changes = Batcher[Callable[[], Any], Any]("changes", _call_all, metrics, max_queue=64)
        self.reconstructions = Batcher[Callable[[], Any], Any]("memories", _call_all, metrics, max_queue=64)
        self.reads = Batcher[Callable[[], Any], Any]("reads", _call_all, metrics, threads=4, max_queue=512)
        # The file of an image may take a gigabyte while it is decoded.
        self.picture_reads = Batcher[Callable[[], Any], Any]("pictures", _call_all, metrics, threads=2, max_queue=512)
        self.filtered_reads = Batcher[Callable[[], Any], Any]("filtered reads", _call_all, metrics, max_queue=64)

    def warm_up(self) -> None:
        """Load the model and the index, compile all kernels, and set `ready`; or set `startup_error`."""
        try:
            hasher = self.collection.hasher
            blank = np.zeros((1, *hasher.preprocessing.shape), hasher.preprocessing.dtype)
            code = hasher.encode_pixels(blank)
            self.collection.query_codes(code, 1)
            near_duplicates.warm_up(code)  # also compiles the kernels of radius searches
            self._process_settings.enter_context(frozen_objects())
            self.ready.set()
        except HashretError as error:
            self.startup_error = str(error)

    def close(self) -> None:
        """Wait for all requests in progress."""
        searches = self.queries, self.filtered_queries, self.image_queries, self.images, self.groupings
        operations = (
            self.additions,
            self.changes,
            self.reconstructions,
            self.reads,
            self.picture_reads,
            self.filtered_reads,
        )
        gathers: tuple[Batcher[Any, Any], ...] = *searches, *operations
        for batcher in gathers:
            batcher.close()
        self._process_settings.close()

    def batcher_for(self, queries: Sequence[Query]) -> Batcher[Query, bytes]:
        """Return the batcher for the queries of one request, which share their options."""
        if queries[0].options.where is not None:
            return self.filtered_queries
        return self.queries if all(query.is_small for query in queries) else self.image_queries

    def info(self) -> dict[str, Any]:
        """Return `Collection.info()`, cached for the present state."""
        state, info = self.collection.state, self._info[1]
        if self._info[0] != state:
            info = self.collection.info() | {"read_only": self.collection.read_only}
            self._info = state, info
        return info

    def items(self, cursor: int, limit: int, where: str | None, fields: Fields, memory: RequestMemory) -> bytes:
        """Return a page of items as JSON. Raise Problem 422 for an invalid filter, or if it is too large."""
        check_filter(self.collection, where)

        def read(view: View) -> bytes:
            ids = view.snapshot.ids(cursor, limit, where).tolist()
            return items_document(view, ids, len(ids) == limit, fields, memory)

        return self.collection.read(read)

    def _encode(self, images: list[bytes]) -> list[tuple[str, bytes] | Exception]:
        """Return the fingerprint of the model and the code of each image."""
        hasher = self.collection.hasher

        def encode(batch: list[bytes]) -> list[tuple[str, bytes]]:
            return [(hasher.fingerprint, code.tobytes()) for code in hasher.encode(batch)]

        return isolate_faults(encode, images, lambda image: find_image_fault(self.collection, [image]))

    def _add(self, requests: list[Addition]) -> list[list[int] | Exception]:
        """Add the images of each request, all of them or none, and return their ids."""

        def add(batch: list[Addition]) -> list[list[int]]:
            images = [image for request in batch for image in request.images]
            ids = iter(self.collection.add(images, [row for request in batch for row in request.metadata]))
            return [list(islice(ids, len(request.images))) for request in batch]

        return isolate_faults(add, requests, lambda request: find_image_fault(self.collection, request.images))


def handlers_of(request: Request) -> Handlers:
    """Return the handlers of the service that received a request."""
    handlers: Handlers = request.app.state.handlers
    return handlers


def _call_all(calls: list[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]
