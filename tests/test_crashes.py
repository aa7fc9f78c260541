"""Collections after their process was killed at any moment, and after a power cut at any write."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.collection import Collection, Hit, Indexed, index_cache, ingest
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.stores.sqlite import SqliteStore

SOAK = "HASHRET_SOAK" in os.environ
ROWS, BATCH = 1500 if SOAK else 600, 50  # images, and images per commit
KILLS = 90 if SOAK else 4  # of each task
SWITCHES = 20 if SOAK else 8  # of the index

# A process with everything loaded forks a child for each job, and kills it after the given number of seconds.
WORKER = """
import json, os, signal, sys, time
import numpy as np, torch
from hashret.collection import Collection, index_cache, ingest, reindexing
from hashret.hasher import Hasher
from hashret.indexes import set_threads

torch.set_num_threads(1), set_threads(1)
ingest.MODEL_CHUNK = ingest.BATCH_ITEMS = reindexing.BATCH_ITEMS = {batch}
index_cache.FEW_CHANGES = 100  # so that the cache file is rewritten

def index(collection, acknowledge, source):
    collection.index(source, committed=lambda lines: [acknowledge(line.path, line.id) for line in lines])

def remove(collection, acknowledge, ids):
    for start in range(0, len(ids), 25):
        collection.remove(ids[start : start + 25])
        [acknowledge(i) for i in ids[start : start + 25]]

def reindex(collection, acknowledge, model):
    collection.reindex(Hasher.load(model))
    acknowledge("switched")

def save(collection, acknowledge, specs):
    for spec in specs:
        collection.use_index(spec)
        acknowledge(spec)

def work(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Collection.open(job["collection"]) as collection:
        acknowledge = lambda *line: os.write(log, json.dumps(line).encode() + b"\\n")
        globals()[job["task"]](collection, acknowledge, job["argument"])

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        try:
            work(job)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    began = time.monotonic()
    if job["after"] is not None:
        time.sleep(job["after"])
        os.kill(child, signal.SIGKILL)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began]), flush=True)
"""


class Worker:
    """Runs tasks on a collection in a child process, which may be killed."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "acknowledged.jsonl"
        command = [sys.executable, "-c", WORKER.replace("{batch}", str(BATCH))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, collection: Path, task: str, argument: Any, after: float | None = None) -> tuple[bool, float]:
        """Run a task, killed after some seconds if `after` is given; return whether it finished, and its duration."""
        self.log.unlink(missing_ok=True)
        job = {"collection": str(collection), "task": task, "argument": argument, "after": after, "log": str(self.log)}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        code, seconds = json.loads(self._process.stdout.readline())
        assert code in ((0,) if after is None else (0, -9))
        return code == 0, seconds

    def acknowledged(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with closing(Worker(tmp_path_factory.mktemp("worker"))) as made:
        yield made


@cache
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (ROWS, 6, 6), np.uint8)


