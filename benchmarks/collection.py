"""Measure a collection of a million items: inserts, cold start, reads during writes, and a repeated indexing run.

    python benchmarks/collection.py --items 1000000 --files 100000

Each figure is compared with a lower bound from the same run: bare SQLite inserts of the same rows in transactions of
the same size, or a bare walk of the same folder. A cold start is a process of its own. Its results are compared with
brute force. An item is one row in each of four tables: items, codes, changes and paths.

A writer commits 1,000 items twenty times a second while another process queries by code: the maximum latency of each is
compared with its maximum latency alone. A commit waits for the disk, and for a core if there are too few, which varies
more between runs than with the presence of a reader; its wait for the database lock is reported separately. Finally a
process queries while the collection is switched from another type of index to its own.
"""

import argparse
import hashlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from hashret import Collection, Hasher
from hashret.codes import hamming, to_hex
from hashret.results import Root
from hashret.stores.protocol import ItemRow
from hashret.stores.sqlite import SqliteStore
from hashret.stores.sqlite_schema import SCHEMA

BATCH = 1000

START = """
import sys, time
start_time = time.perf_counter()
from hashret import Collection
from hashret.codes import from_hex
with Collection.open(sys.argv[1], read_only=True) as collection:
    (hits,) = collection.query_codes(from_hex(sys.argv[2], 64), 10)
took = time.perf_counter() - start_time
assert "torch" not in sys.modules
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(took, int(peak) / 1024, *(hit.id for hit in hits))
"""

READ = """
import sys, time
from hashret import Collection
from hashret.codes import from_hex
from hashret.indexes import set_threads
set_threads(1)
with Collection.open(sys.argv[1], read_only=True) as collection:
    query = from_hex(sys.argv[2], 64)
    collection.query_codes(query, 10)
    print("ready", flush=True)
    max_latency, end = 0.0, time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        start_time = time.perf_counter()
        collection.query_codes(query, 10)
        max_latency = max(max_latency, time.perf_counter() - start_time)
        time.sleep(0.002)
print(max_latency)
"""


