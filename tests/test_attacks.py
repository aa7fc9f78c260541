"""Attacks on a service: it refuses them and stays alive, and its collection does not change.

HASHRET_SOAK=1 runs them with the numbers of a real attack.
"""

import io
import json
import os
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hashret.collection import Collection
from hashret.data import images
from hashret.data.preprocessing import ImagePreprocessing
from hashret.hasher import Hasher

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service import load as load_module  # noqa: E402
from hashret.service import server as server_module  # noqa: E402  # after importorskip
from hashret.service.access import cookie_value  # noqa: E402
from hashret.service.http11 import is_complete_request  # noqa: E402

SOAK = "HASHRET_SOAK" in os.environ
TOKEN = "correct horse"


def pixels(i: int) -> NDArray[np.uint8]:
    return np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "photos").mkdir()
    for i in range(10):
        Image.fromarray(pixels(i)).save(folder / "photos" / f"{i}.png")
    hasher = Hasher("lsh", 16).fit(np.stack([pixels(i) for i in range(50)]))
    with Collection.create(folder / "c", hasher) as made:
        made.index(folder / "photos")
        yield made


@pytest.fixture(scope="module")
def address(collection: Collection, serve: Callable[..., str]) -> str:
    return serve(collection, token=TOKEN)


@pytest.fixture(scope="module")
def public_address(collection: Collection, serve: Callable[..., str]) -> str:
    """Return the URL of a service on all interfaces, where every request needs the token."""
    return serve(collection, host="0.0.0.0", token=TOKEN)


@pytest.fixture(autouse=True)
def check_unharmed(collection: Collection, address: str) -> Iterator[None]:
    """Check after each attack that the service is alive and answers as before, and the collection has not changed."""
    before = collection.generation, collection.items(), collection.query_item(1)
    yield
    assert (collection.generation, collection.items(), collection.query_item(1)) == before
    assert httpx.get(f"{address}/healthz", timeout=10).status_code == 200
    hits = httpx.post(f"{address}/v1/query", json={"id": 1}, timeout=10).json()["hits"]
    assert [hit["id"] for hit in hits] == [hit.id for hit in before[2]]


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the service closes the connection before the timeout."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


