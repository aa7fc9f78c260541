"""Backups of collections in use, and collections that go back to a backup while they are open."""

import functools
import os
import random
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hashret import Collection, Hasher
from hashret.cli.app import run
from hashret.codes import Codes, hamming
from hashret.collection import backup
from hashret.collection.index_cache import IndexCache
from hashret.collection.repair import check, restore_contents
from hashret.errors import HashretError

IMAGES = np.random.default_rng(0).integers(0, 256, (2000, 8, 8), np.uint8)
SECONDS = 600 if os.environ.get("HASHRET_SOAK") else 4


@pytest.fixture(scope="module")
def hasher() -> Hasher:
    return Hasher(bits=64, model="lsh").fit(IMAGES[:200])


@functools.cache
def codes_of(hasher: Hasher) -> Codes:
    return hasher.encode(IMAGES)


@pytest.fixture
def collection(tmp_path: Path, hasher: Hasher) -> Iterator[Collection]:
    with Collection.create(tmp_path / "photos", hasher) as created:
        add(created, range(40))
        yield created


def add(collection: Collection, numbers: range) -> list[int]:
    """Add the images with these numbers, which are their metadata too."""
    return collection.add(list(IMAGES[numbers]), [{"n": n} for n in numbers])


def check_hits(collection: Collection, hasher: Hasher, query: int) -> None:
    """Check that each hit has the distance of its image: an index of another state has other images under its ids."""
    codes = codes_of(hasher)
    hits = collection.query_codes(codes[query, None], 20)[0]
    distances = [hamming(codes[query, None], codes[hit.metadata["n"], None])[0, 0] for hit in hits if hit.metadata]
    assert [hit.distance for hit in hits] == distances and len({hit.id for hit in hits}) == len(hits)


def check_nearest(collection: Collection, hasher: Hasher) -> None:
    """Compare the nearest neighbours with brute force over all items."""
    codes = codes_of(hasher)
    numbers = {item.id: item.metadata["n"] for item in collection.items(limit=5000) if item.metadata}
    ids = np.array(sorted(numbers))
    for query, hits in zip(codes[::100], collection.query_codes(codes[::100].copy(), 5), strict=True):
        distances = hamming(query[None], codes[[numbers[i] for i in ids.tolist()]])[0]
        order = np.lexsort((ids, distances))[:5]
        assert [(hit.distance, hit.id) for hit in hits] == list(zip(distances[order], ids[order], strict=True))
        assert all(hit.metadata == {"n": numbers[hit.id]} for hit in hits)


def test_a_backup_is_a_collection_of_one_state(tmp_path: Path, collection: Collection, hasher: Hasher) -> None:
    """Items with stored contents are added and removed during the copy."""
    stop = threading.Event()

    def write() -> None:
        for start in range(100, 2000, 10):
            ids = add(collection, range(start, start + 10))
            collection.remove(ids[:5])
            if stop.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(collection) < 60:
            time.sleep(0.01)
        report = collection.backup(tmp_path / "backup")
    finally:
        stop.set()
        writer.join()
    with Collection.open(tmp_path / "backup") as copy:
        assert (report.items, report.files, report.missing) == (len(copy), len(copy) + 1, [])
        assert check(copy.path) == [] and 60 <= len(copy) < len(collection)
        assert {file.name.split("-")[0] for file in copy.path.iterdir()} == {"items.db", "models", "blobs"}
        check_nearest(copy, hasher)
        add(copy, range(50, 60))
        check_nearest(copy, hasher)
    assert not list(tmp_path.glob("*.new"))


def test_contents_that_are_removed_during_a_backup(tmp_path: Path, collection: Collection) -> None:
    """The database is copied again, so that it refers to no content that is gone."""
    ids = [item.id for item in collection.items(limit=40)]

    def remove(_: object) -> None:
        if len(ids) > 20:
            collection.remove([ids.pop(), ids.pop(0)])

    report = collection.backup(tmp_path / "backup", remove)
    assert report == (20, 21, []) and check(tmp_path / "backup") == []
    assert len(list((tmp_path / "backup" / "blobs").iterdir())) == 20


