"""`SqliteStore`: the items of a collection in one SQLite database in its folder.

The database is the only truth of a collection; everything else can be made again from it and the user's files. Every
write is one transaction that is durable when it ends.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from hashret.durable import replace_durably
from hashret.errors import HashretError
from hashret.stores.sqlite_connections import Connections, connect, discard, quoted, sqlite_errors
from hashret.stores.sqlite_reads import FilterCache, SqliteSnapshot
from hashret.stores.sqlite_schema import SCHEMA, SCHEMA_VERSION, UPGRADES, upgrade
from hashret.stores.sqlite_writes import SqliteTransaction

DATABASE = "items.db"


class SqliteStore:
    """The store in `folder`; see `hashret.stores.protocol.ItemStore`.

    Raises HashretError if there is none, or it is damaged, or made by a newer hashret. An older one is upgraded, unless
    it is read only, and kept beside it as it was.
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
            raise HashretError(f"there is no collection at {folder}: make one with hashret index SOURCE")
        self._inode = self.path.stat().st_ino
        self._connections = Connections(self.path, read_only=read_only)
        self._filters = FilterCache()
        with sqlite_errors(self.path):
            self._open()

    def _open(self) -> None:
        db = self._connections.writing
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise HashretError(f"{self.path} was made by a newer hashret: upgrade hashret to open it")
        if version < min(UPGRADES):
            raise HashretError(f"{self.path} is no database of a collection: choose another folder")
        # Before anything is written: another program may count versions too.
        SqliteSnapshot(db, self.path, self._filters).settings["generation"]
        if not self.read_only:
            db.execute("PRAGMA journal_mode = WAL")  # which a backup may not be in
            if version < SCHEMA_VERSION:
                self._keep(version)
                upgrade(db.conn)

    def _keep(self, version: int) -> None:
        """Copy the database of an older version beside it."""
        kept = self.path.with_name(f"{DATABASE}.{version}")
        written = kept.with_name(kept.name + ".new")
        try:
            discard(written)
            self._connections.writing.execute("VACUUM INTO ?", (str(written),))
            replace_durably(written, kept)
        finally:
            discard(written)

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, str]) -> Self:
        """A new store in a folder that exists, in place of whatever store is there; it appears whole or not at all."""
        path = folder / DATABASE
        written = path.with_name(path.name + ".new")
        discard(written)
        try:
            with sqlite_errors(path), closing(connect(f"file:{quoted(written)}", read_only=False)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(SCHEMA)
                values = {"generation": "0", "changes_after": "0"} | dict(settings)
                db.table("settings").upsert_all(({"key": k, "value": v} for k, v in values.items()), pk="key")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            replace_durably(written, path)
        finally:
            discard(written)
        return cls(folder)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether there is a store, sound or not, in a folder."""
        return (folder / DATABASE).is_file()

    @property
    def location(self) -> str:
        return str(self.path)

    @contextmanager
    def snapshot(self) -> Iterator[SqliteSnapshot]:
        with sqlite_errors(self.path), self._connections.in_use():
            db = self._connections.reading
            if db.conn.in_transaction:  # a part of that
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
                if advance:
                    transaction.put_setting("generation", str(transaction.generation))
                db.conn.execute("ROLLBACK" if rollback else "COMMIT")
            except BaseException:
                if db.conn.in_transaction:
                    db.conn.execute("ROLLBACK")
                raise

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock of the folder: other threads wait for it, another process is refused."""
        if self.read_only:
            raise HashretError(f"{self.folder} was opened read-only: open it for writing to change it")
        self._check_in_place()  # before a lock would make the folder anew
        with locked(self.folder), sqlite_errors(self.path), self._connections.reading_where_it_writes():
            self._check_in_place()
            yield

    def _check_in_place(self) -> None:
        """Raises HashretError if the database was deleted or replaced: what is written to it then is lost."""
        if not self.path.is_file() or self.path.stat().st_ino != self._inode:
            raise HashretError(f"{self.path} was deleted or replaced since it was opened: open the collection again")

    def close(self) -> None:
        self._connections.close()


_locks: dict[str, threading.RLock] = {}
_locks_lock = threading.Lock()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: other threads wait for it, another process is refused."""
    with _locks_lock:
        ours = _locks.setdefault(os.path.realpath(folder), threading.RLock())
    with ours:
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
