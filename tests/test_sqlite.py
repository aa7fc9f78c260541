import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hashret.errors import HashretError
from hashret.results import Root
from hashret.stores.protocol import FailedPath, ItemRow
from hashret.stores.sqlite import SqliteStore
from hashret.stores.sqlite_schema import upgrade

MODEL = "a" * 64
ROOT = Root("/photos/")

# DESIGN §4: other programs read these names.
TABLES = {
    "items": ["id", "sha256", "width", "height", "bytes", "added", "metadata"],
    "paths": ["root", "name", "item_id", "label", "size", "mtime_ns"],
    "codes": ["item_id", "fingerprint", "code"],
    "failures": ["root", "name", "size", "mtime_ns", "reason", "seen"],
    "verdicts": ["item_a", "item_b", "verdict", "at"],
    "changes": ["generation", "op", "item_id"],
    "states": ["generation", "id"],
    "settings": ["key", "value"],
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore.create(tmp_path, {"fingerprint": MODEL, "bits": "16", "index": "bitflip"})
    yield made
    made.close()


@contextmanager
def connection(store: SqliteStore) -> Iterator[sqlite3.Connection]:
    """Open another connection to the database."""
    with closing(sqlite3.connect(store.path)) as conn:
        yield conn


def content(name: str, text: str, *, root: str = ROOT) -> ItemRow:
    """Return the row of a path; its code is derived from the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape"))
    return ItemRow(root, name, None, len(text), 7, digest.hexdigest(), len(text), 3, 4, digest.digest()[:2])


def put(store: SqliteStore, *rows: ItemRow) -> list[int | None]:
    with store.transaction() as transaction:
        return transaction.put(rows)


def count_items(store: SqliteStore) -> int:
    with store.snapshot() as snapshot:
        return snapshot.count("items")


def everything(store: SqliteStore) -> list[list[tuple[object, ...]]]:
    """Return all rows of all tables, without the random ids of states."""
    with connection(store) as conn:
        tables = [
            conn.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES if table != "states"
        ]
    return [[row for row in rows if row[0] != "state"] for rows in tables]


def test_the_schema_is_the_contract(store: SqliteStore) -> None:
    with sqlite3.connect(store.path) as conn:
        tables = conn.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        assert {name for (name,) in tables} == set(TABLES)
        for table, columns in TABLES.items():
            assert [row[1] for row in conn.execute(f"PRAGMA table_info({table})")] == columns
        assert conn.execute("PRAGMA user_version").fetchone() == (3,)
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        (items,) = conn.execute("SELECT sql FROM sqlite_schema WHERE name = 'items'").fetchone()
        assert "id INTEGER PRIMARY KEY AUTOINCREMENT" in items
    conn.close()
    with store.transaction() as transaction:
        assert transaction._conn.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit is on the disk


def test_a_newer_database_is_refused_unchanged(store: SqliteStore) -> None:
    store.close()
    with connection(store) as conn:
        conn.execute("PRAGMA user_version = 4")
    before = store.path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(HashretError, match="newer hashret: upgrade"):
            SqliteStore(store.folder, read_only=read_only)
    assert store.path.read_bytes() == before


def of_version_2(store: SqliteStore) -> Path:
    """Return a database of schema version 2, which did not record states."""
    store.close()
    with sqlite3.connect(store.path) as conn:
        conn.execute("DROP TABLE states")
        conn.execute("DELETE FROM settings WHERE key = 'state'")
        conn.execute("PRAGMA user_version = 2")
    conn.close()
    return store.path


def of_version_1(store: SqliteStore) -> Path:
    """Return a database of schema version 1, in which digests were UNIQUE."""
    path = of_version_2(store)
    with sqlite3.connect(path) as conn:
        rows = conn.execute("SELECT * FROM items").fetchall()
        sequence = conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
        conn.execute("DROP TABLE items")
        conn.execute(
            "CREATE TABLE items (id INTEGER PRIMARY KEY AUTOINCREMENT, sha256 TEXT NOT NULL UNIQUE,"
            " width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL, added TEXT NOT NULL,"
            " metadata TEXT)"
        )
        conn.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        conn.execute("DELETE FROM sqlite_sequence WHERE name = 'items'")
        if sequence:
            conn.execute("INSERT INTO sqlite_sequence VALUES ('items', ?)", sequence)
        conn.execute("PRAGMA user_version = 1")
    conn.close()
    return path


@pytest.mark.parametrize(("version", "older"), [(1, of_version_1), (2, of_version_2)])
def test_an_older_database_is_backed_up_and_upgraded(
    store: SqliteStore, version: int, older: Callable[[SqliteStore], Path]
) -> None:
    contents = [content(name, name) for name in ("a", "b", "c")]
    ids = put(store, *contents)
    with store.transaction() as transaction:
        transaction.remove([3])  # its id is never reused
    before, schema = everything(store), "SELECT name, sql FROM sqlite_schema ORDER BY name"
    with connection(store) as conn:
        fresh = conn.execute(schema).fetchall()
    path = older(store)
    reading = SqliteStore(path.parent, read_only=True)
    with reading.snapshot() as rows:
        assert rows.find([row.sha256 for row in contents]) == {contents[0].sha256: 1, contents[1].sha256: 2}
        assert rows.state == (2, "") and rows.changes(rows.state) is None  # nothing says what led to this state
    reading.close()

    upgraded = SqliteStore(path.parent)
    assert everything(upgraded) == before and ids == [1, 2, 3]
    with connection(upgraded) as conn:
        assert conn.execute(schema).fetchall() == fresh
        assert conn.execute("PRAGMA user_version").fetchone() == (3,)
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with upgraded.snapshot() as rows:
        state = rows.state
        assert state.generation == 2 and len(state.id) == 16 and rows.changes(state) is not None
    assert put(upgraded, *contents[1:], content("d", "d")) == [2, 4, 5]
    with upgraded.snapshot() as rows:
        changes = rows.changes(state)
        assert changes is not None and changes.added.tolist() == [4, 5]
    upgraded.close()
    kept = path.with_name(f"items.db.{version}")
    assert {file.name for file in path.parent.iterdir()} == {"items.db", kept.name}
    with sqlite3.connect(kept) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (version,)
        assert conn.execute("SELECT id FROM items ORDER BY id").fetchall() == [(1,), (2,)]
    conn.close()


def test_the_backup_of_an_upgrade_is_of_the_older_version(store: SqliteStore) -> None:
    versions: list[int] = []
    for path in [of_version_2(store)] * 2:  # the second time, as if another process had upgraded it meanwhile
        with closing(sqlite3.connect(path)) as conn:
            upgrade(conn, versions.append)
    assert versions == [2]


def test_an_upgrade_that_fails_changes_nothing(store: SqliteStore) -> None:
    path = of_version_1(store)
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE items_1 (x)")
    conn.close()
    for _ in range(2):
        with pytest.raises(HashretError, match="is damaged .*items_1"):
            SqliteStore(path.parent)
        with sqlite3.connect(path) as conn:
            assert conn.execute("PRAGMA user_version").fetchone() == (1,)
            assert conn.execute("SELECT count(*) FROM items").fetchone() == (0,)
        conn.close()


def test_digests_with_equal_prefixes_are_distinguished(store: SqliteStore) -> None:
    alike = [content(str(i), "")._replace(sha256=f"{i:08x}"[::-1].rjust(64, "0")) for i in range(50)]
    assert put(store, *alike) == list(range(1, 51))
    with store.snapshot() as rows:
        assert rows.find([row.sha256 for row in alike]) == {row.sha256: i + 1 for i, row in enumerate(alike)}
        assert rows.find(["0" * 63 + "f", "0" * 63, "0" * 8, ""]) == {}
    with connection(store) as conn:
        plan = conn.execute(
            "EXPLAIN QUERY PLAN SELECT sha256, items.id FROM json_each('[]') CROSS JOIN items"
            " ON substr(sha256, 1, 8) = substr(value, 1, 8) AND sha256 = value"
        ).fetchall()
    assert any("USING INDEX items_by_sha256" in row[3] for row in plan)


@pytest.mark.parametrize("data", [b"", b"no database at all" * 300, bytes(8192), b"SQLite format 3\0" + bytes(4000)])
def test_anything_but_a_database_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "items.db"
    path.write_bytes(data)
    for read_only in (False, True):
        with pytest.raises(HashretError, match="is damaged|not the database of a collection"):
            SqliteStore(tmp_path, read_only=read_only)
    assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]  # a foreign file stays as it is


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.db"
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT)")
    with pytest.raises(HashretError, match="not the database of a collection"):
        SqliteStore(tmp_path)
    conn.execute("PRAGMA user_version = 1")
    conn.close()
    with pytest.raises(HashretError, match="not the database of a collection"):
        SqliteStore(tmp_path)


def test_a_missing_database_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(HashretError, match="no collection at .*hashret index"):
            SqliteStore(folder)
        assert not SqliteStore.exists(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["per%cent", "what?", "half#", "two words", os.fsdecode(b"\xff\xfe"), "line\nfeed"])
def test_the_path_of_the_database_may_have_any_characters(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    store = SqliteStore.create(tmp_path / folder, {"fingerprint": MODEL, "bits": "16"})
    assert put(store, content("a.png", "a")) == [1]
    store.close()
    for read_only in (True, False):
        again = SqliteStore(store.folder, read_only=read_only)
        with again.snapshot() as rows:
            assert rows.count("items") == 1
        again.close()


def test_creating_leaves_nothing_half_made(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.Error):
        SqliteStore.create(tmp_path, {"a setting that": object()})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_creating_ignores_leftovers_of_a_crash(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = SqliteStore.create(tmp_path / "other", {"fingerprint": MODEL, "bits": "16"})
    put(other, content("a.png", "a"))
    for suffix in ("", "-wal", "-shm"):  # as they are while the store is open
        shutil.copy(tmp_path / f"other/items.db{suffix}", tmp_path / f"items.db.new{suffix}")
    other.close()
    store = SqliteStore.create(tmp_path, {})
    with store.snapshot() as rows:
        assert rows.count("items") == 0
    store.close()
    assert {path.name for path in tmp_path.iterdir()} == {"other", "items.db"}


def test_metadata_is_json_to_sqlite(store: SqliteStore) -> None:
    put(store, content("a", "a")._replace(metadata={"taken": "Zürich", "n": [1, None]}))
    with connection(store) as conn:
        assert conn.execute("SELECT metadata ->> 'taken' FROM items WHERE id = 1").fetchone() == ("Zürich",)


def test_paths_that_are_not_utf8_are_stored_as_bytes(store: SqliteStore) -> None:
    names = [os.fsdecode(b"\xff\xfe.png"), os.fsdecode(b"caf\xe9/x.png"), "café/y.png", "new\nline"]
    put(store, *(content(name, name, root=os.fsdecode(b"/caf\xe9/")) for name in names))
    with connection(store) as conn:
        types = conn.execute("SELECT typeof(name), count(*) FROM paths WHERE typeof(root) = 'blob' GROUP BY 1")
        assert dict(types) == {"blob": 2, "text": 2}
        assert (os.fsencode(names[1]),) in conn.execute("SELECT name FROM paths").fetchall()


def test_a_full_disk_leaves_nothing(store: SqliteStore) -> None:
    put(store, content("a", "one"))
    with store.transaction() as transaction:  # on the connection that the next transaction uses
        pages = transaction._conn.execute("PRAGMA page_count").fetchone()[0]
        transaction._conn.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(HashretError, match="disk of .* is full"):
        put(store, *(content(f"{i:0200d}", str(i)) for i in range(200)))
    with store.transaction(advance=False) as transaction:
        transaction._conn.execute("PRAGMA max_page_count = 100000")
    assert put(store, content("b", "two")) == [2]
    with connection(store) as conn:
        assert conn.execute("SELECT value FROM settings WHERE key = 'generation'").fetchone() == ("3",)


def test_a_read_only_store_writes_nothing(store: SqliteStore) -> None:
    put(store, content("a", "one"))
    before = everything(store)
    other = SqliteStore(store.folder, read_only=True)
    with pytest.raises(HashretError, match="cannot be written to: open it read-only"):
        put(other, content("b", "two"))
    with pytest.raises(HashretError, match="was opened read-only: open it for writing"), other.exclusive():
        pass
    assert everything(store) == before
    other.close()


def test_snapshots_are_on_connections_that_cannot_write(store: SqliteStore) -> None:
    put(store, content("a", "one"))
    with store.snapshot() as rows, pytest.raises(sqlite3.OperationalError, match="readonly"):
        rows._conn.execute("DELETE FROM items")
    with store.exclusive(), store.snapshot() as rows:  # except within the write lock
        assert rows._conn is store._connections.writing.conn


def test_writes_leave_the_schema_alone(store: SqliteStore) -> None:
    """Every change of the schema makes all readers read it again."""

    def versions() -> tuple[int, int]:
        with connection(store) as conn:
            tables = conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            return conn.execute("PRAGMA schema_version").fetchone()[0], tables

    before = versions()
    put(store, content("a", "one"), content("b", "two"))
    with store.transaction() as transaction:
        transaction.put_failures([FailedPath(ROOT, "c", 1, 2, "broken")])
        transaction.put_verdict(1, 2, "same")
        transaction.put_setting("data_root", "/data")
    assert versions() == before


@pytest.mark.parametrize("busy", [False, True])
def test_closing_moves_the_log_into_the_database(store: SqliteStore, busy: bool) -> None:
    """Other threads keep read-only connections open, which cannot move the log; one may even be reading."""
    put(store, content("a", "one"))
    has_read, closed = threading.Event(), threading.Event()

    def read() -> None:
        with store.snapshot() as rows:
            assert rows.count("items") == 1
            if busy:
                has_read.set()
                assert closed.wait(30)
        has_read.set()
        assert closed.wait(30)

    reader = threading.Thread(target=read)
    reader.start()
    assert has_read.wait(30)
    store.close()
    if not busy:
        assert not store.path.with_name("items.db-wal").exists()
    closed.set()
    reader.join()
    assert not store.path.with_name("items.db-wal").exists()
    with connection(store) as conn:
        assert conn.execute("SELECT count(*) FROM items").fetchone() == (1,)


def test_a_nested_snapshot_reads_the_state_of_the_outer_one(store: SqliteStore) -> None:
    put(store, content("a", "one"))
    with store.snapshot() as outer:
        other = threading.Thread(target=put, args=(store, content("b", "two")))
        assert outer.count("items") == 1
        other.start()
        other.join()
        with store.snapshot() as inner:
            assert inner.count("items") == 1 and inner.state == outer.state
        assert outer.count("items") == 1  # the inner one does not end it
    with store.exclusive(), store.transaction() as transaction:
        transaction.put([content("c", "three")])
        with store.snapshot() as inner:
            assert inner.count("items") == 3
    with store.snapshot() as rows:
        assert rows.count("items") == 3


def test_other_processes_are_refused_while_one_writes(store: SqliteStore) -> None:
    code = (
        "import sys; from pathlib import Path; from hashret.stores.sqlite import SqliteStore\n"
        "from hashret.errors import HashretError\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "try:\n"
        "    with store.exclusive(): print('writing')\n"
        "except HashretError as error: print(error)"
    )

    def other() -> str:
        done = subprocess.run([sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True)
        return done.stdout + done.stderr

    with store.exclusive():
        assert "another process is writing to" in other()
    assert other() == "writing\n"


def test_a_deleted_database_is_neither_read_nor_written(store: SqliteStore) -> None:
    put(store, content("a", "one"))
    store.path.rename(store.path.with_name("aside"))
    for access in (store.exclusive, store.snapshot):
        with pytest.raises(HashretError, match="items.db is no longer there .*put it back"), access():
            raise AssertionError("nothing may be read or written")
    store.path.with_name("aside").rename(store.path)
    with store.snapshot() as rows:
        assert rows.count("items") == 1


@pytest.mark.parametrize("read_only", [False, True])
def test_a_replaced_database_is_opened_again(store: SqliteStore, tmp_path: Path, read_only: bool) -> None:
    def replace() -> None:
        for suffix in ("-wal", "-shm"):  # SQLite would apply the log to the other database
            store.path.with_name(f"{store.path.name}{suffix}").unlink(missing_ok=True)
        (tmp_path / "copy").replace(store.path)

    put(store, content("a", "one"))
    store.copy_to(tmp_path / "copy")
    put(store, content("b", "two"))
    follower = SqliteStore(store.folder, read_only=read_only)
    with follower.snapshot() as before:
        assert before.count("items") == 2
        store.close()
        replace()
        assert before.count("items") == 2  # a snapshot that has begun reads the old file
    with follower.snapshot() as after:
        assert after.count("items") == 1
        if not read_only:  # a lock that is held stays with the file that it was taken for
            with follower.exclusive(), follower.transaction() as transaction:
                transaction.put([content("c", "three")])
    if not read_only:
        with follower.exclusive():
            shutil.copy(store.path, tmp_path / "copy")
            replace()
            with pytest.raises(HashretError, match="was replaced during the command: run it again"):
                put(follower, content("d", "four"))
    (tmp_path / "copy").write_bytes(b"half a copy")
    replace()
    for _ in range(2):
        with pytest.raises(HashretError, match="is damaged"), follower.snapshot():
            raise AssertionError("it cannot be read")
    follower.close()


def test_a_write_within_a_snapshot_of_a_replaced_database_is_refused(store: SqliteStore, tmp_path: Path) -> None:
    put(store, content("a", "one"))
    store.copy_to(tmp_path / "copy")
    with store.snapshot() as before:
        for suffix in ("-wal", "-shm"):
            store.path.with_name(f"{store.path.name}{suffix}").unlink()
        (tmp_path / "copy").replace(store.path)
        following = threading.Thread(target=count_items, args=(store,))
        following.start()
        following.join()
        with pytest.raises(HashretError, match="was replaced during the command"), store.exclusive():
            put(store, content("c", "three"))
        assert before.count("items") == 1
    assert count_items(store) == 1


def test_every_thread_has_its_connection_and_leaves_no_file_open(store: SqliteStore) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc, to count open files")
    put(store, content("a", "one"))
    before = len(list(descriptors.iterdir()))
    found = []

    def look() -> None:
        with store.snapshot() as rows:
            found.append(set(rows.ids().tolist()))

    for _ in range(20):
        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [{1}] * 60
    assert len(list(descriptors.iterdir())) <= before + 3


def test_a_store_can_be_closed_from_another_thread(store: SqliteStore) -> None:
    put(store, content("a", "one"))
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join()
    assert not store.path.with_name("items.db-wal").exists()  # the last connection moved it into the database
