"""The HTTP service, on a real server and over real connections."""

import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hashret import results
from hashret.codes import to_hex
from hashret.collection import Collection, Hit
from hashret.hasher import Hasher
from hashret.indexes import tables

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service import load, memory, messages, pictures  # noqa: E402  # after importorskip
from hashret.service.app import create_app  # noqa: E402
from hashret.service.server import Server, listen  # noqa: E402

Serve = Callable[..., str]
TOKEN = "correct horse"


def pixels(i: int) -> NDArray[np.uint8]:
    """Return image i; every i gives another."""
    return np.random.default_rng(i).integers(0, 256, (12, 10), dtype=np.uint8)


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def hasher() -> Hasher:
    return Hasher("lsh", 32).fit(np.stack([pixels(i) for i in range(100)]))


def make(folder: Path, hasher: Hasher, count: int = 30) -> Collection:
    """Return a collection of images in the folders 0, 1 and 2."""
    for i in range(count):
        file = folder / "photos" / str(i % 3) / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    collection = Collection.create(folder / "c", hasher)
    collection.index(folder / "photos")
    return collection


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, hasher: Hasher) -> Iterator[Collection]:
    """Return a collection that no test changes."""
    with make(tmp_path_factory.mktemp("served"), hasher) as made:
        made.add([png(500)], [{"price": 3, "who": "Ada"}])
        yield made


@pytest.fixture(scope="module")
def http(collection: Collection, serve: Serve) -> Iterator[Any]:
    with httpx.Client(base_url=serve(collection), timeout=60) as client:
        yield client


@pytest.fixture
def own(tmp_path: Path, hasher: Hasher) -> Iterator[Collection]:
    """Return a collection that the test may change."""
    with make(tmp_path, hasher) as made:
        yield made


def documents(hits: list[Hit]) -> list[dict[str, Any]]:
    """Return hits as in the JSON of an answer."""
    members = [{"rank": rank, **hit._asdict()} for rank, hit in enumerate(hits, 1)]
    return [{name: value for name, value in hit.items() if (name, value) != ("score", None)} for hit in members]


def check_refused(response: Any, status: int, *words: str) -> None:
    """Check that the response is a valid problem document with this status, and these words in its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status and problem["type"] == "about:blank" and problem["title"]
    assert "\n" not in problem["detail"] and all(word in problem["detail"] for word in words), problem


def test_objects_of_the_start_are_excluded_from_garbage_collection(own: Collection, serve: Serve) -> None:
    """With torch loaded, a collection of all objects takes 0.2 s, for which every request would wait."""
    assert httpx.get(f"{serve(own)}/readyz").status_code == 200
    assert gc.get_freeze_count() > 100_000


def test_warm_up_compiles_all_kernels(own: Collection) -> None:
    """In a new process: compiling a kernel takes seconds, for which a request would wait."""
    script = """
import sys
from numba.core.dispatcher import Dispatcher
from hashret.collection import Collection
from hashret.service.metrics import Metrics
from hashret.service.handlers import Handlers

def compiled():
    modules = [module for name, module in sys.modules.items() if name.startswith("hashret.indexes.")]
    members = [(name, value) for module in modules for name, value in vars(module).items()]
    return {name: list(value.signatures) for name, value in members if isinstance(value, Dispatcher)}

with Collection.open(sys.argv[1], read_only=True) as collection:
    handlers = Handlers(collection, Metrics())
    handlers.warm_up()
    before = compiled()
    collection.query_item(1, 5)
    collection.query_item(1, None, 3, where="label = '1'")
    collection.dupes(3)
    collection.dupes(3, by="star")
    handlers.close()
