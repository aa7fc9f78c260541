"""Requests and caches are bounded by bytes, as the memory of a real process shows."""

import io
import json
import re
import socket
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hashret.client import Client
from hashret.codes import to_hex
from hashret.collection import Collection, snapshot
from hashret.collection.byte_cache import ByteCache
from hashret.collection.snapshot import item_size
from hashret.hasher import Hasher
from hashret.results import Item, QueryOptions

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service import documents, memory, queries, routes_items  # noqa: E402  # after importorskip
from hashret.service.problems import Busy, Problem  # noqa: E402

MIB = 2**20
COUNT = 800  # items, each with the most metadata that is allowed


def wide_metadata(i: int) -> dict[str, Any]:
    """Return 50 kB of metadata that take the most memory as Python objects."""
    return {f"{key:03x}": key + i + 0.5 for key in range(3000)}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    folder = tmp_path_factory.mktemp("memory")
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    with Collection.create(folder / "c", Hasher("lsh", 32).fit(images)) as made:
        rows = {str(i): wide_metadata(i) if i % 8 == 0 else {"text": "x" * 49_000} for i in range(COUNT)}
        report = made.index(folder / "images.npy", metadata=rows)
        assert report.described == COUNT
        yield made


class Service:
    """A service in a process of its own."""

    def __init__(self, address: str, pid: int) -> None:
        self.address, self._pid = address, pid
        self.http = httpx.Client(base_url=address, timeout=120)

    def resident(self, name: str) -> float:
        """Return the resident memory in MiB, now ("VmRSS") or at its peak ("VmHWM")."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) / 1024

    @contextmanager
    def growth(self) -> Iterator[list[float]]:
        """Append by how many MiB the resident memory grew at its peak."""
        grown: list[float] = []
        before = self.resident("VmRSS")
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # resets the peak
        yield grown
        grown.append(self.resident("VmHWM") - before)


@pytest.fixture(scope="module")
def service(collection: Collection) -> Iterator[Service]:
    """Return a service whose requests in progress hold at most 110 MiB together."""
    limit = f"from hashret.service import memory; memory.MAX_BYTES_IN_FLIGHT = {110 * MIB}"
    code = f"{limit}; from hashret.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "-c", str(collection.path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split()[-1].rstrip("/")
        started = Service(address, process.pid)
        with started.http as http:
            while http.get("/readyz").status_code != 200:
                time.sleep(0.05)
            assert http.post("/v1/query", json={"id": 1, "k": 1, "fields": "id"}).status_code == 200
            yield started
        process.terminate()


def query(service: Service, codes: Any, k: int, **options: Any) -> Any:
    return service.http.post("/v1/query", json={"code": codes, "k": k, **options})


def check_too_large(response: Any) -> None:
    assert response.status_code == 422 and response.headers["content-type"] == "application/problem+json"
    detail = response.json()["detail"]
    assert "more than 32 MiB" in detail and all(word in detail for word in ("k", "limit", "queries", "fields=id"))


def test_a_large_answer_is_refused_before_it_is_made(collection: Collection, service: Service) -> None:
    """A request of 5 kB would have an answer of more than a gigabyte."""
    codes = to_hex(collection.codes(range(1, 257)))
    with service.growth() as growth:
        check_too_large(query(service, codes, 100))
        check_too_large(query(service, codes[0], COUNT))
        for path in ("/v1/items?limit=1000", "/v1/dupes?max_distance=32"):
            check_too_large(service.http.get(path))
    assert growth[0] < 250


def test_metadata_counts_as_what_it_takes_as_python_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_BYTES_IN_FLIGHT", 16 * MIB)
    text = json.dumps(wide_metadata(0))
    total = memory.Memory()
    request = memory.RequestMemory(total)
    tracemalloc.start()
    try:
        rows = routes_items._parse_metadata([text] * 8, request)
        assert len(rows) == 8 and 0.8 < total.bytes / tracemalloc.get_traced_memory()[0] < 1.2
    finally:
        tracemalloc.stop()
    with pytest.raises(Busy):
        routes_items._parse_metadata([text] * (2 * memory.MAX_BYTES_IN_FLIGHT // total.bytes * 8), request)
    assert total.bytes <= memory.MAX_BYTES_IN_FLIGHT
    request.release()
    assert total.bytes == 0


def test_answers_without_metadata_are_small(collection: Collection, service: Service) -> None:
    codes = to_hex(collection.codes(range(1, 257)))
    with service.growth() as growth:
        answers = query(service, codes, 100, fields="path, distance,id").json()
        page = service.http.get("/v1/items?limit=1000&fields=id,sha256").json()
        groups = service.http.get("/v1/dupes?max_distance=32&fields=id").json()["groups"]
    assert growth[0] < 60
    expected = [collection.query_codes(collection.codes([i]), 100)[0] for i in (1, 256)]
    for answer, hits in zip((answers[0], answers[-1]), expected, strict=True):
        assert answer["hits"] == [{"distance": hit.distance, "id": hit.id, "path": hit.path} for hit in hits]
    assert [item["id"] for item in page["items"]] == [*range(1, COUNT + 1)]
    assert {*page["items"][0]} == {"id", "sha256"}
    assert [{"id": item.id} for item in collection.dupes(32)[0].items] == groups[0]["items"]


def test_the_largest_answer_takes_a_few_times_its_bytes(collection: Collection, service: Service) -> None:
    codes = to_hex(collection.codes([1]))[0]
    with service.growth() as growth:
        answer = query(service, codes, 660)
        items = service.http.get("/v1/items?limit=660")
    sizes = [len(response.content) / MIB for response in (answer, items)]
    assert all(24 < size <= 32 for size in sizes) and growth[0] < 400


def test_clients_that_receive_nothing_have_a_limit_together(service: Service, collection: Collection) -> None:
    """Their answers count until they are disconnected."""
    host, port = service.address.removeprefix("http://").split(":")
    body = json.dumps({"code": to_hex(collection.codes([1]))[0], "k": 660}).encode()
    headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    statuses = []
    with ExitStack() as stack, service.growth() as growth:
        for _ in range(12):
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            client.sendall(f"POST /v1/query HTTP/1.1\r\n{head}\r\n".encode() + body)
            statuses.append(client.recv(12)[-3:])
    assert statuses == [b"200"] * 3 + [b"503"] * 9
    assert growth[0] < 300
    while query(service, "00000000", 660).status_code == 503:  # until the disconnected clients no longer count
        time.sleep(0.05)


def test_queries_of_one_batch_have_a_limit_together(service: Service, collection: Collection) -> None:
    codes = to_hex(collection.codes([1]))[0]
    with service.growth() as growth, ThreadPoolExecutor(16) as pool:
        statuses = Counter(pool.map(lambda _: query(service, codes, 660).status_code, range(32)))
    assert statuses.keys() == {200, 503} and growth[0] < 400


def test_an_item_with_many_paths_is_refused_before_it_is_read(
    tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the ids of such an item are left: a hit has a path only if all paths of its item have room."""
    (tmp_path / "photos").mkdir()
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image.save(tmp_path / "photos" / "0.png")
    for i in range(1, 300):
        (tmp_path / "photos" / f"{i}.png").hardlink_to(tmp_path / "photos" / "0.png")
    with Collection.create(tmp_path / "c", Hasher("lsh", 32).fit(np.zeros((2, 8, 8), np.uint8))) as own:
        own.index(tmp_path / "photos")
        monkeypatch.setattr(memory, "MAX_ANSWER_BYTES", 50_000)
        with httpx.Client(base_url=serve(own), timeout=60) as http:
            body = {"code": "00000000", "k": 1}
            for response in (
                *(http.get(f"/v1/items{end}") for end in ("", "/1", "/1?fields=label")),
                http.get("/v1/dupes"),
                *(http.post("/v1/query", json=body | fields) for fields in ({}, {"fields": "id,path"})),
            ):
                assert response.status_code == 422 and "the answer has more than" in response.json()["detail"]
            assert http.get("/v1/items?fields=id").json()["items"] == [{"id": 1}]
            assert http.get("/v1/items/1?fields=id").json() == {"id": 1}
            assert http.post("/v1/query", json=body | {"fields": "id,rank"}).json()["hits"] == [{"rank": 1, "id": 1}]