@cache
def hasher(model: str) -> Hasher:
    return Hasher(model, 16).fit(images()[:200])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "images.npy"
    np.save(path, images())
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Return the folder of a collection of all images."""
    folder = tmp_path_factory.mktemp("full") / "c"
    with Collection.create(folder, hasher("lsh")) as collection:
        collection.index(source)
    return folder


def state(collection: Collection) -> tuple[NDArray[np.int64], Codes]:
    """Return ids and codes of the current model, read by sqlite3 from a database that passes its integrity checks."""
    with closing(sqlite3.connect(collection.path / "items.db")) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
        sql = "SELECT item_id, code FROM codes WHERE fingerprint = ? ORDER BY item_id"
        found = conn.execute(sql, (collection.fingerprint,)).fetchall()
        assert len(found) == conn.execute("SELECT count(*) FROM items").fetchone()[0]
        assert conn.execute("SELECT count(*) FROM items WHERE id NOT IN (SELECT item_id FROM paths)").fetchone() == (0,)
    codes = np.frombuffer(b"".join(code for _, code in found), np.uint8).reshape(len(found), 2)
    return np.array([i for i, _ in found], np.int64), codes


def check(folder: Path, rng: random.Random) -> tuple[set[int], str]:
    """Check results against brute force over the database; return the ids in it, and the fingerprint of the codes."""
    with Collection.open(folder) as collection:
        ids, codes = state(collection)
        queries = np.frombuffer(rng.randbytes(8), np.uint8).reshape(4, 2)
        answers = zip(
            queries, collection.query_codes(queries, 7), collection.query_codes(queries, None, 3), strict=True
        )
        for query, near, within in answers:
            distances = hamming(query[None], codes)[0].tolist()
            right = sorted(zip(distances, ids.tolist(), strict=True))
            found = [(hit.distance, hit.id) for hit in near]
            if collection.info()["index"] != "bitflip":  # equal by distance
                assert set(found) <= set(right) and len(set(found)) == len(found)
                found, right = [(d, 0) for d, _ in found], [(d, 0) for d, _ in right]
            assert found == right[:7]
            assert [hit.distance for hit in within] == [d for d, _ in right if d <= 3]
        return set(ids.tolist()), collection.fingerprint


def check_found(folder: Path, item_ids: dict[str, int]) -> None:
    """Check that each of these paths is found by its image at distance 0, with the id of its item."""
    rows = [int(path.rpartition("#")[2]) for path in item_ids]
    with Collection.open(folder) as collection:
        answers: list[list[Hit]] = collection.query_batch(images()[rows], None, 0) if rows else []
    for (path, i), hits in zip(item_ids.items(), answers, strict=True):
        assert any(hit.id == i and path in hit.paths for hit in hits), path


@contextmanager
def copy(folder: Path, to: Path) -> Iterator[Path]:
    shutil.copytree(folder, to)
    yield to
    shutil.rmtree(to)


def test_killed_while_indexing(tmp_path: Path, worker: Worker, source: Path) -> None:
    rng, kills = random.Random(1), 0
    Collection.create(tmp_path / "empty", hasher("lsh")).close()
    with copy(tmp_path / "empty", tmp_path / "c") as folder:
        _, seconds = worker(folder, "index", str(source))
    while kills < KILLS:
        acknowledged: dict[str, int] = {}
        with copy(tmp_path / "empty", tmp_path / "c") as folder:
            done = False
            while not done:
                done, _ = worker(folder, "index", str(source), rng.uniform(0, seconds))
                kills += not done
                acknowledged |= dict(worker.acknowledged())
                check(folder, rng)
                check_found(folder, acknowledged)
                done |= kills >= KILLS
            worker(folder, "index", str(source))
            assert len(check(folder, rng)[0]) == ROWS
            with Collection.open(folder) as collection:
                assert collection.index(source).unchanged == ROWS


def test_killed_while_removing(tmp_path: Path, worker: Worker, full: Path) -> None:
    rng, kills = random.Random(2), 0
    everything, _ = check(full, rng)
    doomed = rng.sample(sorted(everything), ROWS // 2)
    with copy(full, tmp_path / "c") as folder:
        _, seconds = worker(folder, "remove", doomed)
    while kills < KILLS:
        with copy(full, tmp_path / "c") as folder:
            removed: set[int] = set()
            done = False
            while not done:
                done, _ = worker(folder, "remove", doomed, rng.uniform(0, seconds))
                kills += not done
                removed |= {i for (i,) in worker.acknowledged()}
                remaining, _ = check(folder, rng)
                assert not remaining & removed and everything - set(doomed) <= remaining
                done |= kills >= KILLS
            worker(folder, "remove", doomed)
            assert check(folder, rng)[0] == everything - set(doomed)


def test_killed_while_reindexing(tmp_path: Path, worker: Worker, full: Path) -> None:
    rng, kills = random.Random(3), 0
    old, new = hasher("lsh").fingerprint, hasher("pca").fingerprint
    hasher("pca").save(tmp_path / "model")
    with copy(full, tmp_path / "c") as folder:
        _, seconds = worker(folder, "reindex", str(tmp_path / "model"))
    while kills < KILLS:
        with copy(full, tmp_path / "c") as folder:
            done = False
            while not done:
                done, _ = worker(folder, "reindex", str(tmp_path / "model"), rng.uniform(0, seconds))
                kills += not done
                ids, fingerprint = check(folder, rng)
                assert len(ids) == ROWS and fingerprint in (old, new)
                assert fingerprint == new or not worker.acknowledged()
                done |= kills >= KILLS
            worker(folder, "reindex", str(tmp_path / "model"))
            assert check(folder, rng)[1] == new
            with Collection.open(folder) as collection:
                assert collection.query(images()[5])[0].distance == 0


def test_killed_while_saving_the_index(tmp_path: Path, worker: Worker, full: Path) -> None:
    rng, kills = random.Random(4), 0
    specs = ["faiss:BFlat", "bitflip"] * (SWITCHES // 2)
    with copy(full, tmp_path / "c") as folder:
        _, seconds = worker(folder, "save", specs)
        while kills < KILLS:
            done, _ = worker(folder, "save", specs, rng.uniform(0, seconds))
            kills += not done
            with Collection.open(folder) as collection:
                done_specs = [spec for (spec,) in worker.acknowledged()]
                last = done_specs[-1:]
                assert not last or collection.info()["index"] in (last[0], specs[specs[0] == last[0]])
            assert len(check(folder, rng)[0]) == ROWS
        worker(folder, "save", specs)
        assert len(list((folder / "index").iterdir())) == 1  # killed processes leave no file behind


class Disk:
    """The durable state of a folder: contents of files and names in folders as of their last fsync.

    SQLite syncs its own files (`synchronous = FULL`), so they are copied as they are.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, happened: Callable[[], None]) -> None:
        self._folder = folder
        self._contents: dict[int, bytes] = {}  # of files, by inode
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}  # in folders, by inode: inodes, and which are folders
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            happened()
            fsync(descriptor)
            self._sync(Path(f"/proc/self/fd/{descriptor}").resolve())
            happened()

        def replaced(*arguments: Any, **options: Any) -> None:
            replace(*arguments, **options)
            happened()

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", replaced)
        self._sync(folder)

    def _sync(self, path: Path) -> None:
        if path.is_dir():
            entries = {entry.name: (entry.stat().st_ino, entry.is_dir()) for entry in path.iterdir()}
            self._names[path.stat().st_ino] = entries
        else:
            self._contents[path.stat().st_ino] = path.read_bytes()

    def after_power_loss(self, to: Path) -> Path:
        """Write the state after a power cut to a folder, and return it."""
        shutil.rmtree(to, ignore_errors=True)
        self._copy(self._folder.stat().st_ino, to)
        for file in self._folder.rglob("items.db*"):
            copied = to / file.relative_to(self._folder)
            if (copied.parent / "items.db").exists() and not copied.name.endswith("-shm"):
                shutil.copyfile(file, copied)
        return to

    def _copy(self, inode: int, to: Path) -> None:
        to.mkdir()
        for name, (entry, is_folder) in self._names.get(inode, {}).items():
            if is_folder:
                self._copy(entry, to / name)
            else:
                (to / name).write_bytes(self._contents.get(entry, b""))  # empty if only the name is durable


