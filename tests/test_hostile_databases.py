"""Damaged and manipulated databases: every command fails with one line, or works as if nothing was wrong."""

import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashret.cli.app import run
from hashret.collection import Collection
from hashret.hasher import Hasher

SOAK = "HASHRET_SOAK" in os.environ
PIXELS = np.random.default_rng(0).integers(0, 256, (80, 8, 8), np.uint8)
READING = ["info", "query id:1 --json", "query hex:0000 -r 16 --json", "query rows.npy --json"]
WRITING = ["index rows.npy --prune", "index more.npy", "reindex other"]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a collection, its sources, and another model."""
    folder = tmp_path_factory.mktemp("intact")
    np.save(folder / "rows.npy", PIXELS[:60])
    np.save(folder / "more.npy", PIXELS[60:])
    Hasher("pca", 8).fit(PIXELS).save(folder / "other")
    with Collection.create(folder / ".hashret", Hasher("lsh", 16).fit(PIXELS)) as collection:
        collection.index(folder / "rows.npy")
        collection.add(PIXELS[60:70])
        collection.remove([3])
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a copy of the intact folder, as the working directory."""
    shutil.copytree(intact, tmp_path / "folder")
    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    monkeypatch.chdir(tmp_path / "folder")
    yield tmp_path / "folder"


