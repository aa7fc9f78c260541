"""What a collection of a million items costs: rows a second, opening, following a writer, and looking at files again.

    python benchmarks/collection.py --items 1000000 --files 100000

Beside each figure stands the least that the same can cost in the same run: bare SQLite inserts of the same rows in
transactions of the same size, a bare walk of the same folder. A cold start is a process of its own. Answers of the
million are compared with brute force. An item is a row in each of four tables: items, codes, changes and paths.

For some seconds a writer commits a thousand items twenty times a second while another process asks by code: the longest
that either took stands beside the longest that it took alone. A writer waits for the disk alone, and for a core where
there are too few: that differs more from run to run than by whether anybody reads. How long it waits to be let into the
database stands apart. At last a process asks while the collection is switched from another kind of index to its own.
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
began = time.perf_counter()
from hashret import Collection
from hashret.codes import from_hex
with Collection.open(sys.argv[1], read_only=True) as there:
    (hits,) = there.query_codes(from_hex(sys.argv[2], 64), 10)
took = time.perf_counter() - began
assert "torch" not in sys.modules
(most,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(took, int(most) / 1024, *(hit.id for hit in hits))
"""

READ = """
import sys, time
from hashret import Collection
from hashret.codes import from_hex
from hashret.indexes import set_threads
set_threads(1)
with Collection.open(sys.argv[1], read_only=True) as there:
    query = from_hex(sys.argv[2], 64)
    there.query_codes(query, 10)
    print("ready", flush=True)
    longest, until = 0.0, time.monotonic() + float(sys.argv[3])
    while time.monotonic() < until:
        began = time.perf_counter()
        there.query_codes(query, 10)
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.002)
print(longest)
"""


