"""Requests per second and latency of `hashret serve`, beside an empty FastAPI route on the same server in the same run.

    python benchmarks/service.py --data train-images-idx3-ubyte.gz --json

Server and load generator are a process each. The generator sends bytes that were made before over --connections
connections that stay open; its own share of a core is printed, so that one sees who waits for whom. Parts:

- rates: closed loops, targets in turn, medians of the rounds: the empty route, queries by code (those of items with
  three bits flipped), by image (PNG), one or 256 a request; in process, `Collection.query_batch` of 256 and of one; and
  the server's processor time for a request, which holds where the machine has other work too
- latency: queries by code at half of the rate found, evenly spaced; p50 and p99 from when each was due
- memory: of the server, before and after --requests queries by code
- writer: another process indexes 10,000 images meanwhile
- overload: eight times as many connections as a service answers at a time; those who are refused wait for the second
  that they are told, or ask again at once, so that each waits for all others
"""

import argparse
import asyncio
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hashret import Collection, Hasher
from hashret.codes import to_hex
from hashret.data.images import decode
from hashret.data.sources import open_source

PARTS = ("rates", "latency", "memory", "writer", "overload")
QUERIES = 4000  # different ones
TOGETHER = 256  # images in a request that has several, as many as may be


class Load(NamedTuple):
    """What came of some load."""

    rate: float  # answers a second
    statuses: dict[int, int]
    seconds: list[float]  # from when a request was due until its answer
    busy: float  # share of a core that the generator took
    refused: list[float]  # seconds of the answers 429 and 503


class Connection(asyncio.Protocol):
    """Sends one request after the other, and tells of each answer."""

    def __init__(self, answered: Callable[["Connection", int], None]) -> None:
        self._answered = answered
        self._buffer = bytearray()
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._answered(self, 0)

    def send(self, request: bytes, due: float) -> None:
        self.due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        start = self._buffer.lower().index(b"content-length:") + 15
        length = int(self._buffer[start : self._buffer.index(b"\r", start)])
        if len(self._buffer) >= end + 4 + length:
            status = int(self._buffer[9:12])
            self._buffer.clear()
            self._answered(self, status)


async def _drive(
    port: int,
    requests: list[bytes],
    connections: int,
    seconds: float,
    most: int | None,
    rate: float | None,
    patience: float,
) -> Load:
    """A closed loop, or one request every 1 / rate seconds whatever the answers do; who is refused waits first."""
    loop, source = asyncio.get_running_loop(), cycle(requests)
    statuses: Counter[int] = Counter()
    took: list[float] = []
    refused: list[float] = []
    free: list[Connection] = []
    waiting: list[float] = []  # when those were due that no connection was free for
    over, sent = loop.create_future(), 0
    began = loop.time()

    def answered(connection: Connection, status: int) -> None:
        nonlocal sent
        now = loop.time()
        if over.done():
            return
        statuses[status] += 1
        (refused if status in (429, 503) else took).append(now - connection.due)
        if now - began >= seconds or sum(statuses.values()) == most:
            over.set_result(None)
        elif connection.lost:
            return
        elif rate is None and patience and status in (429, 503):
            loop.call_later(patience, lambda: connection.send(next(source), loop.time()))
        elif rate is None:
            connection.send(next(source), now)
        elif waiting:
            connection.send(next(source), waiting.pop(0))
        else:
            free.append(connection)

    made = [await loop.create_connection(lambda: Connection(answered), "127.0.0.1", port) for _ in range(connections)]
    cpu, began = time.process_time(), loop.time()
    if rate is None:
        for _, connection in made:
            connection.send(next(source), began)
    else:
        free += [connection for _, connection in made]

        def tick() -> None:
            nonlocal sent
            now = loop.time()
            while began + sent / rate <= now:
                due = began + sent / rate
                sent += 1
                if free:
                    free.pop().send(next(source), due)
                else:
                    waiting.append(due)
            if not over.done():
                loop.call_at(began + sent / rate, tick)

        tick()
    await over
    wall = loop.time() - began
    for transport, _ in made:
        transport.abort()
    busy = (time.process_time() - cpu) / wall
    return Load(sum(statuses.values()) / wall, dict(statuses), took, busy, refused)


def drive(
    port: int,
    requests: list[bytes],
    connections: int = 64,
    seconds: float = 5.0,
    most: int | None = None,
    rate: float | None = None,
    patience: float = 0.0,
) -> Load:
    return asyncio.run(_drive(port, requests, connections, seconds, most, rate, patience))