Command = Callable[[str], str]


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs a command, and returns the line that it failed with, or "" if it did not fail."""

    def command(line: str) -> str:
        capsys.readouterr()
        code = run([*line.split(), "--quiet"])
        _, err = capsys.readouterr()
        assert "Traceback" not in err and code in (0, 1)
        if code == 0:
            return ""
        err = re.sub(r"^hashret: missing .*\n", "", err, flags=re.MULTILINE)  # a line for each, before the advice
        assert err.startswith("hashret: ") and err.count("\n") == 1 and len(err) < 1000, err
        return err

    return command


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the relevant files: every reader recreates the `-shm` file, and an empty log is no log."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(("-shm", "lock")))
    return {file: data for file in files if (data := file.read_bytes()) or not file.name.endswith("-wal")}


def execute(*statements: str) -> None:
    with closing(sqlite3.connect(".hashret/items.db")) as conn, conn:
        conn.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            conn.execute(statement)


# What no command can do anything with

SETTINGS = [
    "DELETE FROM settings",
    "DROP TABLE settings",
    *(f"DELETE FROM settings WHERE key = '{key}'" for key in ("fingerprint", "bits", "generation", "index")),
    *(
        f"UPDATE settings SET value = {value} WHERE key = '{key}'"
        for key in ("fingerprint", "bits", "generation", "changes_after")
        for value in ("''", "'x'", "-1", "x'00ff'", "'1e9'", "'99999999999999999999999'", "'../../..'")
    ),
    "UPDATE settings SET value = '24' WHERE key = 'bits'",
    "UPDATE settings SET value = '17' WHERE key = 'bits'",
    "UPDATE settings SET value = '" + "0" * 64 + "' WHERE key = 'fingerprint'",
    "UPDATE settings SET value = CAST(x'ff' AS TEXT) WHERE key = 'bits'",
]


@pytest.mark.parametrize("statement", SETTINGS if SOAK else SETTINGS[::6])
def test_invalid_settings(folder: Path, failure: Command, statement: str) -> None:
    execute(statement)
    before = contents(folder)
    for line in ("query rows.npy", "index more.npy"):
        assert failure(line), line
    assert failure("info") or "'24'" in statement  # only loading the model would show this
    assert contents(folder) == before


@pytest.mark.parametrize("spec", ["tree", "faiss:Flat", "x'00'", ""])
def test_an_unknown_index(folder: Path, failure: Command, spec: str) -> None:
    execute(f"UPDATE settings SET value = '{spec.replace(chr(39), chr(39) * 2)}' WHERE key = 'index'")
    assert "items.db is damaged" in failure("query id:1") and "items.db is damaged" in failure("index rows.npy")


FOREIGN = [
    "CREATE TABLE settings (id INTEGER PRIMARY KEY, name TEXT)",
    "CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT)",
    "CREATE TABLE settings (key TEXT, value TEXT, more TEXT)",
    "CREATE VIEW settings AS SELECT 'bits' AS key, 16 AS value",
]


@pytest.mark.parametrize("version", [0, 1, 2, 3, -1] if SOAK else [1, 2])
@pytest.mark.parametrize("statement", FOREIGN)
def test_a_database_of_another_program_stays_as_it_is(
    folder: Path, failure: Command, statement: str, version: int
) -> None:
    Path(".hashret/items.db").unlink()
    execute(statement, f"PRAGMA user_version = {version}")
    before = contents(folder)
    for line in (*READING, *WRITING):
        assert "items.db" in failure(line), line
    assert contents(folder) == before


# Rows

ROWS = [
    *(f"UPDATE codes SET code = {value}" for value in ("'text'", "x''", "x'ff'", "zeroblob(1000000)", "5", "1.5")),
    "UPDATE codes SET code = x'ff' WHERE item_id = 1; UPDATE codes SET code = x'ffffff' WHERE item_id = 2",
    *(f"UPDATE codes SET item_id = {value} WHERE item_id = 5" for value in ("-5", "'x'", "x'05'", "1.5", "1e300")),
    "UPDATE codes SET fingerprint = x'00'",
    "DELETE FROM items WHERE id = 7",
    "UPDATE items SET id = -7 WHERE id = 7",
    *(f"UPDATE items SET metadata = {value}" for value in ("'{'", "5", "x'ff'", "'" + "[" * 5000 + "'")),
    *(f"UPDATE items SET sha256 = {value} || id" for value in ("'../../rows.npy'", "x'ff'", "5")),
    "UPDATE items SET width = 'wide', added = x'00', bytes = -1",
    *(f"UPDATE paths SET root = {value}" for value in ("5", "x'ff'", "CAST(x'ff' AS TEXT)", "''", "'blobs/'")),
    *(f"UPDATE paths SET name = {value} || name" for value in ("5", "x'ff'", "CAST(x'ff' AS TEXT)")),
    "UPDATE paths SET name = CAST(name AS REAL) + 0.5",
    *(f"UPDATE paths SET item_id = {value} WHERE item_id = 9" for value in ("-9", "'x'", "10000", "x'09'")),
    "UPDATE paths SET size = 'x', mtime_ns = x'ff', label = 5",
    *(f"INSERT INTO changes VALUES (99, {op}, {i})" for op in ("'add'", "5") for i in ("-1", "'x'", "4", "1e300")),
    *(f"UPDATE sqlite_sequence SET seq = {value}" for value in ("'x'", "-5", "0", "9223372036854775807", "NULL")),
    "DELETE FROM sqlite_sequence",
    *(f"DROP TABLE {table}" for table in ("items", "codes", "paths", "changes", "failures")),
    *(f"ALTER TABLE {table} ADD COLUMN more" for table in ("items", "codes", "paths", "failures", "changes")),
    *(f"ALTER TABLE items RENAME COLUMN {column} TO other" for column in ("id", "sha256", "metadata")),
    "CREATE TRIGGER stop BEFORE INSERT ON items BEGIN SELECT RAISE(ABORT, 'stop'); END",
]


@pytest.mark.parametrize("statements", ROWS if SOAK else ROWS[::6])
def test_invalid_rows(folder: Path, failure: Command, statements: str) -> None:
    try:
        execute(*statements.split("; "))
    except sqlite3.Error:
        pytest.skip("this SQLite does not let it happen")
    before = contents(folder)
    said = [failure(line) for line in READING]
    assert contents(folder) == before
    said += [failure(line) for line in WRITING]
    for text in filter(None, said):
        assert "items.db" in text or "cannot be read where they were" in text or "there is no item" in text, text
    assert (folder / "rows.npy").exists() and Path("more.npy").exists()


def test_no_item_leads_out_of_the_collection(folder: Path) -> None:
    """Stored contents are deleted by their SHA-256, which a manipulated row may replace by a path."""
    Path("precious.txt").write_text("all of it")
    execute("UPDATE items SET sha256 = '../../precious.txt' WHERE id = 61")
    with Collection.open(".hashret") as collection:
        assert collection.remove([61]) == 1
    assert Path("precious.txt").read_text() == "all of it"


def damages(data: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        damaged = bytearray(data)
        damage = rng.random()
        if damage < 0.15:
            del damaged[rng.randrange(len(damaged)) :]
        elif damage < 0.3:
            begin = rng.randrange(0, len(damaged), 512)
            damaged[begin : begin + 4096] = rng.choice((bytes(4096), rng.randbytes(4096)))[: len(damaged) - begin]
        elif damage < 0.4:  # swap two pages
            a, b = (4096 * rng.randrange(len(damaged) // 4096) for _ in range(2))
            damaged[a : a + 4096], damaged[b : b + 4096] = damaged[b : b + 4096], damaged[a : a + 4096]
        else:
            for _ in range(rng.choice((1, 4, 50))):
                # the first page, headers of pages, or anywhere
                page = rng.randrange(len(damaged) // 4096)
                position = rng.choice(
                    (rng.randrange(200), 4096 * page + rng.randrange(12), rng.randrange(len(damaged)))
                )
                damaged[position] ^= 1 << rng.randrange(8)
        yield bytes(damaged)


def test_damaged_databases_end_in_one_line(folder: Path, failure: Command) -> None:
    original = Path(".hashret/items.db").read_bytes()
    refused = 0
    for damaged in damages(original, 600 if SOAK else 15):
        for line in (*READING, *WRITING) if SOAK else (*READING[:3], WRITING[0]):
            for name in ("items.db-wal", "items.db-shm"):
                Path(".hashret", name).unlink(missing_ok=True)
            Path(".hashret/items.db").write_bytes(damaged)
            before = contents(folder)
            said = failure(line)
            refused += said != ""
            if line in READING:
                assert contents(folder) == before
    assert refused > 15


def test_a_log_of_another_database_is_ignored(folder: Path, failure: Command) -> None:
    for junk in (b"", b"junk" * 5000, bytes(40_000)):
        Path(".hashret/items.db-wal").write_bytes(junk)
        for line in READING:
            assert failure(line) == ""


def test_other_file_types_in_place_of_the_database(folder: Path, failure: Command) -> None:
    Path(".hashret/items.db").unlink()
    puts: list[Callable[[Path], Any]] = [
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
    ]
    for put in puts:
        path = Path(".hashret/items.db").absolute()
        put(path)
        for line in (*READING, "reindex other"):
            assert "there is no collection at" in failure(line) or "items.db" in failure(line)
        path.rmdir() if path.is_dir() else path.unlink()
