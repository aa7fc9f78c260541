"""Damaged index caches: hits always equal those of brute force over the database."""

import json
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashret.codes import hamming
from hashret.collection import Collection
from hashret.hasher import Hasher

SOAK = "HASHRET_SOAK" in os.environ
INDEXES = ["bitflip", "faiss:BFlat"]
DAMAGED = 5000 if SOAK else 80  # caches, of all indexes together
PIXELS = np.random.default_rng(0).integers(0, 256, (400, 8, 8), np.uint8)


@cache
def hasher() -> Hasher:
    return Hasher("lsh", 16).fit(PIXELS)


def caches(folder: Path) -> list[Path]:
    return sorted((folder / "index").iterdir())


def check_answers(folder: Path, index: str) -> None:
    """Check that the hits of a newly opened collection equal those of brute force."""
    with closing(sqlite3.connect(f"file:{folder / 'items.db'}?mode=ro", uri=True)) as conn:
        rows = conn.execute("SELECT item_id, code FROM codes ORDER BY item_id").fetchall()
    ids = [i for i, _ in rows]
    codes = np.frombuffer(b"".join(code for _, code in rows), np.uint8).reshape(len(ids), -1)
    queries = np.concatenate([codes[:2], np.random.default_rng(1).integers(0, 256, (2, codes.shape[1]), np.uint8)])
    expected = [sorted(zip(row.tolist(), ids, strict=True))[:30] for row in hamming(queries, codes)]
    with Collection.open(folder, read_only=True) as fresh:
        found = [[(hit.distance, hit.id) for hit in hits] for hits in fresh.query_codes(queries, 30)]
    if index == "bitflip":
        assert found == expected
    else:  # of several items at the k-th distance, FAISS may find others
        assert [[d for d, _ in hits] for hits in found] == [[d for d, _ in hits] for hits in expected]


def flip(cache: Path, others: list[bytes], rng: random.Random) -> None:
    data = bytearray(cache.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 30))):
        data[rng.randrange(rng.choice((200, len(data)))) % len(data)] ^= 1 << rng.randrange(8)
    cache.write_bytes(data)


def blank(cache: Path, others: list[bytes], rng: random.Random) -> None:
    data = bytearray(cache.read_bytes())
    begin = rng.randrange(len(data))
    end = min(len(data), begin + 4096)
    data[begin:end] = bytes(end - begin) if rng.random() < 0.5 else rng.randbytes(end - begin)
    cache.write_bytes(data)


def cut(cache: Path, others: list[bytes], rng: random.Random) -> None:
    os.truncate(cache, rng.choice((0, 1, 8, 16, 8192, cache.stat().st_size - 1, rng.randrange(cache.stat().st_size))))


def lengthen(cache: Path, others: list[bytes], rng: random.Random) -> None:
    with cache.open("ab") as file:
        file.write(bytes(rng.choice((1, 64, 4096))))


def swap(cache: Path, others: list[bytes], rng: random.Random) -> None:
    """Replace the cache by one of another collection, an older one, or one of another index."""
    cache.write_bytes(rng.choice(others))


def change_version(cache: Path, others: list[bytes], rng: random.Random) -> None:
    data = bytearray(cache.read_bytes())
    data[7] = rng.randrange(256)
    cache.write_bytes(data)


DAMAGES = [flip, flip, flip, blank, blank, cut, cut, lengthen, swap, change_version]


