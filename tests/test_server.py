"""Slow and hanging clients and requests: others are answered, memory stays, and SIGTERM ends the process in time.

HASHRET_SOAK=1 sends 100,000 requests.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashret.collection import Collection
from hashret.hasher import Hasher

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service import server as server_module  # noqa: E402  # after importorskip

SOAK = "HASHRET_SOAK" in os.environ
SLOW_CLIENTS = 1000
SERVE = """
import sys, time, threading
from hashret.collection import Collection
from hashret.service import server
from hashret.service.app import create_app

class Hanging(Collection):
    '''A collection of which one item makes a query spin, and one makes it wait for ever.'''

    def nearest_item(self, item_id, *args, **options):
        while item_id == 2:
            pass
        if item_id == 3:
            threading.Event().wait()
        return super().nearest_item(item_id, *args, **options)

if len(sys.argv) > 2:
    server.SHUTDOWN_SECONDS, server.GRACE_SECONDS = map(float, sys.argv[2:])
with Hanging.open(sys.argv[1]) as collection, server.listen("127.0.0.1", 0) as listening:
    port = listening.getsockname()[1]
    server.serve(create_app(collection), listening, lambda: print(port, flush=True))
"""
HEAD = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LIST = b"GET /v1/items?limit=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a collection whose list of items has 8 MB, more than the buffers of a connection."""
    path = tmp_path_factory.mktemp("slow") / "c"
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    with Collection.create(path, Hasher("lsh", 16).fit(images)) as collection:
        collection.add(list(images), [{"text": "x" * 40_000} for _ in images])
    return path


def connect(port: int) -> socket.socket:
    """Return a connection with a small buffer, so that little is sent that the client does not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    return connection


class Process:
    """A service in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self.address = f"http://127.0.0.1:{self.port}"
        while httpx.get(f"{self.address}/readyz", timeout=60).status_code != 200:
            time.sleep(0.05)

    def connect(self) -> socket.socket:
        return connect(self.port)

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


@contextmanager
def started(folder: Path, *options: float) -> Iterator[Process]:
    command = [sys.executable, "-c", SERVE, str(folder), *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


def check_answers(service: Process, count: int) -> None:
    """Check that the service answers queries by items and by small images, and health checks."""
    with httpx.Client(base_url=service.address, timeout=20) as client:
        for _ in range(count):
            assert client.post("/v1/query", json={"id": 1}).status_code == 200
            assert client.post("/v1/query", content=b"x", headers={"content-type": "image/png"}).status_code == 422
            assert client.get("/healthz").status_code == 200


def test_slow_clients_keep_nobody_out(folder: Path) -> None:
    """A thousand clients send half a head or half a body, or read nothing of an answer; then the service ends."""
    large = b"Content-Length: 9000000\r\n\r\n" + bytes(600_000)
    kinds = {HEAD: 100, HEAD + b"Content-Length: 1000\r\n\r\n{": 550, LIST: 10, HEAD + large: 10}
    with started(folder, 50.0, 2.0) as service, ExitStack() as stack:
        for sent, count in kinds.items():
            for _ in range(1000 if SOAK else count):
                stack.enter_context(service.connect()).sendall(sent)
            check_answers(service, 5)
        assert service.resident_bytes() < 3 * 2**30
        service.process.send_signal(signal.SIGTERM)
        output = service.process.communicate(timeout=40)[1]
        assert service.process.returncode == 0 and "Timeout" not in output


def test_a_client_that_does_not_read_is_disconnected(
    folder: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "DOWNLOAD_SECONDS", 0.5)
    with Collection.open(folder) as collection:
        address = serve(collection)
        with connect(int(address.rpartition(":")[2])) as connection:
            connection.sendall(LIST)
            time.sleep(4)
            received = 0
            with suppress(ConnectionResetError):
                while data := connection.recv(2**20):
                    received += len(data)
            assert 0 < received < 8_000_000
        monkeypatch.undo()
        assert len(httpx.get(f"{address}/v1/items?limit=1000", timeout=30).content) > 8_000_000


def test_sigterm_ends_the_process_whatever_hangs(folder: Path) -> None:
    with started(folder, 3.0, 1.0) as service, ExitStack() as stack:
        for body in (b'{"id": 2}', b'{"id": 3, "k": 2}'):
            hung = stack.enter_context(service.connect())
            hung.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        stack.enter_context(service.connect()).sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        stack.enter_context(service.connect()).sendall(LIST)
        time.sleep(1)
        assert httpx.get(f"{service.address}/healthz", timeout=20).status_code == 200
        service.process.send_signal(signal.SIGTERM)
        output = service.process.communicate(timeout=30)[1]
        assert service.process.returncode == 1
        assert "Timeout (0:00:03)!" in output and "in nearest_item" in output


def test_memory_does_not_grow_with_the_number_of_requests(folder: Path) -> None:
    """Requests of every kind, with errors, new connections and half requests among them."""
    warm, total = (10_000, 100_000) if SOAK else (300, 900)
    with started(folder) as service:
        request_many(service, warm)
        before = service.resident_bytes()
        request_many(service, total - warm)
        growth = service.resident_bytes() / before
        assert growth <= 1.05, f"{before / 2**20:.0f} MiB became {growth:.3f} times as much"


def request_many(service: Process, count: int) -> None:
    """Send requests in four threads."""

    def send(offset: int) -> None:
        for start in range(offset, count, 1000):
            with httpx.Client(base_url=service.address, timeout=60) as client:
                for i in range(start, min(start + 1000, count), 4):
                    kind: Any = i // 4 % 8
                    if kind < 3:
                        client.post("/v1/query", json={"id": 4 + i % 100, "k": 1})
                    elif kind == 3:
                        client.post("/v1/query?k=1", content=bytes(i % 3000), headers={"content-type": "image/png"})
                    elif kind == 4:
                        client.get(f"/v1/items/{i}/{i}", headers={"cookie": f"a={i}", f"x-{i}": "y"})
                    elif kind == 5:
                        client.get(f"/v1/items/{1 + i % 200}/image?size={16 + i % 8}")
                    elif kind == 6:
                        client.request(f"X{i}", f"/{i}?a={i}")
                    else:
                        with service.connect() as connection:
                            connection.sendall(HEAD[: i % len(HEAD)])

    threads = [threading.Thread(target=send, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