assert len([name for name, signatures in before.items() if signatures]) > 5, before
assert compiled() == before, (before, compiled())
"""
    done = subprocess.run([sys.executable, "-c", script, own.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_form_of_a_query_has_the_hits_of_the_collection(collection: Collection, http: Any) -> None:
    image, code = png(77), to_hex(collection.hasher.encode([png(77)]))[0]
    hits = documents(collection.query(image, 4))
    for response in (
        http.post("/v1/query?k=4", content=image, headers={"content-type": "image/png"}),
        http.post("/v1/query?k=4", files={"file": ("a.png", image)}),
        http.post("/v1/query?k=9", files={"file": ("a.png", image)}, data={"k": "4"}),
        http.post("/v1/query", json={"code": code, "k": 4}),
    ):
        assert response.status_code == 200 and response.headers["content-type"] == "application/json"
        assert response.json()["k"] == 4 and response.json()["hits"] == hits
    assert http.post("/v1/query", json={"code": code}).json()["query"] == f"hex:{code}"
    by_id = http.post("/v1/query", json={"id": 5, "k": 3}).json()
    assert by_id == {"query": "id:5", "k": 3, "hits": documents(collection.query_item(5, 3))}


def test_k_and_max_distance_limit_the_hits(collection: Collection, http: Any) -> None:
    code = to_hex(collection.codes([1]))[0]
    assert len(http.post("/v1/query", json={"code": code}).json()["hits"]) == 10
    for options in ({"max_distance": 11}, {"max_distance": 11, "k": 2}, {"k": 1000}):
        hits = collection.query_codes(collection.codes([1]), options.get("k"), options.get("max_distance"))[0]
        assert http.post("/v1/query", json={"code": code, **options}).json()["hits"] == documents(hits)


def test_a_batch_is_answered_in_order(collection: Collection, http: Any) -> None:
    images = [png(i) for i in (3, 200, 5)]
    files = [("file", (f"{i}.png", image)) for i, image in enumerate(images)]
    expected = [documents(hits) for hits in collection.query_batch(images, 2)]
    answers = http.post("/v1/query?k=2", files=files).json()
    assert [answer["query"] for answer in answers] == ["0.png", "1.png", "2.png"]
    assert [answer["hits"] for answer in answers] == expected
    answers = http.post("/v1/query", json={"code": to_hex(collection.hasher.encode(images)), "k": 2}).json()
    assert [answer["hits"] for answer in answers] == expected


def test_a_filter_selects_items_and_can_do_nothing_else(collection: Collection, http: Any) -> None:
    where = "label = '1' AND width < 800"
    hits = collection.query_item(5, 4, where=where)
    assert {hit.label for hit in hits} == {"1"}
    assert http.post("/v1/query", json={"id": 5, "k": 4, "where": where}).json()["hits"] == documents(hits)
    (priced,) = http.post("/v1/query?where=price=3", files={"file": png(1)}).json()["hits"]
    assert priced["metadata"] == {"price": 3, "who": "Ada"}
    for invalid in ("label =", "1); DROP TABLE items; --", "load_extension('x')", "x" * 10_001):
        check_refused(http.post("/v1/query", json={"id": 1, "where": invalid}), 422)


def test_hits_may_be_ranked_by_asymmetric_distance(collection: Collection, http: Any) -> None:
    hits = collection.query(png(91), 5, rank="asymmetric")
    answer = http.post("/v1/query", files={"file": png(91)}, data={"k": "5", "rank": "asymmetric"}).json()
    assert answer["hits"] == documents(hits) and answer["hits"][0]["score"] is not None
    check_refused(http.post("/v1/query", json={"id": 1, "rank": "asymmetric"}), 422, "rank")


def test_answers_may_include_codes(collection: Collection, http: Any) -> None:
    headers = {"content-type": "image/png"}
    for request in ({"content": png(88), "headers": headers}, {"files": {"file": png(88)}}):
        answer = http.post("/v1/query?codes=true", **request).json()
        assert answer["code"] == to_hex(collection.hasher.encode([png(88)]))[0]
        assert [hit["code"] for hit in answer["hits"]] == to_hex(
            collection.codes([hit["id"] for hit in answer["hits"]])
        )
        a, b = int(answer["code"], 16), int(answer["hits"][3]["code"], 16)
        assert (a ^ b).bit_count() == answer["hits"][3]["distance"]
    code = to_hex(collection.codes([3]))[0]
    by_code = http.post("/v1/query", json={"code": code, "codes": True}).json()
    assert by_code["code"] == by_code["hits"][0]["code"] == code
    assert http.post("/v1/query", json={"id": 3, "codes": True}).json()["code"] == to_hex(collection.codes([3]))[0]


@pytest.mark.parametrize(
    "body",
    [
        b'{"code": "00ff00ff"}',
        b'{"code": "00FF00ff", "k": 3, "max_distance": 14}',
        b'{"code": "00ff00ff", "k": 3, "codes": true}',
        b'{"code": ["00ff00ff", "12345678"], "k": 2}',
        b'{"code": "00ff00ff", "k": 3, "where": "label = \'1\'"}',
        '{"code": "00ff00ff"}'.encode("utf-16"),
        b'{"id": 5, "k": 3}',
        b'{"id": 99}',
        b'{"code": "00"}',
        b'{"code": "00ff00ff", "k": 0}',
        b'{"code": "00ff00ff", "where": "label ="}',
        b'{"code": "00ff00ff", "fingerprint": "another"}',
        b'{"code": NaN}',
        b'{"code": "\xff"}',
        b"[]",
        b"",
    ],
)
def test_a_json_query_of_a_page_has_the_same_answer(http: Any, body: bytes) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    page_headers = headers | {"origin": str(http.base_url).rstrip("/")}  # these requests pass the layers of FastAPI
    direct, from_page = (http.post("/v1/query", content=body, headers=h) for h in (headers, page_headers))
    assert (direct.status_code, direct.content) == (from_page.status_code, from_page.content)
    assert {**direct.headers, "date": ""} == {**from_page.headers, "date": ""}


def test_cached_items_are_updated_when_the_collection_changes(own: Collection, serve: Serve, tmp_path: Path) -> None:
    with httpx.Client(base_url=serve(own), timeout=60) as http:
        query = {"code": to_hex(own.codes([1]))[0], "k": 2}
        before = http.post("/v1/query", json=query).json()["hits"]
        more = tmp_path / "more" / "other"
        more.mkdir(parents=True)
        shutil.copy(before[0]["path"], more)
        own.index(tmp_path / "more")
        after = http.post("/v1/query", json=query).json()["hits"]
        assert len(before[0]["paths"]) == 1 and len(after[0]["paths"]) == 2
        assert after == documents(own.query_codes(own.codes([1]), 2)[0]) and after[1] == before[1]


def test_concurrent_queries_are_batched(collection: Collection, http: Any) -> None:
    codes = collection.hasher.encode([png(i) for i in range(300, 500)])
    expected = collection.query_codes(codes, 3)

    def ask(i: int) -> Any:
        if i % 50 == 7:  # a broken image fails alone
            return http.post("/v1/query", content=b"broken", headers={"content-type": "image/png"}).status_code
        if i % 2:
            return http.post("/v1/query?k=3", content=png(300 + i), headers={"content-type": "image/png"}).json()[
                "hits"
            ]
        return http.post("/v1/query", json={"code": to_hex(codes[i : i + 1])[0], "k": 3}).json()["hits"]

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(200)))
    assert answers == [422 if i % 50 == 7 else documents(hits) for i, hits in enumerate(expected)]
    sizes = [line for line in http.get("/metrics").text.splitlines() if line.startswith("hashret_batch_size")]
    count, total = (
        next(float(line.split()[-1]) for line in sizes if f'{suffix}{{stage="queries"}}' in line)
        for suffix in ("count", "sum")
    )
    assert count < total  # some batches had several queries


def test_images_are_encoded(collection: Collection, http: Any) -> None:
    images = [png(i) for i in range(3)]
    answer = http.post("/v1/encode", files=[("file", image) for image in images]).json()
    assert answer["codes"] == to_hex(collection.hasher.encode(images))
    assert (answer["fingerprint"], answer["bits"]) == (collection.fingerprint, 32)


def test_a_reconstruction_is_a_picture(tmp_path: Path, serve: Serve) -> None:
    hasher = Hasher("ae", 16, network="mlp").fit(np.stack([pixels(i) for i in range(20)]), steps=2)
    with make(tmp_path, hasher, 3) as own, httpx.Client(base_url=serve(own)) as http:
        for request in ({"json": {"id": 1}}, {"files": {"file": png(0)}}):
            response = http.post("/v1/reconstruct", **request)
            assert response.headers["content-type"] == "image/png"
            assert Image.open(io.BytesIO(response.content)).size == (10, 12)
        check_refused(http.post("/v1/reconstruct", json={"id": 99}), 404, "no item 99")


def test_a_model_without_a_network_has_no_reconstructions(http: Any) -> None:
    check_refused(http.post("/v1/reconstruct", json={"id": 1}), 422, "has no network")


def test_items_are_added_shown_listed_and_removed(own: Collection, serve: Serve) -> None:
    with httpx.Client(base_url=serve(own), timeout=60) as http:
        files = [("file", ("a.png", png(600))), ("file", ("b.png", png(601)))]
        metadata = [json.dumps({"price": 3}), "null"]
        (first, second) = http.post("/v1/items", files=files, data={"metadata": metadata}).json()["ids"]
        assert http.post("/v1/items", files=files[:1]).json() == {"ids": [first]}  # it exists
        assert own.get(first).metadata == {"price": 3} and own.get(second).metadata is None
        item = http.get(f"/v1/items/{first}").json()
        code = to_hex(own.codes([first]))[0]
        assert item == own.get(first)._asdict() | {"code": code}
        assert http.post("/v1/query", json={"code": code, "k": 1}).json()["hits"][0]["id"] == first
        cursor, seen = 0, []
        while cursor is not None:
            page = http.get("/v1/items", params={"cursor": cursor, "limit": 7}).json()
            seen += page["items"]
            cursor = page["next"]
        assert [item["id"] for item in seen] == list(range(1, 33)) and seen[2] == own.get(3)._asdict()
        filtered = http.get("/v1/items", params={"where": "price = 3", "limit": 1}).json()
        assert [item["id"] for item in filtered["items"]] == [first] and filtered["next"] == first
        assert http.get("/v1/items", params={"where": "price = 3", "cursor": first}).json()["items"] == []
        for invalid in ("label =", "1); DROP TABLE items; --", "load_extension('x')", "x" * 10_001):
            response = http.get("/v1/items", params={"where": invalid})
            check_refused(response, 422)
            query = {"id": 1, "where": invalid}
            assert "x" * 50 in invalid or response.json() == http.post("/v1/query", json=query).json()
        assert http.delete(f"/v1/items/{second}").json() == {"removed": 1}
        assert http.delete(f"/v1/items/{second}").json() == {"removed": 0}
        check_refused(http.get(f"/v1/items/{second}"), 404, f"no item {second}")
        assert len(own) == 31


def test_changes_by_another_process_are_seen(own: Collection, serve: Serve) -> None:
    with httpx.Client(base_url=serve(own), timeout=60) as http, Collection.open(own.path) as other:
        (added,) = other.add([png(700)])
        query = {"content": png(700), "headers": {"content-type": "image/png"}}
        assert http.post("/v1/query?k=1", **query).json()["hits"][0]["id"] == added
        other.remove([added])
        assert http.post("/v1/query?k=1", **query).json()["hits"][0]["id"] != added


def test_a_code_of_another_model_is_a_conflict(own: Collection, serve: Serve) -> None:
    with httpx.Client(base_url=serve(own), timeout=60) as http:
        before = own.fingerprint
        query = {"code": to_hex(own.codes([1]))[0], "fingerprint": before}
        assert http.post("/v1/query", json=query).status_code == 200
        own.reindex(Hasher("pca", 32).fit(np.stack([pixels(i) for i in range(100)])))
        check_refused(http.post("/v1/query", json=query), 409, before, own.fingerprint)
        assert http.get("/v1/info").json()["fingerprint"] == own.fingerprint


def test_near_duplicates_are_grouped_and_judged(own: Collection, serve: Serve) -> None:
    with httpx.Client(base_url=serve(own), timeout=60) as http:
        radius = own.query_item(1, 1)[0].distance
        expected = own.dupes(radius)
        assert expected
        answer = http.get("/v1/dupes", params={"max_distance": radius}).json()
        assert [[item["id"] for item in group["items"]] for group in answer["groups"]] == [
            [item.id for item in group.items] for group in expected
        ]
        assert answer["groups"][0]["distances"] == expected[0].distances and not answer["more"]
        assert http.get("/v1/dupes", params={"max_distance": radius, "limit": 1}).json()["more"] == (len(expected) > 1)
        near = own.query_item(1, 1)[0].id
        verdict = {"a": 1, "b": near, "verdict": "different"}
        assert http.post("/v1/verdicts", json=verdict).json() == verdict
        assert near not in {hit["id"] for hit in http.post("/v1/query", json={"id": 1}).json()["hits"]}
        check_refused(http.post("/v1/verdicts", json=verdict | {"b": 999}), 404, "no item 999")
        check_refused(http.post("/v1/verdicts", json=verdict | {"b": 1}), 422, "one content")
        check_refused(http.post("/v1/verdicts", json=verdict | {"verdict": "maybe"}), 422, "verdict")
        check_refused(http.get("/v1/dupes?by=other"), 422, "by")


def test_a_calibration_is_returned_once_it_exists(own: Collection, serve: Serve) -> None:
    with httpx.Client(base_url=serve(own), timeout=60) as http:
        check_refused(http.get("/v1/calibration"), 404, "run hashret calibrate")
        calibration = own.calibrate(images=5)
        assert http.get("/v1/calibration").json() == calibration._asdict()


def size_of(response: Any) -> tuple[int, int]:
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(response.content)).size


def test_a_picture_is_scaled(tmp_path: Path, hasher: Hasher, serve: Serve) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.kron(pixels(0), np.ones((40, 40), np.uint8))).save(tmp_path / "photos" / "large.png")
    with make(tmp_path, hasher, 1) as own, httpx.Client(base_url=serve(own)) as http:
        large = next(item.id for item in own.items() if "large" in item.paths[0])
        assert size_of(http.get(f"/v1/items/{large}/image?size=300")) == (250, 300)
        assert http.get(f"/v1/items/{large}/image").headers["content-type"] == "image/jpeg"
        assert size_of(http.get(f"/v1/items/{large}/image?size=16")) == (13, 16)
        small = http.get(f"/v1/items/{3 - large}/image?size=300")  # never enlarged
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(small.content))), pixels(0))


def test_a_large_file_is_not_read_for_a_picture(own: Collection, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", own.get(1).bytes - 1)
    url = f"{serve(own)}/v1/items/1/image"
    check_refused(httpx.get(url), 413, "item 1", "open it at its path")
    monkeypatch.setattr(pictures, "MAX_FILE_BYTES", own.get(1).bytes)
    assert httpx.get(url).status_code == 200
    monkeypatch.setattr(memory, "MAX_ANSWER_BYTES", 10)
    check_refused(httpx.get(url), 422, "the answer has more than")


def test_pictures_are_read_from_every_type_of_source(tmp_path: Path, hasher: Hasher, serve: Serve) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/0.png", png(1000))
        archive.writestr("x/1.png", png(1001))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for i in (1002, 1003):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(png(i))
            tar.addfile(member, io.BytesIO(png(i)))
    np.save(tmp_path / "a.npy", np.stack([pixels(i) for i in range(1004, 1010)]))
    with Collection.create(tmp_path / "c", hasher) as own, httpx.Client(base_url=serve(own)) as http:
        for name in ("a.zip", "a.tar.gz", "a.npy"):
            own.index(tmp_path / name)
        own.add([pixels(1010), png(1011)])
        for item_id, i in zip(range(1, 13), range(1000, 1012), strict=True):
            picture = http.get(f"/v1/items/{item_id}/image").content
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), pixels(i)), own.get(item_id)


def test_only_indexed_contents_are_shown(own: Collection, tmp_path: Path, serve: Serve) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(900))
    first, second, third, fourth = (Path(own.get(i).paths[0]) for i in (1, 2, 3, 4))
    first.write_bytes(png(900))  # another content
    second.unlink()
    second.symlink_to(secret)  # outside the folder
    copy = tmp_path / "copy.png"
    third.rename(copy)
    third.symlink_to(copy)  # outside the folder, with the same content
    fourth.unlink()
    os.mkfifo(fourth)
    with httpx.Client(base_url=serve(own), timeout=60) as http:
        for i in (1, 2, 3, 4):
            check_refused(http.get(f"/v1/items/{i}/image"), 404, "is not where it was")
        assert size_of(http.get("/v1/items/5/image")) == (10, 12)


@pytest.mark.parametrize(
    ("status", "request_options", "words"),
    [
        (400, {"content": b"{", "headers": {"content-type": "application/json"}}, "invalid JSON"),
        (400, {"content": b'{"code": "\xff"}', "headers": {"content-type": "application/json"}}, "invalid JSON"),
        (400, {"content": b"nothing", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "multipart"),
        (400, {"content": b"", "headers": {"content-type": "multipart/form-data"}}, "boundary"),
        (415, {"content": b"<a/>", "headers": {"content-type": "application/xml"}}, "image/*"),
        (415, {"content": b""}, "image/*"),
        (422, {"content": b"no image", "headers": {"content-type": "image/png"}}, "no image"),
        (422, {"content": b"", "headers": {"content-type": "image/png"}}, "empty file"),
        (422, {"content": png(0)[:-30], "headers": {"content-type": "image/png"}}, "PNG"),
        (422, {"files": {"other": png(0)}}, "'file'"),
        (422, {"files": {"file": png(0)}, "data": {"k": "0"}}, "k: "),
        (422, {"files": {"file": png(0)}, "data": {"size": "3"}}, "size: "),
        (422, {"files": {"file": png(0)}, "data": {"metadata": "{}"}}, "metadata"),
        (422, {"files": [("file", png(i)) for i in (0,) * 257]}, "256"),
        (422, {"json": []}, "object"),
        (422, {"json": {}}, "code"),
        (422, {"json": {"code": "12345"}}, "code"),
        (422, {"json": {"code": "zz"}}, "code"),
        (422, {"json": {"code": "00"}}, "32 bits, not 8"),
        (422, {"json": {"code": ["00000000", "00"]}}, "32 bits, not 8"),
        (422, {"json": {"code": []}}, "code"),
        (422, {"json": {"code": ["00000000"] * 257}}, "code"),
        (422, {"json": {"code": ["00000000"] * 256, "k": 101}}, "at most 100"),
        (422, {"json": {"code": "00000000", "id": 1}}, "code"),
        (422, {"json": {"code": "00000000", "k": 1001}}, "k: "),
        (422, {"json": {"code": "00000000", "k": "3"}}, "k: "),
        (422, {"json": {"code": "00000000", "max_distance": -1}}, "max_distance: "),
        (422, {"json": {"id": 2**64}}, "id: "),
        (404, {"json": {"id": 2**62}}, "no item"),
    ],
)
def test_an_invalid_query_is_refused_with_its_reason(http: Any, status: int, request_options: Any, words: str) -> None:
    check_refused(http.post("/v1/query", **request_options), status, words)


def test_too_large_images_and_requests_are_refused(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    headers = {"content-type": "image/png"}
    response = http.post("/v1/query", content=bomb.getvalue(), headers=headers)
    check_refused(response, 413, "400 megapixels")
    monkeypatch.setattr(memory, "MAX_REQUEST_BYTES", 2**20)
    for content in (bytes(2**20 + 1), (bytes(2**19) for _ in range(3))):  # the second has no Content-Length
        check_refused(http.post("/v1/query", content=content, headers=headers), 413, "MiB")
    assert http.post("/v1/query", content=png(0), headers=headers).status_code == 200


def test_a_body_announced_as_too_large_is_refused_at_once(http: Any) -> None:
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
        connection.sendall(b"Content-Length: 99999999999\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_bytes_of_all_requests_have_a_limit(http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a request count until its response, whatever its status is."""
    monkeypatch.setattr(memory, "MAX_BYTES_IN_FLIGHT", 3000)
    monkeypatch.setattr(memory, "SMALL_BYTES", 3000)
    headers = {"content-type": "image/png"}
    for _ in range(5):
        assert http.post("/v1/query?k=1", content=png(0), headers=headers).status_code == 200
        check_refused(http.post("/v1/query", content=bytes(2000), headers=headers), 422)
        check_refused(http.post("/v1/query", content=bytes(3001), headers=headers), 503, "too many bytes at once")
    monkeypatch.setattr(memory, "MAX_BYTES_IN_FLIGHT", 0)  # as if slow clients held all of them
    assert http.post("/v1/query?k=1", content=png(0), headers=headers).status_code == 200


