"""What is done for requests, in threads that `Gather` keeps: which of them waits for which."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from starlette.requests import Request

from hashret.collection import Collection, near_duplicates
from hashret.errors import HashretError
from hashret.process import frozen_objects
from hashret.results import MAX_QUERIES, Group, Item
from hashret.service.faults import check_filter, fault_of_images, result_of_each
from hashret.service.gather import Gather
from hashret.service.metrics import Metrics
from hashret.service.pictures import Pictures
from hashret.service.queries import Answers, Query


class Addition(NamedTuple):
    """Images to be added, each with its metadata."""

    images: list[bytes]
    metadata: list[dict[str, Any] | None]


class Work:
    """The collection, as requests use it."""

    def __init__(self, collection: Collection, metrics: Metrics) -> None:
        self.collection = collection
        self.pictures = Pictures(collection)
        self._settings = ExitStack()  # of the process, while the service runs
        self.ready = threading.Event()
        self.trouble: str | None = None  # what keeps it from getting ready
        self._info: tuple[int, dict[str, Any]] = (-1, {})
        answers = Answers(collection)
        self.queries = Gather("queries", answers, metrics, most=MAX_QUERIES, waiting=4096)
        # A filter may take a second, and an image half a minute, which no other query shall wait for.
        self.filtered_queries = Gather("filtered queries", answers, metrics, most=MAX_QUERIES, waiting=256)
        self.image_queries = Gather("image queries", answers, metrics, most=MAX_QUERIES, waiting=1024)
        self.images = Gather("images", self._encode, metrics, most=MAX_QUERIES, waiting=1024)
        self.additions = Gather("additions", self._add, metrics, most=16, waiting=64)
        self.groupings = Gather[Callable[[], list[Group]], list[Group]]("groupings", _call, metrics, waiting=8)
        self.changes = Gather[Callable[[], Any], Any]("changes", _call, metrics, waiting=64)
        self.memories = Gather[Callable[[], Any], Any]("memories", _call, metrics, waiting=64)
        self.reads = Gather[Callable[[], Any], Any]("reads", _call, metrics, threads=4, waiting=512)
        self.filtered_reads = Gather[Callable[[], Any], Any]("filtered reads", _call, metrics, waiting=64)

    def warm_up(self) -> None:
        """Load the model and the index, and have all kernels compiled, or keep in `trouble` why that cannot be done."""
        try:
            hasher = self.collection.hasher
            blank = np.zeros((1, *hasher.preprocessing.shape), hasher.preprocessing.dtype)
            code = hasher.encode_pixels(blank)
            self.collection.query_codes(code, 1)
            near_duplicates.warm_up(code)  # and what searches within a radius
            self._settings.enter_context(frozen_objects())
            self.ready.set()
        except HashretError as error:
            self.trouble = str(error)

    def close(self) -> None:
        searches = self.queries, self.filtered_queries, self.image_queries, self.images, self.groupings
        others = self.additions, self.changes, self.memories, self.reads, self.filtered_reads
        gathers: tuple[Gather[Any, Any], ...] = *searches, *others
        for gather in gathers:
            gather.close()
        self._settings.close()

    def gather_for(self, queries: Sequence[Query]) -> Gather[Query, bytes]:
        """Where queries of one kind wait."""
        if queries[0].options.where is not None:
            return self.filtered_queries
        return self.queries if all(query.is_small for query in queries) else self.image_queries

    def info(self) -> dict[str, Any]:
        """What `Collection.info` says, which takes a while, as of the present generation."""
        generation, info = self._info
        if generation != self.collection.generation:
            info = self.collection.info() | {"read_only": self.collection.read_only}
            self._info = info["generation"], info
        return info

    def items(self, cursor: int, limit: int, where: str | None) -> list[Item]:
        """What `Collection.items` gives; raises Problem 422 if the filter is none."""
        check_filter(self.collection, where)
        return self.collection.items(cursor, limit, where=where)

    def _encode(self, images: list[bytes]) -> list[tuple[str, bytes] | Exception]:
        """The model's fingerprint and the code of each image."""
        hasher = self.collection.hasher

        def encode(batch: list[bytes]) -> list[tuple[str, bytes]]:
            return [(hasher.fingerprint, code.tobytes()) for code in hasher.encode(batch)]

        return result_of_each(encode, images, lambda image: fault_of_images(self.collection, [image]))

    def _add(self, requests: list[Addition]) -> list[list[int] | Exception]:
        """The items of each request's images, of which all are added or none."""

        def add(batch: list[Addition]) -> list[list[int]]:
            images = [image for request in batch for image in request.images]
            ids = iter(self.collection.add(images, [row for request in batch for row in request.metadata]))
            return [list(islice(ids, len(request.images))) for request in batch]

        return result_of_each(add, requests, lambda request: fault_of_images(self.collection, request.images))


def work_of(request: Request) -> Work:
    """The work of the service that a request has come to."""
    work: Work = request.app.state.work
    return work


def _call(calls: list[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]
