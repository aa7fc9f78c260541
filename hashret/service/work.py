"""What is done for requests, in threads that `Gather` keeps: searching, encoding, adding, and drawing pictures."""

import io
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hashret.codes import Codes, to_hex
from hashret.collection import Collection, near_duplicates
from hashret.data.images import decode
from hashret.errors import HashretError, NotFound, TooLarge
from hashret.process import frozen_objects
from hashret.results import Group, Hit, QueryOptions
from hashret.service import MOST_QUERIES
from hashret.service.gather import Gather
from hashret.service.metrics import Metrics
from hashret.service.problems import Problem

if TYPE_CHECKING:
    from hashret.results import Item

T = TypeVar("T")
R = TypeVar("R")
SMALL = 128  # pictures of at most so many pixels a side go as PNG, which keeps each pixel
MOST_TEXTS = 100_000  # of items, that are kept ready: some 35 MB
SMALL_IMAGE = 2**12  # bytes of an image that cannot keep others waiting for long
PICTURE_BYTES = 64 * 2**20  # of pictures that are kept ready


class Wanted(NamedTuple):
    """What is wanted of a query."""

    k: int
    max_distance: int | None
    where: str | None
    rank: str
    codes: bool


class Question(NamedTuple):
    """A query: an image's bytes, a code's, or an item's id, and the model that a code is said to be of."""

    name: str | None
    value: bytes | int
    is_code: bool
    wanted: Wanted
    fingerprint: str | None = None


class Addition(NamedTuple):
    """Images to be added, each with its metadata."""

    images: list[bytes]
    metadata: list[dict[str, Any] | None]


