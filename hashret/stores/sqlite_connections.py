"""SQLite connections, one per thread and purpose, and SQLite's errors translated into HashretError."""

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

    Each thread reads on a read-only connection and writes on another. A thread that holds the collection's lock also
    reads on its writer, whose page cache then has the pages that it is about to change.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self._path = path
        self._read_only = read_only
        self._local = threading.local()
        self._opened: weakref.WeakSet[_ThreadConnections] = weakref.WeakSet()
        self._last: Database | None = None  # the writer that is closed after all others
        self._lock = threading.Lock()  # guards the attributes of all _ThreadConnections

    @property
    def reading(self) -> Database:
        """This thread's connection for reading."""
        return self.writing if self._own.reads_on_writer else self._connection("reading", read_only=True)

    @property
    def writing(self) -> Database:
        """This thread's connection for writing; for a read-only store, the one for reading."""
        if self._read_only:
            return self._connection("reading", read_only=True)
        return self._connection("writing", read_only=False)

    def _connection(self, purpose: str, *, read_only: bool) -> Database:
        connections = self._own.connections
        if purpose not in connections:
            uri = f"file:{quoted(self._path)}?mode={'ro' if read_only else 'rw'}"
            if read_only and not os.access(self._path.parent, os.W_OK) and not has_wal(self._path):
                uri += "&immutable=1"
            connections[purpose] = connect(uri, read_only=read_only)
        return connections[purpose]

    @property
    def _own(self) -> "_ThreadConnections":
        if not hasattr(self._local, "own"):
            with self._lock:
                self._local.own = _ThreadConnections()
                self._opened.add(self._local.own)
        own: _ThreadConnections = self._local.own
        return own

    @property
    def idle(self) -> bool:
        """Whether this thread neither uses its connections nor holds the collection's lock."""
        return not self._own.uses and not self.locked

    @property
    def locked(self) -> bool:
        """Whether this thread holds the collection's lock."""
        return self._own.reads_on_writer

    @property
    def outdated(self) -> bool:
        """Whether this thread uses connections that `close` would have closed."""
        return self._own.closing

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep `close` from closing this thread's connections: SQLite crashes if one is closed during a statement."""
        own = self._own
        with self._lock:
            own.uses += 1
        try:
            yield
        finally:
            with self._lock:
                own.uses -= 1
                if own.closing and not own.uses:
                    own.close()
                    if self._last is not None and not any(other.closing for other in self._opened):
                        self._last.close()
                        self._last = None

    @contextmanager
    def read_on_writer(self) -> Iterator[None]:
        """Let this thread read on its connection for writing."""
        own = self._own
        before, own.reads_on_writer = own.reads_on_writer, True
        try:
            yield
        finally:
            own.reads_on_writer = before

    def close(self) -> None:
        """Close the connections of all threads; connections in use are closed as soon as they no longer are.

        The last one closed is a writer, if any is open: SQLite moves the log into the database only then.
        """
        with self._lock:
            threads = list(self._opened)
            for other in threads:
                other.closing = bool(other.uses)
            idle = [other for other in threads if not other.closing]
            for other in idle:
                other.close("reading")
            writers = [other.connections.pop("writing") for other in idle if "writing" in other.connections]
            if writers and len(idle) < len(threads):
                self._last = writers.pop()
            for writer in writers:
                writer.close()


class _ThreadConnections:
    """The connections of one thread; they are closed when it ends, or by `Connections.close`."""

    def __init__(self) -> None:
        self.connections: dict[str, Database] = {}
        self.uses = 0  # the depth of nested `in_use` blocks
        self.closing = False  # whether to close them when `uses` is 0
        self.reads_on_writer = False

    def close(self, *purposes: str) -> None:
        """Close the connections for these purposes, by default all, reading before writing."""
        self.closing = False
        for purpose in purposes or ("reading", "writing"):
            if purpose in self.connections:
                self.connections.pop(purpose).close()

    def __del__(self) -> None:
        self.close()


class _Database(Database):
    """sqlite-utils detects the support of upserts by creating a table; every supported SQLite has them (3.24)."""

    supports_on_conflict = True


def connect(uri: str, *, read_only: bool) -> Database:
    """Open a connection that waits up to 30 s for locks of other connections."""
    conn = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False)
    try:
        if not read_only:
            conn.execute("PRAGMA synchronous = FULL")
            # Digests are random, so a batch touches pages throughout their index: cache them, and checkpoint rarely.
            conn.execute("PRAGMA cache_size = -65536")  # KiB
            conn.execute("PRAGMA wal_autocheckpoint = 8000")  # pages, of 4 KiB
        return _Database(conn)
    except BaseException:
        conn.close()
        raise


def quoted(path: Path) -> str:
    """Quote a path for an SQLite URI."""
    return quote(os.fsencode(path.absolute()))


def has_wal(path: Path) -> bool:
    """Return whether a write-ahead log belongs to the database; an empty one without `-shm` is a reader's leftover."""
    wal, index = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    return wal.exists() and (index.exists() or wal.stat().st_size > 0)


def discard(path: Path) -> None:
    """Delete a database with its log, which SQLite would otherwise apply to a new database of the same name."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Translate SQLite's errors on the database at `path` into HashretError with advice."""
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
            "not a database": lambda: f"{path} is damaged, or not a database: hashret doctor says what can be saved",
            "disk I/O": lambda: f"{path.parent} cannot be read or written ({text}): check the disk",
            "no such": lambda: f"{path} is not the database of a collection: choose another folder",
        }
        for part, message in advice.items():
            if part in text:
                raise HashretError(message()) from error
        if isinstance(error, sqlite3.ProgrammingError):
            raise
        raise damaged(path, one_line(error)) from error


def to_stored(path: str) -> str | bytes:
    """Convert a path to its stored form: text, or bytes if it is not UTF-8."""
    if path.isascii():
        return str(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)


def from_stored(stored: str | bytes) -> str:
    """Invert `to_stored`; raise sqlite3.DatabaseError for a value of another type."""
    if not isinstance(stored, str | bytes):
        raise sqlite3.DatabaseError(f"malformed: {stored!r} for a text")
    return stored if isinstance(stored, str) else os.fsdecode(stored)