@pytest.mark.parametrize("origin", [False, True])
def test_options_of_a_json_query_are_refused_in_the_url(http: Any, origin: bool) -> None:
    headers = {"origin": str(http.base_url).rstrip("/")} if origin else {}
    check_refused(http.post("/v1/query?k=3", json={"id": 1}, headers=headers), 422, "k: put it into the JSON")
    assert http.post("/v1/query?", json={"id": 1}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/items/x", 422),
        ("GET", "/v1/items/0", 422),
        ("GET", f"/v1/items/{2**63}", 422),
        ("GET", "/v1/items/../../etc/passwd", 404),
        ("GET", "/v1/items/1/image?size=9999", 422),
        ("GET", "/v1/items/1/image?size=../../etc/passwd", 422),
        ("GET", "/v1/items?cursor=-1", 422),
        ("GET", "/v1/items?limit=1001", 422),
        ("PUT", "/v1/items", 405),
        ("GET", "/page/../app.py", 404),
    ],
)
def test_unknown_routes_and_parameters_are_problems(http: Any, method: str, path: str, status: int) -> None:
    check_refused(http.request(method, path), status)


@pytest.mark.parametrize("metadata", [["{}"], ["{}", "3"], ["{}", "{"]])
def test_metadata_must_be_one_object_per_image(http: Any, metadata: list[str]) -> None:
    response = http.post("/v1/items", files=[("file", png(0)), ("file", png(1))], data={"metadata": metadata})
    assert response.status_code in (400, 422) and response.json()["detail"]