class Work:
    """The collection, as requests use it."""

    def __init__(self, collection: Collection, metrics: Metrics) -> None:
        self.collection = collection
        self._settings = ExitStack()  # of the process, while the service runs
        self.ready = threading.Event()
        self.trouble: str | None = None  # what keeps it from getting ready
        self._info: tuple[int, dict[str, Any]] = (-1, {})
        self._texts: dict[int, tuple[Item, str]] = {}
        self._pictures: OrderedDict[tuple[str, int], tuple[bytes, str]] = OrderedDict()
        self._pictures_lock = threading.Lock()
        self.queries = Gather("queries", self._answer, metrics, most=MOST_QUERIES, waiting=4096)
        # A filter may take a second, and an image half a minute, which no other query shall wait for.
        self.filtered_queries = Gather("filtered queries", self._answer, metrics, most=MOST_QUERIES, waiting=256)
        self.image_queries = Gather("image queries", self._answer, metrics, most=MOST_QUERIES, waiting=1024)
        self.images = Gather("images", self._encode, metrics, most=MOST_QUERIES, waiting=1024)
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

    def gather_for(self, questions: Sequence[Question]) -> Gather[Question, bytes]:
        """Where questions of one kind wait."""
        if questions[0].wanted.where is not None:
            return self.filtered_queries
        small = all(
            asked.is_code or isinstance(asked.value, int) or len(asked.value) <= SMALL_IMAGE for asked in questions
        )
        return self.queries if small else self.image_queries

    def info(self) -> dict[str, Any]:
        """What `Collection.info` says, which takes a while, as of the present generation."""
        there = self.collection
        generation, told = self._info
        if generation != there.generation:
            told = there.info() | {"read_only": there.read_only}
            self._info = told["generation"], told
        return told

    def items(self, cursor: int, limit: int, where: str | None) -> "list[Item]":
        """What `Collection.items` gives; it is the request's fault if the filter is none."""
        self.check_filter(where)
        return self.collection.items(cursor, limit, where=where)

    def check_filter(self, where: str | None) -> None:
        """Raises Problem if this filter is none."""
        if where is not None:
            try:
                self.collection.matching(where)
            except HashretError as error:
                raise Problem(422, str(error)) from None

    def picture(self, item_id: int, size: int) -> tuple[bytes, str]:
        """An item's image with no side longer than `size`, as the bytes of a file, and its media type."""
        key = self.collection.get(item_id).sha256, size
        with self._pictures_lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        content = self.collection.content(item_id)
        try:
            made = draw(decode(content, (size // 2, size // 2)).pixels, size)
        except HashretError as error:
            raise _refusal(error) from None
        with self._pictures_lock:
            self._pictures[key] = made
            while sum(len(data) for data, _ in self._pictures.values()) > PICTURE_BYTES:
                self._pictures.popitem(last=False)
        return made

    def remembered(self, image: bytes | int) -> tuple[bytes, str]:
        """The image that the model remembers an image, or an item, by, as `picture` gives."""
        from hashret.tasks.generation import reconstruct

        hasher = self.collection.hasher
        content = self.collection.content(image) if isinstance(image, int) else image
        try:
            pixels = hasher.preprocessing(content).pixels
            return draw(reconstruct(hasher, pixels[None])[0], max(pixels.shape))
        except HashretError as error:
            raise _refusal(error) from None

    # What the gathers call

    def _answer(self, questions: list[Question]) -> list[bytes | Exception]:
        """The answer to each, as JSON."""
        answers: list[bytes | Exception] = [b""] * len(questions)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (_, value, is_code, wanted, fingerprint) in enumerate(questions):
            kind = len(value) if is_code and isinstance(value, bytes) else type(value)
            groups.setdefault((kind, wanted, fingerprint), []).append(i)
        for (_, wanted, _), rows in groups.items():
            some = [questions[i] for i in rows]
            plain = not wanted.codes and wanted.rank == "distance" and not isinstance(some[0].value, int)
            told = _each(self._tell_plainly if plain else self._tell, some, self._fault_of_question)
            for i, answer in zip(rows, told, strict=True):
                answers[i] = answer
        return answers

    def _tell(self, questions: list[Question]) -> list[bytes | Exception]:
        """The answers to questions of one kind."""
        return [self._document(asked, hits) for asked, hits in zip(questions, self._search(questions), strict=True)]

    def _tell_plainly(self, questions: list[Question]) -> list[bytes]:
        """The same for codes and images, of hits by distance and without their codes: what is said of an item is kept
        ready."""
        answers = []
        there = self.collection
        if questions[0].is_code:
            found = self._search_codes(questions, _by_options(there.nearest))
        else:
            found = self._search_images(questions, _by_options(there.nearest_images))
        for asked, (distances, items, _) in zip(questions, found, strict=True):
            hits = [
                f'{{"rank":{rank},"distance":{distance},{self._text(item)}'
                for rank, (distance, item) in enumerate(zip(distances, items, strict=True), 1)
            ]
            answers.append(
                f'{{"query":{json.dumps(asked.name)},"k":{asked.wanted.k},"hits":[{",".join(hits)}]}}'.encode()
            )
        return answers

    def _text(self, item: "Item") -> str:
        """The end of a hit's JSON, which is the item's."""
        kept = self._texts.get(item.id)
        if kept is not None and kept[0] is item:
            return kept[1]
        if kept is not None or len(self._texts) > MOST_TEXTS:  # the collection has changed, or has too many
            self._texts.clear()
        text = json.dumps(_members(item), separators=(",", ":"))[1:]
        self._texts[item.id] = item, text
        return text

    def _search(self, questions: list[Question]) -> list[list[Hit]]:
        """The hits of questions of one kind."""
        first, there = questions[0], self.collection
        k, max_distance, where, rank, _ = first.wanted
        if first.is_code:
            return self._search_codes(questions, there.query_codes)
        if isinstance(first.value, int):
            self.check_filter(where)
            return [there.query_item(int(asked.value), k, max_distance, where=where) for asked in questions]
        return self._search_images(questions, partial(there.query_batch, rank=rank))

    def _search_images(self, questions: list[Question], search: Callable[..., list[R]]) -> list[R]:
        """What a search of the collection gives for questions by image, of one kind."""
        k, max_distance, where, _, _ = questions[0].wanted
        self.check_filter(where)
        values = [asked.value for asked in questions if isinstance(asked.value, bytes)]
        return search(values, k, max_distance, where=where)

    def _search_codes(self, questions: list[Question], search: Callable[..., list[R]]) -> list[R]:
        """What a search of the collection gives for questions by code, of one kind."""
        first = questions[0]
        k, max_distance, where, _, _ = first.wanted
        self.check_filter(where)
        values = [asked.value for asked in questions if isinstance(asked.value, bytes)]
        codes: Codes = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1)
        self._check(first.fingerprint)
        try:
            found = search(codes, k, max_distance, where=where)
        except ValueError as error:  # codes of another width
            raise Problem(422, str(error), "ValueError") from None
        self._check(first.fingerprint)  # so that no other model came in between
        return found

    def _check(self, fingerprint: str | None) -> None:
        if fingerprint is not None and fingerprint != (ours := self.collection.fingerprint):
            text = f"the code is of model {fingerprint[:64]}, and the collection uses {ours}: encode again"
            raise Problem(409, text)

    def _document(self, asked: Question, hits: list[Hit]) -> bytes | Exception:
        wanted = asked.wanted
        told: dict[str, Any] = {"query": asked.name, "k": wanted.k, "hits": []}
        documents: list[dict[str, Any]] = [
            {"rank": rank, "distance": hit.distance} | _members(hit) for rank, hit in enumerate(hits, 1)
        ]
        if wanted.rank != "distance":
            documents = [document | {"score": hit.score} for document, hit in zip(documents, hits, strict=True)]
        if wanted.codes:
            try:
                told["code"] = self._code(asked)
                codes = to_hex(self.collection.codes([hit.id for hit in hits]))
                documents = [document | {"code": code} for document, code in zip(documents, codes, strict=True)]
            except HashretError as error:  # an item was removed meanwhile
                return error
        return json.dumps(told | {"hits": documents}, separators=(",", ":")).encode()

    def _code(self, asked: Question) -> str:
        """The code of what was asked for, in hex."""
        if isinstance(asked.value, int):
            return to_hex(self.collection.codes([asked.value]))[0]
        return asked.value.hex() if asked.is_code else to_hex(self.collection.hasher.encode([asked.value]))[0]

    def _encode(self, images: list[bytes]) -> list[tuple[str, bytes] | Exception]:
        """The model's fingerprint and the code of each image."""
        hasher = self.collection.hasher

        def encode(some: list[bytes]) -> list[tuple[str, bytes]]:
            return [(hasher.fingerprint, code.tobytes()) for code in hasher.encode(some)]

        return _each(encode, images, lambda image: self._fault([image]))

    def _add(self, requests: list[Addition]) -> list[list[int] | Exception]:
        """The items of each request's images, of which all are added or none."""

        def add(some: list[Addition]) -> list[list[int]]:
            images = [image for request in some for image in request.images]
            ids = iter(self.collection.add(images, [told for request in some for told in request.metadata]))
            return [list(islice(ids, len(request.images))) for request in some]

        return _each(add, requests, lambda request: self._fault(request.images))

    def _fault_of_question(self, asked: Question) -> Exception | None:
        return self._fault([asked.value] if isinstance(asked.value, bytes) and not asked.is_code else [])

    def _fault(self, images: list[bytes]) -> Exception | None:
        """How the first of these images that cannot be decoded is refused, if there is one."""
        prepare = self.collection.hasher.preprocessing
        for image in images:
            try:
                prepare(image)
            except HashretError as broken:
                return _refusal(broken)
        return None


def _by_options(search: Callable[[Any, QueryOptions], list[R]]) -> Callable[..., list[R]]:
    """A search that takes options, as one that takes their values."""
    return lambda asked, k, max_distance, where: search(asked, QueryOptions(k, max_distance, where=where))


def _members(found: "Hit | Item") -> dict[str, Any]:
    """What is told of an item that was found."""
    path = found.paths[0] if found.paths else None
    return {
        "id": found.id,
        "path": path,
        "label": found.label,
        "paths": found.paths,
        "metadata": found.metadata,
    }


def draw(pixels: NDArray[np.uint8], size: int) -> tuple[bytes, str]:
    """Pixels (h, w, 1 | 3) as a file with no side longer than `size`, and its media type."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3)
    file = io.BytesIO()
    if max(image.size) <= SMALL:
        image.save(file, "PNG")
        return file.getvalue(), "image/png"
    image.save(file, "JPEG", quality=85)
    return file.getvalue(), "image/jpeg"


def _each(
    work: Callable[[list[T]], Sequence[R]], items: list[T], fault: Callable[[T], Exception | None]
) -> list[R | Exception]:
    """What `work` gives for all items. Where it fails, each of which `fault` tells is refused as that says, and the
    others are tried again, so that a slow item is not tried over and over; or each half is, if the fault is of none."""
    try:
        return list(work(items))
    except (HashretError, Problem) as error:
        faults = [fault(item) for item in items]
        if any(faults):
            sound = [item for item, told in zip(items, faults, strict=True) if told is None]
            rest = iter(_each(work, sound, fault) if sound else [])
            return [next(rest) if told is None else told for told in faults]
        half = len(items) // 2
        return [*_halved(work, items[:half]), *_halved(work, items[half:])] if half else [error]


def _halved(work: Callable[[list[T]], Sequence[R]], items: list[T]) -> list[R | Exception]:
    return _each(work, items, lambda item: None)


def _refusal(error: HashretError) -> Exception:
    return error if isinstance(error, NotFound | TooLarge) else Problem(422, str(error))


def _call(calls: list[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]