def clustered(items: int) -> np.ndarray:
    """Return codes around one random centre for every 500 items, each bit flipped with probability 0.06."""
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2, (max(1000, items // 500), 64), np.uint8)
    parts = []
    for start in range(0, items, 100_000):
        count = min(100_000, items - start)
        bits = centres[rng.integers(0, len(centres), count)] ^ (rng.random((count, 64), np.float32) < 0.06)
        parts.append(np.packbits(bits, axis=1))
    return np.concatenate(parts)


def item_rows(codes: np.ndarray, start: int) -> list[ItemRow]:
    """Return the rows of files of distinct contents, one for each code."""
    rows = []
    for i, code in enumerate(codes, start):
        digest = hashlib.sha256(b"%d" % i).hexdigest()
        rows.append(ItemRow(Root("/photos/"), f"{i:09d}.jpg", None, 5000, i, digest, 5000, 32, 32, code.tobytes()))
    return rows


def fill(store: SqliteStore, codes: np.ndarray) -> float:
    """Return the seconds that the store takes to insert one item for each code."""
    return sum(fill_from(store, codes, start)[0] for start in range(0, len(codes), BATCH))


def fill_from(store: SqliteStore, codes: np.ndarray, start: int) -> tuple[float, float]:
    """Return the seconds that the store takes to insert the next `BATCH` items, and those of its wait for the lock."""
    rows = item_rows(codes[start % len(codes) :][:BATCH], start)
    start_time = time.perf_counter()
    with store.transaction() as transaction:
        locked_time = time.perf_counter()
        transaction.put(rows)
    return time.perf_counter() - start_time, locked_time - start_time


def fill_bare(path: Path, codes: np.ndarray) -> float:
    """Return the seconds that SQLite takes to insert the same rows without lookups."""
    took = 0.0
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -65536;" + SCHEMA)
        for start in range(0, len(codes), BATCH):
            rows = list(enumerate(item_rows(codes[start : start + BATCH], start), start + 1))
            start_time = time.perf_counter()
            conn.execute("BEGIN IMMEDIATE")
            conn.executemany(
                "INSERT INTO items VALUES (?, ?, 32, 32, 5000, '2026-01-01T00:00:00Z', NULL)",
                ((i, c.sha256) for i, c in rows),
            )
            conn.executemany("INSERT INTO codes VALUES (?, ?, ?)", ((i, "0" * 64, c.code) for i, c in rows))
            conn.executemany("INSERT INTO changes VALUES (?, 'add', ?)", ((start, i) for i, _ in rows))
            conn.executemany(
                "INSERT INTO paths VALUES (?, ?, ?, NULL, ?, ?)",
                ((c.root, c.name, i, c.size, c.mtime_ns) for i, c in rows),
            )
            conn.execute("COMMIT")
            took += time.perf_counter() - start_time
    return took


def cold(folder: Path, code: str) -> tuple[float, float, float, list[int]]:
    """Return the seconds of a new process from the first import to the answer, those of the process, its peak memory in
    MiB, and the ids of the answer."""
    start_time = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", START, folder, code], capture_output=True, text=True, check=True)
    total = time.perf_counter() - start_time
    inside, mib, *ids = process.stdout.split()
    return float(inside), total, float(mib), [int(i) for i in ids]


def read_beside(folder: Path, code: str, seconds: float) -> subprocess.Popen[str]:
    """Start a process that queries for some seconds and then prints its maximum latency; return it when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ, folder, code, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def max_commit_latency(store: SqliteStore, codes: np.ndarray, start: int, seconds: float) -> tuple[float, float, int]:
    """Commit `BATCH` new items twenty times a second; return the maximum latency, the maximum wait for the write lock,
    and the number of items afterwards."""
    max_latency, max_wait, end = 0.0, 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        start_time = time.perf_counter()
        latency, wait = fill_from(store, codes, start)
        max_latency, max_wait, start = max(max_latency, latency), max(max_wait, wait), start + BATCH
        time.sleep(max(0.0, 0.05 - time.perf_counter() + start_time))
    return max_latency, max_wait, start


def files(folder: Path, count: int) -> Path:
    """Write `count` small image files, a thousand in each folder."""
    pixels = np.random.default_rng(1).integers(0, 256, (count, 8, 8), np.uint8)
    for i, image in enumerate(pixels):
        subfolder = folder / f"{i // 1000:03d}"
        subfolder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(subfolder / f"{i:06d}.bmp")
    return folder


def walk(folder: Path) -> int:
    """Call stat on every file, which a repeated indexing run cannot avoid; return the number of files."""
    count = 0
    for subfolder, _, names in os.walk(folder):
        for name in names:
            count += os.stat(os.path.join(subfolder, name)).st_size > 0  # noqa: PTH116, PTH118  # the fastest way
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of reads during writes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    hasher = Hasher("lsh", 64).fit(np.random.default_rng(2).integers(0, 256, (100, 8, 8), np.uint8))
    rows: dict[str, tuple[float, float | None, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        codes = clustered(args.items)
        with Collection.create(folder / "c", hasher) as collection, closing(SqliteStore(folder / "c")) as store:
            ours, bare = args.items / fill(store, codes), args.items / fill_bare(folder / "bare.db", codes)
            rows["items.db, items a second"] = ours, bare, "bare inserts"
            rows["items.db, rows a second, four an item"] = 4 * ours, 4 * bare, "bare inserts"
            start_time = time.perf_counter()
            collection.rebuild_index()
            rows["index built and saved, s"] = time.perf_counter() - start_time, None, ""
        rows["items.db, bytes an item"] = (folder / "c/items.db").stat().st_size / args.items, None, ""
        query = codes[7] ^ np.uint8(1)
        _, _, _, ids = cold(folder / "c", to_hex(query[None])[0])
        distances = hamming(query[None], codes)[0]
        assert ids == (np.lexsort((np.arange(args.items), distances))[:10] + 1).tolist(), (
            "the results differ from brute force"
        )
        inside, total, mib, _ = min(cold(folder / "c", to_hex(query[None])[0]) for _ in range(3))
        rows["cold start to the first result, s"] = inside, total, "with the start of Python"
        rows["its peak memory, MiB"] = mib, None, ""
        with Collection.open(folder / "c") as collection, closing(SqliteStore(folder / "c")) as store:
            code, seconds = to_hex(query[None])[0], args.seconds
            alone = float(read_beside(folder / "c", code, seconds / 2).communicate()[0])
            commit_alone, wait_alone, count = max_commit_latency(store, codes, args.items, seconds / 2)
            process = read_beside(folder / "c", code, seconds + 1)
            commit, wait, count = max_commit_latency(store, codes, count, seconds)
            rows["maximum query latency beside a writer, ms"] = (
                1000 * float(process.communicate()[0]),
                1000 * alone,
                "alone",
            )
            rows["maximum commit latency beside a reader, ms"] = 1000 * commit, 1000 * commit_alone, "alone"
            rows["maximum wait for the write lock, ms"] = 1000 * wait, 1000 * wait_alone, "alone"
            collection.use_index("faiss:BFlat")
            flat = float(read_beside(folder / "c", code, seconds / 2).communicate()[0])
            process = read_beside(folder / "c", code, seconds)
            collection.use_index("bitflip")
            rows["maximum query latency beside a switch, ms"] = (
                1000 * float(process.communicate()[0]),
                1000 * flat,
                "alone",
            )
        photos = files(folder / "photos", args.files)
        with Collection.create(folder / "d", hasher) as collection:
            start_time = time.perf_counter()
            assert collection.index(photos).added == args.files
            rows["indexing files, a second"] = args.files / (time.perf_counter() - start_time), None, ""
            start_time = time.perf_counter()
            assert collection.index(photos).unchanged == args.files
            again = time.perf_counter() - start_time
            start_time = time.perf_counter()
            assert walk(photos) == args.files
            rows["indexing them again, s"] = again, time.perf_counter() - start_time, "a bare walk"
    rows["peak memory of this process, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, None, ""
    if args.json:
        print(json.dumps({name: {"ours": ours, "beside": bound} for name, (ours, bound, _) in rows.items()}))
        return
    print(f"{args.items:,} items, {args.files:,} files, {os.cpu_count()} cores")
    for name, (ours, bound, bound_name) in rows.items():
        comparison = "" if bound is None else f"{bound:>14,.2f}  {bound_name}"
        print(f"{name:44}{ours:>14,.2f}{comparison}")


if __name__ == "__main__":
    main()
