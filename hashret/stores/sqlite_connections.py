"""Connections to an SQLite database, one a thread and purpose, and what SQLite's errors mean for a collection."""

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlite_utils import Database

from hashret.errors import HashretError, damaged, one_line


class Connections:
    """The connections of all threads to the database at `path`.

    Each thread reads on a connection that cannot write, and writes on another; a thread that holds the collection's
    lock also reads on the latter, whose cache has the pages that it is about to change.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._path = path
        self._read_only = read_only
        self._threads = threading.local()
        self._opened: weakref.WeakSet[_OfThread] = weakref.WeakSet()
        self._last: Database | None = None  # closed when those that were in use are
        self._lock = threading.Lock()  # for what each thread has open, and whether it uses that

    @property
    def reading(self) -> Database:
        """This thread's connection for reading."""
        return self.writing if self._mine.writes_next else self._connection("reading", read_only=True)

    @property
    def writing(self) -> Database:
        """This thread's connection for writing; for a store that is read-only, the one for reading."""
        if self._read_only:
            return self._connection("reading", read_only=True)
        return self._connection("writing", read_only=False)

    def _connection(self, purpose: str, *, read_only: bool) -> Database:
        connections = self._mine.connections
        if purpose not in connections:
            uri = f"file:{quoted(self._path)}?mode={'ro' if read_only else 'rw'}"
            if read_only and not os.access(self._path.parent, os.W_OK) and not has_wal(self._path):
                uri += "&immutable=1"
            connections[purpose] = connect(uri, read_only=read_only)
        return connections[purpose]

    @property
    def _mine(self) -> "_OfThread":
        if not hasattr(self._threads, "mine"):
            with self._lock:
                self._threads.mine = _OfThread()
                self._opened.add(self._threads.mine)
        mine: _OfThread = self._threads.mine
        return mine

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """`close` leaves alone what this thread uses: closed in the middle of a statement, it would crash."""
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
                    if self._last is not None and not any(held.unwanted for held in self._opened):
                        self._last.close()
                        self._last = None

    @contextmanager
    def reading_where_it_writes(self) -> Iterator[None]:
        """Within, this thread reads on its connection for writing."""
        mine = self._mine
        before, mine.writes_next = mine.writes_next, True
        try:
            yield
        finally:
            mine.writes_next = before

    def close(self) -> None:
        """Close the connections of all threads; those that a thread is just using, when it has done so.

        The last one has to be one for writing: only such a one takes the log into the database.
        """
        with self._lock:
            threads = list(self._opened)
            for held in threads:
                held.unwanted = bool(held.uses)
            idle = [held for held in threads if not held.unwanted]
            for held in idle:
                held.close("reading")
            writers = [held.connections.pop("writing") for held in idle if "writing" in held.connections]
            if writers and len(idle) < len(threads):
                self._last = writers.pop()
            for writer in writers:
                writer.close()


class _OfThread:
    """The connections of a thread; they are closed with it, or by `Connections.close`."""

    def __init__(self) -> None:
        self.connections: dict[str, Database] = {}
        self.uses = 0  # nested
        self.unwanted = False  # to be closed when it is used no more
        self.writes_next = False

    def close(self, *purposes: str) -> None:
        """Close the connections for these purposes, or all, those for reading first."""
        self.unwanted = False
        for purpose in purposes or ("reading", "writing"):
            if purpose in self.connections:
                self.connections.pop(purpose).close()

    def __del__(self) -> None:
        self.close()


class _Database(Database):
    """Upserts as SQLite has had them since 3.24: sqlite-utils finds out by making a table in the database."""

    supports_on_conflict = True


def connect(uri: str, *, read_only: bool) -> Database:
    """A connection that waits half a minute for the locks of others."""
    conn = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
    if not read_only:
        conn.execute("PRAGMA synchronous = FULL")
        # Digests come in no order, so a batch touches pages all over their index: they are kept, and written back from
        # the log less often.
        conn.execute("PRAGMA cache_size = -65536")  # KiB
        conn.execute("PRAGMA wal_autocheckpoint = 8000")  # pages, of 4 KiB
    return _Database(conn)


def quoted(path: Path) -> str:
    """A path as part of an SQLite URI."""
    return quote(os.fsencode(path.absolute()))


def has_wal(path: Path) -> bool:
    """Whether there is more of a database than its file; an empty log without an index is only what a reader left."""
    wal, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    return wal.exists() and (index.exists() or wal.stat().st_size > 0)


def discard(path: Path) -> None:
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


def to_stored(path: str) -> str | bytes:
    """A path as the database keeps it: text, or bytes if it is not UTF-8."""
    if path.isascii():
        return str(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)


def from_stored(stored: str | bytes) -> str:
    """The inverse of `to_stored`; raises sqlite3.DatabaseError for what is neither."""
    if not isinstance(stored, str | bytes):
        raise sqlite3.DatabaseError(f"malformed: {stored!r} for a text")
    return stored if isinstance(stored, str) else os.fsdecode(stored)
