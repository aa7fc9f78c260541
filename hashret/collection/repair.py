"""What has happened to a collection that should not have, and how much of a damaged one can be had back.

Beside the store this is the only room that speaks SQL: it reads databases that the store has to refuse.
"""

import hashlib
import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hashret.collection.opened import locked
from hashret.durable import put_in_place, sync
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.indexes import INDEXES
from hashret.stores.sqlite import BLOBS, Store
from hashret.stores.sqlite_pages import Cell, cells


class Finding(NamedTuple):
    """Something wrong with the "database", "items", "model", "blobs" or "index" of a collection, and the way out."""

    part: str
    text: str


class Recovered(NamedTuple):
    """How many items there are again, how many more left traces that are no whole item, and where the damaged database
    is kept; `roots` are the sources that were indexed."""

    items: int
    dropped: int
    backup: Path
    roots: list[str]


def examine(folder: Path) -> list[Finding]:
    """Everything that is wrong with the collection in `folder`; every row, every content kept in it and every model is
    read. Raises HashretError if there is no collection."""
    database = folder / "items.db"
    if not database.is_file():
        raise HashretError(f"there is no collection at {folder}: make one with hashret index SOURCE")
    with closing(_connect(database)) as conn:
        try:
            wrong = [row[0] for row in conn.execute("PRAGMA integrity_check(1)") if row[0] != "ok"]
            settings = dict(conn.execute("SELECT key, value FROM settings"))
            parts = [] if wrong else [*_items(conn, settings), *_blobs(conn, folder), *_model(folder, settings)]
            return [*map(_damaged, wrong), *parts, *([] if wrong else _index(folder, settings))]
        except (sqlite3.DatabaseError, LookupError, TypeError, ValueError) as error:  # values that make no sense too
            return [_damaged(str(error))]


def recover(folder: Path) -> Recovered:
    """Make a new database of all that can still be read in a damaged one, which is kept beside it.

    An item is whole with its row, a path and its code; the images of others are found again by indexing their sources.
    Raises HashretError if no model is left, or nothing can be read.
    """
    database, made = folder / "items.db", folder / "recovery"
    with locked(folder):
        tables = _read(database)
        settings = _settings(folder, tables) if tables["items"] else {}
        whole, rows = _whole(tables, settings) if settings else (set[int](), {})
        if not whole:
            raise HashretError(f"nothing can be read in {database}: delete {folder} and index your images again")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        try:
            with closing(Store.create(made / "items.db", settings)) as store, store.write(step=0):
                for table, found in rows.items():
                    places = ", ".join("?" * len(_COLUMNS[table]))
                    store.db.conn.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({places})", found)
                # Ids are never reused, those of items that are lost neither.
                store.db.conn.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'items'", (_highest(tables),))
            backup = _keep(database)
            shutil.rmtree(folder / "index", ignore_errors=True)
            written = (made / "items.db").replace(folder / "items.db.new")
            put_in_place(written, database)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    traces = {row[0] for row in tables["items"]} | {row[2] for row in tables["paths"]}
    roots = sorted({str(row[0]) for row in rows["paths"]} - {BLOBS})
    return Recovered(len(whole), len(traces - whole), backup, roots)


def _connect(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)


def _damaged(reason: str) -> Finding:
    reason = " ".join(reason.split())
    return Finding("database", f"items.db is damaged ({reason}): hashret doctor --recover saves what can be read")


# What may be wrong, part by part


def _items(conn: sqlite3.Connection, settings: dict[str, str]) -> Iterator[Finding]:
    """Items that lack something, and what belongs to none."""
    fingerprint, width = settings["fingerprint"], int(settings["bits"]) // 8
    for sql, told, what in (
        ("items WHERE id NOT IN (SELECT item_id FROM paths)", (), "items have no path"),
        ("paths WHERE item_id NOT IN (SELECT id FROM items)", (), "paths lead to no item"),
        (
            "items WHERE id NOT IN (SELECT item_id FROM codes WHERE fingerprint = ? AND length(code) = ?)",
            (fingerprint, width),
            "items have no code",
        ),
        ("codes WHERE item_id NOT IN (SELECT id FROM items)", (), "codes are of no item"),
    ):
        count = conn.execute(f"SELECT count(*) FROM {sql}", told).fetchone()[0]
        if count:
            yield Finding("items", f"{count:,} {what}: hashret doctor --recover drops them")


def _blobs(conn: sqlite3.Connection, folder: Path) -> Iterator[Finding]:
    """Contents that the collection should hold, and does not."""
    for (name,) in conn.execute("SELECT name FROM paths WHERE root = ?", (BLOBS,)):
        try:
            with (folder / BLOBS / name).open("rb") as file:
                wrong = "" if hashlib.file_digest(file, "sha256").hexdigest() == name else "was changed"
        except OSError as error:
            wrong = f"cannot be read ({error.strerror})"
        if wrong:
            yield Finding("blobs", f"{BLOBS}{name} {wrong}: restore it; it can be found, but not coded by other models")


