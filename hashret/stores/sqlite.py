"""`SqliteStore`: the items of a collection in one SQLite database in its folder.

The database is the source of truth: everything else can be rebuilt from it and the user's files. Every write is one
transaction that is durable when it ends.
"""

import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from shlex import quote
from typing import Self

from filelock import FileLock, Timeout

from hashret.durable import replace_durably, sync
from hashret.errors import HashretError
from hashret.stores.sqlite_connections import Connections, connect, discard, quoted, sqlite_errors
from hashret.stores.sqlite_reads import FilterCache, SqliteSnapshot
from hashret.stores.sqlite_schema import SCHEMA, SCHEMA_VERSION, UPGRADES, upgrade
from hashret.stores.sqlite_writes import SqliteTransaction

DATABASE = "items.db"
RECOVERED = f"{DATABASE}.recovered"  # complete, and about to replace a damaged database


class SqliteStore:
    """The `ItemStore` in `folder/items.db`; see `hashret.stores.protocol.ItemStore`.

    A database of an older schema version is upgraded, after a backup beside it, unless it is opened read-only. Raises
    HashretError if there is no database, or it is damaged, or of a newer schema version.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder = folder
        self.path = folder / DATABASE
        self.read_only = read_only
        try:
            exists = self.path.is_file()
        except OSError as error:
            raise HashretError(
                f"{self.path} cannot be opened ({error.strerror}): check the folder's permissions"
            ) from error
        if not exists:
            raise HashretError(
                f"there is no collection at {folder}: make one with hashret index SOURCE -c {quote(str(folder))}"
            )
        if (folder / RECOVERED).exists():
            raise HashretError(f"the recovery of {folder} was interrupted: finish it with hashret doctor --recover")
        self._file = self._identity()
        self._locked_file: tuple[int, int] | None = self._file  # None if it was replaced before the lock was taken
        self._reopening = threading.Lock()
        self._connections = Connections(self.path, read_only=read_only)
        self._filters = FilterCache()
        try:
            with sqlite_errors(self.path):
                self._open()
        except BaseException:
            self._connections.close()
            raise

    def _open(self) -> None:
        db = self._connections.writing
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise HashretError(f"{self.path} was made by a newer hashret: upgrade hashret to open it")
        if version < min(UPGRADES):
            raise HashretError(f"{self.path} is not the database of a collection: choose another folder")
        # Check this before the first write: the database of another program may have the same user_version.
        SqliteSnapshot(db, self.path, self._filters).settings["generation"]
        if not self.read_only:
            db.execute("PRAGMA journal_mode = WAL")  # a restored backup may have another mode
            if version < SCHEMA_VERSION:
                upgrade(db.conn, self._back_up)

    def _back_up(self, version: int) -> None:
        """Copy the database of an older schema version to a file beside it."""
        backup = self.path.with_name(f"{DATABASE}.{version}")
        temporary = backup.with_name(backup.name + ".new")
        try:
            self.copy_to(temporary)
            replace_durably(temporary, backup)
        finally:
            discard(temporary)

    def copy_to(self, path: Path) -> None:
        """Write a copy of the current state to the database file `path`, and replace one that is there."""
        discard(path)
        with sqlite_errors(self.path), self._connections.in_use():
            try:
                # As bytes, which a name that is not UTF-8 needs.
                self._connections.reading.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(path),))
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                    raise
                raise HashretError(
                    f"the disk is too full for a copy of {self.path}: free some space and run the command again"
                ) from None
        sync(path)

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, str]) -> Self:
        """Create a store in an existing folder, atomically, replacing one that is there."""
        path = folder / DATABASE
        temporary = path.with_name(path.name + ".new")
        discard(temporary)
        try:
            with sqlite_errors(path), closing(connect(f"file:{quoted(temporary)}", read_only=False)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(SCHEMA)
                values = {"generation": "0", "changes_after": "0"} | dict(settings) | {"state": secrets.token_hex(8)}
                db.table("settings").upsert_all(({"key": k, "value": v} for k, v in values.items()), pk="key")
                db.table("states").insert({"generation": int(values["generation"]), "id": values["state"]})
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            replace_durably(temporary, path)
        finally:
            discard(temporary)
        return cls(folder)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Return whether a folder contains a store, intact or damaged."""
        return (folder / DATABASE).is_file()

    @property
    def location(self) -> str:
        return str(self.path)

    def _identity(self) -> tuple[int, int]:
        """Return the device and the inode of the database file. Raise HashretError if it is gone."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise HashretError(
                f"{self.path} is no longer there ({error.strerror}): put it back, or index your images again"
            ) from None
        return status.st_dev, status.st_ino

    def _follow(self) -> None:
        """Open the database again if its file was replaced, as by a restored backup."""
        if not self._connections.idle or self._identity() == self._file:
            return
        with self._reopening:
            file = self._identity()
            if file != self._file:
                self._connections.close()
                with sqlite_errors(self.path):
                    self._open()
                self._file = file

    @contextmanager
    def snapshot(self) -> Iterator[SqliteSnapshot]:
        self._follow()
        with sqlite_errors(self.path), self._connections.in_use():
            db = self._connections.reading
            if db.conn.in_transaction:  # nested: read within the outer transaction
                yield SqliteSnapshot(db, self.path, FilterCache())
                return
            db.conn.execute("BEGIN")
            try:
                yield SqliteSnapshot(db, self.path, self._filters)
            finally:
                if db.conn.in_transaction:
                    db.conn.execute("COMMIT")

    @contextmanager
    def transaction(self, *, advance: bool = True, rollback: bool = False) -> Iterator[SqliteTransaction]:
        with sqlite_errors(self.path), self._connections.in_use():
            db = self._connections.writing
            db.conn.execute("BEGIN IMMEDIATE")
            try:
                transaction = SqliteTransaction(db, self.path, advance=advance)
                yield transaction
                transaction.record_state()
                if self._identity() != self._locked_file:  # the commit would be lost with the open file
                    raise HashretError(f"{self.path} was replaced during the command: run it again")
                db.conn.execute("ROLLBACK" if rollback else "COMMIT")
            except BaseException:
                if db.conn.in_transaction:
                    db.conn.execute("ROLLBACK")
                raise

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder's lock: other threads wait for it; in another process HashretError is raised."""
        if self.read_only:
            raise HashretError(f"{self.folder} was opened read-only: open it for writing to change it")
        self._follow()  # before the lock file is created, which would recreate a deleted folder
        with locked(self.folder), sqlite_errors(self.path):
            self._follow()
            if not self._connections.locked:  # not nested
                self._locked_file = None if self._connections.outdated else self._file
            with self._connections.read_on_writer():
                yield

    def close(self) -> None:
        self._connections.close()


_locks: dict[str, threading.RLock] = {}
_locks_lock = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock: other threads wait for it; in another process HashretError is raised."""
    with _locks_lock:
        thread_lock = _locks.setdefault(os.path.realpath(folder), threading.RLock())
    with thread_lock:
        try:
            lock = FileLock(folder / "lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise HashretError(
                f"another process is writing to {folder}: run the command again when it has finished"
            ) from None
        except OSError as error:
            raise HashretError(f"{folder} cannot be written to ({error.strerror}): check its permissions") from None
        try:
            yield
        finally:
            lock.release()