def test_a_power_cut_loses_nothing_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    """Cut the power before and after every fsync and rename: all that was not synced is lost."""
    monkeypatch.setattr(ingest, "MODEL_CHUNK", 250)
    monkeypatch.setattr(ingest, "BATCH_ITEMS", 250)
    monkeypatch.setattr(index_cache, "FEW_CHANGES", 100)
    moments, acknowledged, removed = 0, set[int](), set[int]()
    models = {hasher(model).fingerprint: hasher(model) for model in ("lsh", "pca")}
    rng, checking, created = random.Random(5), False, False

    def lose_power() -> None:
        nonlocal moments, checking
        if checking:
            return
        checking, moments = True, moments + 1
        folder = disk.after_power_loss(tmp_path / "lost") / "a" / "c"
        if created or (folder / "items.db").exists():
            ids, fingerprint = check(folder, rng)
            assert acknowledged <= ids and not removed & ids
            with Collection.open(folder) as collection:
                assert collection.hasher.fingerprint == fingerprint in models
                for i in random.Random(moments).sample(sorted(acknowledged), min(5, len(acknowledged))):
                    blob = Path(collection.get(i).paths[0])
                    if blob.parent.name == "blobs":
                        code = models[fingerprint].encode([blob])
                        assert any(hit.id == i for hit in collection.query_codes(code, None, 0)[0])
        checking = False

    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk", monkeypatch, lose_power)
    with Collection.create(tmp_path / "disk/a/c", hasher("lsh")) as collection:
        created = True
        lose_power()
        for row in range(0, 40, 8):
            acknowledged |= set(collection.add(images()[row : row + 8]))
            lose_power()
        caches, batches = set((tmp_path / "disk/a/c/index").iterdir()), list[int]()

        def acknowledge(lines: list[Indexed]) -> None:
            acknowledged.update(line.id or 0 for line in lines)
            batches.append(len(lines))

        collection.index(source, committed=acknowledge)
        assert len(batches) > 2 and not caches & set((tmp_path / "disk/a/c/index").iterdir())
        lose_power()
        for i in (3, 4, 50):
            collection.remove([i])
            acknowledged.discard(i)
            removed.add(i)
            lose_power()
        with closing(SqliteStore(collection.path)) as store, store.transaction() as transaction:  # by another process
            transaction.remove([60])
        acknowledged.discard(60)
        collection.use_index("faiss:BFlat")
        collection.use_index("bitflip")
        collection.reindex(hasher("pca"))
        assert collection.fingerprint == hasher("pca").fingerprint
        lose_power()
    assert moments > 100