def test_a_broken_image_is_not_added(own: Collection, serve: Serve) -> None:
    with httpx.Client(base_url=serve(own), timeout=60) as http:
        check_refused(http.post("/v1/items", files={"file": png(800)[:60]}), 422)
    assert len(own) == 30


def test_writes_need_the_token(own: Collection, serve: Serve) -> None:
    with httpx.Client(base_url=serve(own, token=TOKEN)) as http:
        bearer = {"authorization": f"Bearer {TOKEN}"}
        assert http.post("/v1/query", json={"id": 1}).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {TOKEN}"},
            {"cookie": "hashret=x"},
        ):
            check_refused(http.delete("/v1/items/1", headers=headers), 401, "token")
            check_refused(http.post("/v1/items", files={"file": png(1)}, headers=headers), 401, "token")
        assert http.delete("/v1/items/1", headers=bearer).json() == {"removed": 1}
        check_refused(http.get("/?token=wrong"), 401, "not the token")
        response = http.get("/", params={"token": TOKEN})  # the request of the page
        assert response.status_code == 303 and TOKEN not in response.headers["set-cookie"]
        assert "HttpOnly" in response.headers["set-cookie"] and "SameSite=strict" in response.headers["set-cookie"]
        assert http.delete("/v1/items/2").json() == {"removed": 1}  # with the cookie