HEAD = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/query HTTP/1.1\r\nHost: loc",
        HEAD + b"Content-Length: 1000\r\n\r\nhalf of it",
        HEAD.replace(b"image/png", b"application/json") + b'Content-Length: 1000\r\n\r\n{"code": ',
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhalf",
    ],
    ids=["nothing", "half a head", "half a body", "half a query", "half a chunk"],
)
def test_incomplete_requests_are_closed(address: str, sent: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(server_module, "UPLOAD_SECONDS", 0.5)
    with connect(address) as connection:
        connection.sendall(sent)
        assert is_closed(connection)


@pytest.mark.parametrize(
    "sent",
    [
        b"what is this\r\n\r\n",
        b"\x16\x03\x01" + bytes(200) + b"\r\n\r\n",
        b"GET /v1/items?where=" + b"%F3" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 5_000_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET\r\n\r\n",
    ],
    ids=["text", "TLS", "long address", "long header", "second request"],
)
def test_invalid_requests_get_a_problem(address: str, sent: bytes) -> None:
    """The response must arrive even while the client is still sending."""
    with connect(address) as connection:
        connection.sendall(sent)
        answer = b""
        while received := connection.recv(65536):
            answer += received
    head, _, body = answer[answer.rindex(b"HTTP/1.1") :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"application/problem+json" in head
    assert json.loads(body)["detail"].startswith("not an HTTP request, or URL and headers are over")


def test_an_invalid_body_closes_the_connection(address: str) -> None:
    with connect(address) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n")
        assert is_closed(connection)


def test_a_client_that_sends_after_a_refusal_is_disconnected(address: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.5)
    with connect(address) as connection:
        connection.sendall(b"what is this\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.1)


def test_slow_uploads_are_disconnected(address: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(server_module, "UPLOAD_SECONDS", 0.5)
    with connect(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 10:
                connection.sendall(b"x")
                time.sleep(0.1)


def test_aborted_uploads_change_nothing(address: str) -> None:
    for size in (0, 1, 999) * (50 if SOAK else 3):
        with connect(address) as connection:
            head = HEAD.replace(b"query", b"items") + f"Authorization: Bearer {TOKEN}\r\n".encode()
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n" + bytes(size))


@pytest.mark.parametrize(
    "sent",
    [
        b"\0" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx",
    ],
)
def test_invalid_http_is_refused(address: str, sent: bytes) -> None:
    answer = b""
    with connect(address) as connection, suppress(OSError):  # it may close the connection early
        connection.sendall(sent)
        answer = connection.recv(1000)
    assert not answer or answer.split()[1] in (b"400", b"404", b"413", b"422", b"431"), answer


def test_thousands_of_open_connections_do_no_harm(collection: Collection, tmp_path: Path) -> None:
    """The server is a process of its own, because connections count against the open files of both sides."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    count = min(10_000 if SOAK else 300, hard - 500)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    command = [
        sys.executable,
        "-c",
        "from hashret.cli import main; main()",
        "serve",
        "-c",
        str(collection.path),
        "--port",
        "0",
    ]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ExitStack() as opened:
            assert process.stderr is not None
            own = process.stderr.readline().split()[-1].rstrip("/")
            for i in range(count):
                connection = opened.enter_context(connect(own))
                connection.sendall(HEAD[: i % len(HEAD)])
            for _ in range(20):
                assert httpx.post(f"{own}/v1/query", json={"id": 1}, timeout=20).status_code == 200
            process.terminate()
            assert process.wait(60) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        ([HEAD + b"Content-Length: 4\r\n\r\nbody"], 1),
        ([b"GET /v1/info HTTP/1.1\r\nHost: localhost\r\n\r\n"], 1),
        ([b"GET /v1/info HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3], 3),
        ([HEAD + b"Content-Length: 4\r\n\r\nbodyGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"], 2),
        ([HEAD + b"Content-Length: 4\r\n\r\nbo", b"dy"], 1),
        ([HEAD + b"Content-Le", b"ngth: 4\r\n\r\nbody"], 1),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"], 1),
        ([HEAD + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\nbody"], 1),
    ],
    ids=["post", "get", "three at once", "health after it", "half a body", "half a head", "chunks", "expected"],
)
def test_a_rejected_request_leaves_the_connection_usable(
    address: str, monkeypatch: Any, sent: list[bytes], answers: int
) -> None:
    before = count_rejected(address)
    monkeypatch.setattr(load_module, "MAX_IN_FLIGHT", 0)
    health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(address) as connection:
        for part in sent:
            connection.sendall(part)
            time.sleep(0.05)
        connection.sendall(health)
        received = b""
        while received.count(b"HTTP/1.1 ") < answers + 1 or not received.endswith(b"}"):
            received += connection.recv(65536)
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses[-1] == b"200" and statuses[0] == b"503" and len(statuses) == answers + 1
    rejected = statuses.count(b"503")
    assert received.count(b"too many requests at once") == received.lower().count(b"retry-after: 1") == rejected
    monkeypatch.undo()
    assert count_rejected(address) == before + (len(sent) == 1 and is_complete_request(sent[0]))


def count_rejected(address: str) -> float:
    """Return how many requests were rejected before parsing."""
    counter = 'hashret_requests_total{method="other",route="other",status="503"} '
    lines = httpx.get(f"{address}/metrics", timeout=10).text.splitlines()
    return next((float(line.removeprefix(counter)) for line in lines if line.startswith(counter)), 0.0)


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Content-Length: 4\r\nContent-Length: 40\r\n\r\nbody",
        HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nbody",
        HEAD + b"Content-Length : 4\r\n\r\nbody",
        HEAD + b"Content-Length: +4\r\n\r\nbody",
        HEAD + b"Content-Length: 4\n\r\nbody",
        HEAD + b"X: y\r\n Content-Length: 4\r\n\r\nbody",
        HEAD + b"Content-Length: 4\r\nConnection: close\r\n\r\nbody",
        b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"GET /\r\nHost: localhost\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_ambiguous_requests_are_parsed_by_h11(sent: bytes) -> None:
    assert not is_complete_request(sent)
    assert is_complete_request(HEAD + b"Content-Length: 4\r\n\r\nbody")


def png_of(width: int, height: int, data: bytes) -> bytes:
    """Return a PNG whose header announces this size, with any data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif_of(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0"
        + b"\0" * 6
        + b",\0\0\0\0"
        + struct.pack("<HHB", width, height, 0)
        + b"\2\0;"
    )


@pytest.mark.parametrize("path", ["/v1/query", "/v1/encode", "/v1/items", "/v1/reconstruct"])
@pytest.mark.parametrize(
    ("bomb", "status"),
    [
        (png_of(2**31 - 1, 2**31 - 1, b""), 413),
        (png_of(60_000, 60_000, zlib.compress(bytes(10**6))), 413),
        (png_of(9_000, 9_000, zlib.compress(bytes(10**6))), 422),
        (png_of(0, 0, b""), 422),
        (gif_of(65_535, 65_535), 413),
        (
            b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (999999999, 999999999), }".ljust(
                128
            ),
            422,
        ),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1, 8), }".ljust(200), 422),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
    ],
    ids=["png", "large png", "short png", "empty png", "gif", "npy", "pickle", "postscript", "svg"],
)
def test_decompression_bombs_are_refused(address: str, path: str, bomb: bytes, status: int) -> None:
    headers = {"content-type": "image/png", "authorization": f"Bearer {TOKEN}"}
    response = httpx.post(address + path, content=bomb, headers=headers)
    assert response.status_code == status, response.text


def slow_bmp(side: int) -> bytes:
    """Return a run-length encoded BMP whose rows Pillow fills pixel by pixel."""
    data = b"\1\5\0\0" * side
    info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + info + bytes(1024) + data


@pytest.mark.parametrize(
    ("path", "other_path", "clients", "good_images"),
    [("/v1/query", "/v1/query", 1, 7), ("/v1/reconstruct", "/readyz", 4, 0)],
)
def test_a_slow_image_does_not_delay_other_requests(
    address: str, monkeypatch: Any, path: str, other_path: str, clients: int, good_images: int
) -> None:
    """A slow image is decoded at most twice, even if it is found in a batch."""
    monkeypatch.setattr(images, "DECODE_SECONDS", 1.0)
    slow, decoded, preprocess = slow_bmp(9000), [], ImagePreprocessing.__call__

    def counting(self: ImagePreprocessing, content: Any) -> Any:
        decoded.append(content)
        return preprocess(self, content)

    monkeypatch.setattr(ImagePreprocessing, "__call__", counting)
    good = png_of(8, 8, zlib.compress(bytes(72)))
    files = [("file", ("slow.bmp", slow)), *[("file", ("good.png", good))] * good_images]
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(httpx.post(address + path, files=files, timeout=60)))
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while slow not in decoded:
        assert time.monotonic() < deadline and not answers
        time.sleep(0.01)
    with httpx.Client(base_url=address, timeout=60) as http:
        response = http.post(other_path, json={"id": 1}) if other_path == path else http.get(other_path)
    assert response.status_code == 200 and all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join()
    expected = [(422, "decoding takes longer")] * clients
    assert [(answer.status_code, answer.json()["detail"][:21]) for answer in answers] == expected
    assert decoded.count(slow) == (2 if good_images else clients)