def test_lost_contents_are_named(tmp_path: Path, collection: Collection, capsys: pytest.CaptureFixture[str]) -> None:
    (lost,) = list((collection.path / "blobs").iterdir())[3:4]
    lost.unlink()
    report = collection.backup(tmp_path / "backup")
    assert report == (40, 40, [f"blobs/{lost.name}"])
    assert run(["backup", str(tmp_path / "again"), "-c", str(collection.path)]) == 1
    messages = capsys.readouterr().err
    assert f"copied 40 items and 40 files to {tmp_path / 'again'}" in messages
    assert f"1 file of {collection.path} could not be copied, such as blobs/{lost.name}" in messages
    assert len(check(tmp_path / "again")) == 1


def test_contents_that_are_recorded_as_absent_are_not_missing(tmp_path: Path, collection: Collection) -> None:
    next((collection.path / "blobs").iterdir()).unlink()
    assert restore_contents(collection.path) == (0, 1)
    assert collection.backup(tmp_path / "backup") == (40, 40, []) and check(tmp_path / "backup") == []


def test_a_backup_goes_to_any_path(tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(collection.path)
    names = ["../beside"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"../not UTF-8 \xff"))
    for name in names:
        assert collection.backup(name).items == 40 and check(Path(name).resolve()) == []
    (tmp_path / "link").symlink_to(collection.path)
    with pytest.raises(HashretError, match="is in the folder of the collection"):
        collection.backup(tmp_path / "link" / "copy")


def test_a_backup_replaces_nothing(tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HashretError, match="photos exists: choose another folder"):
        collection.backup(collection.path)
    with pytest.raises(HashretError, match="is in the folder of the collection"):
        collection.backup(collection.path / "models" / "copy")
    (tmp_path / "file").touch()
    with pytest.raises(HashretError, match="cannot be written"):
        collection.backup(tmp_path / "file" / "backup")
    monkeypatch.setattr(backup, "MAX_ATTEMPTS", 0)
    with pytest.raises(HashretError, match="back it up again"):
        collection.backup(tmp_path / "backup")
    assert {file.name for file in tmp_path.iterdir()} == {"file", "photos"}


def restore_in_place(folder: Path, saved: Path) -> None:
    """Restore the database as `sqlite3 items.db .restore` does."""
    with closing(sqlite3.connect(saved / "items.db")) as source, closing(sqlite3.connect(folder / "items.db")) as db:
        source.backup(db)


def replace_database(folder: Path, saved: Path) -> None:
    shutil.copy(saved / "items.db", folder / "copy")
    for suffix in ("-wal", "-shm"):  # SQLite would apply the log to the other database
        (folder / f"items.db{suffix}").unlink(missing_ok=True)
    (folder / "copy").replace(folder / "items.db")


def replace_folder(folder: Path, saved: Path) -> None:
    folder.rename(folder.with_name(f"old-{time.monotonic_ns()}"))
    shutil.copytree(saved, folder)


@pytest.mark.parametrize("restore", [restore_in_place, replace_database, replace_folder])
@pytest.mark.parametrize(("read_only", "queried"), [(False, True), (True, False)])
def test_an_open_collection_follows_a_restored_backup(
    tmp_path: Path,
    collection: Collection,
    hasher: Hasher,
    restore: Callable[[Path, Path], None],
    read_only: bool,
    queried: bool,
) -> None:
    """It may be `queried` in the restored state, or only after as many commits as before."""
    collection.backup(tmp_path / "backup")
    add(collection, range(100, 140))
    add(collection, range(200, 240))
    with Collection.open(collection.path, read_only=read_only) as live:
        check_nearest(live, hasher)
        generation, state = live.generation, live.state
        restore(collection.path, tmp_path / "backup")
        if queried:
            check_nearest(live, hasher)  # the index in memory is ahead of the database
            assert len(live) == 40 and live.generation == generation - 2
            live.check_ready()
        with Collection.open(collection.path) as writer:
            assert add(writer, range(300, 340)) == list(range(41, 81))  # ids that other images had
            add(writer, range(400, 440))
            check_nearest(writer, hasher)
        assert live.generation == generation and live.state != state
        check_nearest(live, hasher)  # the generation is the one of the index in memory before
    with Collection.open(collection.path) as later:
        check_nearest(later, hasher)