def test_off_loopback_everything_but_health_needs_the_token(collection: Collection, serve: Serve) -> None:
    with pytest.raises(ValueError, match="needs a token"):
        create_app(collection, host="0.0.0.0")
    with httpx.Client(base_url=serve(collection, host="0.0.0.0", token=TOKEN)) as http:
        for path in (
            "/",
            "/v1/info",
            "/v1/items/1",
            "/v1/items/1/image",
            "/metrics",
            "/openapi.json",
            "/page.js",
            "/no",
        ):
            check_refused(http.get(path), 401, "token")
        check_refused(http.post("/v1/query", json={"id": 1}), 401, "token")
        assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
        assert http.get("/v1/info", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200


def test_a_read_only_service_changes_nothing(own: Collection, serve: Serve) -> None:
    with Collection.open(own.path, read_only=True) as reader, httpx.Client(base_url=serve(reader)) as http:
        check_refused(http.delete("/v1/items/1"), 403, "read-only")
        check_refused(http.post("/v1/items", files={"file": png(1)}), 403, "read-only")
        assert http.get("/v1/info").json()["read_only"]
        assert http.post("/v1/query", json={"id": 1}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_other_host_names_are_refused(http: Any, host: str) -> None:
    check_refused(http.get("/v1/info", headers={"host": host}), 400, "localhost")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"])
def test_local_host_names_are_accepted(http: Any, host: str) -> None:
    assert http.get("/v1/info", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_pages_of_another_origin_are_refused(http: Any, origin: str) -> None:
    check_refused(http.post("/v1/query", json={"id": 1}, headers={"origin": origin}), 403, "origin")
    check_refused(http.post("/v1/items", files={"file": png(1)}, headers={"origin": origin}), 403, "origin")
    response = http.options("/v1/items", headers={"origin": origin, "access-control-request-method": "POST"})
    assert response.status_code == 403 and "access-control-allow-origin" not in response.headers


def test_an_allowed_origin_is_accepted(collection: Collection, serve: Serve) -> None:
    origin = "https://photos.example"
    with httpx.Client(base_url=serve(collection, origins=[origin], token=TOKEN)) as http:
        preflight = {"origin": origin, "access-control-request-method": "DELETE"}
        allowed = http.options("/v1/items/1", headers=preflight)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == origin
        response = http.post("/v1/query", json={"id": 1}, headers={"origin": origin, "host": "photos.example"})
        assert response.status_code == 200 and response.headers["access-control-allow-origin"] == origin
        check_refused(http.delete("/v1/items/1", headers={"origin": origin}), 401)
        check_refused(http.get("/v1/info", headers={"origin": "https://evil.example"}), 403)


def test_health_and_metrics(http: Any, collection: Collection) -> None:
    assert http.get("/healthz").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready"}
    text = http.get("/metrics").text
    assert f"hashret_items {len(collection)}.0" in text and "hashret_generation" in text
    assert 'hashret_requests_total{method="GET",route="/healthz",status="200"}' in text
    counter = 'hashret_requests_total{method="POST",route="/v1/query",status="200"}'
    before = _figure(text, counter)
    http.post("/v1/query", json={"id": 1})
    assert _figure(http.get("/metrics").text, counter) == before + 1
    assert 'hashret_request_seconds_count{route="/v1/items/{item_id}"}' not in text or "/v1/items/1" not in text


@pytest.mark.parametrize(
    "params", ["", "?k=3", "?max_distance=9", "?rank=asymmetric&k=4", "?codes=true", "?where=id<9"]
)
def test_an_image_query_of_a_page_has_the_same_answer(http: Any, params: str) -> None:
    """Queries of pages pass the layers of FastAPI, queries of programs do not."""
    http.post("/v1/verdicts", json={"a": 1, "b": 2, "verdict": "different"})
    data = Path(http.get("/v1/items/1").json()["paths"][0]).read_bytes()
    headers = {"content-type": "image/png"}
    direct = http.post(f"/v1/query{params}", content=data, headers=headers)
    headers |= {"origin": str(http.base_url).rstrip("/")}
    from_page = http.post(f"/v1/query{params}", content=data, headers=headers)
    assert direct.status_code == from_page.status_code == 200 and direct.content == from_page.content
    hits = [hit["id"] for hit in direct.json()["hits"]]
    assert hits[0] == 1 and 2 not in hits


@pytest.mark.parametrize(
    ("params", "content", "status"),
    [("?k=0", b"x", 422), ("?k=x", b"x", 422), ("?size=3", b"x", 422), ("", b"", 422), ("?where=(", b"x", 422)],
)
def test_an_image_query_of_a_page_has_the_same_error(http: Any, params: str, content: bytes, status: int) -> None:
    headers = {"content-type": "image/png"}
    direct = http.post(f"/v1/query{params}", content=content, headers=headers)
    headers |= {"origin": str(http.base_url).rstrip("/")}
    from_page = http.post(f"/v1/query{params}", content=content, headers=headers)
    assert direct.status_code == from_page.status_code == status
    assert direct.json() == from_page.json() and direct.headers["content-type"] == "application/problem+json"


def test_probes_of_the_index_are_counted(
    collection: Collection, tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MIN_CODES", 2)  # so that the index has tables
    monkeypatch.setattr(tables, "SCAN_NS", 100.0)
    rng = np.random.default_rng(0)
    with Collection.create(tmp_path / "c", collection.hasher) as own:
        np.save(tmp_path / "rows.npy", rng.integers(0, 256, (1500, 8, 8), np.uint8))
        own.index(tmp_path / "rows.npy")

        def figures() -> tuple[float, float]:
            text = httpx.get(f"{address}/metrics").text
            return _figure(text, "hashret_index_queries_total"), _figure(text, "hashret_index_probes_total")

        address = serve(own)
        before = figures()
        code = to_hex(own.codes([1]))[0]
        for _ in range(3):
            httpx.post(f"{address}/v1/query", json={"code": code, "k": 1})
        after = figures()
        assert after[0] == before[0] + 3 and after[1] > before[1] + 3
        assert figures() == after
        own.rebuild_index()  # its counts begin at zero
        httpx.post(f"{address}/v1/query", json={"code": code, "k": 1})
        assert figures()[0] == after[0] + 1 and figures()[1] > after[1]


def _figure(text: str, name: str) -> float:
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)


def test_readyz_tells_why_a_model_cannot_be_loaded(own: Collection, serve: Serve) -> None:
    weights = own.path / "models" / own.fingerprint / "model.safetensors"
    weights.unlink()  # not overwritten: it may be memory-mapped
    weights.write_bytes(b"")
    with Collection.open(own.path) as reopened, httpx.Client(base_url=serve(reopened)) as http:
        assert http.get("/healthz").status_code == 200
        check_refused(http.get("/readyz"), 503, "damaged", "restore it")
        check_refused(http.post("/v1/query", content=png(0), headers={"content-type": "image/png"}), 503, "damaged")


def test_too_many_concurrent_requests_are_refused(collection: Collection, serve: Serve, monkeypatch: Any) -> None:
    monkeypatch.setattr(load, "MAX_IN_FLIGHT", 4)
    address = serve(collection)

    def ask(i: int) -> int:
        response = httpx.post(f"{address}/v1/query", content=png(i), headers={"content-type": "image/png"}, timeout=60)
        if response.status_code == 503:
            check_refused(response, 503, "too many requests")
            assert response.headers["retry-after"] == "1"
        return int(response.status_code)

    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(ask, range(48)))
    assert set(statuses) == {200, 503}
    assert ask(0) == 200


def test_a_port_in_use_is_an_error(capsys: pytest.CaptureFixture[str], own: Collection) -> None:
    from hashret.cli.app import run

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "-c", str(own.path), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_sigterm_finishes_the_requests_in_progress(own: Collection) -> None:
    command = [
        sys.executable,
        "-c",
        "from hashret.cli import main; main()",
        "serve",
        "-c",
        str(own.path),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split()[-1]
        assert address.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=address, timeout=60) as http:
            files = [("file", png(2000 + i)) for i in range(200)]
            statuses = []
            adding = threading.Thread(target=lambda: statuses.append(http.post("/v1/items", files=files).status_code))
            adding.start()
            while "hashret_requests" not in httpx.get(f"{address}metrics").text:
                pass
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            adding.join()
        assert process.wait(30) == 0 and process.stderr.read() == ""
    assert statuses in ([200], [503]) and len(own) == (230 if statuses == [200] else 30)


def test_the_openapi_document_has_every_route_and_error(http: Any) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/query",
        "/v1/encode",
        "/v1/reconstruct",
        "/v1/items",
        "/v1/items/{item_id}",
        "/v1/items/{item_id}/image",
        "/v1/dupes",
        "/v1/verdicts",
        "/v1/info",
        "/v1/calibration",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            for status, response in operation["responses"].items():
                is_problem = "application/problem+json" in response["content"]
                assert (int(status) >= 400) == is_problem, (path, status)


@pytest.mark.parametrize(
    ("message", "value_type", "more"),
    [
        (messages.Hit, results.Hit, {"rank", "code"}),
        (messages.Item, results.Item, set()),
        (messages.Group, results.Group, {"size"}),
        (messages.Calibration, results.Calibration, set()),
    ],
)
def test_a_message_has_the_fields_of_its_value_type(message: Any, value_type: Any, more: set[str]) -> None:
    fields = {name: field.annotation for name, field in message.model_fields.items()}
    expected = {name: value_type.__annotations__[name] for name in value_type._fields}
    if value_type is results.Group:  # the items of a message are messages
        assert (fields.pop("items"), expected.pop("items")) == (list[messages.Item], list[results.Item])
    assert more <= fields.keys()
    assert {name: annotation for name, annotation in fields.items() if name not in more} == expected


def test_an_idle_connection_is_closed(collection: Collection) -> None:
    server = Server(create_app(collection), lambda: None)

    class Connection:
        cycle: Any = None
        transport: Any = None
        closed = False

        def abort(self) -> None:
            self.closed = True

    connection = Connection()
    connection.transport = connection
    server.server_state.connections.add(connection)  # type: ignore[arg-type]
    server._close_idle(0.0)
    server._close_idle(10.0)
    assert not connection.closed
    server._close_idle(16.0)
    assert connection.closed


def test_the_examples_of_the_documentation_run(own: Collection, serve: Serve, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    document = (Path(__file__).parent.parent / "docs" / "howto" / "serve.md").read_text()
    for name, i in (("cat.png", 50), ("dog.png", 51)):
        (tmp_path / name).write_bytes(png(i))
    address = serve(own)
    hashret = f"{sys.executable} -c 'from hashret.cli import main; main()'"
    commands = re.findall(r"^\$ (?!hashret serve)(.*)$", document, re.MULTILINE)
    assert len(commands) == 10
    for command in commands:
        command = command.replace("http://127.0.0.1:8000", address).replace("curl ", "curl -fsS ")
        done = subprocess.run(
            re.sub("^hashret", hashret, command),
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"HASHRET_TOKEN": TOKEN},
        )
        assert done.returncode == 0 and (done.stdout or "-o" in command), (command, done.stderr)
    (example,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as printed:
        names: dict[str, Any] = {}
        exec(example.replace("http://127.0.0.1:8000", address), names)
        names["photos"].close()
    assert len(printed.getvalue().splitlines()) == 10
