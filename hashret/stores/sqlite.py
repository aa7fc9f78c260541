"""The collection's database: items, paths, codes and what happened to them, in SQLite through sqlite-utils.

It is the only truth of a collection; everything else can be made again from it and the user's files. Every write is one
transaction that is durable when it returns, and moves the collection from one generation to the next.

The file is longer than most because nothing outside it may speak SQL.
"""

import json
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import wraps
from itertools import chain, islice
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from sqlite_utils import Database

from hashret.codes import Codes
from hashret.durable import put_in_place
from hashret.errors import HashretError, one_line
from hashret.results import Failure, Item
from hashret.stores.filters import matching

P = ParamSpec("P")
R = TypeVar("R")

BLOBS = "blobs/"  # the root of contents that came without a file, inside the collection
SCHEMA_VERSION = 2  # PRAGMA user_version
# Digests come in no order, so an index of them is written to all over at every commit: the first eight of their 64
# characters, which next to no others share, make one of a quarter of the size, and twice as fast.
_ITEMS = """
CREATE TABLE items (
  id INTEGER PRIMARY KEY AUTOINCREMENT, sha256 TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
  bytes INTEGER NOT NULL, added TEXT NOT NULL, metadata TEXT);
CREATE INDEX items_by_sha256 ON items(substr(sha256, 1, 8));
"""
SCHEMA = f"""{_ITEMS}
CREATE TABLE paths (
  root NOT NULL, name NOT NULL, item_id INTEGER NOT NULL REFERENCES items(id), label TEXT,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, PRIMARY KEY (root, name)) WITHOUT ROWID;
CREATE INDEX paths_by_item ON paths(item_id);
CREATE TABLE codes (
  item_id INTEGER NOT NULL REFERENCES items(id), fingerprint TEXT NOT NULL, code BLOB NOT NULL,
  PRIMARY KEY (fingerprint, item_id)) WITHOUT ROWID;
CREATE TABLE failures (
  root NOT NULL, name NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, reason TEXT NOT NULL,
  seen TEXT NOT NULL, PRIMARY KEY (root, name)) WITHOUT ROWID;
CREATE TABLE verdicts (
  item_a INTEGER NOT NULL, item_b INTEGER NOT NULL, verdict TEXT NOT NULL, at TEXT NOT NULL,
  PRIMARY KEY (item_a, item_b)) WITHOUT ROWID;
CREATE TABLE changes (
  generation INTEGER NOT NULL, op TEXT NOT NULL, item_id INTEGER NOT NULL,
  PRIMARY KEY (generation, item_id, op)) WITHOUT ROWID;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

# What makes a database of a version one of the next.
_UPGRADES = {
    1: f"""
ALTER TABLE items RENAME TO items_1;
{_ITEMS}
INSERT INTO items SELECT * FROM items_1;
DELETE FROM sqlite_sequence WHERE name = 'items';
INSERT INTO sqlite_sequence SELECT 'items', seq FROM sqlite_sequence WHERE name = 'items_1';
DROP TABLE items_1;
"""
}

# The models that codes are of, one step in the table's order for each, where SELECT DISTINCT would read all codes.
_FINGERPRINTS = """
WITH RECURSIVE model(fingerprint) AS (
  SELECT min(fingerprint) FROM codes
  UNION SELECT (SELECT min(fingerprint) FROM codes WHERE fingerprint > model.fingerprint) FROM model)
