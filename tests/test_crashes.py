"""What a collection is after its process was killed at any moment, and after the power went at any write."""

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
from hashret.collection import Collection, Hit, Indexed
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.stores.sqlite import SqliteStore

SOAK = "HASHRET_SOAK" in os.environ
ROWS, BATCH = 1500, 50  # how many images there are, and how many are committed together
KILLS = 90 if SOAK else 9  # of each kind of work

# A process that has loaded everything forks one for each piece of work, and kills that one after so many seconds.
WORKSHOP = """
import json, os, signal, sys, time
import numpy as np, torch
from hashret.collection import ingest, reindexing
from hashret.collection import Collection
from hashret.hasher import Hasher
from hashret.indexes import set_threads

torch.set_num_threads(1), set_threads(1)
ingest.BATCH_ITEMS = reindexing.BATCH_ITEMS = {batch}

def index(there, told, source):
    there.index(source, committed=lambda lines: [told(line.path, line.id) for line in lines])

def remove(there, told, ids):
    for start in range(0, len(ids), 25):
        there.remove(ids[start : start + 25])
        [told(i) for i in ids[start : start + 25]]

def reindex(there, told, model):
    there.reindex(Hasher.load(model))
    told("switched")

def save(there, told, kinds):
    for kind in kinds:
        there.use_index(kind)
        told(kind)

def work(job):
    file = os.open(job["told"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Collection.open(job["collection"]) as there:
        globals()[job["work"]](there, lambda *line: os.write(file, json.dumps(line).encode() + b"\\n"), job["with"])

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


class Workshop:
    """Work on a collection in a process of its own, which may be killed."""

    def __init__(self, folder: Path) -> None:
        self.told = folder / "told.jsonl"
        command = [sys.executable, "-c", WORKSHOP.replace("{batch}", str(BATCH))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, collection: Path, work: str, what: Any, after: float | None = None) -> tuple[bool, float]:
        """Whether it came to its end, and how long it took; `acknowledged` tells what it said to have done."""
        self.told.unlink(missing_ok=True)
        job = {"collection": str(collection), "work": work, "with": what, "after": after, "told": str(self.told)}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        code, seconds = json.loads(self._process.stdout.readline())
        assert code in ((0,) if after is None else (0, -9))
        return code == 0, seconds

    def acknowledged(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.told.read_text().splitlines()] if self.told.exists() else []

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with closing(Workshop(tmp_path_factory.mktemp("workshop"))) as made:
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
    """A collection of all images."""
    folder = tmp_path_factory.mktemp("full") / "c"
    with Collection.create(folder, hasher("lsh")) as there:
        there.index(source)
    return folder


def state(there: Collection) -> tuple[NDArray[np.int64], Codes]:
    """Ids and codes of the current model as another program reads them in a database that has to be sound."""
    with closing(sqlite3.connect(there.path / "items.db")) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
        sql = "SELECT item_id, code FROM codes WHERE fingerprint = ? ORDER BY item_id"
        found = conn.execute(sql, (there.fingerprint,)).fetchall()
        assert len(found) == conn.execute("SELECT count(*) FROM items").fetchone()[0]
        assert conn.execute("SELECT count(*) FROM items WHERE id NOT IN (SELECT item_id FROM paths)").fetchone() == (0,)
    codes = np.frombuffer(b"".join(code for _, code in found), np.uint8).reshape(len(found), 2)
    return np.array([i for i, _ in found], np.int64), codes


def check(folder: Path, chance: random.Random) -> tuple[set[int], str]:
    """Answers equal brute force over the database; the ids that are there, and the model they are coded with."""
    with Collection.open(folder) as there:
        ids, codes = state(there)
        queries = np.frombuffer(chance.randbytes(8), np.uint8).reshape(4, 2)
        answers = zip(queries, there.query_codes(queries, 7), there.query_codes(queries, None, 3), strict=True)
        for query, near, within in answers:
            distances = hamming(query[None], codes)[0].tolist()
            right = sorted(zip(distances, ids.tolist(), strict=True))
            found = [(hit.distance, hit.id) for hit in near]
            if there.info()["index"] != "bitflip":  # equal by distance
                assert set(found) <= set(right) and len(set(found)) == len(found)
                found, right = [(d, 0) for d, _ in found], [(d, 0) for d, _ in right]
            assert found == right[:7]
            assert [hit.distance for hit in within] == [d for d, _ in right if d <= 3]
        return set(ids.tolist()), there.fingerprint


def check_found(folder: Path, wanted: dict[str, int]) -> None:
    """Each of these paths is found at distance 0 by its image, and leads to its item."""
    rows = [int(path.rpartition("#")[2]) for path in wanted]
    with Collection.open(folder) as there:
        answers: list[list[Hit]] = there.query_batch(images()[rows], None, 0) if rows else []
    for (path, i), hits in zip(wanted.items(), answers, strict=True):
        assert any(hit.id == i and path in hit.paths for hit in hits), path


@contextmanager
def copy(folder: Path, to: Path) -> Iterator[Path]:
    shutil.copytree(folder, to)
    yield to
    shutil.rmtree(to)


def test_killed_while_indexing(tmp_path: Path, workshop: Workshop, source: Path) -> None:
    chance, kills = random.Random(1), 0
    Collection.create(tmp_path / "empty", hasher("lsh")).close()
    with copy(tmp_path / "empty", tmp_path / "c") as folder:
        _, seconds = workshop(folder, "index", str(source))
    while kills < KILLS:
        acknowledged: dict[str, int] = {}
        with copy(tmp_path / "empty", tmp_path / "c") as folder:
            done = False
            while not done:
                done, _ = workshop(folder, "index", str(source), chance.uniform(0, seconds))
                kills += not done
                acknowledged |= dict(workshop.acknowledged())
                check(folder, chance)
                check_found(folder, acknowledged)
                done |= kills >= KILLS
            workshop(folder, "index", str(source))
            assert len(check(folder, chance)[0]) == ROWS
            with Collection.open(folder) as there:
                assert there.index(source).unchanged == ROWS


def test_killed_while_removing(tmp_path: Path, workshop: Workshop, full: Path) -> None:
    chance, kills = random.Random(2), 0
    everything, _ = check(full, chance)
    doomed = chance.sample(sorted(everything), ROWS // 2)
    with copy(full, tmp_path / "c") as folder:
        _, seconds = workshop(folder, "remove", doomed)
    while kills < KILLS:
        with copy(full, tmp_path / "c") as folder:
            gone: set[int] = set()
            done = False
            while not done:
                done, _ = workshop(folder, "remove", doomed, chance.uniform(0, seconds))
                kills += not done
                gone |= {i for (i,) in workshop.acknowledged()}
                there, _ = check(folder, chance)
                assert not there & gone and everything - set(doomed) <= there
                done |= kills >= KILLS
            workshop(folder, "remove", doomed)
            assert check(folder, chance)[0] == everything - set(doomed)


def test_killed_while_reindexing(tmp_path: Path, workshop: Workshop, full: Path) -> None:
    chance, kills = random.Random(3), 0
    old, new = hasher("lsh").fingerprint, hasher("pca").fingerprint
    hasher("pca").save(tmp_path / "model")
    with copy(full, tmp_path / "c") as folder:
        _, seconds = workshop(folder, "reindex", str(tmp_path / "model"))
    while kills < KILLS:
        with copy(full, tmp_path / "c") as folder:
            done = False
            while not done:
                done, _ = workshop(folder, "reindex", str(tmp_path / "model"), chance.uniform(0, seconds))
                kills += not done
                ids, fingerprint = check(folder, chance)
                assert len(ids) == ROWS and fingerprint in (old, new)
                assert fingerprint == new or not workshop.acknowledged()
                done |= kills >= KILLS
            workshop(folder, "reindex", str(tmp_path / "model"))
            assert check(folder, chance)[1] == new
            with Collection.open(folder) as there:
                assert there.query(images()[5])[0].distance == 0


def test_killed_while_saving_the_index(tmp_path: Path, workshop: Workshop, full: Path) -> None:
    chance, kills = random.Random(4), 0
    kinds = ["faiss:BFlat", "bitflip"] * 10
    with copy(full, tmp_path / "c") as folder:
        _, seconds = workshop(folder, "save", kinds)
        while kills < KILLS:
            done, _ = workshop(folder, "save", kinds, chance.uniform(0, seconds))
            kills += not done
            with Collection.open(folder) as there:
                told = [kind for (kind,) in workshop.acknowledged()]
                assert not told or there.info()["index"] in (told[-1], kinds[kinds[0] == told[-1]])
            assert len(check(folder, chance)[0]) == ROWS
        workshop(folder, "save", kinds)
        assert len(list((folder / "index").iterdir())) == 1  # no file of those killed is left


class Disk:
    """What of a folder is durable: contents of files as they were last synced, and names as their folders were.

    SQLite syncs its files by itself and is asked to (`synchronous = FULL`); they are taken as they are.
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
        """A copy of what would be there if the power went now."""
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
                (to / name).write_bytes(self._contents.get(entry, b""))  # nothing, if only the name came to the disk