@pytest.mark.parametrize("index", INDEXES)
def test_no_damage_changes_the_hits(tmp_path: Path, index: str) -> None:
    folder = tmp_path / "c"
    with Collection.create(folder, hasher(), index) as collection:
        collection.add(PIXELS[:50])
        others = [caches(folder)[0].read_bytes()]
        collection.use_index(INDEXES[index == INDEXES[0]])
        others += [caches(folder)[0].read_bytes()]
        collection.use_index(index)
        collection.add(PIXELS[50:300])
        collection.remove(range(1, 40))
    with Collection.create(tmp_path / "other", hasher(), index) as other:
        other.add(PIXELS[250:])
        others += [caches(tmp_path / "other")[0].read_bytes()]
    (cache,) = caches(folder)
    intact, mtime = cache.read_bytes(), cache.stat().st_mtime_ns
    rng = random.Random(0)
    for _ in range(DAMAGED // len(INDEXES)):
        for damage in rng.sample(DAMAGES, rng.choice((1, 1, 2))):
            if cache.stat().st_size > 1:
                damage(cache, others, rng)
        os.utime(cache, ns=(mtime + rng.choice((-1, 1, 10**9)),) * 2)
        check_answers(folder, index)
        cache.write_bytes(intact)
    os.utime(cache, ns=(mtime,) * 2)
    check_answers(folder, index)


def put_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_loop(path: Path) -> None:
    path.symlink_to(path)


def put_hole(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 2**42)  # reading it would take hours


@pytest.mark.parametrize("put", [put_folder, put_pipe, put_zeros, put_loop, put_hole])
def test_a_cache_that_is_no_regular_file_is_replaced(tmp_path: Path, put: Callable[[Path], None]) -> None:
    np.save(tmp_path / "rows.npy", PIXELS[:50])
    with Collection.create(tmp_path / "c", hasher()) as collection:
        collection.index(tmp_path / "rows.npy")
    (cache,) = caches(tmp_path / "c")
    cache.unlink()
    put(cache)
    check_answers(tmp_path / "c", "bitflip")
    with Collection.open(tmp_path / "c") as collection:
        assert collection.index(tmp_path / "rows.npy").unchanged == 50
    assert caches(tmp_path / "c") == [cache] and cache.is_file() and not cache.is_symlink()
    check_answers(tmp_path / "c", "bitflip")


def test_no_file_is_deleted_through_a_link_in_place_of_the_folder(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "c", hasher()) as collection:
        collection.add(PIXELS[:50])
        shutil.rmtree(tmp_path / "c/index")
        (tmp_path / "documents").mkdir()
        (tmp_path / "documents/thesis.tex").write_text("all of it")
        (tmp_path / "c/index").symlink_to(tmp_path / "documents")
        collection.remove([1])
        collection.use_index("faiss:BFlat")
    assert (tmp_path / "documents/thesis.tex").read_text() == "all of it"
    assert len(list((tmp_path / "documents").iterdir())) == 2
    check_answers(tmp_path / "c", "faiss:BFlat")


RECORDS: list[Any] = [None, 5, [], {}, "x", {"name": "../items.db"}, {"name": None}, {"status": None},
           {"status": [1]}, {"generation": 10**9}, {"generation": -1}, {"generation": "1"}, {"sha256": 5},
           {"more": 1}, {"state": "0" * 16}, {"state": None}]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_a_cache_record_that_makes_no_sense_is_ignored(tmp_path: Path, record: object) -> None:
    with Collection.create(tmp_path / "c", hasher()) as collection:
        collection.add(PIXELS[:50])
    with closing(sqlite3.connect(tmp_path / "c/items.db")) as conn, conn:
        stored = json.loads(conn.execute("SELECT value FROM settings WHERE key = 'cache'").fetchone()[0])
        text = json.dumps(stored | record if isinstance(record, dict) and record else record)
        conn.execute("UPDATE settings SET value = ? WHERE key = 'cache'", (text,))
    watch = threading.Timer(60, os.abort)  # waiting for a later generation would never end
    watch.start()
    check_answers(tmp_path / "c", "bitflip")
    with Collection.open(tmp_path / "c") as collection:
        collection.remove([1])
    check_answers(tmp_path / "c", "bitflip")
    watch.cancel()
    assert len(caches(tmp_path / "c")) == 1


def test_changes_that_contradict_the_cache_are_not_applied(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "c", hasher()) as collection:
        collection.add(PIXELS[:50])
        collection.add(PIXELS[50:60])
    with closing(sqlite3.connect(tmp_path / "c/items.db")) as conn, conn:
        generation = int(conn.execute("SELECT value FROM settings WHERE key = 'generation'").fetchone()[0])
        conn.execute("INSERT OR REPLACE INTO changes VALUES (?, 'add', 7)", (generation,))  # which the cache holds
    check_answers(tmp_path / "c", "bitflip")