def clustered(items: int) -> np.ndarray:
    """Codes around one centre for every 500 items, each bit flipped with probability 0.06."""
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2, (max(1000, items // 500), 64), np.uint8)
    parts = []
    for start in range(0, items, 100_000):
        count = min(100_000, items - start)
        bits = centres[rng.integers(0, len(centres), count)] ^ (rng.random((count, 64), np.float32) < 0.06)
        parts.append(np.packbits(bits, axis=1))
    return np.concatenate(parts)


def contents(codes: np.ndarray, start: int) -> list[ItemRow]:
    """What a thousand files of different contents are on their way into the database."""
    rows = []
    for i, code in enumerate(codes, start):
        digest = hashlib.sha256(b"%d" % i).hexdigest()
        rows.append(ItemRow(Root("/photos/"), f"{i:09d}.jpg", None, 5000, i, digest, 5000, 32, 32, code.tobytes()))
    return rows


def fill(store: SqliteStore, codes: np.ndarray) -> float:
    """Seconds that the store takes for the rows of so many items."""
    return sum(fill_from(store, codes, start)[0] for start in range(0, len(codes), BATCH))


def fill_from(store: SqliteStore, codes: np.ndarray, start: int) -> tuple[float, float]:
    """Seconds that the store takes for the rows of a thousand items, with the codes that come in turn, and how many of
    them it waits to be let in."""
    rows = contents(codes[start % len(codes) :][:BATCH], start)
    began = time.perf_counter()
    with store.transaction() as transaction:
        let_in = time.perf_counter()
        transaction.put(rows)
    return time.perf_counter() - began, let_in - began


def fill_bare(path: Path, codes: np.ndarray) -> float:
    """Seconds that SQLite takes for the same rows, with nothing looked up."""
    took = 0.0
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -65536;" + SCHEMA)
        for start in range(0, len(codes), BATCH):
            rows = list(enumerate(contents(codes[start : start + BATCH], start), start + 1))
            began = time.perf_counter()
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
            took += time.perf_counter() - began
    return took


def cold(folder: Path, code: str) -> tuple[float, float, float, list[int]]:
    """Seconds in a new process from the first import to the answer, those of the whole process, its MiB, and ids."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", START, folder, code], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - began
    inside, mib, *ids = done.stdout.split()
    return float(inside), whole, float(mib), [int(i) for i in ids]


def read_beside(folder: Path, code: str, seconds: float) -> subprocess.Popen[str]:
    """A process that asks for so long, and then prints the longest that an answer took; it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ, folder, code, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def longest_commit(store: SqliteStore, codes: np.ndarray, start: int, seconds: float) -> tuple[float, float, int]:
    """The longest that a commit of a thousand new items took, of twenty a second, and that one waited to be let in; and
    how many items there are then."""
    longest, waited, until = 0.0, 0.0, time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        took, let_in = fill_from(store, codes, start)
        longest, waited, start = max(longest, took), max(waited, let_in), start + BATCH
        time.sleep(max(0.0, 0.05 - time.perf_counter() + began))
    return longest, waited, start


def files(folder: Path, count: int) -> Path:
    """So many small image files, a thousand in a folder."""
    pixels = np.random.default_rng(1).integers(0, 256, (count, 8, 8), np.uint8)
    for i, image in enumerate(pixels):
        place = folder / f"{i // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:06d}.bmp")
    return folder


def walk(folder: Path) -> int:
    """Look at every file: what no second run can do without."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            found += os.stat(os.path.join(place, name)).st_size > 0  # noqa: PTH116, PTH118  # as fast as it gets
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="for which a reader is beside a writer")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    hasher = Hasher("lsh", 64).fit(np.random.default_rng(2).integers(0, 256, (100, 8, 8), np.uint8))
    rows: dict[str, tuple[float, float | None, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codes = clustered(asked.items)
        with Collection.create(folder / "c", hasher) as collection, closing(SqliteStore(folder / "c")) as store:
            ours, bare = asked.items / fill(store, codes), asked.items / fill_bare(folder / "bare.db", codes)
            rows["items.db, items a second"] = ours, bare, "bare inserts"
            rows["items.db, rows a second, four an item"] = 4 * ours, 4 * bare, "bare inserts"
            began = time.perf_counter()
            collection.rebuild_index()
            rows["index built and saved, s"] = time.perf_counter() - began, None, ""
        rows["items.db, bytes an item"] = (folder / "c/items.db").stat().st_size / asked.items, None, ""
        query = codes[7] ^ np.uint8(1)
        inside, whole, mib, ids = cold(folder / "c", to_hex(query[None])[0])
        distances = hamming(query[None], codes)[0]
        assert ids == (np.lexsort((np.arange(asked.items), distances))[:10] + 1).tolist(), "the answer is wrong"
        inside, whole, mib, _ = min(cold(folder / "c", to_hex(query[None])[0]) for _ in range(3))
        rows["first answer of a new process, s"] = inside, whole, "with Python's own start"
        rows["and its memory, MiB"] = mib, None, ""
        with Collection.open(folder / "c") as collection, closing(SqliteStore(folder / "c")) as store:
            code, seconds = to_hex(query[None])[0], asked.seconds
            alone = float(read_beside(folder / "c", code, seconds / 2).communicate()[0])
            commit_alone, wait_alone, count = longest_commit(store, codes, asked.items, seconds / 2)
            process = read_beside(folder / "c", code, seconds + 1)
            commit, wait, count = longest_commit(store, codes, count, seconds)
            rows["longest answer beside a writer, ms"] = 1000 * float(process.communicate()[0]), 1000 * alone, "alone"
            rows["longest commit beside a reader, ms"] = 1000 * commit, 1000 * commit_alone, "alone"
            rows["longest wait to be let in, ms"] = 1000 * wait, 1000 * wait_alone, "alone"
            collection.use_index("faiss:BFlat")
            flat = float(read_beside(folder / "c", code, seconds / 2).communicate()[0])
            process = read_beside(folder / "c", code, seconds)
            collection.use_index("bitflip")
            rows["longest answer beside a switch, ms"] = 1000 * float(process.communicate()[0]), 1000 * flat, "alone"
        photos = files(folder / "photos", asked.files)
        with Collection.create(folder / "d", hasher) as collection:
            began = time.perf_counter()
            assert collection.index(photos).added == asked.files
            rows["indexing files, a second"] = asked.files / (time.perf_counter() - began), None, ""
            began = time.perf_counter()
            assert collection.index(photos).unchanged == asked.files
            again = time.perf_counter() - began
            began = time.perf_counter()
            assert walk(photos) == asked.files
            rows["looking at them again, s"] = again, time.perf_counter() - began, "a bare walk"
    rows["most memory of this process, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, None, ""
    if asked.json:
        print(json.dumps({what: {"ours": ours, "beside": beside} for what, (ours, beside, _) in rows.items()}))
        return
    print(f"{asked.items:,} items, {asked.files:,} files, {os.cpu_count()} cores")
    for what, (ours, beside, whose) in rows.items():
        least = "" if beside is None else f"{beside:>14,.2f}  {whose}"
        print(f"{what:40}{ours:>14,.2f}{least}")


if __name__ == "__main__":
    main()