@pytest.mark.parametrize("fields", ["", "ids", "id,", "id;distance", "id,sha256", "code,id,nothing"])
def test_fields_that_do_not_exist_are_refused(service: Service, fields: str) -> None:
    response = query(service, "00000000", 1, fields=fields)
    assert response.status_code == 422 and response.json()["detail"].startswith("fields: there is no ")
    for path in ("items?", "items/1?", "dupes?"):
        response = service.http.get(f"/v1/{path}fields=rank,{fields}")
        assert response.status_code == 422 and "rank" not in response.json()["detail"].partition(";")[2]


def test_every_choice_of_fields_leaves_out_the_others(collection: Collection, service: Service) -> None:
    """In any order, for every form of a query, with scores and codes where these are."""
    image = io.BytesIO()
    Image.fromarray(np.asarray(collection.content(3))).save(image, "PNG")
    file = {"file": image.getvalue()}
    ask = partial(service.http.post, "/v1/query")
    forms: list[Callable[[dict[str, Any]], Any]] = [
        lambda options: ask(json={"code": "00ff00ff", **options}),
        lambda options: ask(json={"id": 3, **options}),
        lambda options: ask(files=file, data=options),
        lambda options: ask(files=file, params=options | {"rank": "asymmetric"}),
    ]
    for post in forms:
        for codes in (False, True):
            whole = post({"k": 3, "codes": codes}).json()
            names = [*documents.HIT_FIELDS]
            for fields in (*names, "path,id,rank", "score,code", "metadata,distance", ",".join(reversed(names))):
                chosen = post({"k": 3, "codes": codes, "fields": fields}).json()
                kept = set(fields.split(","))
                hits = [{name: value for name, value in hit.items() if name in kept} for hit in whole["hits"]]
                assert chosen == whole | {"hits": hits}, (fields, codes)