SELECT fingerprint FROM model WHERE fingerprint IS NOT NULL
"""


class Seen(NamedTuple):
    """What is known of a path since it was last looked at."""

    item_id: int | None  # None if it never could be read
    size: int
    mtime_ns: int
    failed: bool  # whether it could not be read then


class Content(NamedTuple):
    """An image as found under a path, ready to be stored; `code` is None where its content is known already."""

    root: str
    name: str
    label: str | None
    size: int
    mtime_ns: int
    sha256: str
    length: int  # of the file, in bytes
    width: int
    height: int
    code: bytes | None
    metadata: dict[str, Any] | None = None
    added: str | None = None  # if it was before now
    id: int | None = None  # which it gets if that is above all that were ever given


class Place(NamedTuple):
    """A path under which something is recorded; `item_id` is None for what never could be read."""

    root: str
    name: str
    item_id: int | None


class Changes(NamedTuple):
    """What became of the codes between two generations."""

    removed: NDArray[np.int64]
    added: NDArray[np.int64]
    codes: Codes


class _Settings(dict[str, str]):
    """The settings of a database; one that is lacking is damage."""

    def __init__(self, path: Path, settings: dict[str, str]) -> None:
        super().__init__(settings)
        self._path = path

    def __missing__(self, key: str) -> str:
        raise damaged(self._path, f"it has no setting {key}")


_FORMS = {
    "fingerprint": re.compile("[0-9a-f]{64}"),
    "bits": re.compile("[0-9]{1,4}"),
    "generation": re.compile("[0-9]{1,18}"),
    "changes_after": re.compile("[0-9]{1,18}"),
}


def damaged(path: Path, how: str) -> HashretError:
    """The error for a database that is not what hashret made it."""
    return HashretError(f"{path} is damaged ({how}): hashret doctor says what can be saved")


def _makes_sense(read: Callable[Concatenate["Store", P], R]) -> Callable[Concatenate["Store", P], R]:
    """Say of values that hashret never wrote, such as texts for numbers, that the database is damaged."""

    @wraps(read)
    def method(store: "Store", /, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return read(store, *arguments, **options)
        except (TypeError, ValueError, OverflowError, LookupError, RecursionError) as error:
            raise damaged(store.path, one_line(error)) from error

    return method


class Store:
    """The database at `path`, one connection a thread.

    Raises HashretError if it is missing, damaged, or made by a newer hashret.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        try:
            there = path.is_file()
        except OSError as error:
            raise HashretError(f"{path} cannot be opened ({error.strerror}): check the folder's permissions") from error
        if not there:
            raise HashretError(f"there is no collection at {path.parent}: make one with hashret index SOURCE")
        self.path = path
        self.read_only = read_only
        self._inode = path.stat().st_ino
        self._threads = threading.local()
        self._matching: tuple[str, str, NDArray[np.int64]] | None = None  # the last one asked for
        self._opened: weakref.WeakSet[_Connections] = weakref.WeakSet()  # by all threads
        self._lock = threading.Lock()  # for what each of them has open, and whether it uses that
        with sqlite_errors(path):
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise HashretError(f"{path} was made by a newer hashret: upgrade hashret to open it")
            if version < min(_UPGRADES):
                raise HashretError(f"{path} is no database of a collection: choose another folder")
            self.settings()["generation"]  # before anything is written: another program may count versions too
            if not read_only:
                self.db.execute("PRAGMA journal_mode = WAL")  # which a backup may not be in
                if version < SCHEMA_VERSION:
                    self._upgrade(version)

    @classmethod
    def create(cls, path: Path, settings: dict[str, str]) -> "Store":
        """A new database in place of whatever is there; it appears whole or not at all."""
        written = path.with_name(path.name + ".new")
        _discard(written)
        try:
            with sqlite_errors(path), closing(_connect(f"file:{_quoted(written)}", read_only=False)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(SCHEMA)
                db.conn.executemany(
                    "INSERT INTO settings VALUES (?, ?)",
                    ({"generation": "0", "changes_after": "0"} | settings).items(),
                )
                db.conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.conn.commit()
                db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            put_in_place(written, path)
        finally:
            _discard(written)
        return cls(path)

    def _upgrade(self, version: int) -> None:
        """Make a database of an older version one of this version, in one commit, and keep what it was beside it."""
        kept = self.path.with_name(f"{self.path.name}.{version}")
        written = kept.with_name(kept.name + ".new")
        conn = self.db.conn
        try:
            _discard(written)
            conn.execute("VACUUM INTO ?", (str(written),))
            put_in_place(written, kept)
        finally:
            _discard(written)
        conn.execute("PRAGMA legacy_alter_table = ON")  # what refers to a table keeps to its name
        conn.execute("BEGIN IMMEDIATE")
        try:
            while (version := conn.execute("PRAGMA user_version").fetchone()[0]) < SCHEMA_VERSION:
                for statement in _UPGRADES[version].split(";"):
                    conn.execute(statement)
                conn.execute(f"PRAGMA user_version = {version + 1}")
            conn.execute("COMMIT")
        except BaseException:
            if conn.in_transaction:
                conn.execute("ROLLBACK")
            raise
        finally:
            conn.execute("PRAGMA legacy_alter_table = OFF")

    @property
    def db(self) -> Database:
        """This thread's connection."""
        return self._connection("connection", self.read_only)

    def _connection(self, name: str, read_only: bool) -> Database:
        """One of this thread's connections, opened when it is first asked for."""
        named = self._mine.named
        if name not in named:
            uri = f"file:{_quoted(self.path)}?mode={'ro' if read_only else 'rw'}"
            if read_only and not os.access(self.path.parent, os.W_OK) and not _has_wal(self.path):
                uri += "&immutable=1"
            named[name] = _connect(uri, read_only)
        return named[name]

    @property
    def _mine(self) -> "_Connections":
        """What this thread has open."""
        if not hasattr(self._threads, "mine"):
            with self._lock:
                self._threads.mine = _Connections()
                self._opened.add(self._threads.mine)
        mine: _Connections = self._threads.mine
        return mine

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """`close` leaves alone what this thread has open: closed in the middle of a statement, it would crash."""
        mine = self._mine
        with self._lock:
            mine.uses += 1
        try:
            yield
        finally:
            with self._lock:
                mine.uses -= 1
                if mine.unwanted and not mine.uses:
                    mine.close()

    def check_in_place(self) -> None:
        """Raises HashretError if the database was deleted or replaced: what is written to it then is lost."""
        if not self.path.is_file() or self.path.stat().st_ino != self._inode:
            raise HashretError(f"{self.path} was deleted or replaced since it was opened: open the collection again")

    def close(self) -> None:
        """Close the connections of all threads; those that a thread is just reading with, when that has been read."""
        with self._lock:
            for held in list(self._opened):
                if held.uses:
                    held.unwanted = True
                else:
                    held.close()

    @contextmanager
    def read(self) -> Iterator[dict[str, str]]:
        """A transaction in which everything read is of one generation; gives the settings."""
        with sqlite_errors(self.path), self._in_use():
            conn = self.db.conn
            conn.execute("BEGIN")
            try:
                yield self.settings()
            finally:
                if conn.in_transaction:
                    conn.execute("COMMIT")

    @contextmanager
    def write(self, step: int = 1) -> Iterator[int]:
        """A transaction that is durable when it ends without an exception; gives the generation that it makes.

        With a `step` of 0 it makes no new one: nothing may change that an answer is made of.
        """
        with sqlite_errors(self.path), self._in_use():
            conn = self.db.conn
            if not self._mine.writing:
                # Digests come in no order, so a batch touches pages all over their index: they are kept, and written
                # back from the log less often.
                conn.execute("PRAGMA cache_size = -65536")  # KiB
                conn.execute("PRAGMA wal_autocheckpoint = 8000")  # pages, of 4 KiB
                self._mine.writing = True
            conn.execute("BEGIN IMMEDIATE")
            try:
                generation = int(self.settings()["generation"]) + step
                yield generation
                self.put_setting("generation", str(generation))
                conn.execute("COMMIT")
            except BaseException:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
                raise

    def settings(self) -> dict[str, str]:
        """All settings; one that every collection has, and this one lacks, is asked for with a HashretError."""
        rows = self.db.conn.execute("SELECT key, value FROM settings")
        told = _Settings(self.path, {key: _from_text(value) for key, value in rows})
        for key, form in _FORMS.items():
            if key in told and not form.fullmatch(told[key]):
                raise damaged(self.path, f"its setting {key} is {told[key]!r}")
        return told

    def put_setting(self, key: str, value: str) -> None:
        """Change a setting, inside `write`."""
        self.db.conn.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, _text(value)))

    def count(self, table: str) -> int:
        with sqlite_errors(self.path), self._in_use():
            return int(self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    # Paths and failures

    def knows(self, root: str) -> bool:
        """Whether anything is known of any path under a root."""
        sql = "SELECT EXISTS (SELECT 1 FROM paths WHERE root = :r) OR EXISTS (SELECT 1 FROM failures WHERE root = :r)"
        return bool(self.db.conn.execute(sql, {"r": _text(root)}).fetchone()[0])

    def seen(self, root: str, names: Sequence[str]) -> dict[str, Seen]:
        """What is known of the paths with these names, by name; those of which nothing is known are left out."""
        items = {
            name: Seen(row[0], row[1], row[2], False)
            for name, *row in self._named("name, item_id, size, mtime_ns", "paths", root, names)
        }
        for name, size, mtime_ns in self._named("name, size, mtime_ns", "failures", root, names):
            items[name] = Seen(items[name].item_id if name in items else None, size, mtime_ns, True)
        return items

    def _named(self, columns: str, table: str, root: str, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The rows of some paths in a table, the name first."""
        stored = [_text(name) for name in names]
        # One statement for all names costs a tenth of one for each; JSON holds no bytes, and for SQLite a text in it
        # ends at a zero, so those go one by one.
        text = json.dumps([name for name in stored if isinstance(name, str) and "\0" not in name])
        sql = f"SELECT {columns} FROM {table} WHERE root = ? AND name"
        yield from self.db.conn.execute(f"{sql} IN (SELECT value FROM json_each(?))", (_text(root), text))
        for name in stored:
            if isinstance(name, bytes) or "\0" in name:
                for row in self.db.conn.execute(f"{sql} = ?", (_text(root), name)):
                    yield _from_text(row[0]), *row[1:]

    def _rows(self, sql: str, rows: Iterable[tuple[Any, ...]], end: str = "") -> None:
        """Execute a statement that takes rows of values, a thousand rows in one go.

        Other threads run meanwhile, where `executemany` would stop them, and be stopped, at every row.
        """
        rows = iter(rows)
        while some := list(islice(rows, 1000)):
            places = "(" + ", ".join("?" * len(some[0])) + ")"
            self.db.conn.execute(f"{sql} {', '.join([places] * len(some))}{end}", list(chain.from_iterable(some)))

    def find(self, sha256s: Sequence[str]) -> dict[str, int]:
        """The ids of the items with these contents."""
        sql = (
            "SELECT sha256, items.id FROM json_each(?) CROSS JOIN items ON substr(sha256, 1, 8) = substr(value, 1, 8)"
            " AND sha256 = value"
        )
        return dict(self.db.conn.execute(sql, (json.dumps(sha256s),)))

    def put(self, contents: Sequence[Content], fingerprint: str, generation: int) -> list[int | None]:
        """Store contents under their paths, inside `write`; the item's id of each.

        A content that is there already gains a path. A path that led to another item no longer does, and an item
        whose last path is lost goes with it. A content that comes without a code, because it was there, and is there
        no more, is not stored and gets None.
        """
        ids = self.find([content.sha256 for content in contents])
        fresh: dict[str, Content] = {}
        for content in contents:
            if content.sha256 not in ids and content.code is not None:
                fresh.setdefault(content.sha256, content)
        highest = self.highest()
        for sha256, content in fresh.items():
            ids[sha256] = highest = max(highest + 1, content.id or 0)
        now = _now()
        told = ((ids[s], s, c.width, c.height, c.length, c.added or now, _json(c.metadata)) for s, c in fresh.items())
        self._rows("INSERT INTO items VALUES", told)
        self._rows("INSERT INTO codes VALUES", ((ids[s], fingerprint, c.code) for s, c in fresh.items()))
        self._rows("INSERT INTO changes VALUES", ((generation, "add", ids[sha256]) for sha256 in fresh))
        stored = [content for content in contents if content.sha256 in ids]
        left: set[int] = set()  # by a path
        named: dict[str, list[str]] = {}
        for content in stored:
            named.setdefault(content.root, []).append(content.name)
        for root, names in named.items():
            left.update(item_id for _, item_id in self._named("name, item_id", "paths", root, names))
        roots = {root: _text(root) for root in named}
        rows = [
            (roots[c.root], _text(c.name), ids[c.sha256], c.label and _text(c.label), c.size, c.mtime_ns)
            for c in stored
        ]
        self._rows("INSERT OR REPLACE INTO paths VALUES", rows)
        if self.db.conn.execute("SELECT EXISTS (SELECT 1 FROM failures)").fetchone()[0]:
            self._rows("DELETE FROM failures WHERE (root, name) IN (VALUES", (row[:2] for row in rows), ")")
        last = {row[:2]: row[2] for row in rows}  # an archive may hold a name twice
        self._drop_orphans(left.union(ids.values()).difference(last.values()), generation)
        return [ids.get(content.sha256) for content in contents]

    def put_failures(self, failures: Iterable[tuple[str, str, int, int, str]]) -> None:
        """Remember (root, name, size, mtime_ns, reason) of what could not be read, inside `write`."""
        self.db.conn.executemany(
            "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?, ?)",
            [(_text(root), _text(name), *rest, _now()) for root, name, *rest in failures],
        )

    def remove_items(self, ids: Iterable[int], generation: int) -> list[str]:
        """Forget items and their paths, inside `write`; the contents that were there."""
        there = [row for i in ids for row in self.db.conn.execute("SELECT id, sha256 FROM items WHERE id = ?", (i,))]
        there = list(dict(there).items())
        self.db.conn.executemany("DELETE FROM paths WHERE item_id = ?", [(i,) for i, _ in there])
        self._drop_orphans({i for i, _ in there}, generation)
        return [sha256 for _, sha256 in there]

    def paths_not_in(self, root: str, names: Iterable[str]) -> tuple[int, list[str]]:
        """How many paths and failures are recorded under `root`, and the names among them that `names` lacks.

        To be called inside `write`.
        """
        conn = self.db.conn
        conn.execute("CREATE TEMP TABLE IF NOT EXISTS present (name PRIMARY KEY) WITHOUT ROWID")
        conn.execute("DELETE FROM present")
        conn.executemany("INSERT OR IGNORE INTO present VALUES (?)", ((_text(name),) for name in names))
        known = "SELECT name FROM paths WHERE root = :r UNION SELECT name FROM failures WHERE root = :r"
        told = {"r": _text(root)}
        total = conn.execute(f"SELECT count(*) FROM ({known})", told).fetchone()[0]
        rows = conn.execute(f"{known} EXCEPT SELECT name FROM present", told)
        return total, [_from_text(row[0]) for row in rows]

    def remove_paths(self, root: str, names: Sequence[str], generation: int) -> list[str]:
        """Forget paths, inside `write`; an item whose last path is lost goes with it; the contents that did."""
        left = set()
        for name in names:
            key = (_text(root), _text(name))
            left |= {row[0] for row in self.db.conn.execute("SELECT item_id FROM paths WHERE root=? AND name=?", key)}
            self.db.conn.execute("DELETE FROM paths WHERE root = ? AND name = ?", key)
            self.db.conn.execute("DELETE FROM failures WHERE root = ? AND name = ?", key)
        return self._drop_orphans(left, generation)

    def _drop_orphans(self, ids: set[int], generation: int) -> list[str]:
        """Remove those of the items that no path leads to; what their contents were."""
        conn = self.db.conn
        models = conn.execute(_FINGERPRINTS).fetchall() if ids else []
        gone = list[str]()
        for i in ids:
            if conn.execute("SELECT 1 FROM paths WHERE item_id = ? LIMIT 1", (i,)).fetchone() is None:
                gone += [row[0] for row in conn.execute("SELECT sha256 FROM items WHERE id = ?", (i,))]
                conn.executemany("DELETE FROM codes WHERE fingerprint = ? AND item_id = ?", [(f, i) for (f,) in models])
                conn.execute("DELETE FROM items WHERE id = ?", (i,))
                conn.execute("INSERT OR REPLACE INTO changes VALUES (?, 'remove', ?)", (generation, i))
        if ids:  # ids are never used again, so no verdict may outlive its items
            conn.execute(
                "DELETE FROM verdicts WHERE NOT EXISTS (SELECT 1 FROM items WHERE id = item_a)"
                " OR NOT EXISTS (SELECT 1 FROM items WHERE id = item_b)"
            )
        return gone

    def roots(self, table: str = "paths") -> list[str]:
        return [_from_text(row[0]) for row in self.db.conn.execute(f"SELECT DISTINCT root FROM {table}")]

    def recorded(self, path: str) -> list[Place]:
        """What is recorded at a path, or below it if it was a folder, an archive or a file of many images."""
        return [place for table in ("paths", "failures") for place in self._recorded(table, path)]

    def _recorded(self, table: str, path: str) -> Iterator[Place]:
        item_id = "item_id" if table == "paths" else "NULL"
        sql = f"SELECT name, {item_id} FROM {table} WHERE root = ?"
        folder = path.rstrip("/") + "/"
        for root in self.roots(table):
            if root.startswith(folder) or root in (f"{path}!/", f"{path}#"):
                rows = self.db.conn.execute(sql, (_text(root),)).fetchall()
            elif path.startswith(root):
                rows = list(self._named(f"name, {item_id}", table, root, [path.removeprefix(root)]))
                below = folder.removeprefix(root)
                # "0" follows "/", so these are all names in that folder; those that are bytes sort by themselves.
                for low in {_text(below), os.fsencode(below)}:
                    high = low[:-1] + "0" if isinstance(low, str) else low[:-1] + b"0"
                    rows += self.db.conn.execute(f"{sql} AND name >= ? AND name < ?", (_text(root), low, high))
            else:
                continue
            yield from (Place(root, _from_text(name), item_id) for name, item_id in rows)

    def places(self, ids: Iterable[int]) -> list[Place]:
        """The paths of items."""
        sql = "SELECT root, name, item_id FROM paths WHERE item_id IN (SELECT value FROM json_each(?))"
        rows = self.db.conn.execute(sql, (json.dumps(list(ids)),))
        return [Place(_from_text(root), _from_text(name), item_id) for root, name, item_id in rows]

    def failures(self) -> Iterator[tuple[str, Failure]]:
        """The root of each path that could not be read, and what is known of it, in order."""
        for root, name, reason, seen in self.db.conn.execute("SELECT root, name, reason, seen FROM failures"):
            yield _from_text(root), Failure(_from_text(root) + _from_text(name), reason, seen)

    def doubt_failures(self, root: str) -> None:
        """Let what could not be read under a root seem to have changed since, inside `write`."""
        self.db.conn.execute("UPDATE failures SET mtime_ns = -1 WHERE root = ?", (_text(root),))

    # Metadata

    def undescribed(
        self, root: str, rows: Sequence[tuple[str, dict[str, Any]]], told: set[int]
    ) -> tuple[dict[int, str], int]:
        """The metadata, as JSON, of items that it is new to, and how many rows of (name, metadata) name no path.

        Of several rows for one item the first counts: `told` are the items that had theirs, and becomes more.
        """
        items = dict(self._named("name, item_id", "paths", root, [name for name, _ in rows]))
        fresh: dict[int, str] = {}
        for name, metadata in rows:
            if name in items and items[name] not in told:
                told.add(items[name])
                fresh[items[name]] = json.dumps(metadata, ensure_ascii=False)
        sql = "SELECT id, metadata FROM items WHERE id IN (SELECT value FROM json_each(?))"
        known = dict(self.db.conn.execute(sql, (json.dumps(list(fresh)),)))
        changed = {i: metadata for i, metadata in fresh.items() if known[i] != metadata}
        return changed, sum(name not in items for name, _ in rows)

    def describe(self, metadata: dict[int, str]) -> None:
        """Replace the metadata of items, inside `write`."""
        self.db.conn.executemany("UPDATE items SET metadata = ? WHERE id = ?", [(m, i) for i, m in metadata.items()])

    def matching(self, where: str, generation: str) -> NDArray[np.int64] | None:
        """Ids, ascending, of the items that an SQLite expression holds for; None if there is a later generation.

        Raises HashretError if the expression is none, or does or needs more than it may: see `filters`.
        """
        kept = self._matching
        if kept is not None and kept[:2] == (where, generation):
            return kept[2]
        conn = self._connection("guarded", read_only=True).conn
        conn.execute("BEGIN")
        try:
            if conn.execute("SELECT value FROM settings WHERE key = 'generation'").fetchone()[0] != generation:
                return None
            found = matching(conn, where)
        finally:
            conn.execute("COMMIT")
        if found.lasting:
            self._matching = (where, generation, found.ids)
        return found.ids

    # Items and codes

    def ids(self, after: int, limit: int) -> list[int]:
        """The ids that follow `after`, in order, at most `limit`."""
        sql = "SELECT id FROM items WHERE id > ? ORDER BY id LIMIT ?"
        return [row[0] for row in self.db.conn.execute(sql, (after, limit))]

    @_makes_sense
    def highest(self) -> int:
        """The highest id that was ever given to an item."""
        sql = "SELECT CAST(max(seq) AS INTEGER) FROM sqlite_sequence WHERE name = 'items'"
        highest = self.db.conn.execute(sql).fetchone()[0] or 0
        if not 0 <= highest < 2**62:
            raise damaged(self.path, f"the last item had the number {highest}")
        return int(highest)

    def contents(self, fingerprint: str) -> Iterator[Content]:
        """Everything that `put` would need to make the items again, path for path, by id."""
        sql = (
            "SELECT root, name, label, size, mtime_ns, sha256, bytes, width, height, code, metadata, added, id"
            " FROM items JOIN codes ON codes.item_id = id AND fingerprint = ? JOIN paths ON paths.item_id = id"
            " ORDER BY id, root, name"
        )
        for row in self.db.conn.execute(sql, (fingerprint,)):
            content = Content(*row)
            yield content._replace(
                root=_from_text(row[0]),
                name=_from_text(row[1]),
                label=row[2] and _from_text(row[2]),
                metadata=None if row[10] is None else json.loads(row[10]),
            )

    @_makes_sense
    def items(self, ids: Iterable[int]) -> dict[int, Item]:
        """The items with these ids, by id; those that do not exist are left out."""
        wanted = json.dumps(list(ids))
        paths: dict[int, list[tuple[str, str | None]]] = {}
        sql = "SELECT item_id, root, name, label FROM paths WHERE item_id IN (SELECT value FROM json_each(?))"
        for i, root, name, label in self.db.conn.execute(sql, (wanted,)):
            paths.setdefault(i, []).append((_from_text(root) + _from_text(name), label and _from_text(label)))
        found = {}
        for row in self.db.conn.execute("SELECT * FROM items WHERE id IN (SELECT value FROM json_each(?))", (wanted,)):
            own = sorted(paths.get(row[0], []), key=lambda path: path[0])
            label = next((label for _, label in own if label is not None), None)
            metadata = None if row[6] is None else json.loads(row[6])
            i, sha256, width, height, size, added, _ = row
            several = list(dict.fromkeys(path for path, _ in own))  # a file may lie under two roots
            found[i] = Item(i, sha256, width, height, size, added, metadata, several, label)
        return found

    @_makes_sense
    def codes(self, fingerprint: str, bits: int, ids: Sequence[int] | None = None) -> tuple[NDArray[np.int64], Codes]:
        """Ids int64 (n) and codes uint8 (n, bits // 8) of all items, or of those among `ids`, in ascending order."""
        if ids is None:
            return self._codes(bits, "", fingerprint)
        return self._codes(bits, "AND item_id IN (SELECT value FROM json_each(?))", fingerprint, json.dumps(list(ids)))

    def _codes(self, bits: int, which: str, *told: str | int) -> tuple[NDArray[np.int64], Codes]:
        """Ids and codes of a model's items, or of `which` of them, in ascending order."""
        found_ids: list[int] = []
        found = bytearray()
        sql = f"SELECT item_id, code FROM codes WHERE fingerprint = ? {which} ORDER BY item_id"
        rows = self.db.conn.execute(sql, told)
        while some := rows.fetchmany(10_000):
            some_ids, some_codes = zip(*some, strict=True)
            if set(map(len, some_codes)) != {bits // 8}:
                raise damaged(self.path, f"codes are not of {bits} bits")
            found_ids += some_ids
            found += b"".join(some_codes)
        if found_ids and found_ids[0] < 0:
            raise damaged(self.path, f"an item has the number {found_ids[0]}")
        codes = np.frombuffer(bytes(found), np.uint8).reshape(len(found_ids), bits // 8)
        return np.array(found_ids, np.int64), codes

    @_makes_sense
    def changes(self, since: int, fingerprint: str, bits: int) -> Changes | None:
        """What became of the codes after generation `since`; None if that is no longer recorded."""
        if since < int(self.settings()["changes_after"]):
            return None
        # Ids are never reused: what was added since and is gone has no code any more, and was not there before.
        added = "SELECT item_id FROM changes WHERE generation > ? AND op = 'add'"
        ids, codes = self._codes(bits, f"AND item_id IN ({added})", fingerprint, since)
        gone = "SELECT item_id FROM changes WHERE generation > ? AND op <> 'add'"
        removed = self.db.conn.execute(f"{gone} AND item_id NOT IN ({added}) ORDER BY item_id", (since, since))
        return Changes(np.fromiter((row[0] for row in removed), np.int64), ids, codes)

    def forget_changes(self, up_to: int) -> None:
        """Drop the record of changes up to a generation, inside `write`."""
        self.db.conn.execute("DELETE FROM changes WHERE generation <= ?", (up_to,))
        self.put_setting("changes_after", str(up_to))

    # Copies and verdicts

    def at(self, path: str) -> int | None:
        """The item that a whole path leads to."""
        for root in self.roots():
            if path.startswith(root):
                told = (_text(root), _text(path.removeprefix(root)))
                row = self.db.conn.execute("SELECT item_id FROM paths WHERE root = ? AND name = ?", told).fetchone()
                if row is not None:
                    return int(row[0])
        return None

    def best_first(self, keep: str) -> NDArray[np.int64]:
        """The ids of all items, of several copies the one to keep first: "largest" (in pixels, then in bytes),
        "oldest" (by the date of the file), or else what lies under the folder `keep`, then the largest.

        Raises HashretError if nothing lies there.
        """
        order, told = "width * height DESC, bytes DESC, id", dict[str, bytes | int]()
        if keep == "oldest":  # contents without a file have the date at which they were added
            of_files = "SELECT min(nullif(mtime_ns, 0)) FROM paths WHERE item_id = id"
            order = f"coalesce(({of_files}), strftime('%s', added) * 1000000000), id"
        elif keep != "largest":
            folder = os.fsencode(keep.rstrip("/") + "/")
            told = {"folder": folder, "length": len(folder)}
            under = "SELECT 1 FROM paths WHERE substr(CAST(root || name AS BLOB), 1, :length) = :folder"
            if self.db.conn.execute(f"{under} LIMIT 1", told).fetchone() is None:
                raise HashretError(
                    f"nothing indexed lies under {keep}: keep the largest, the oldest, or another folder"
                )
            order = f"EXISTS ({under} AND item_id = id) DESC, {order}"
        rows = self.db.conn.execute(f"SELECT id FROM items ORDER BY {order}", told)
        return np.fromiter((row[0] for row in rows), np.int64)

    def oldest_path(self, item_id: int) -> str:
        """Of the paths of an item that of the oldest file."""
        sql = "SELECT root, name FROM paths WHERE item_id = ? ORDER BY mtime_ns, root, name LIMIT 1"
        root, name = self.db.conn.execute(sql, (item_id,)).fetchone()
        return _from_text(root) + _from_text(name)

    def shared(self) -> NDArray[np.int64]:
        """The ids of the items that several paths lead to."""
        rows = self.db.conn.execute("SELECT item_id FROM paths GROUP BY item_id HAVING count(*) > 1")
        return np.fromiter((row[0] for row in rows), np.int64)

    def put_verdict(self, a: int, b: int, verdict: str) -> None:
        """Remember what two items are to each other, inside `write`."""
        told = (min(a, b), max(a, b), verdict, _now())
        self.db.conn.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", told)

    def verdicts(self, verdict: str) -> NDArray[np.int64]:
        """The pairs of ids (n, 2) that were judged to be so, the lower id first, in ascending order."""
        rows = self.db.conn.execute("SELECT item_a, item_b FROM verdicts WHERE verdict = ?", (verdict,)).fetchall()
        return np.array(rows, np.int64).reshape(-1, 2)

    # Switching models

    def uncoded(self, root: str, name: str, fingerprint: str) -> tuple[int, str] | None:
        """Id and SHA-256 of the item at a path, if it has no code of this model."""
        sql = (
            "SELECT id, sha256 FROM items JOIN paths ON item_id = id WHERE root = ? AND name = ? AND NOT EXISTS"
            " (SELECT 1 FROM codes WHERE codes.item_id = id AND fingerprint = ?)"
        )
        row: tuple[int, str] | None = self.db.conn.execute(sql, (_text(root), _text(name), fingerprint)).fetchone()
        return row

    def put_codes(self, fingerprint: str, codes: Iterable[tuple[int, bytes]]) -> None:
        """Add codes of a model that is not the current one yet, inside `write`."""
        self.db.conn.executemany(
            "INSERT OR REPLACE INTO codes VALUES (?, ?, ?)", [(i, fingerprint, c) for i, c in codes]
        )

    def without_code(self, fingerprint: str) -> list[int]:
        sql = "SELECT id FROM items WHERE id NOT IN (SELECT item_id FROM codes WHERE fingerprint = ?)"
        return [row[0] for row in self.db.conn.execute(sql, (fingerprint,))]

    def switch(self, fingerprint: str, bits: int, generation: int) -> None:
        """Make a model the current one and drop the codes of all others, inside `write`."""
        self.db.conn.execute("DELETE FROM codes WHERE fingerprint <> ?", (fingerprint,))
        self.put_setting("fingerprint", fingerprint)
        self.put_setting("bits", str(bits))
        self.db.conn.execute("DELETE FROM settings WHERE key = 'calibration'")  # distances were those of its codes
        self.forget_changes(generation)


class _Connections:
    """What a thread has open; it is closed with the thread, or by `Store.close`."""

    def __init__(self) -> None:
        self.named: dict[str, Database] = {}
        self.uses = 0  # one within the other
        self.unwanted = False  # to be closed when it is used no more
        self.writing = False  # whether its connection was told what it needs for that

    def close(self) -> None:
        self.unwanted = self.writing = False
        while self.named:
            self.named.popitem()[1].close()

    def __del__(self) -> None:
        self.close()


def _connect(uri: str, read_only: bool) -> Database:
    conn = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
    if not read_only:
        conn.execute("PRAGMA synchronous = FULL")
    return Database(conn)


def _quoted(path: Path) -> str:
    """A path as part of an SQLite URI."""
    return quote(os.fsencode(path.absolute()))


def _has_wal(path: Path) -> bool:
    """Whether there is more of a database than its file; an empty log without an index is only what a reader left."""
    wal, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    return wal.exists() and (index.exists() or wal.stat().st_size > 0)


def _discard(path: Path) -> None:
    """Delete a database, and the log that SQLite would take for that of another one under its name."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Say what SQLite's errors mean for the database at `path`."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        text = str(error)
        advice: dict[str, Callable[[], str]] = {
            "full": lambda: f"the disk of {path.parent} is full: free some space and run the command again",
            "readonly": lambda: f"{path.parent} cannot be written to: open it read-only, or change its permissions",
            "unable to open": lambda: f"{path} cannot be opened: check the folder's permissions",
            "locked": lambda: f"{path.parent} is being written to by another process: try again when it has finished",
            "malformed": lambda: f"{path} is damaged: hashret doctor says what can be saved",
            "decode": lambda: f"{path} is damaged: hashret doctor says what can be saved",
            "not a database": lambda: f"{path} is damaged, or no database: hashret doctor says what can be saved",
            "disk I/O": lambda: f"{path.parent} cannot be read or written ({text}): check the disk",
            "no such": lambda: f"{path} is no database of a collection: choose another folder",
        }
        for part, say in advice.items():
            if part in text:
                raise HashretError(say()) from error
        if isinstance(error, sqlite3.ProgrammingError):
            raise
        raise damaged(path, one_line(error)) from error


def _text(path: str) -> str | bytes:
    """As SQLite keeps a path: text, or bytes if it is not UTF-8."""
    if path.isascii():
        return path
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _from_text(stored: str | bytes) -> str:
    if not isinstance(stored, str | bytes):
        raise sqlite3.DatabaseError(f"malformed: {stored!r} for a text")
    return stored if isinstance(stored, str) else os.fsdecode(stored)


def _json(metadata: dict[str, Any] | None) -> str | None:
    return None if metadata is None else json.dumps(metadata, ensure_ascii=False)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