def test_an_index_cache_of_another_history_is_not_loaded(
    tmp_path: Path, collection: Collection, hasher: Hasher
) -> None:
    collection.backup(tmp_path / "backup")
    for history in (100, 300):  # of equal numbers of commits
        with Collection.open(collection.path) as writer:
            add(writer, range(history, history + 40))
            writer.rebuild_index()
            check_nearest(writer, hasher)
        if history == 100:
            index = [(file, file.read_bytes()) for file in (collection.path / "index").iterdir()]
            replace_database(collection.path, tmp_path / "backup")
    for file, data in index:
        file.write_bytes(data)
    with Collection.open(collection.path) as later:
        check_nearest(later, hasher)


def test_readers_and_a_writer_while_backups_are_restored(
    tmp_path: Path, collection: Collection, hasher: Hasher
) -> None:
    collection.backup(tmp_path / "backup")
    stop, errors, queries = threading.Event(), list[BaseException](), [0] * 8

    def read(number: int) -> None:
        rng = random.Random(number)
        try:
            while not stop.is_set():
                try:
                    check_hits(shared[number % 2], hasher, rng.randrange(2000))
                    queries[number] += 1
                except HashretError as error:
                    if "no longer there" not in str(error):  # between the two renames of a folder
                        raise
        except BaseException as error:
            errors.append(error)

    with Collection.open(collection.path) as first, Collection.open(collection.path, read_only=True) as second:
        shared = first, second
        readers = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for reader in readers:
            reader.start()
        end, writes, rng = time.monotonic() + SECONDS, 0, random.Random(9)
        while not errors and (time.monotonic() < end or writes < 10 or min(queries) < 3):
            start, writes = rng.randrange(100, 1900), writes + 1
            add(collection, range(start, start + rng.randrange(1, 40)))
            if rng.random() < 0.3:
                collection.remove(rng.sample(range(1, 60), 3))
            if not writes % 5:
                rng.choice([restore_in_place, replace_folder])(collection.path, tmp_path / "backup")
        stop.set()
        for reader in readers:
            reader.join()
        assert not errors, errors[0]
        for live in (*shared, collection):
            check_nearest(live, hasher)


def test_a_service_follows_a_restored_backup(
    tmp_path: Path, collection: Collection, hasher: Hasher, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
    pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")
    code = codes_of(hasher)[300].tobytes().hex()
    with httpx.Client(base_url=serve(collection)) as http:

        def nearest(number: int = 300) -> list[int]:
            code = codes_of(hasher)[number].tobytes().hex()
            response = http.post("/v1/query", json={"code": code, "k": 1})
            return [hit["metadata"]["n"] for hit in response.raise_for_status().json()["hits"]]

        collection.backup(tmp_path / "backup")
        add(collection, range(280, 320))
        assert nearest() == [300]
        replace_folder(collection.path, tmp_path / "backup")
        assert nearest()[0] < 40 and http.get("/readyz").status_code == 200
        with Collection.open(collection.path) as writer:
            add(writer, range(290, 330))
        assert nearest() == [300] and http.get("/v1/info").json()["items"] == 80
        replace_folder(collection.path, tmp_path / "backup")
        with Collection.open(collection.path) as writer:
            add(writer, range(630, 670))
        assert nearest(640) == [640]  # by the id and in the generation of the last answer
        with Collection.open(collection.path) as writer:
            add(writer, range(290, 330))
        collection.path.rename(tmp_path / "away")
        for response in http.get("/readyz"), http.get("/v1/info"), http.post("/v1/query", json={"code": code}):
            assert response.status_code == 503 and "no longer there" in response.json()["detail"]
        (tmp_path / "away").rename(collection.path)
        assert nearest() == [300] and http.get("/readyz").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(IndexCache, "current", property(lambda cache: object()))  # no query can be answered
            assert http.get("/readyz").status_code == 503 and http.get("/healthz").status_code == 200
        assert http.get("/readyz").status_code == 200