def test_nothing_acknowledged_goes_with_the_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    """Before and after every sync and rename of ours, with all that was not synced by then lost."""
    moments, acknowledged, removed = 0, set[int](), set[int]()
    models = {hasher(model).fingerprint: hasher(model) for model in ("lsh", "pca")}
    chance, checking, created = random.Random(5), False, False

    def lose_power() -> None:
        nonlocal moments, checking
        if checking:
            return
        checking, moments = True, moments + 1
        folder = disk.after_power_loss(tmp_path / "lost") / "a" / "c"
        if created or (folder / "items.db").exists():
            ids, fingerprint = check(folder, chance)
            assert acknowledged <= ids and not removed & ids
            with Collection.open(folder) as there:
                assert there.hasher.fingerprint == fingerprint in models
                for i in random.Random(moments).sample(sorted(acknowledged), min(5, len(acknowledged))):
                    blob = Path(there.get(i).paths[0])
                    if blob.parent.name == "blobs":
                        code = models[fingerprint].encode([blob])
                        assert any(hit.id == i for hit in there.query_codes(code, None, 0)[0])
        checking = False

    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk", monkeypatch, lose_power)
    with Collection.create(tmp_path / "disk/a/c", hasher("lsh")) as there:
        created = True
        lose_power()
        for row in range(0, 40, 8):
            acknowledged |= set(there.add(images()[row : row + 8]))
            lose_power()
        there.index(source, committed=lambda lines: acknowledged.update(line.id or 0 for line in lines))
        lose_power()
        for i in (3, 4, 50):
            there.remove([i])
            acknowledged.discard(i)
            removed.add(i)
            lose_power()
        with closing(SqliteStore(there.path)) as store, store.transaction() as transaction:  # by another process
            transaction.remove([60])
        acknowledged.discard(60)
        there.use_index("faiss:BFlat")
        there.use_index("bitflip")
        there.reindex(hasher("pca"))
        assert there.fingerprint == hasher("pca").fingerprint
        lose_power()
    assert moments > 100