def test_the_client_asks_for_fields(collection: Collection, service: Service) -> None:
    codes = collection.codes([1, 2])
    with Client(service.address) as client:
        expected = [[hit._replace(paths=[], metadata=None) for hit in row] for row in collection.query_codes(codes, 3)]
        assert client.query_codes(codes, 3, fields=["path", "label"]) == expected
        assert client.query_item(1, 2, fields=[]) == [
            hit._replace(path=None, paths=[], metadata=None) for hit in collection.query_item(1, 2)
        ]
        with pytest.raises(ValueError, match="there is no 'size'"):
            client.query_codes(codes, 3, fields=["size"])
        with pytest.raises(ValueError, match="more than 32 MiB"):
            client.query_codes(codes, COUNT)


def test_a_long_json_text_is_refused_before_it_is_parsed(service: Service) -> None:
    """A list of empty objects takes 25 times as many bytes in memory."""
    headers = {"content-type": "application/json"}
    body = b"[" + b"{}," * (20 * MIB) + b"{}]"
    with service.growth() as growth:
        for route in ("query", "reconstruct", "verdicts"):
            response = service.http.post(f"/v1/{route}", content=body, headers=headers)
            assert response.status_code == 413 and "256 KiB" in response.json()["detail"]
    assert growth[0] < 250


@pytest.mark.parametrize("form", ["plain", "text", "wide", "many paths"])
def test_a_cache_counts_what_its_values_take(form: str) -> None:
    """Within a third of what Python allocates, so that a limit is one."""

    def item(i: int) -> Item:
        metadata = wide_metadata(i) if form == "wide" else {"text": "x" * 500 + str(i)} if form == "text" else None
        paths = [f"/photos/{i:06}/{name:03}.png" for name in range(200 if form == "many paths" else 1)]
        return Item(
            i + 10**6, f"{i:064}", 800 + i, 600 + i, 10**6 + i, f"2026-01-{i:09}", metadata, paths, f"label {i}"
        )

    def text(i: int) -> str:
        return documents.item_members(item(i), documents.HIT_FIELDS[2:7])

    for make, size_of in ((item, item_size), (text, sys.getsizeof)):
        cache = ByteCache[Any](10**9, size_of)
        count = 40 if form == "wide" else 200
        tracemalloc.start()
        try:
            for i in range(count):
                cache.put(i + 10**6, make(i))
            allocated = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert 0.6 < allocated / cache.bytes < 1.1
    assert not cache.values("another state") and len(cache.values()) == count


def test_a_full_cache_drops_the_oldest_values() -> None:
    cache = ByteCache[str](10_000, len)
    for i in range(40):
        cache.put(i, "x" * 800)
        assert cache.bytes == 1000 * len(cache.values()) <= 10_000
    assert [*cache.values()] == [*range(30, 40)]
    cache.put(40, "x" * 20_000)
    cache.put(39, "x" * 9000)  # a key that is cached
    assert [*cache.values()] == [*range(30, 40)]
    cache.put(1, "y", state=7)
    assert cache.values(7) == {1: "y"} and not cache.values() and cache.bytes == 201
    cache.put(2, "z", state=8)
    assert not cache.values(7) and cache.bytes == 201


def test_cached_items_are_bounded_by_bytes(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_CACHED_BYTES", MIB)
    monkeypatch.setattr(queries, "MAX_CACHED_BYTES", MIB)
    with Collection.open(collection.path, read_only=True) as own:
        codes = own.codes(range(1, 31))
        for row, expected in zip(own.query_codes(codes, 2), collection.query_codes(codes, 2), strict=True):
            assert row == expected
        view_cache = own.read(lambda view: view._cache)
        handler = queries.QueryHandler(own)
        batch: list[queries.Query] = [queries.CodeQuery("x", code.tobytes(), QueryOptions(2)) for code in codes]
        first, second = handler(batch), handler(batch)
        assert first == second == queries.QueryHandler(collection)(batch)
        for cache in (view_cache, handler._members):
            assert cache.max_bytes == MIB and 0 < cache.bytes <= MIB


def test_a_request_that_has_ended_holds_nothing() -> None:
    """Its queries may still be in a batch."""
    total = memory.Memory()
    request, other = memory.RequestMemory(total), memory.RequestMemory(total)
    request.receive(1000)
    other.answer(500)
    request.release()
    with pytest.raises(Busy):
        request.answer(1)
    request.release()
    assert total.bytes == 500
    with pytest.raises(Problem, match="more than 32 MiB") as error:
        other.answer(memory.MAX_ANSWER_BYTES)
    assert error.value.status == 422 and total.bytes == 500
