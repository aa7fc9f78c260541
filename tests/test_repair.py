import json
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hashret.cli.app import run
from hashret.collection import Collection
from hashret.collection.repair import Finding, check, recover
from hashret.data.contents import sha256
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.stores import sqlite_repair
from hashret.stores.sqlite import locked
from hashret.stores.sqlite_pages import cells

SOAK = "HASHRET_SOAK" in os.environ


@cache
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (400, 5, 5), np.uint8)


@cache
def hasher(model: str = "lsh") -> Hasher:
    return Hasher(model, 16).fit(images()[:50])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "images.npy"
    np.save(path, images()[:380])
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Return a collection of 397 items, of which 17 have no file of their own."""
    folder = tmp_path_factory.mktemp("made") / "c"
    with Collection.create(folder, hasher()) as collection:
        collection.index(source)
        collection.add(images()[380:])
        collection.remove([5, 6, 400])
    return folder


@pytest.fixture
def folder(tmp_path: Path, original: Path) -> Path:
    return shutil.copytree(original, tmp_path / "c")


def execute(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / "items.db")) as conn:
        conn.execute(sql)
        conn.commit()


def check_found(folder: Path) -> int:
    """Check that each item is found by its own image and has its old id; return their number."""
    with Collection.open(folder) as collection:
        everything = collection.query_codes(np.zeros((1, 2), np.uint8), None, 16)[0]
        answers = collection.query_batch(images()[[hit.id - 1 for hit in everything]], None, 0)
        for hit, equal in zip(everything, answers, strict=True):
            assert hit.paths and hit.id not in (5, 6, 400)
            assert any(found.id == hit.id for found in equal)
        assert len(everything) == len(collection)
        return len(collection)


def test_an_intact_collection_has_no_findings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if "-shm" not in path.name)
    assert check(folder) == []
    assert run(["doctor", "-c", str(folder)]) == 0
    assert run(["doctor", "-c", str(folder), "--recover", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == "[]\n" and err == f"nothing is wrong with the 397 items in {folder}\n" * 2
    after = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if "-shm" not in path.name)
    assert [entry for entry in after if "-wal" not in entry[0].name] == before


@pytest.mark.parametrize("junk", ["zeros", "noise"])
def test_all_rows_outside_a_lost_page_are_recovered(tmp_path: Path, original: Path, source: Path, junk: str) -> None:
    rng = random.Random(0)
    pages = list(range((original / "items.db").stat().st_size // 4096))
    with closing(sqlite3.connect(original / "items.db")) as conn:  # the schema, and the first page of each table
        beginnings = [0, *(row[0] - 1 for row in conn.execute("SELECT rootpage FROM sqlite_master"))]
    saved = []
    for page in pages if SOAK else {*beginnings, *rng.sample(pages, 4)}:
        folder = shutil.copytree(original, tmp_path / f"c{page}")
        with (folder / "items.db").open("r+b") as file:
            file.seek(page * 4096)
            file.write(bytes(4096) if junk == "zeros" else rng.randbytes(4096))
        damaged = (folder / "items.db").read_bytes()
        if check(folder):  # else the page was free
            report = recover(folder)
            assert report.backup.read_bytes() == damaged and report.roots == [f"{source}#"]
            assert check(folder) == []
            assert check_found(folder) == report.items >= 397 - report.dropped
            saved.append(report.items)
        with Collection.open(folder) as collection:
            collection.index(source)
            collection.add(images()[380:])
            collection.remove([400])
            assert all(collection.query_batch(images(), None, 0))
        shutil.rmtree(folder)
    assert len(saved) >= 3 and np.mean(saved) > 300


def test_recovery_with_many_lost_pages(folder: Path) -> None:
    rng = random.Random(1)
    pages = (folder / "items.db").stat().st_size // 4096
    with (folder / "items.db").open("r+b") as file:
        for page in rng.sample(range(1, pages), pages // 5):
            file.seek(page * 4096)
            file.write(rng.randbytes(4096))
    report = recover(folder)
    assert 0 < report.items == check_found(folder)


@pytest.mark.parametrize("size", [512, 4096, 65536])
@pytest.mark.parametrize("lost", [False, True])
def test_rows_are_found_without_their_parent_pages(tmp_path: Path, size: int, lost: bool) -> None:
    """Rows have values of every type, some longer than a page, some only in the log; deleted rows are not found."""
    rng = random.Random(size)
    forms: list[Callable[[], object]] = [
        lambda: None,
        lambda: rng.choice([0, 1]),
        lambda: rng.randrange(-(2**63), 2**63) >> rng.randrange(64),
        rng.random,
        lambda: "é" * rng.choice([0, 1, 50, size // 2]),
        lambda: rng.randbytes(rng.choice([0, 1, size // 5, size, 3 * size])),
    ]
    file = tmp_path / "items.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as conn:
        conn.execute("PRAGMA secure_delete = OFF")  # so that free pages contain old rows
        conn.execute(f"PRAGMA page_size = {size}")
        conn.execute("PRAGMA journal_mode = WAL")
        conn.execute("CREATE TABLE numbered (id INTEGER PRIMARY KEY, a, b, c)")
        conn.execute("CREATE TABLE keyed (key TEXT PRIMARY KEY, a, b) WITHOUT ROWID")
        for i in range(0, 600, 2):
            a, b, c = (rng.choice(forms)() for _ in range(3))
            conn.execute("INSERT INTO numbered VALUES (?, ?, ?, ?)", (i * 2**40 - 7, a, b, c))
            conn.execute("INSERT INTO keyed VALUES (?, ?, ?)", (f"{rng.random():.{i % 99}f}{i}", b, c))
        conn.execute("DELETE FROM numbered WHERE id / 1099511627776 BETWEEN 100 AND 400")
        conn.execute("DELETE FROM keyed WHERE key > '0.4' AND key < '0.6'")
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        conn.execute("INSERT INTO keyed VALUES ('late', 1, NULL)")
        expected = {(row[0], (None, *row[1:])) for row in conn.execute("SELECT * FROM numbered")}
        expected |= {(None, row) for row in conn.execute("SELECT * FROM keyed")}
        for copied in (file, tmp_path / "items.db-wal"):
            shutil.copy(copied, tmp_path / f"copy-{copied.name}")
    copy = (tmp_path / "copy-items.db").rename(tmp_path / "lost.db")
    (tmp_path / "copy-items.db-wal").rename(tmp_path / "lost.db-wal")
    if lost:  # all of the first page except a page size other than the default
        with copy.open("r+b") as opened:
            opened.write(bytes(16))
            opened.seek(0 if size == 4096 else 18)
            opened.write(rng.randbytes(size - 18))
    found = [(cell.rowid, cell.values) for cell in cells(copy)]
    assert expected <= set(found)
    assert all(len(values) == 5 for _, values in set(found) - expected)  # rows of sqlite_schema
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("DELETE FROM paths WHERE item_id = 7", "1 items have no path"),
        ("DELETE FROM items WHERE id = 7", "1 paths lead to no item"),
        ("DELETE FROM codes WHERE item_id = 7", "1 items have no code"),
        ("UPDATE codes SET code = x'00' WHERE item_id = 7", "1 items have no code"),
    ],
)
def test_incomplete_items_are_dropped(folder: Path, damage: str, text: str) -> None:
    execute(folder, damage)
    found = check(folder)
    assert found[0].part == "items" and found[0].text.startswith(text)
    assert recover(folder)[:2] == (396, 1)
    assert check(folder) == [] and check_found(folder) == 396
    with Collection.open(folder) as collection:
        assert collection.add(images()[6:7]) == [401]  # ids are never reused


@pytest.mark.parametrize("key", ["fingerprint", "bits", "index", "generation", "changes_after"])
def test_lost_settings_are_inferred(folder: Path, key: str) -> None:
    execute(folder, f"DELETE FROM settings WHERE key = '{key}'")
    execute(folder, "DELETE FROM paths WHERE item_id = 7")
    recover(folder)
    assert check(folder) == [] and check_found(folder) == 396


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "part", "text"),
    [
        (lambda folder: flip(next((folder / "blobs").iterdir())), "blobs", "was changed: restore it"),
        (lambda folder: next((folder / "blobs").iterdir()).unlink(), "blobs", "cannot be read"),
        (lambda folder: shutil.rmtree(folder / "models"), "model", "no model folder"),
        (lambda folder: flip(next(folder.glob("models/*/model.safetensors"))), "model", "was changed|damaged"),
        (lambda folder: hasher("pca").save(next(folder.glob("models/*"))), "model", "another model"),
        (lambda folder: flip(next((folder / "index").iterdir())), "index", "does not match its checksum"),
    ],
)  # fmt: skip
def test_each_part_is_checked(
    folder: Path, damage: Callable[[Path], None], part: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    (found,) = check(folder)
    assert found.part == part and re.search(text, found.text)
    assert run(["doctor", "-c", str(folder), "--json"]) == 1
    assert [Finding(**finding) for finding in json.loads(capsys.readouterr().out)] == [found]
    assert run(["doctor", "-c", str(folder), "--recover"]) == (part == "model")
    assert len(check(folder)) == (part == "model")


def test_recovery_needs_a_model_and_rows(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "-c", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("hashret: there is no collection at")
    execute(folder, "DELETE FROM paths WHERE item_id = 7")
    shutil.rmtree(folder / "models")
    with pytest.raises(HashretError, match="no model of the codes is left"):
        recover(folder)
    (folder / "items.db").write_bytes(b"no database at all")
    assert run(["doctor", "-c", str(folder)]) == 1
    assert "items.db is damaged" in capsys.readouterr().out


def test_lost_contents_are_stored_again_or_recorded_as_absent(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An import has none of the contents that the exported collection stored: here 30, of which 10 are in the source
    too."""
    new, blobs = tmp_path / "new", tmp_path / "new/blobs"
    with Collection.open(folder) as collection:
        collection.add(images()[370:])
        collection.export(tmp_path / "all.jsonl")
    with Collection.create(new, hasher()) as collection:
        assert collection.import_items(tmp_path / "all.jsonl") == 398
    assert run(["doctor", "-c", str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30 and all(re.search("blobs/.* cannot be read .*--recover", line) for line in lines)
    kept, changed = sha256(images()[385]), sha256(images()[371])
    blobs.mkdir()
    shutil.copy(folder / "blobs" / kept, blobs)  # from a backup
    (blobs / changed).write_bytes(b"changed")
    assert run(["doctor", "-c", str(new), "--recover"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err == (
        "restored 10 stored contents from other paths; 19 are recorded as absent\n"
        f"nothing is wrong with the 398 items in {new}; the contents of 19 are stored nowhere\n"
    )
    assert (blobs / f"{changed}.damaged").read_bytes() == b"changed"
    with Collection.open(new) as collection:
        assert len(list(collection.contents(range(1, 402)))) == 398 - 19
        assert len(collection.add(images()[370:])) == 30 and len(collection) == 398  # the contents are added again
        assert len(list(collection.contents(range(1, 402)))) == 398
    assert run(["doctor", "-c", str(new)]) == 0
    assert "nowhere" not in capsys.readouterr().err
    next(path for path in blobs.iterdir() if path.name == kept).unlink()
    assert len(check(new)) == 1  # absent is not what was lost later


def test_leftovers_are_named_and_deleted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = "0123456789abcdef"
    names = [f".items.{token}.new", f"models/.m.{token}.new", f"blobs/.b.{token}.new", f"index/.i.{token}.new"]
    names += [f"models/.gone.{token}.new/config.json", "items.db.new-wal", "items.db.1.new", "recovery/items.db"]
    names += [f"blobs/{'0' * 64}"]  # added or removed by a killed process
    kept = ["items.db.1", "items.db.damaged-20260101-000000", "blobs/notes.txt", "mine.new"]
    for name in names + kept:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    expected = sorted(name.removesuffix("/config.json").replace("recovery/items.db", "recovery") for name in names)
    found = check(folder)
    assert sorted(finding.text.partition(" ")[0] for finding in found) == expected
    assert {finding.part for finding in found} == {"leftover"} and run(["doctor", "-c", str(folder)]) == 1
    with locked(folder):  # as a process that is using them
        assert len(check(folder)) == len(names) - 4
    assert run(["doctor", "-c", str(folder), "--recover"]) == 0
    assert not [name for name in names if (folder / name).exists()] and check_found(folder) == 397
    assert all((folder / name).read_bytes() == b"x" for name in kept)


def test_an_interrupted_recovery_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows in the log of the damaged database are recovered, although its log is gone by then."""
    with closing(sqlite3.connect(folder / "items.db")) as conn:
        conn.execute("PRAGMA wal_autocheckpoint = 0")
        conn.execute("UPDATE items SET metadata = '{\"late\": 1}' WHERE id = 9")
        conn.commit()
        for suffix in ("", "-wal"):
            shutil.copy(folder / f"items.db{suffix}", folder / f"kept{suffix}")
    for suffix in ("", "-wal"):
        (folder / f"kept{suffix}").replace(folder / f"items.db{suffix}")
    before = (folder / "items.db").read_bytes()

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # between the deletion of the log and the replacement
        patched.setattr(sqlite_repair, "sync", stop)
        with pytest.raises(KeyboardInterrupt):
            recover(folder)
    assert (folder / "items.db").read_bytes() == before and not (folder / "items.db-wal").exists()
    with pytest.raises(HashretError, match="recovery of .* was interrupted: finish it with hashret doctor --recover"):
        Collection.open(folder)
    (found,) = check(folder)
    assert found.part == "database" and "recovery was interrupted" in found.text
    assert run(["doctor", "-c", str(folder), "--recover"]) == 0
    with Collection.open(folder) as collection:
        assert collection.get(9).metadata == {"late": 1}
    assert check_found(folder) == 397
    assert len(list(folder.glob("items.db.damaged-*[0-9]"))) == 2  # also if both were made in one second