def test_damaged_images_are_refused_or_decoded(address: str, collection: Collection) -> None:
    whole = (collection.path.parent / "photos" / "0.png").read_bytes()
    files = {"png": whole}
    for format_name in ("JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        file = io.BytesIO()
        Image.fromarray(pixels(0)).save(file, format_name)
        files[format_name] = file.getvalue()
    rng = random.Random(0)
    with httpx.Client(base_url=address) as http:
        for _ in range(5000 if SOAK else 60):
            data = bytearray(rng.choice(list(files.values())))
            for _ in range(rng.randint(1, 10)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            response = http.post(
                "/v1/query", content=bytes(data[: rng.randint(1, len(data))]), headers={"content-type": "image/png"}
            )
            assert response.status_code in (200, 413, 422), response.text


@pytest.mark.parametrize(
    "item_id",
    [
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "1%00.png",
        "1/../../../etc/passwd",
        "-1",
        "1e3",
        "0x1",
        "１",
        "9" * 400,
        "1;ls",
        "1' OR '1'='1",
        "%ff%fe",
    ],
)
def test_the_image_route_accepts_only_ids(address: str, item_id: str) -> None:
    for path in (
        f"/v1/items/{item_id}/image",
        f"/v1/items/{item_id}",
        f"/v1/items/1/image?size={item_id}",
        f"/{item_id}",
    ):
        with connect(address) as connection:
            line = f"GET {path.replace(' ', '%20')} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            connection.sendall(line.encode())
            answer = connection.makefile("rb").read()
        assert b"root:" not in answer and answer.split()[1] in (b"400", b"404", b"422"), answer[:200]


def test_text_that_is_not_utf_8_is_refused(address: str) -> None:
    with httpx.Client(base_url=address) as http:
        bad = b"\xff\xfe\xc3("
        json_headers = {"content-type": "application/json"}
        for content in (
            bad,
            b'{"code": "' + bad + b'"}',
            b'{"' + bad + b'": 1}',
            b'{"code": "\\ud800"}',
            b"[" * 100_000,
        ):
            assert http.post("/v1/query", content=content, headers=json_headers).status_code in (400, 422)
        form = b'--x\r\nContent-Disposition: form-data; name="' + bad + b'"\r\n\r\n' + bad + b"\r\n--x--\r\n"
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert http.post("/v1/query", content=form, headers=headers).status_code in (400, 422)
        assert http.post("/v1/query?k=%ff%fe", content=b"x", headers={"content-type": "image/png"}).status_code == 422
        named = form.replace(b'name="' + bad, b'name="file"; filename="' + bad)
        assert http.post("/v1/query", content=named, headers=headers).status_code == 422


@pytest.mark.parametrize(
    "credentials",
    [
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer correct hors",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \xff",
    ],
)
def test_wrong_tokens_are_refused(address: str, credentials: str) -> None:
    headers = {"authorization": credentials.encode("latin-1")}
    assert httpx.delete(f"{address}/v1/items/1", headers=headers).status_code == 401
    cookies = {"cookie": f"hashret={credentials}".encode("latin-1")}
    assert httpx.delete(f"{address}/v1/items/1", headers=cookies).status_code == 401


COOKIE = cookie_value(TOKEN).encode()


@pytest.mark.parametrize(
    "cookie",
    [
        b"",
        b"hashret",
        b"hashret=",
        b"hashret=\xe9",
        b'hashret="\xe9"',
        b'hashret="\\351"',  # http.cookies unescapes it to the one before
        b"hashret=" + b"0" * 64,
        b"hashret=" + COOKIE[:-1],
        b"hashret=" + COOKIE + b"0",
        b"hashret=" + COOKIE + b"\xe9",
        b"hashret=" + COOKIE.upper(),
        b'hashret="' + COOKIE + b'"',
        b"hashret=" + TOKEN.encode(),
        b"hashret2=" + COOKIE,
        b"xhashret=" + COOKIE,
        b"Hashret=" + COOKIE,
        b"x=hashret=" + COOKIE,
        b'x="; hashret=" ' + COOKIE,
        b"a=b" * 10_000,
        b"; ".join(b"a%d=b" % i for i in range(5000)),
        b'hashret="' + b"\\" * 60_000 + b'"',  # takes http.cookies of Python 3.11.7 12 s
        b"hashret=" + b"0" * 60_000,
        b";hashret=0" * 6000,
        b";" + b" " * 60_000 + b"x",
        b";" * 60_000,
    ],
    ids=lambda cookie: repr(cookie[:20]),
)
def test_wrong_cookies_are_refused_like_no_cookie(public_address: str, cookie: bytes) -> None:
    with httpx.Client(base_url=public_address, timeout=10) as http:
        without = http.get("/v1/info")
        response = http.get("/v1/info", headers={"cookie": cookie})
        assert response.status_code == without.status_code == 401
        assert response.content == without.content


@pytest.mark.parametrize(
    "cookie",
    [
        b"hashret=" + COOKIE,
        b"a=b; hashret=" + COOKIE,
        b"hashret=" + COOKIE + b"; a=b",
        b'a="\\351;b=\xe9;hashret=' + COOKIE + b" ;c",
        b"hashret=stale; hashret=" + COOKIE,
        b"a=" + b"\\" * 60_000 + b"; hashret=" + COOKIE,
    ],
    ids=lambda cookie: repr(cookie[:20]),
)
def test_the_cookie_is_found_among_others(public_address: str, cookie: bytes) -> None:
    assert httpx.get(f"{public_address}/v1/info", headers={"cookie": cookie}, timeout=10).status_code == 200


def test_the_cookie_of_the_page_is_accepted(public_address: str) -> None:
    with httpx.Client(base_url=public_address) as http:
        assert http.get("/page.js").status_code == 401
        assert http.get("/", params={"token": TOKEN}).status_code == 303
        assert http.cookies["hashret"].encode() == COOKIE
        assert http.get("/page.js").status_code == http.get("/v1/info").status_code == 200


def test_too_large_batches_are_refused(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60) as http:
        assert http.post("/v1/query", json={"code": ["0000"] * 100_000}).status_code == 413
        form = (
            b"".join(b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' for _ in range(5000))
            + b"--x--\r\n"
        )
        assert (
            http.post(
                "/v1/query", content=form, headers={"content-type": "multipart/form-data; boundary=x"}
            ).status_code
            == 422
        )
        long = form.replace(b"\r\n1\r\n", b"\r\n" + b"1" * 100_000 + b"\r\n", 1)
        assert (
            http.post(
                "/v1/query", content=long, headers={"content-type": "multipart/form-data; boundary=x"}
            ).status_code
            == 400
        )


def fuzz(folder: Path, schema: str, *options: str) -> None:
    """Send valid and invalid requests of an OpenAPI document; check that no response is a 5xx or undocumented."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", schema, f"--checks={checks}", *options]
    command += ["--max-examples=200"] if SOAK else ["--max-examples=3", "--phases=fuzzing"]
    command += ["--seed=1", "--no-color", "--mode=all", "--request-timeout=10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_fuzzed_requests_without_the_token_cause_no_server_error(address: str, tmp_path: Path) -> None:
    fuzz(tmp_path, f"{address}/openapi.json")


def test_fuzzed_requests_with_the_token_cause_no_server_error(
    collection: Collection, serve: Callable[..., str], tmp_path: Path
) -> None:
    """They may change the collection, which is a copy."""
    with Collection.create(tmp_path / "c", collection.hasher) as own:
        own.index(collection.path.parent / "photos")
        own_address, before = serve(own, token=TOKEN), own.generation
        fuzz(tmp_path, f"{own_address}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}")
        assert own.generation > before  # some requests did change it
        assert httpx.get(f"{own_address}/healthz").status_code == 200


def test_fuzzed_requests_without_the_token_are_refused_off_loopback(
    collection: Collection, serve: Callable[..., str], tmp_path: Path
) -> None:
    fuzzed, bearer = serve(collection, host="0.0.0.0", token=TOKEN), {"authorization": f"Bearer {TOKEN}"}
    document = tmp_path / "openapi.json"
    document.write_text(httpx.get(f"{fuzzed}/openapi.json", headers=bearer).text)
    fuzz(tmp_path, str(document), "--url", fuzzed)
    metrics = httpx.get(f"{fuzzed}/metrics", headers=bearer).text
    counters = re.findall(r'hashret_requests_total{.*route="(.*)",status="(.*)"} (.*)', metrics)
    responses = Counter[tuple[str, str]]()
    for route, status, count in counters:  # one per method
        responses[route, status] += int(float(count))
    assert responses["other", "401"] > 20
    assert responses["other", "200"] == 1  # the OpenAPI document
    assert {route for route, _ in responses} == {"other", "/healthz", "/readyz"}
    assert {status for route, status in responses if route == "other"} == {"200", "401"}
