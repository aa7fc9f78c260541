"""Requests per second and latency of `hashret serve`, compared with an empty FastAPI route on the same server.

    python benchmarks/service.py --data train-images-idx3-ubyte.gz --json

Server and load generator are separate processes. The generator sends prepared bytes over --connections persistent
connections; it prints its own share of a core, which shows whether the generator limits the rate. Parts:

- rates: closed loops, targets in turn, medians over the rounds: the empty route, queries by code (codes of items with
  three bits flipped), by image (PNG), one or 256 per request; in process, `Collection.query_batch` of 256 and of one;
  and the server's CPU time per request, which depends less on the load of the machine
- latency: queries by code at half of the measured rate, evenly spaced; p50 and p99 from the due time of each
- memory: of the server, before and after --requests queries by code
- writer: queries while another process indexes 10,000 images
- overload: eight times as many connections as the service has requests in progress; rejected clients retry after the
  second of Retry-After, or at once
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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
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
QUERIES = 4000  # distinct queries
BATCH_SIZE = 256  # images of a request with many images, the maximum


class Load(NamedTuple):
    """The result of a load test."""

    rate: float  # responses per second
    statuses: dict[int, int]
    seconds: list[float]  # from the due time of a request to its response
    generator_share: float  # of a core
    rejected_seconds: list[float]  # the same for responses 429 and 503


class Connection(asyncio.Protocol):
    """Send one request after the other, and call `on_response` with the status of each response."""

    def __init__(self, on_response: Callable[["Connection", int], None]) -> None:
        self._on_response = on_response
        self._buffer = bytearray()
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._on_response(self, 0)

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
            self._on_response(self, status)


async def _drive(
    port: int,
    requests: list[bytes],
    connections: int,
    seconds: float,
    max_requests: int | None,
    rate: float | None,
    retry_after: float,
) -> Load:
    """Run a closed loop, or with `rate` an open loop; rejected requests are repeated after `retry_after` seconds."""
    loop, source = asyncio.get_running_loop(), cycle(requests)
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    rejected: list[float] = []
    idle: list[Connection] = []
    overdue: list[float] = []  # due times of requests that wait for a connection
    done, sent = loop.create_future(), 0
    start = loop.time()

    def on_response(connection: Connection, status: int) -> None:
        nonlocal sent
        now = loop.time()
        if done.done():
            return
        statuses[status] += 1
        (rejected if status in (429, 503) else latencies).append(now - connection.due)
        if now - start >= seconds or sum(statuses.values()) == max_requests:
            done.set_result(None)
        elif connection.lost:
            if statuses[0] == connections:
                done.set_exception(ConnectionError("the server closed all connections"))
        elif rate is None and retry_after and status in (429, 503):
            loop.call_later(retry_after, lambda: connection.send(next(source), loop.time()))
        elif rate is None:
            connection.send(next(source), now)
        elif overdue:
            connection.send(next(source), overdue.pop(0))
        else:
            idle.append(connection)

    opened = [
        await loop.create_connection(lambda: Connection(on_response), "127.0.0.1", port) for _ in range(connections)
    ]
    cpu, start = time.process_time(), loop.time()
    if rate is None:
        for _, connection in opened:
            connection.send(next(source), start)
    else:
        idle += [connection for _, connection in opened]

        def tick() -> None:
            nonlocal sent
            now = loop.time()
            while start + sent / rate <= now:
                due = start + sent / rate
                sent += 1
                if idle:
                    idle.pop().send(next(source), due)
                else:
                    overdue.append(due)
            if not done.done():
                loop.call_at(start + sent / rate, tick)

        tick()
    await done
    wall = loop.time() - start
    for transport, _ in opened:
        transport.abort()
    generator_share = (time.process_time() - cpu) / wall
    return Load(sum(statuses.values()) / wall, dict(statuses), latencies, generator_share, rejected)


def drive(
    port: int,
    requests: list[bytes],
    connections: int = 64,
    seconds: float = 5.0,
    max_requests: int | None = None,
    rate: float | None = None,
    retry_after: float = 0.0,
) -> Load:
    return asyncio.run(_drive(port, requests, connections, seconds, max_requests, rate, retry_after))


def request(path: str, body: bytes = b"", media_type: str = "application/json") -> bytes:
    if not body:
        return f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {media_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextmanager
def server(*command: str) -> Iterator[tuple[int, int]]:
    """Run a server in a process of its own; yield its port and process id."""
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

    from hashret.service.load import Load as ServiceLoad
    from hashret.service.server import listen, serve

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        yield {"load": ServiceLoad(), "count_rejected": lambda: None}  # which `http11.Protocol` uses

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def empty() -> dict[str, str]:
        return {}

    listening = listen("127.0.0.1", 0)
    serve(app, listening, lambda: print(f"at :{listening.getsockname()[1]}", file=sys.stderr, flush=True))


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
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
    """Return how many images per second are encoded and searched for."""
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = done % (len(images) - batch)
        collection.query_batch(images[start : start + batch])
        done += batch
    return done / (time.perf_counter() - begin)


def percentile(values: list[float], share: float) -> float:
    return float(np.percentile(values, 100 * share)) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="the source to index; the queries are its images")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the default model")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="per target and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200_000, help="of the memory part")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--empty", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.empty:
        serve_empty()
        return
    parts = options.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts are {', '.join(PARTS)}")
    with TemporaryDirectory() as temporary:
        figures = measure(Path(temporary), options, parts)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:<56}{value:>12,.2f}" if isinstance(value, float) else f"{name:<56} {value:>11}")


def measure(folder: Path, options: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    hasher = Hasher().fit(options.data, steps=options.steps)
    collection = Collection.create(folder / "c", hasher)
    collection.index(options.data)
    ids = [item.id for item in collection.items(limit=QUERIES)]
    rng = np.random.default_rng(0)
    bits = np.unpackbits(collection.codes(ids), axis=1)
    for row in bits:
        row[rng.choice(len(row), 3, replace=False)] ^= 1
    codes = np.packbits(bits, axis=1)
    by_code = [request("/v1/query", json.dumps({"code": code, "k": 10}).encode()) for code in to_hex(codes)]
    images = pngs([decode(record.read()).pixels for record in islice(open_source(options.data), QUERIES)])
    by_image = [request("/v1/query", image, "image/png") for image in images]
    random.Random(0).shuffle(by_image)
    figures: dict[str, Any] = {"items": len(collection), "connections": options.connections}
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
            figures |= rates(empty, (port, pid), by_code, by_image, collection, images, options)
            rate = figures["by code, a second"]
        if "latency" in parts:
            rate = rate or drive(port, by_code, options.connections, options.seconds).rate
            load = drive(port, by_code, options.connections, 3 * options.seconds, rate=rate / 2)
            figures["at half the rate, p50, ms"] = percentile(load.seconds, 0.5)
            figures["at half the rate, p99, ms"] = percentile(load.seconds, 0.99)
            figures["p99 / p50"] = percentile(load.seconds, 0.99) / percentile(load.seconds, 0.5)
        if "memory" in parts:
            drive(port, by_code, options.connections, max_requests=options.requests // 10, seconds=1e9)
            figures["memory before, MB"] = resident_megabytes(pid)
            drive(port, by_code, options.connections, max_requests=options.requests, seconds=1e9)
            figures[f"after {options.requests:,} requests, MB"] = resident_megabytes(pid)
        if "writer" in parts:
            figures |= beside_writer(folder, port, by_code, options)
        if "overload" in parts:
            for name, retry_after in (("after a second", 1.0), ("at once", 0.0)):
                load = drive(port, by_image, 8 * 512, 2 * options.seconds, retry_after=retry_after)
                figures[f"overload, retry {name}: statuses"] = str(load.statuses)
                for share in (0.5, 0.99):
                    latency = percentile(load.rejected_seconds, share) if load.rejected_seconds else 0.0
                    figures[f"overload, retry {name}: p{100 * share:.0f} of rejected, ms"] = latency
            figures["after overload: statuses"] = str(drive(port, by_code, 8, 1.0).statuses)
    collection.close()
    return figures


def per_image(load: Load) -> Load:
    """Return the load with the rate in images instead of requests."""
    return load._replace(rate=load.rate * BATCH_SIZE)


def check(port: int, by_code: bytes, by_image: list[bytes], images: list[bytes], collection: Collection) -> None:
    """Check that answers equal those of the collection before anything is timed."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port)
    for image in images[:20]:
        connection.request("POST", "/v1/query", image, {"content-type": "image/png"})
        document = json.loads(connection.getresponse().read())
        hits = [(hit.distance, hit.id) for hit in collection.query(image)]
        assert [(hit["distance"], hit["id"]) for hit in document["hits"]] == hits, "answers differ"


