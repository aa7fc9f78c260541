"""Uploads of several clients in one batch: what is wrong with one of them does not fall on the others."""

import asyncio
import io
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hashret.collection import Collection
from hashret.errors import HashretError
from hashret.hasher import Hasher

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service.batcher import Batcher, as_exception  # noqa: E402  # after importorskip
from hashret.service.faults import isolate_faults  # noqa: E402
from hashret.service.metrics import Metrics  # noqa: E402


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    with Collection.create(tmp_path_factory.mktemp("uploads") / "c", Hasher("lsh", 16).fit(images)) as made:
        yield made


@pytest.fixture(scope="module")
def address(collection: Collection, serve: Callable[..., str]) -> str:
    return serve(collection)


UNSTORABLE = {
    "a list": '{"a": []}',
    "an object": '{"a": {"b": 1}}',
    "60 kB": json.dumps({"a": "x" * 60_000}),
    "60 kB of escapes": json.dumps({"a": "é" * 27_000}, ensure_ascii=False),
    "infinity": '{"a": 1e999}',
    "minus infinity": '{"a": -1e999}',
    "NaN": '{"a": NaN}',
    "a lone surrogate": '{"a": "\\ud800"}',
    "a lone surrogate in a key": '{"\\udfff": 1}',
    "many digits": f'{{"a": {"9" * 5000}}}',
    "brackets": '{"a": ' + "[" * 30_000,
    "nested brackets": '{"a": ' + "[" * 900 + "]" * 900 + "}",
    "no object": "[1]",
    "a number": "1",
    "no JSON": "{",
    "nothing": "",
    "an empty key": '{"": 1}',
    "a long key": json.dumps({"k" * 201: 1}),
    "a quote in a key": '{"a\\"b": 1}',
    "a line break in a key": '{"a\\nb": 1}',
    "a NUL in a key": '{"a\\u0000b": 1}',
}
STORABLE: dict[str, Any] = {
    "nothing": None,
    "no members": {},
    "scalars": {"a": 1, "b": 1.5, "c": "é\n😀", "d": True, "e": None},
    "the largest": {"a": "x" * 49_991},
    "large integers": {"a": 2**63, "b": -(2**64), "c": 10**400},
    "the largest number": {"a": 1.7976931348623157e308},
    "a NUL": {"a": "b\0c"},
    "names of columns": {"id": 1, "sha256": "x", "path": "y"},
}


@pytest.mark.parametrize("text", UNSTORABLE.values(), ids=UNSTORABLE)
def test_metadata_that_cannot_be_stored_is_refused(collection: Collection, address: str, text: str) -> None:
    files, before = [("file", ("a.png", png(1))), ("file", ("b.png", png(2)))], collection.generation
    response = httpx.post(f"{address}/v1/items", files=files, data={"metadata": ["{}", text]}, timeout=30)
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"].startswith("metadata: ") and "\n" not in response.json()["detail"]
    assert collection.generation == before


@pytest.mark.parametrize("name", STORABLE)
def test_metadata_that_is_stored_comes_back(collection: Collection, address: str, name: str) -> None:
    metadata, image = STORABLE[name], png(1000 + list(STORABLE).index(name))
    with httpx.Client(base_url=address, timeout=30) as client:
        response = client.post("/v1/items", files={"file": image}, data={"metadata": json.dumps(metadata)})
        assert response.status_code == 200, response.text
        (item,) = response.json()["ids"]
        assert collection.get(item).metadata == metadata
        assert client.get(f"/v1/items/{item}").json()["metadata"] == metadata
        assert client.get(f"/v1/items?where=id={item}").json()["items"][0]["metadata"] == metadata


def test_faulty_uploads_do_not_fall_on_others(collection: Collection, address: str) -> None:
    """Uploads at the same time join batches, in which every third has a fault."""
    before = len(collection)
    broken = zlib.compress(bytes(100))

    def add(i: int) -> int:
        content, metadata = (broken if i % 6 == 1 else png(i)), ('{"a": 1e999}' if i % 6 == 4 else '{"a": 1}')
        with httpx.Client(base_url=address, timeout=60) as client:
            response = client.post("/v1/items", files={"file": content}, data={"metadata": metadata})
        return int(response.status_code)

    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(add, range(48)))
    assert statuses == [422 if i % 3 == 1 else 200 for i in range(48)]
    assert len(collection) == before + 32


class Panic(BaseException):
    """What a panic of a Rust library becomes."""


ERRORS = [
    ValueError("v"),
    HashretError("h"),
    MemoryError(),
    RecursionError(),
    StopIteration(),
    KeyError("k"),
    OSError(5),
]


@pytest.mark.parametrize("error", [*ERRORS, Panic("p")], ids=repr)
@pytest.mark.parametrize("faulty", [{3}, {0, 7}, {1, 2, 3}])
@pytest.mark.parametrize("is_found", [True, False])
def test_an_error_of_any_type_is_that_of_its_item(error: BaseException, faulty: set[int], is_found: bool) -> None:
    def process(items: list[int]) -> list[int]:
        if faulty & set(items):
            raise error
        return [item * 10 for item in items]

    def find_fault(item: int) -> Exception | None:
        return as_exception(error) if is_found and item in faulty else None

    results = isolate_faults(process, list(range(8)), find_fault)
    assert {item for item, result in enumerate(results) if isinstance(result, Exception)} == faulty
    assert all(error in (results[item], getattr(results[item], "__cause__", None)) for item in faulty)
    assert [result for result in results if isinstance(result, int)] == [i * 10 for i in range(8) if i not in faulty]


def test_items_queued_after_one_that_failed_are_not_processed() -> None:
    """Their request has ended, and their bytes are no longer counted."""
    processed = list[int]()

    def process(items: list[int]) -> list[int]:
        processed.extend(items)
        if 0 in items:
            raise ValueError("0")
        return items

    async def check() -> None:
        batcher = Batcher("test", process, Metrics(), max_batch_size=1)
        with pytest.raises(ValueError, match="0"):
            await asyncio.wait_for(batcher.submit_all(range(100)), 10)
        assert await asyncio.wait_for(batcher.submit(200), 10) == 200
        batcher.close()

    asyncio.run(check())
    assert processed[-1] == 200 and len(processed) < 5


@pytest.mark.parametrize("error", [*ERRORS, Panic("p"), SystemExit(3), GeneratorExit(), "too few"], ids=repr)
def test_a_batcher_survives_any_error(error: BaseException | str) -> None:
    def process(items: list[int]) -> list[int]:
        if 1 not in items:
            return items
        if isinstance(error, str):
            return items[1:]
        raise error

    async def check() -> None:
        batcher = Batcher("test", process, Metrics(), max_batch_size=4)
        results = await asyncio.wait_for(asyncio.gather(*map(batcher.submit, range(4)), return_exceptions=True), 10)
        assert len(results) == 4 and all(isinstance(result, Exception) for result in results)
        assert await asyncio.wait_for(batcher.submit(7), 10) == 7
        batcher.close()

    asyncio.run(check())
