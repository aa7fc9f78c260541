"""What arrives before a client is known: its size is limited, and its parsing takes linear time.

A quadratic parser takes 8 to 30 s for each of the hostile requests here; `SECONDS` is far less than that and far more
than they take.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import numpy as np
import pytest

from hashret.collection import Collection
from hashret.hasher import Hasher

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service import http11  # noqa: E402  # after importorskip
from hashret.service.guard import MAX_PARAMETERS, MAX_TYPE_BYTES  # noqa: E402
from hashret.service.http11 import MAX_CHUNK_HEAD_BYTES, MAX_HEAD_BYTES, MAX_HEADERS  # noqa: E402

SECONDS = 4.0
START = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    with Collection.create(tmp_path_factory.mktemp("http11") / "c", Hasher("lsh", 16).fit(images)) as made:
        made.add(list(images))
        yield made


@pytest.fixture(scope="module")
def address(collection: Collection, serve: Callable[..., str]) -> str:
    """Return the URL of a service that answers no request without the token, except for health."""
    return serve(collection, host="0.0.0.0", token="secret")


@pytest.fixture(scope="module")
def open_address(collection: Collection, serve: Callable[..., str]) -> str:
    """Return the URL of a service that anyone on this machine may query."""
    return serve(collection)


def send(address: str, *parts: bytes) -> tuple[int, bytes]:
    """Send a request and close the sending side; return the status of the first response, and all responses."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        connection.settimeout(SECONDS + 10)
        received = b""
        with suppress(ConnectionResetError):
            while not received.endswith(b"}") and (data := connection.recv(65536)):
                received += data
    return int(received.split()[1]) if received else 0, received


def padded_head(size: int) -> bytes:
    """Return a request whose lines have `size` bytes in total, without line ends."""
    lines = len(START.replace(b"\r\n", b""))
    return START + b"X:" + b"x" * (size - lines - 2) + b"\r\n\r\n"


LIMITS = [
    (padded_head(MAX_HEAD_BYTES - 100), 200),
    (padded_head(MAX_HEAD_BYTES + 1), 400),
    (padded_head(4 * MAX_HEAD_BYTES), 400),
    (START + b"X: y\r\n" * (MAX_HEADERS - 1) + b"\r\n", 200),
    (START + b"X: y\r\n" * MAX_HEADERS + b"\r\n", 400),
    (START + b"X: y\r\n" * 5000 + b"\r\n", 400),
    (START.replace(b"/healthz", b"/healthz?" + b"x" * (MAX_HEAD_BYTES - 200)) + b"\r\n", 200),
    (START.replace(b"/healthz", b"/healthz?" + b"x" * MAX_HEAD_BYTES) + b"\r\n", 400),
    (START.replace(b"/healthz", b"/healthz?" + b"&" * (MAX_PARAMETERS - 1)) + b"\r\n", 200),
    (START.replace(b"/healthz", b"/healthz?" + b"&" * MAX_PARAMETERS) + b"\r\n", 422),
    (START + b"Content-Type: " + b"x" * MAX_TYPE_BYTES + b"\r\n\r\n", 200),
    (START + b"Content-Type: " + b"x" * (MAX_TYPE_BYTES + 1) + b"\r\n\r\n", 415),
    (
        POST.replace(b"/v1/query", b"/healthz") + b"0" * 20 + b";" + b"x" * (MAX_CHUNK_HEAD_BYTES - 23) + b"\r\n\r\n",
        405,
    ),
    (POST + b"0" * 20 + b";" + b"x" * (MAX_CHUNK_HEAD_BYTES - 22) + b"\r\n\r\n", 400),
]


@pytest.mark.parametrize(("request_bytes", "status"), LIMITS, ids=range(len(LIMITS)))
@pytest.mark.parametrize("size", [10**6, 1000], ids=["at once", "in parts"])
def test_requests_up_to_the_limits_are_answered(
    address: str, open_address: str, request_bytes: bytes, status: int, size: int
) -> None:
    """In parts, h11 applies its own limit too."""
    target = open_address if request_bytes.startswith(POST[:20]) else address
    parts = [request_bytes[i : i + size] for i in range(0, len(request_bytes), size)]
    assert send(target, *parts)[0] == status