def _model(folder: Path, settings: dict[str, str]) -> Iterator[Finding]:
    """Whether the model that the codes are of is there and whole."""
    place = folder / "models" / settings["fingerprint"]
    try:
        if Hasher.load(place).fingerprint != settings["fingerprint"]:
            yield Finding("model", f"{place} holds another model: restore it")
    except HashretError as error:
        yield Finding("model", str(error))


def _index(folder: Path, settings: dict[str, str]) -> Iterator[Finding]:
    """Whether the cache, if there is one, is as it was written."""
    told = json.loads(settings.get("cache", "null"))
    if told is not None:
        file = folder / "index" / Path(told["name"]).name
        if file.is_file():  # if not, it will be made again
            try:
                INDEXES[told["index"].partition(":")[0]].load(file)
            except (HashretError, OSError) as error:
                yield Finding("index", f"{error}; nothing is lost: --recover does that")


# What can be read in a damaged database

_COLUMNS = {
    "items": ("id", "sha256", "width", "height", "bytes", "added", "metadata"),
    "paths": ("root", "name", "item_id", "label", "size", "mtime_ns"),
    "codes": ("item_id", "fingerprint", "code"),
    "failures": ("root", "name", "size", "mtime_ns", "reason", "seen"),
    "verdicts": ("item_a", "item_b", "verdict", "at"),
    "settings": ("key", "value"),
    "changes": ("generation", "op", "item_id"),
    "sqlite_sequence": ("name", "seq"),
}
Row = tuple[Any, ...]


def _read(database: Path) -> dict[str, list[Row]]:
    """The rows of each table; of one that is damaged those that lie in pages which are not."""
    tables: dict[str, list[Row]] = {}
    with closing(_connect(database)) as conn:
        for table, columns in _COLUMNS.items():
            with suppress(sqlite3.DatabaseError):
                tables[table] = conn.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    if len(tables) < len(_COLUMNS):
        found: dict[str, dict[Row, Row]] = {table: {} for table in _COLUMNS}
        named: list[Row] = []
        for cell in cells(database):
            match cell:
                # As they lie there: first the key, then the rest.
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
                    named.append((root, name, number, None, -1, 0))
        for row in named:  # the index of paths holds names too; what is not in it will be found out by indexing
            found["paths"].setdefault(row[:2], row)
        tables = {table: list(rows.values()) for table, rows in found.items()} | tables
    return tables


def _settings(folder: Path, tables: dict[str, list[Row]]) -> dict[str, str]:
    """The settings that were, and for those that are lost what follows from the rest."""
    settings = {key: value for key, value in tables["settings"] if isinstance(value, str)}
    models = {place.name for place in (folder / "models").glob("*") if (place / "config.json").is_file()}
    if settings.get("fingerprint") not in models:
        coded = Counter(fingerprint for _, fingerprint, _ in tables["codes"] if fingerprint in models)
        if not coded:
            raise HashretError(f"no model of the codes is left in {folder / 'models'}: restore it from a backup")
        settings["fingerprint"] = coded.most_common(1)[0][0]
    config = json.loads((folder / "models" / settings["fingerprint"] / "config.json").read_text("utf-8"))
    told = settings.get("generation", "")
    reached = [int(told) if told.isdecimal() else 0, *(row[0] for row in tables["changes"] if type(row[0]) is int)]
    settings.pop("cache", None)
    now = str(max(reached) + 1)
    return {"index": "bitflip"} | settings | {"bits": str(config["bits"]), "generation": now, "changes_after": now}


def _whole(tables: dict[str, list[Row]], settings: dict[str, str]) -> tuple[set[int], dict[str, list[Row]]]:
    """The ids of the items of which everything is there, and the rows that are of them alone."""
    width = int(settings["bits"]) // 8
    good = {
        i for i, fingerprint, code in tables["codes"]
        if fingerprint == settings["fingerprint"] and isinstance(code, bytes) and len(code) == width
    }  # fmt: skip
    good &= {row[0] for row in tables["items"] if type(row[0]) is int and len(str(row[1])) == 64}
    good &= {row[2] for row in tables["paths"]}
    rows = {
        "items": [row for row in tables["items"] if row[0] in good],
        "paths": [row for row in tables["paths"] if row[2] in good],
        "codes": [row for row in tables["codes"] if row[0] in good and row[1] == settings["fingerprint"]],
        "failures": tables["failures"],
        "verdicts": [row for row in tables["verdicts"] if {row[0], row[1]} <= good],
    }
    return good, rows


def _highest(tables: dict[str, list[Row]]) -> int:
    """The largest id that was ever given, as far as anything tells."""
    where = {"items": 0, "codes": 0, "paths": 2, "changes": 2, "sqlite_sequence": 1}
    return max(int(row[place]) for table, place in where.items() for row in tables[table] if type(row[place]) is int)


def _keep(database: Path) -> Path:
    """Put the damaged database and its log aside; a log must not be taken for that of the new one."""
    backup = database.with_name(f"{database.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("", "-wal"):
        file = database.with_name(database.name + suffix)
        if file.exists():
            sync(Path(shutil.copy2(file, backup.with_name(backup.name + suffix))))
    sync(database.parent)
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    return backup