def request(path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
    if not body:
        return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def server(*command: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and its process id."""
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().strip().rstrip("/").rpartition(":")[2])
        try:
            yield port, process.pid
        finally:
            process.terminate()
            process.wait()


def serve_empty() -> None:
    from fastapi import FastAPI

    from hashret.service.server import listen, serve

    app = FastAPI()

    @app.get("/")
    async def empty() -> dict[str, str]:
        return {}

    listening = listen("127.0.0.1", 0)
    serve(app, listening, lambda: print(f"at :{listening.getsockname()[1]}", file=sys.stderr, flush=True))


def megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def processor_seconds(pid: int) -> float:
    """What a process has taken so far, which other processes on the machine change less than the rates."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def pngs(pixels: list[np.ndarray[Any, Any]]) -> list[bytes]:
    files = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
        files.append(file.getvalue())
    return files


def in_process(collection: Collection, images: list[bytes], batch: int, seconds: float) -> float:
    """Images a second that are encoded and searched for."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = done % (len(images) - batch)
        collection.query_batch(images[start : start + batch])
        done += batch
    return done / (time.perf_counter() - began)


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="what is indexed; the queries are its images")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the default model")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each target in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200_000, help="of the memory part")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--empty", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.empty:
        serve_empty()
        return
    parts = asked.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts are {', '.join(PARTS)}")
    with TemporaryDirectory() as temporary:
        figures = measure(Path(temporary), asked, parts)
    if asked.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:<56}{value:>12,.2f}" if isinstance(value, float) else f"{name:<56} {value:>11}")


def measure(folder: Path, asked: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    hasher = Hasher().fit(asked.data, steps=asked.steps)
    collection = Collection.create(folder / "c", hasher)
    collection.index(asked.data)
    ids = [item.id for item in collection.items(limit=QUERIES)]
    rng = np.random.default_rng(0)
    bits = np.unpackbits(collection.codes(ids), axis=1)
    for row in bits:
        row[rng.choice(len(row), 3, replace=False)] ^= 1
    codes = np.packbits(bits, axis=1)
    by_code = [request("/v1/query", json.dumps({"code": code, "k": 10}).encode()) for code in to_hex(codes)]
    images = pngs([decode(record.read()).pixels for record in islice(open_source(asked.data), QUERIES)])
    by_image = [request("/v1/query", image, "image/png") for image in images]
    random.Random(0).shuffle(by_image)
    figures: dict[str, Any] = {"items": len(collection), "connections": asked.connections}
    with (
        server(__file__, "--empty") as empty,
        server("-c", "from hashret.cli import main; main()", "serve", "-c", str(folder / "c"), "--port", "0") as (
            port,
            pid,
        ),
    ):
        check(port, by_code[0], by_image, images, collection)
        rate = None
        if "rates" in parts:
            figures |= rates(empty, (port, pid), by_code, by_image, collection, images, asked)
            rate = figures["by code, a second"]
        if "latency" in parts:
            rate = rate or drive(port, by_code, asked.connections, asked.seconds).rate
            load = drive(port, by_code, asked.connections, 3 * asked.seconds, rate=rate / 2)
            figures["at half the rate, p50, ms"] = percentile(load.seconds, 0.5)
            figures["at half the rate, p99, ms"] = percentile(load.seconds, 0.99)
            figures["p99 / p50"] = percentile(load.seconds, 0.99) / percentile(load.seconds, 0.5)
        if "memory" in parts:
            drive(port, by_code, asked.connections, most=asked.requests // 10, seconds=1e9)
            figures["memory before, MB"] = megabytes(pid)
            drive(port, by_code, asked.connections, most=asked.requests, seconds=1e9)
            figures[f"after {asked.requests:,} requests, MB"] = megabytes(pid)
        if "writer" in parts:
            figures |= beside_writer(folder, port, by_code, asked)
        if "overload" in parts:
            for name, patience in (("a second later", 1.0), ("at once", 0.0)):
                load = drive(port, by_image, 8 * 512, 2 * asked.seconds, patience=patience)
                figures[f"overload, refused ask again {name}: answers"] = str(load.statuses)
                for share in (0.5, 0.99):
                    took = percentile(load.refused, share) if load.refused else 0.0
                    figures[f"overload, refused ask again {name}: p{100 * share:.0f}, ms"] = took
            figures["after overload: statuses"] = str(drive(port, by_code, 8, 1.0).statuses)
    collection.close()
    return figures


def together(load: Load) -> Load:
    """The same by images instead of by requests."""
    return load._replace(rate=load.rate * TOGETHER)


def check(port: int, by_code: bytes, by_image: list[bytes], images: list[bytes], collection: Collection) -> None:
    """Answers are those of the collection, before anything is timed."""
    import http.client

    there = http.client.HTTPConnection("127.0.0.1", port)
    for image in images[:20]:
        there.request("POST", "/v1/query", image, {"content-type": "image/png"})
        told = json.loads(there.getresponse().read())
        hits = [(hit.distance, hit.id) for hit in collection.query(image)]
        assert [(hit["distance"], hit["id"]) for hit in told["hits"]] == hits, "answers differ"


def rates(
    empty: tuple[int, int],
    served: tuple[int, int],
    by_code: list[bytes],
    by_image: list[bytes],
    collection: Collection,
    images: list[bytes],
    asked: argparse.Namespace,
) -> dict[str, Any]:
    port = served[0]
    targets: dict[str, Callable[[], Load]] = {
        "empty route": lambda: drive(empty[0], [request("/")], asked.connections, asked.seconds),
        "by code": lambda: drive(port, by_code, asked.connections, asked.seconds),
        "by image": lambda: drive(port, by_image, asked.connections, asked.seconds),
        f"by {TOGETHER} images": lambda: together(drive(port, by_images, 4, asked.seconds)),
    }
    form = b"".join(
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + image + b"\r\n"
        for image in images[:TOGETHER]
    )
    by_images = [request("/v1/query", form + b"--x--\r\n", "multipart/form-data; boundary=x")]
    found: dict[str, list[float]] = {}
    taken: dict[str, list[float]] = {}
    busy: dict[str, float] = {}
    for target in targets.values():
        target()  # warm
    for _ in range(asked.rounds):
        for name, target in targets.items():
            pid = (empty if name == "empty route" else served)[1]
            before = processor_seconds(pid)
            load = target()
            taken.setdefault(name, []).append((processor_seconds(pid) - before) / sum(load.statuses.values()))
            assert set(load.statuses) == {200}, (name, load.statuses)
            found.setdefault(name, []).append(load.rate)
            busy[name] = load.busy
        for batch in (256, 1):
            rate = in_process(collection, images, batch, asked.seconds)
            found.setdefault(f"in process, {batch} images at a time", []).append(rate)
    medians = {name: statistics.median(values) for name, values in found.items()}
    figures: dict[str, Any] = {f"{name}, a second": value for name, value in medians.items()}
    figures |= {f"{name}: generator's share of a core": value for name, value in busy.items()}
    figures["by code / empty route"] = medians["by code"] / medians["empty route"]
    microseconds = {name: 1e6 * statistics.median(values) for name, values in taken.items()}
    figures |= {f"{name}: server's processor time, µs": value for name, value in microseconds.items()}
    figures["by code / empty route, by that"] = microseconds["empty route"] / microseconds["by code"]
    for batch in (256, 1):
        for name in ("by image", f"by {TOGETHER} images"):
            figures[f"{name} / in process, {batch} at a time"] = (
                medians[name] / medians[f"in process, {batch} images at a time"]
            )
    return figures


def beside_writer(folder: Path, port: int, by_code: list[bytes], asked: argparse.Namespace) -> dict[str, Any]:
    """Queries while another process indexes 10,000 more images."""
    shape = decode(next(iter(open_source(asked.data))).read()).pixels.shape
    more = np.random.default_rng(1).integers(0, 256, (10_000, *shape), np.uint8)
    np.save(folder / "more.npy", more[..., 0] if shape[-1] == 1 else more)
    command = [sys.executable, "-c", "from hashret.cli import main; main()", "index", str(folder / "more.npy")]
    statuses: Counter[int] = Counter()
    took: list[float] = []
    with subprocess.Popen([*command, "-c", str(folder / "c"), "--quiet"]) as process:
        while process.poll() is None:
            load = drive(port, by_code, 8, 1.0)
            statuses.update(load.statuses)
            took += load.seconds
    assert process.returncode == 0
    return {
        "beside a writer: answers": str(dict(statuses)),
        "beside a writer, p99, ms": percentile(took, 0.99),
        "beside a writer, longest, ms": max(took) * 1000,
    }


if __name__ == "__main__":
    main()
