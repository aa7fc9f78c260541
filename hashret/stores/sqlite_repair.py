"""Check the database of a collection, and recover the readable rows of a damaged one.

The database is opened read-only with sqlite3 alone: sqlite-utils reads the schema first, which may be damaged.
"""

import re
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from hashret.durable import Replacement, replace_durably, sync
from hashret.errors import HashretError
from hashret.results import BLOBS
from hashret.stores.protocol import ModelKey
from hashret.stores.sqlite import DATABASE, RECOVERED, SqliteStore
from hashret.stores.sqlite_connections import sqlite_errors
from hashret.stores.sqlite_pages import Cell, cells
from hashret.stores.sqlite_schema import COLUMNS

_SCRATCH = "recovery"  # a folder, in which a recovered database is built
_UNFINISHED = re.compile(re.escape(DATABASE) + r"(\.[0-9]+)?\.new(-wal|-shm|-journal)?")
# SQLite's errors that say nothing of the database: a full disk, a missing permission, another process. Of its errors of
# input and output, those of reading do.
_ENVIRONMENT = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR,
}  # fmt: skip
_DAMAGED_MEDIUM = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS}

Row = tuple[Any, ...]


class DatabaseReport(NamedTuple):
    """The result of a check of a database, which need not be one that `SqliteStore` can open."""

    database: str  # the name of the file
    damage: list[str]  # SQLite's reports of corruption; the fields below are empty then
    settings: dict[str, str]
    inconsistencies: list[str]  # such as "3 items have no path"
    blobs: dict[str, int]  # the names of contents that the collection stores itself, and their sizes, or `ABSENT`


class RecoveryReport(NamedTuple):
    """The result of a recovery."""

    items: int  # recovered
    dropped: int  # incomplete items
    backup: Path  # of the damaged database
    roots: list[str]  # of the recovered paths


def check_database(folder: Path) -> DatabaseReport:
    """Read every row of the database in `folder`. Raise HashretError if there is none."""
    if not SqliteStore.exists(folder):
        raise HashretError(
            f"there is no collection at {folder}: make one with hashret index SOURCE -c {quote(str(folder))}"
        )
    if (folder / RECOVERED).exists():
        return DatabaseReport(DATABASE, ["its recovery was interrupted"], {}, [], {})
    with closing(_connect(folder / DATABASE)) as conn:
        try:
            damage = [row[0] for row in conn.execute("PRAGMA integrity_check(1)") if row[0] != "ok"]
            settings = dict(conn.execute("SELECT key, value FROM settings"))
            if damage:
                return DatabaseReport(DATABASE, damage, settings, [], {})
            blobs = dict(conn.execute("SELECT name, size FROM paths WHERE root = ?", (str(BLOBS),)))
            return DatabaseReport(DATABASE, [], settings, list(_inconsistencies(conn, settings)), blobs)
        except (sqlite3.DatabaseError, LookupError, TypeError, ValueError) as error:  # invalid values too
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
            if code & 0xFF in _ENVIRONMENT and code not in _DAMAGED_MEDIUM:
                with sqlite_errors(folder / DATABASE):
                    raise
            return DatabaseReport(DATABASE, [str(error)], {}, [], {})


def _inconsistencies(conn: sqlite3.Connection, settings: dict[str, str]) -> Iterator[str]:
    fingerprint, width = settings["fingerprint"], int(settings["bits"]) // 8
    coded = "SELECT item_id FROM codes WHERE fingerprint = ? AND length(code) = ?"
    checks: tuple[tuple[str, Row, str], ...] = (
        ("items WHERE id NOT IN (SELECT item_id FROM paths)", (), "items have no path"),
        ("paths WHERE item_id NOT IN (SELECT id FROM items)", (), "paths lead to no item"),
        (f"items WHERE id NOT IN ({coded})", (fingerprint, width), "items have no code"),
        ("codes WHERE item_id NOT IN (SELECT id FROM items)", (), "codes are of no item"),
    )
    for rows, values, problem in checks:
        count = conn.execute(f"SELECT count(*) FROM {rows}", values).fetchone()[0]
        if count:
            yield f"{count:,} {problem}"


def _connect(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)


