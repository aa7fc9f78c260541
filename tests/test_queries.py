"""Queries that wait at the same time are batched, and each has the answer that it would have alone."""

import asyncio
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hashret.codes import to_hex
from hashret.collection import Collection
from hashret.errors import NotFound
from hashret.hasher import Hasher
from hashret.results import Hit, QueryOptions

pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service import pictures  # after importorskip
from hashret.service.batcher import Batcher
from hashret.service.handlers import Handlers
from hashret.service.metrics import Metrics
from hashret.service.problems import Busy, Problem
from hashret.service.queries import CodeQuery, ImageQuery, ItemQuery, Query, QueryHandler


def pixels(i: int) -> NDArray[np.uint8]:
    return np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, "PNG")
    return file.getvalue()


def make(folder: Path, cls: type[Collection] = Collection) -> Collection:
    """Return a collection of 20 image files, 00.png to 19.png."""
    (folder / "photos").mkdir()
    for i in range(20):
        (folder / "photos" / f"{i:02d}.png").write_bytes(png(i))
    made = cls.create(folder / "c", Hasher("lsh", 32).fit(np.stack([pixels(i) for i in range(50)])))
    made.index(folder / "photos")
    return made


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    with make(tmp_path_factory.mktemp("queries")) as made:
        yield made


@pytest.mark.parametrize("seed", range(4))
def test_a_query_in_a_batch_has_the_answer_that_it_has_alone(collection: Collection, seed: int) -> None:
    """The order is random, because a batch is searched with the options of its first query."""
    codes = [code.tobytes() for code in collection.codes([1, 2, 3])]
    plain, few = QueryOptions(), QueryOptions(2)
    others = [QueryOptions(20, 12), QueryOptions(where="id < 9"), QueryOptions(where="id =")]
    queries: list[Query] = [
        *(CodeQuery("x", code, options) for code in codes for options in (plain, few, *others)),
        CodeQuery("narrow", codes[0][:2], plain),
        CodeQuery("wide", codes[0] + codes[1][:2], plain),  # together as long as two codes
        CodeQuery("with codes", codes[0], plain, codes=True),
        CodeQuery("ours", codes[0], plain, fingerprint=collection.fingerprint),
        CodeQuery("theirs", codes[0], plain, fingerprint="f" * 64),
        CodeQuery("narrow and theirs", codes[0][:2], plain, fingerprint="f" * 64),
        *(ImageQuery(f"{i}.png", png(i), options) for i in (3, 4, 77) for options in (plain, few, *others)),
        ImageQuery("broken", b"\xff\xd8", plain),
        ImageQuery("ranked", png(3), replace(few, rank="asymmetric")),
        ImageQuery("with codes", png(3), few, codes=True),
        *(ItemQuery(f"id:{i}", i, options) for i in (1, 5) for options in (plain, few, *others)),
        ItemQuery("none", 999, plain),
        ItemQuery("with codes", 1, few, codes=True),
    ]
    order = np.random.default_rng(seed).permutation(len(queries)).tolist()
    together = QueryHandler(collection)([queries[i] for i in order])
    for i, answer in zip(order, together, strict=True):
        (alone,) = QueryHandler(collection)([queries[i]])
        assert type(answer) is type(alone) and str(answer) == str(alone), queries[i]
    errors = {
        queries[i].name: answer for i, answer in zip(order, together, strict=True) if isinstance(answer, Exception)
    }
    statuses = {name: error.status for name, error in errors.items() if isinstance(error, Problem)}
    assert isinstance(errors.pop("none"), NotFound)
    assert statuses == {
        **dict.fromkeys(("x", "3.png", "4.png", "77.png", "id:1", "id:5"), 422),  # an invalid filter
        "narrow": 422,
        "wide": 422,
        "theirs": 409,
        "narrow and theirs": 409,
        "broken": 422,
    }


