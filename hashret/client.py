"""`Client`: a collection that `hashret serve` serves over HTTP, with the methods of `Collection`."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from hashret.codes import Codes, check_codes, from_hex, to_hex
from hashret.data.contents import content_bytes
from hashret.data.images import as_batch, to_content
from hashret.errors import HashretError, NotFound, TooLarge
from hashret.results import MAX_HITS, MAX_K, MAX_QUERIES, TARGET_PRECISION, Calibration, Group, Hit, Item, QueryOptions

_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "NotFound": NotFound,
    "TooLarge": TooLarge,
}


class Client:
    """A client for the collection that `hashret serve` serves at `url`.

    Its methods take and return the values of the methods of `Collection`. An image is a path, bytes, a PIL image, a
    uint8 array (h, w) or (h, w, 1 | 3 | 4), or a vector, floats (d,); files are read on the client. A client is
    thread-safe, and a context manager that closes its connections.

    `token` is sent with every request: a service needs it for writing and, on a host other than loopback, for all
    requests. `timeout` is in seconds.

    All methods raise HashretError if the service cannot be reached, needs another token or reports an error, TooLarge
    for an image that exceeds a limit of the service, and ValueError for an invalid argument. The constructor raises
    HashretError for an invalid `url`.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 60.0) -> None:
        try:
            import httpx
        except ImportError:
            raise HashretError("a client needs more packages: pip install 'hashret[serve]'") from None
        self._http_error = httpx.HTTPError
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        except httpx.InvalidURL as error:
            raise HashretError(f"{url} is not a valid URL ({error}): give one like http://127.0.0.1:8000") from None
        self.url = url

    def close(self) -> None:
        """Close the connections to the service."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of items, which are distinct contents."""
        return int(self.info()["items"])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the collection's model, as hex."""
        return str(self.info()["fingerprint"])

    @property
    def bits(self) -> int:
        """The number of bits of a code."""
        return int(self.info()["bits"])

    def info(self) -> dict[str, Any]:
        """Return counts, model, index, size on disk, and whether the service is read-only, by name."""
        document: dict[str, Any] = self._request("GET", "/v1/info")
        return document

    def query(
        self,
        image: Any,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        where: str | None = None,
        rank: str = "distance",
        fields: Sequence[str] | None = None,
    ) -> list[Hit]:
        """Search for images similar to an image, as `Collection.query` does.

        The hits are the `k` nearest, those within `max_distance` bits (with `k` None), or both, ordered by distance, or
        by `rank` "asymmetric". `where` is an SQLite expression that filters items. With `fields`, of path, paths, label
        and metadata the service sends only these; the others are None or empty.

        Raise HashretError if the image cannot be decoded or `where` is invalid, or if `k` is None and the service
        returns its maximum of 1,000 hits, so that more may exist. Raise ValueError for an invalid `k`, `max_distance`,
        `rank` or `fields`, and if the answer would exceed the 32 MiB of a service.
        """
        return self.query_batch([image], k, max_distance, where=where, rank=rank, fields=fields)[0]

    def query_batch(
        self,
        images: Any,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        where: str | None = None,
        rank: str = "distance",
        fields: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """Search for each image of a batch, as `query` does; return one list of hits per image."""
        options = _params(QueryOptions(k, max_distance, rank, where), fields)
        params = {name: str(value) for name, value in options.items()}
        answers: list[list[Hit]] = []
        for files in _batches(_files(images), k):
            documents = self._request("POST", "/v1/query", files=files, data=params | {"rank": rank})
            answers += [_hits(answer, k) for answer in (documents if isinstance(documents, list) else [documents])]
        return answers

    def query_codes(
        self,
        codes: Codes,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        where: str | None = None,
        fields: Sequence[str] | None = None,
    ) -> list[list[Hit]]:
        """Search for codes, uint8 (n, bits // 8), as `query` does; return one list of hits per code.

        Raise ValueError for codes of another dtype or width.
        """
        params = _params(QueryOptions(k, max_distance, where=where), fields)
        answers: list[list[Hit]] = []
        for texts in _batches(to_hex(check_codes(codes)), k):
            answers += [
                _hits(answer, k) for answer in self._request("POST", "/v1/query", json={"code": texts} | params)
            ]
        return answers

    def query_item(
        self,
        item_id: int,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        where: str | None = None,
        fields: Sequence[str] | None = None,
    ) -> list[Hit]:
        """Search for images similar to an item, as `query` does, without the item itself.

        Raise NotFound if no item has this id.
        """
        params = _params(QueryOptions(k, max_distance, where=where), fields)
        return _hits(self._request("POST", "/v1/query", json={"id": item_id} | params), k)

    def encode(self, images: Any) -> Codes:
        """Return the codes of images, uint8 (n, bits // 8), as `Hasher.encode` does."""
        texts: list[str] = []
        for files in _batches(_files(images)):
            texts += self._request("POST", "/v1/encode", files=files)["codes"]
        return from_hex(texts) if texts else np.empty((0, self.bits // 8), np.uint8)

    def add(self, images: Any, metadata: Sequence[dict[str, Any] | None] | None = None) -> list[int]:
        """Add images, and return their item ids in order, as `Collection.add` does.

        `metadata` has a dict, or None, for each image. An image that the collection already has keeps its id. More than
        256 images are added in several transactions.

        Raise ValueError if the number or a value of `metadata` is invalid.
        """
        files = _files(images)
        if metadata is not None and len(metadata) != len(files):
            raise ValueError(f"{len(files)} images need as many metadata, not {len(metadata)}")
        texts = [json.dumps(values) for values in metadata or []]
        ids: list[int] = []
        for batch in _batches(range(len(files))):
            fields = {"metadata": texts[batch.start : batch.stop]}
            ids += self._request("POST", "/v1/items", files=files[batch.start : batch.stop], data=fields)["ids"]
        return ids

    def dupes(self, max_distance: int = 3, *, by: str = "connected", keep: str = "largest") -> list[Group]:
        """Return groups of near-duplicates within `max_distance` bits, as `Collection.dupes` does.

        Raise HashretError if there are more than 1,000 groups, or more than 1,000 items in a group, which is the limit
        of a service.
        """
        options = {"max_distance": max_distance, "by": by, "keep": keep, "limit": 1000}
        document = self._request("GET", "/v1/dupes", params=options)
        if document["more"] or any(group["size"] > len(group["items"]) for group in document["groups"]):
            raise HashretError("there are more duplicates than a service returns: run hashret dupes on its machine")
        return [Group([Item(**item) for item in group["items"]], group["distances"]) for group in document["groups"]]

    def calibration(self) -> Calibration:
        """Return the calibration of the collection's model.

        Raise NotFound if `hashret calibrate` has not been run for this model.
        """
        return Calibration(**self._request("GET", "/v1/calibration"))

    def radius(self, target: float = TARGET_PRECISION) -> int:
        """Return the radius in bits with the highest recall of near-duplicates at a precision of at least `target`.

        Raise NotFound if `hashret calibrate` has not been run for this model, HashretError if no radius has this
        precision, and ValueError unless `target` is above 0 and at most 1.
        """
        return self.calibration().radius(target, len(self))

    def verdict(self, a: int, b: int, verdict: str) -> None:
        """Store the verdict that items `a` and `b` are the "same" or "different", as `Collection.verdict` does.

        Raise NotFound if no item has one of these ids, and ValueError for equal ids or another verdict.
        """
        self._request("POST", "/v1/verdicts", json={"a": a, "b": b, "verdict": verdict})

    def remove(self, ids: Iterable[int]) -> int:
        """Remove items by their ids, and return how many existed. Files are not deleted."""
        return sum(int(self._request("DELETE", f"/v1/items/{int(i)}")["removed"]) for i in ids)

    def get(self, item_id: int) -> Item:
        """Return the item with this id.

        Raise NotFound if no item has this id.
        """
        document = self._request("GET", f"/v1/items/{int(item_id)}")
        return Item(**{name: document[name] for name in Item._fields})

    def items(self, after: int = 0, limit: int = 100, *, where: str | None = None) -> list[Item]:
        """Return at most `limit` items with ids above `after`, in the order of their ids, as `Collection.items` does.

        `limit` is at most 1,000; `where` is an SQLite expression that filters items.
        """
        options: dict[str, Any] = {"cursor": after, "limit": limit} | ({} if where is None else {"where": where})
        document = self._request("GET", "/v1/items", params=options)
        return [Item(**item) for item in document["items"]]

    def _request(self, method: str, path: str, **request: Any) -> Any:
        """Return the JSON of a response, or raise the exception that an error response names."""
        try:
            response = self._http.request(method, path, **request)
            document = response.json()
        except self._http_error as error:
            raise HashretError(f"{self.url} cannot be reached ({error}): start it with hashret serve") from None
        except ValueError:
            raise HashretError(f"{self.url} is not a hashret service: check the URL") from None
        if response.is_success:
            return document
        raise _ERRORS.get(document.get("error"), HashretError)(document.get("detail", response.reason_phrase))


def _params(options: QueryOptions, fields: Sequence[str] | None) -> dict[str, Any]:
    """Return the options of a query as members of a JSON body or fields of a form."""
    names = None if fields is None else ",".join(["id", "distance", "score", *fields])
    params = {"k": options.k, "max_distance": options.max_distance, "where": options.where, "fields": names}
    return {name: value for name, value in params.items() if value is not None}


def _files(images: Any) -> list[tuple[str, tuple[str, bytes]]]:
    """Return the images of a batch as the files of a form."""
    return [("file", ("image", content_bytes(to_content(image)))) for image in as_batch(images)]


def _batches(items: Sequence[Any], k: int | None = 1) -> Iterator[Any]:
    """Yield slices of the items, each as large as one request with `k` hits per item may be."""
    size = max(1, min(MAX_QUERIES, MAX_HITS // (k or MAX_K)))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _hits(answer: dict[str, Any], k: int | None) -> list[Hit]:
    """Return the hits of an answer. Raise HashretError if `k` is None and hits may be missing."""
    if k is None and len(answer["hits"]) == MAX_K:
        raise HashretError(
            f"the service returns at most {MAX_K:,} hits, and there may be more: give k, or a smaller max_distance"
        )
    absent: dict[str, Any] = {"path": None, "paths": [], "label": None, "metadata": None}
    return [Hit(**(absent | {name: hit[name] for name in Hit._fields if name in hit})) for hit in answer["hits"]]
