"""`Client`: a collection that is served elsewhere, with the verbs of `Collection`."""

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
    """The collection that `hashret serve` serves at `url`.

    Code that uses a `Collection` runs with a `Client` instead: images are given as there, and read here. Many threads
    may use one object. Raises what a Collection does, and HashretError where the service cannot be reached.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 60.0) -> None:
        try:
            import httpx
        except ImportError:
            raise HashretError("a client needs more packages: pip install 'hashret[serve]'") from None
        self._failed = httpx.HTTPError
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        except httpx.InvalidURL as error:
            raise HashretError(f"{url} is no address ({error}): give one such as http://127.0.0.1:8000") from None
        self.url = url

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """How many items, that is different contents, there are."""
        return int(self.info()["items"])

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the model that the codes are of."""
        return str(self.info()["fingerprint"])

    @property
    def bits(self) -> int:
        """The width of a code."""
        return int(self.info()["bits"])

    def info(self) -> dict[str, Any]:
        """Counts, model, index and size on disk."""
        told: dict[str, Any] = self._ask("GET", "/v1/info")
        return told

    def query(
        self,
        image: Any,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        where: str | None = None,
        rank: str = "distance",
    ) -> list[Hit]:
        """What `Collection.query` gives; HashretError where that may be more than the thousand hits a service gives."""
        return self.query_batch([image], k, max_distance, where=where, rank=rank)[0]

    def query_batch(
        self,
        images: Any,
        k: int | None = 10,
        max_distance: int | None = None,
        *,
        where: str | None = None,
        rank: str = "distance",
    ) -> list[list[Hit]]:
        """What `query` gives, for each of a batch of images."""
        params = {name: str(value) for name, value in _params(QueryOptions(k, max_distance, rank, where)).items()}
        answers: list[list[Hit]] = []
        for files in _requests(_files(images), k):
            documents = self._ask("POST", "/v1/query", files=files, data=params | {"rank": rank})
            answers += [_hits(answer, k) for answer in (documents if isinstance(documents, list) else [documents])]
        return answers

    def query_codes(
        self, codes: Codes, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[list[Hit]]:
        """What `query` gives, for codes, uint8 (n, bits // 8); raises ValueError for codes of another width."""
        params = _params(QueryOptions(k, max_distance, where=where))
        answers: list[list[Hit]] = []
        for texts in _requests(to_hex(check_codes(codes)), k):
            answers += [_hits(answer, k) for answer in self._ask("POST", "/v1/query", json={"code": texts} | params)]
        return answers

    def query_item(
        self, item_id: int, k: int | None = 10, max_distance: int | None = None, *, where: str | None = None
    ) -> list[Hit]:
        """What `query` gives for the image of an item, leaving out the item itself; NotFound if there is none."""
        params = _params(QueryOptions(k, max_distance, where=where))
        return _hits(self._ask("POST", "/v1/query", json={"id": item_id} | params), k)

    def encode(self, images: Any) -> Codes:
        """Codes, uint8 (n, bits // 8), as `Hasher.encode` gives."""
        texts: list[str] = []
        for files in _requests(_files(images)):
            texts += self._ask("POST", "/v1/encode", files=files)["codes"]
        return from_hex(texts) if texts else np.empty((0, self.bits // 8), np.uint8)

    def add(self, images: Any, metadata: Sequence[dict[str, Any] | None] | None = None) -> list[int]:
        """Add contents; the item's id of each, as `Collection.add` does."""
        files = _files(images)
        if metadata is not None and len(metadata) != len(files):
            raise ValueError(f"{len(files)} images need as many metadata, not {len(metadata)}")
        texts = [json.dumps(one) for one in metadata or []]
        ids: list[int] = []
        for some in _requests(range(len(files))):
            told = {"metadata": texts[some.start : some.stop]}
            ids += self._ask("POST", "/v1/items", files=files[some.start : some.stop], data=told)["ids"]
        return ids

    def dupes(self, max_distance: int = 3, *, by: str = "connected", keep: str = "largest") -> list[Group]:
        """What `Collection.dupes` gives; HashretError where that is more than a service gives: a thousand groups of a
        thousand items."""
        options = {"max_distance": max_distance, "by": by, "keep": keep, "limit": 1000}
        told = self._ask("GET", "/v1/dupes", params=options)
        if told["more"] or any(group["size"] > len(group["items"]) for group in told["groups"]):
            raise HashretError("there are more duplicates than a service tells: run hashret dupes where it runs")
        return [Group([Item(**item) for item in group["items"]], group["distances"]) for group in told["groups"]]

    def calibration(self) -> Calibration:
        """What `hashret calibrate` found for the service's model; raises NotFound if it was not asked to."""
        return Calibration(**self._ask("GET", "/v1/calibration"))

    def radius(self, target: float = TARGET_PRECISION) -> int:
        """The radius that finds most copies while this share of what it shows is right, as `calibration` has it."""
        return self.calibration().radius(target, len(self))

    def verdict(self, a: int, b: int, verdict: str) -> None:
        """Remember that two items, by their ids, are the "same" or "different", as `Collection.verdict` does."""
        self._ask("POST", "/v1/verdicts", json={"a": a, "b": b, "verdict": verdict})

    def remove(self, ids: Iterable[int]) -> int:
        """Forget items; how many of them were there."""
        return sum(int(self._ask("DELETE", f"/v1/items/{int(i)}")["removed"]) for i in ids)

    def get(self, item_id: int) -> Item:
        """The item with this id; raises NotFound if there is none."""
        told = self._ask("GET", f"/v1/items/{int(item_id)}")
        return Item(**{name: told[name] for name in Item._fields})

    def items(self, after: int = 0, limit: int = 100, *, where: str | None = None) -> list[Item]:
        """What `Collection.items` gives; `limit` is 1,000 at most."""
        options: dict[str, Any] = {"cursor": after, "limit": limit} | ({} if where is None else {"where": where})
        told = self._ask("GET", "/v1/items", params=options)
        return [Item(**item) for item in told["items"]]

    def _ask(self, method: str, path: str, **request: Any) -> Any:
        """What the service answers; raises what it refuses with."""
        try:
            response = self._http.request(method, path, **request)
            told = response.json()
        except self._failed as error:
            raise HashretError(f"{self.url} cannot be reached ({error}): start it with hashret serve") from None
        except ValueError:
            raise HashretError(f"{self.url} is no hashret service: check the address") from None
        if response.is_success:
            return told
        raise _ERRORS.get(told.get("error"), HashretError)(told.get("detail", response.reason_phrase))


def _params(options: QueryOptions) -> dict[str, Any]:
    """What every query may say, as members of a JSON body or fields of a form."""
    params = {"k": options.k, "max_distance": options.max_distance, "where": options.where}
    return {name: value for name, value in params.items() if value is not None}


def _files(images: Any) -> list[tuple[str, tuple[str, bytes]]]:
    """Each of a batch of images as a file of a form."""
    return [("file", ("image", content_bytes(to_content(image)))) for image in as_batch(images)]


def _requests(items: Sequence[Any], k: int | None = 1) -> Iterator[Any]:
    """Items as many at a time as one request may have, which depends on the hits of each."""
    most = max(1, min(MAX_QUERIES, MAX_HITS // (k or MAX_K)))
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _hits(answer: dict[str, Any], k: int | None) -> list[Hit]:
    if k is None and len(answer["hits"]) == MAX_K:
        raise HashretError(
            f"there may be more than the {MAX_K:,} hits that a service gives: give k, or a smaller distance"
        )
    return [Hit(**{name: hit[name] for name in Hit._fields if name in hit}) for hit in answer["hits"]]