class RecoveredRows:
    """The readable rows of the database in `folder`: of a damaged table, those in intact pages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables = _read(folder / DATABASE)

    @property
    def items(self) -> int:
        """The number of readable rows of the table `items`."""
        return len(self._tables["items"])

    @property
    def settings(self) -> dict[str, str]:
        """The readable settings."""
        return {key: value for key, value in self._tables["settings"] if isinstance(value, str)}

    @property
    def fingerprints(self) -> Counter[str]:
        """The number of readable codes of each model."""
        return Counter(fingerprint for _, fingerprint, _ in self._tables["codes"])

    @property
    def generation(self) -> int:
        """The highest generation in any readable row."""
        text = self.settings.get("generation", "")
        recorded = (row[0] for row in self._tables["changes"] if type(row[0]) is int)
        return max([int(text) if text.isdecimal() else 0, *recorded])

    def restore(self, settings: dict[str, str]) -> RecoveryReport:
        """Replace the damaged database by a new one of the complete items: those with a row, a path and a code.

        Raise HashretError if there are none.
        """
        complete, rows = self._complete(ModelKey(settings["fingerprint"], int(settings["bits"])))
        if not complete:
            raise nothing_left(self._folder)
        temporary = self._folder / _SCRATCH
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            SqliteStore.create(temporary, settings).close()
            with closing(sqlite3.connect(temporary / DATABASE)) as conn, conn:
                for table, table_rows in rows.items():
                    values = ", ".join("?" * len(COLUMNS[table]))
                    conn.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({values})", table_rows)
                # Ids are never reused, not even those of lost items.
                conn.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'items'", (self._highest_id(),))
            backup = _back_up(self._folder / DATABASE)
            replace_durably(temporary / DATABASE, self._folder / RECOVERED)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        finish_recovery(self._folder)
        mentioned = {row[0] for row in self._tables["items"]} | {row[2] for row in self._tables["paths"]}
        roots = sorted({str(row[0]) for row in rows["paths"]} - {BLOBS})
        return RecoveryReport(len(complete), len(mentioned - complete), backup, roots)

    def _complete(self, model: ModelKey) -> tuple[set[int], dict[str, list[Row]]]:
        """Return the ids of the complete items, and the rows that belong to them."""
        tables = self._tables
        complete = {
            i for i, fingerprint, code in tables["codes"]
            if fingerprint == model.fingerprint and isinstance(code, bytes) and len(code) == model.bits // 8
        }  # fmt: skip
        complete &= {row[0] for row in tables["items"] if type(row[0]) is int and len(str(row[1])) == 64}
        complete &= {row[2] for row in tables["paths"]}
        rows = {
            "items": [row for row in tables["items"] if row[0] in complete],
            "paths": [row for row in tables["paths"] if row[2] in complete],
            "codes": [row for row in tables["codes"] if row[0] in complete and row[1] == model.fingerprint],
            "failures": tables["failures"],
            "verdicts": [row for row in tables["verdicts"] if {row[0], row[1]} <= complete],
        }
        return complete, rows

    def _highest_id(self) -> int:
        """Return the highest id in any readable row."""
        columns = {"items": 0, "codes": 0, "paths": 2, "changes": 2, "sqlite_sequence": 1}
        ids = (row[column] for table, column in columns.items() for row in self._tables[table])
        return max(i for i in ids if type(i) is int)


def nothing_left(folder: Path) -> HashretError:
    """Return the error for a database without a readable item."""
    return HashretError(f"nothing can be read in {folder / DATABASE}: delete {folder} and index your images again")


def _read(database: Path) -> dict[str, list[Row]]:
    """Return the readable rows of each table."""
    tables: dict[str, list[Row]] = {}
    with closing(_connect(database)) as conn:
        for table, columns in COLUMNS.items():
            with suppress(sqlite3.DatabaseError):
                tables[table] = conn.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    return tables if len(tables) == len(COLUMNS) else _read_pages(database) | tables


def _read_pages(database: Path) -> dict[str, list[Row]]:
    """Return the rows in intact pages, assigned to tables by the types of their values: the page that names a row's
    table may be lost."""
    found: dict[str, dict[Row, Row]] = {table: {} for table in COLUMNS}
    names: list[Row] = []
    for cell in cells(database):
        match cell:
            # In the order of storage: the primary key first.
            case Cell(int(number), (None, str(), int(), int(), int(), str(), str() | None) as values):
                found["items"][number,] = (number, *values[1:])
            case Cell(int(number), (str(), int()) as values):
                found["sqlite_sequence"][number,] = values
            case Cell(None, (str() | bytes(), str() | bytes(), int(), str() | bytes() | None, int(), int()) as row):
                found["paths"][row[:2]] = row
            case Cell(None, (str() | bytes(), str() | bytes(), int(), int(), str(), str()) as row):
                found["failures"][row[:2]] = row
            case Cell(None, (str(fingerprint), int(number), bytes(code))):
                found["codes"][fingerprint, number] = (number, fingerprint, code)
            case Cell(None, (int(), int(), str(), str()) as row):
                found["verdicts"][row[:2]] = row
            case Cell(None, (str(key), str()) as row):
                found["settings"][key,] = row
            case Cell(None, (int(generation), int(number), "add" | "remove" as op)):
                found["changes"][generation, number, op] = (generation, op, number)
            case Cell(None, (int(number), str() | bytes() as root, str() | bytes() as name)):
                names.append((root, name, number, None, -1, 0))
    for row in names:  # from the index paths_by_item, which has no label, size or mtime: the next indexing adds them
        found["paths"].setdefault(row[:2], row)
    return {table: list(rows.values()) for table, rows in found.items()}


def finish_recovery(folder: Path) -> None:
    """Put a recovered database, if there is one, in the place of the damaged one, without its log.

    SQLite would apply that log to the new database. Nothing is lost if the process is killed in between: the recovered
    database has the rows of the log, and no store opens the damaged one while it is there.
    """
    if (folder / RECOVERED).exists():
        for suffix in ("-wal", "-shm"):
            (folder / (DATABASE + suffix)).unlink(missing_ok=True)
        sync(folder)
        replace_durably(folder / RECOVERED, folder / DATABASE)


def unfinished(folder: Path) -> list[Path]:
    """Return the databases that a killed process did not finish, if no process is writing to the folder."""
    return [path for path in sorted(folder.iterdir()) if path.name == _SCRATCH or _UNFINISHED.fullmatch(path.name)]


def _back_up(database: Path) -> Path:
    """Copy the damaged database and its log, under a new name."""
    name, number = f"{database.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}", 1
    backup = database.with_name(name)
    while backup.exists():  # clocks can be set back
        backup, number = database.with_name(f"{name}-{number}"), number + 1
    for suffix in ("-wal", ""):
        file = database.with_name(database.name + suffix)
        if file.exists():
            with Replacement(backup.with_name(backup.name + suffix)) as new:
                shutil.copy2(file, new.path)
                new.commit()
    return backup