def test_a_folder_deleted_while_it_is_open(tmp_path: Path, full: Path, source: Path) -> None:
    with copy(full, tmp_path / "c") as folder:
        with Collection.open(folder) as writer, Collection.open(folder, read_only=True) as reader:
            code = reader.hasher.encode_pixels(images()[:1, :, :, None])
            before = reader.query_codes(code, 5)
            shutil.rmtree(folder)
            assert before
            for access in (
                lambda: reader.query_codes(code, 5),
                lambda: writer.query_codes(code, 5),
                lambda: writer.add(images()[:1] ^ 1),
                lambda: writer.remove([1]),
                lambda: writer.index(source),
                lambda: writer.use_index("faiss"),
            ):
                with pytest.raises(HashretError, match="items.db is no longer there"):
                    access()
        assert not folder.exists()
        with pytest.raises(HashretError, match="there is no collection at"):
            Collection.open(folder)
        folder.mkdir()  # for `copy` to remove


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 600 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path, source: Path) -> None:
    rng, acknowledged = random.Random(6), dict[str, int]()

    def committed(lines: list[Indexed]) -> None:
        acknowledged.update((line.path, line.id) for line in lines if line.id is not None)

    folder = small_disk / "c"
    with Collection.create(folder, hasher("lsh")) as collection:
        for size in (50, 100, 200, 400, 800, 1600):
            rows = source.with_name(f"{size}.npy")
            np.save(rows, np.random.default_rng(size).integers(0, 256, (size, 6, 6), np.uint8))
            try:
                collection.index(rows, committed=committed)
            except HashretError as error:
                assert "is full" in str(error) or "cannot be written" in str(error)
                break
        else:
            raise AssertionError("the disk was large enough")
        with pytest.raises(HashretError, match=r"is full|cannot be (read or )?written"):
            collection.add(np.random.default_rng(1).integers(0, 256, (3, 500, 500), np.uint8))
    assert len(acknowledged) >= 50
    assert set(acknowledged.values()) <= check(folder, rng)[0]
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    with Collection.open(folder) as collection:
        collection.index(rows)
        assert {i for i in acknowledged.values() if collection.get(i)} == set(acknowledged.values())
    assert len(check(folder, rng)[0]) >= size