# Each keeps the event loop of an unlimited parser busy for seconds: for every byte, it looks at all others.
HOSTILE = {
    "spaces before a NUL": START + b"X:" + b" " * 60_000 + b"\0\r\n\r\n",
    "tabs before a form feed": START + b"X:" + b"\t" * 60_000 + b"\f\r\n\r\n",
    "spaces before a carriage return": START + b"X:" + b" " * 60_000 + b"\rx\r\n\r\n",
    "spaces in the name": START + b" " * 60_000 + b"\0\r\n\r\n",
    "folded spaces before a NUL": START + b"X: y\r\n" + b" " * 60_000 + b"\0\r\n\r\n",
    "a header without an end": START + b"X:" + b" " * 200_000,
    "a folded header": START + b"X: y\r\n" + b" z\r\n" * 16_000 + b"\r\n",
    "words before a NUL": START + b"X:" + b" a" * 30_000 + b"\0\r\n\r\n",
    "a target": START.replace(b"/healthz", b"/healthz/" + b"%41" * 20_000) + b"\r\n",
    "a target of percent signs": START.replace(b"/healthz", b"/healthz/" + b"%" * 60_000) + b"\r\n",
    "a target of slashes": START.replace(b"/healthz", b"/" * 60_000) + b"\r\n",
    "a query string": START.replace(b"/healthz", b"/?token=" + b"&token=" * 8_000) + b"\r\n",
    "a method": b"A" * 60_000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a host": START.replace(b"localhost", b"localhost" + b":1" * 30_000) + b"\r\n",
    "origins": START + b"Origin: " + b"http://" * 8_000 + b"\r\n\r\n",
    "a referer": START + b"Sec-Fetch-Site: x\r\nReferer: " + b"/" * 60_000 + b"\r\n\r\n",
    "quotes in the cookie": START + b'Cookie: a="' + b"\\" * 60_000 + b'"\r\n\r\n',
    "escapes in the cookie": START + b'Cookie: a="' + b'\\"' * 30_000 + b'"\r\n\r\n',
    "the name of the cookie": START + b"Cookie: " + b";hashret=" * 6_000 + b"\r\n\r\n",
    "a token": START + b"Authorization: Bearer " + b"x " * 30_000 + b"\r\n\r\n",
    "a content type": START + b'Content-Type: multipart/form-data;"' + b";" * 60_000 + b"\r\n\r\n",
    "connections": START + b"Connection: " + b"a," * 30_000 + b"\r\n\r\n",
    "lengths": START + b"Content-Length: " + b"0," * 30_000 + b"0\r\n\r\n",
    "digits of a length": START + b"Content-Length: " + b"9" * 60_000 + b"\r\n\r\n",
    "expectations": START + b"Expect: " + b"a," * 30_000 + b"\r\n\r\n",
    "spaces in a chunk extension": POST + b"1;" + b" " * 60_000 + b"\n\r\n",
    "a trailer": POST + b"0\r\nX:" + b" " * 60_000 + b"\0\r\n\r\n",
    "chunks of a byte": POST + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n",
    "empty lines": b"\r\n" * 30_000,
}


@pytest.mark.parametrize("request_bytes", HOSTILE.values(), ids=HOSTILE)
def test_no_request_stops_the_others(address: str, open_address: str, request_bytes: bytes) -> None:
    """Three clients send the request; a fourth is answered meanwhile."""
    for target in (address, open_address):
        host, port = target.removeprefix("http://").split(":")
        with ExitStack() as stack:
            for _ in range(3):
                client = stack.enter_context(socket.create_connection((host, int(port)), timeout=SECONDS))
                with suppress(ConnectionError):  # it may be refused before it is sent
                    client.sendall(request_bytes)
            start = time.monotonic()
            assert httpx.get(f"{target}/healthz", timeout=SECONDS).status_code == 200
            assert time.monotonic() - start < SECONDS


def test_json_has_a_limit(open_address: str) -> None:
    """Numbers, brackets and unknown members cost far more memory and time than their bytes."""
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=open_address, timeout=30, headers=headers) as client:
        largest = b'{"code": [%s], "where": "%s"}' % (b",".join([b'"0000"'] * 256), b"\\u00e9" * 9_998)
        assert (
            client.post("/v1/query", content=largest + b" " * (2**18 - len(largest))).status_code == 422
        )  # the filter
        for content in (b"[" + b"[]," * 90_000 + b"[]]", b" " * (2**18 + 1), b"[" * 10**7):
            response = client.post("/v1/query", content=content)
            assert response.status_code == 413 and "256 KiB" in response.json()["detail"]
        for content in (b"{" + b",".join(b'"%d":0' % i for i in range(22_000)) + b"}", b"[" * 2**18):
            start = time.monotonic()
            assert client.post("/v1/query", content=content).status_code in (400, 422)
            assert time.monotonic() - start < SECONDS


def test_connections_have_a_limit(collection: Collection) -> None:
    """A connection too many is closed; the others, and the files of the collection, are as before."""
    script = """
import resource, sys
from hashret.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))
main()
"""
    command = [sys.executable, "-c", script, "serve", "-c", str(collection.path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ExitStack() as stack:
        assert process.stderr is not None
        host, port = process.stderr.readline().split()[-1].strip("/").removeprefix("http://").split(":")
        limit = 400 - http11.RESERVED_FILES
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=30) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.1)
            for _ in range(limit - 1):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            extra = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            assert extra.recv(1) == b""
            assert client.post("/v1/query", json={"id": 1}).status_code == 200
            stack.close()
            time.sleep(0.5)
            assert httpx.get(f"http://{host}:{port}/healthz").status_code == 200
        process.terminate()
        assert process.wait(60) == 0