def test_an_answer_has_the_hits_of_the_collection(collection: Collection) -> None:
    code = collection.codes([4])
    options = QueryOptions(3, 20, where="id < 15")
    queries: list[tuple[Query, list[Hit]]] = [
        (CodeQuery("a", code.tobytes(), options), collection.query_codes(code, 3, 20, where="id < 15")[0]),
        (ImageQuery("b", png(5), options), collection.query(png(5), 3, 20, where="id < 15")),
        (ItemQuery("c", 6, options), collection.query_item(6, 3, 20, where="id < 15")),
        (
            ImageQuery("d", png(7), replace(options, rank="asymmetric"), codes=True),
            collection.query(png(7), 3, 20, rank="asymmetric", where="id < 15"),
        ),
    ]
    for (query, hits), answer in zip(queries, QueryHandler(collection)([query for query, _ in queries]), strict=True):
        assert isinstance(answer, bytes)
        document = json.loads(answer)
        assert (document["query"], document["k"]) == (query.name, 3) and len(hits) == len(document["hits"])
        for rank, (hit, member) in enumerate(zip(hits, document["hits"], strict=True), 1):
            expected = hit._asdict() | {"rank": rank}
            if query.options.rank == "distance":
                del expected["score"]
            if query.codes:
                expected["code"] = to_hex(collection.codes([hit.id]))[0]
            assert member == expected


def test_a_model_that_changes_during_a_search_is_a_conflict(tmp_path: Path) -> None:
    class Switching(Collection):
        """A collection whose model changes after a search for codes."""

        def nearest(self, *args: Any, **options: Any) -> Any:
            results = super().nearest(*args, **options)
            self.reindex(other)
            return results

    other = Hasher("lsh", 32).fit(np.stack([pixels(i) for i in range(100, 150)]), seed=1)
    with make(tmp_path, Switching) as own:
        code, ours = own.codes([1]).tobytes(), own.fingerprint
        (answer,) = QueryHandler(own)([CodeQuery("a", code, QueryOptions(), fingerprint=ours)])
        assert isinstance(answer, Problem) and answer.status == 409 and own.fingerprint == other.fingerprint != ours


def test_a_full_queue_refuses_items_until_it_has_room() -> None:
    started, proceed = threading.Event(), threading.Event()

    def process(items: list[int]) -> list[int]:
        started.set()
        assert proceed.wait(10)
        return [2 * item for item in items]

    async def submit() -> list[Any]:
        batcher = Batcher("test", process, Metrics(), max_queue=3)
        first = asyncio.ensure_future(batcher.submit(0))
        assert await asyncio.to_thread(started.wait, 10)
        waiting = [asyncio.ensure_future(batcher.submit(i)) for i in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="too many test at once"):
            await asyncio.wait_for(batcher.submit(4), 5)
        with pytest.raises(Busy):
            await asyncio.wait_for(batcher.submit_all([5, 6]), 5)
        proceed.set()
        answers = [await first, *[await future for future in waiting]]
        answers += await batcher.submit_all([7, 8, 9, 10])  # larger than the queue, which is empty
        batcher.close()
        return answers

    assert asyncio.run(submit()) == [0, 2, 4, 6, 14, 16, 18, 20]


def test_the_cache_of_pictures_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path) as own:
        first = pictures.Pictures(own).of_item(1, 64)
        monkeypatch.setattr(pictures, "MAX_CACHED_BYTES", len(first[0]) + 300)
        own_pictures = pictures.Pictures(own)
        first, second = own_pictures.of_item(1, 64), own_pictures.of_item(2, 64)
        third = own_pictures.of_item(3, 64)
        for i in (1, 2, 3):
            Path(own.get(i).paths[0]).unlink()
        assert own_pictures.of_item(3, 64) == third and {first[1], second[1], third[1]} == {"image/png"}
        for i in (1, 2):
            with pytest.raises(NotFound):
                own_pictures.of_item(i, 64)


def test_slow_queries_have_batchers_of_their_own(collection: Collection) -> None:
    """A filter may take a second, and a large image half a minute."""
    handlers, plain, filtered = Handlers(collection, Metrics()), QueryOptions(), QueryOptions(where="id < 9")
    small, large = png(1), png(1) + bytes(5000)
    for queries, name in (
        ([CodeQuery("a", bytes(4), plain)], "queries"),
        ([ItemQuery("a", 1, plain)], "queries"),
        ([ImageQuery("a", small, plain)], "queries"),
        ([ImageQuery("a", small, plain), ImageQuery("b", large, plain)], "image queries"),
        ([CodeQuery("a", bytes(4), filtered)], "filtered queries"),
        ([ImageQuery("a", large, filtered)], "filtered queries"),
    ):
        assert handlers.batcher_for(queries).name == name
    handlers.close()