def test_a_folder_that_is_deleted_under_its_readers(tmp_path: Path, full: Path, source: Path) -> None:
    with copy(full, tmp_path / "c") as folder:
        with Collection.open(folder) as writer, Collection.open(folder, read_only=True) as reader:
            code = reader.hasher.encode_pixels(images()[:1, :, :, None])
            before = reader.query_codes(code, 5)
            shutil.rmtree(folder)
            for view in (reader, writer):
                assert view.query_codes(code, 5) == before
            for write in (
                lambda: writer.add(images()[:1] ^ 1),
                lambda: writer.remove([1]),
                lambda: writer.index(source),
                lambda: writer.use_index("faiss"),
            ):
                with pytest.raises(HashretError, match="was deleted or replaced since it was opened"):
                    write()
        assert not folder.exists()
        with pytest.raises(HashretError, match="there is no collection at"):
            Collection.open(folder)
        folder.mkdir()  # for `copy` to remove


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path, source: Path) -> None:
    chance, acknowledged = random.Random(6), dict[str, int]()

    def committed(lines: list[Indexed]) -> None:
        acknowledged.update((line.path, line.id) for line in lines if line.id is not None)

    folder = small_disk / "c"
    with Collection.create(folder, hasher("lsh")) as there:
        for size in (50, 100, 200, 400, 800, 1600):
            rows = source.with_name(f"{size}.npy")
            np.save(rows, np.tile(images(), (2, 1, 1))[:size] ^ np.uint8(size % 255))
            try:
                there.index(rows, committed=committed)
            except HashretError as error:
                assert "is full" in str(error) or "cannot be written" in str(error)
                break
        else:
            raise AssertionError("the disk was large enough")
        with pytest.raises(HashretError, match=r"is full|cannot be (read or )?written"):
            there.add(np.random.default_rng(1).integers(0, 256, (3, 500, 500), np.uint8))
    assert len(acknowledged) >= 50
    assert set(acknowledged.values()) <= check(folder, chance)[0]
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    with Collection.open(folder) as there:
        there.index(rows)
        assert {i for i in acknowledged.values() if there.get(i)} == set(acknowledged.values())
    assert len(check(folder, chance)[0]) >= size