def rates(
    empty: tuple[int, int],
    served: tuple[int, int],
    by_code: list[bytes],
    by_image: list[bytes],
    collection: Collection,
    images: list[bytes],
    options: argparse.Namespace,
) -> dict[str, Any]:
    port = served[0]
    targets: dict[str, Callable[[], Load]] = {
        "empty route": lambda: drive(empty[0], [request("/")], options.connections, options.seconds),
        "by code": lambda: drive(port, by_code, options.connections, options.seconds),
        "by image": lambda: drive(port, by_image, options.connections, options.seconds),
        f"by {BATCH_SIZE} images": lambda: per_image(drive(port, by_images, 4, options.seconds)),
    }
    form = b"".join(
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + image + b"\r\n"
        for image in images[:BATCH_SIZE]
    )
    by_images = [request("/v1/query", form + b"--x--\r\n", "multipart/form-data; boundary=x")]
    measured: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    generator_shares: dict[str, float] = {}
    for target in targets.values():
        target()  # warm up
    for _ in range(options.rounds):
        for name, target in targets.items():
            pid = (empty if name == "empty route" else served)[1]
            before = cpu_seconds(pid)
            load = target()
            cpu.setdefault(name, []).append((cpu_seconds(pid) - before) / sum(load.statuses.values()))
            assert set(load.statuses) == {200}, (name, load.statuses)
            measured.setdefault(name, []).append(load.rate)
            generator_shares[name] = load.generator_share
        for batch in (256, 1):
            rate = in_process(collection, images, batch, options.seconds)
            measured.setdefault(f"in process, {batch} images at a time", []).append(rate)
    medians = {name: statistics.median(values) for name, values in measured.items()}
    figures: dict[str, Any] = {f"{name}, a second": value for name, value in medians.items()}
    figures |= {f"{name}: generator's share of a core": value for name, value in generator_shares.items()}
    figures["by code / empty route"] = medians["by code"] / medians["empty route"]
    microseconds = {name: 1e6 * statistics.median(values) for name, values in cpu.items()}
    figures |= {f"{name}: server's CPU time, µs": value for name, value in microseconds.items()}
    figures["by code / empty route, by CPU time"] = microseconds["empty route"] / microseconds["by code"]
    for batch in (256, 1):
        for name in ("by image", f"by {BATCH_SIZE} images"):
            figures[f"{name} / in process, {batch} at a time"] = (
                medians[name] / medians[f"in process, {batch} images at a time"]
            )
    return figures


def beside_writer(folder: Path, port: int, by_code: list[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """Measure queries while another process indexes 10,000 more images."""
    shape = decode(next(iter(open_source(options.data))).read()).pixels.shape
    more = np.random.default_rng(1).integers(0, 256, (10_000, *shape), np.uint8)
    np.save(folder / "more.npy", more[..., 0] if shape[-1] == 1 else more)
    command = [sys.executable, "-c", "from hashret.cli import main; main()", "index", str(folder / "more.npy")]
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    with subprocess.Popen([*command, "-c", str(folder / "c"), "--quiet"]) as process:
        while process.poll() is None:
            load = drive(port, by_code, 8, 1.0)
            statuses.update(load.statuses)
            latencies += load.seconds
    assert process.returncode == 0
    return {
        "beside a writer: statuses": str(dict(statuses)),
        "beside a writer, p99, ms": percentile(latencies, 0.99),
        "beside a writer, longest, ms": max(latencies) * 1000,
    }


if __name__ == "__main__":
    main()
