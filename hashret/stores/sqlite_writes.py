"""`SqliteTransaction`: the writes of the SQLite store, within one transaction of a connection.

sqlite-utils writes the tables of few rows. Items, paths and codes are written in statements of a thousand rows each,
because `executemany`, which sqlite-utils uses too, takes the global interpreter lock again for every row. Rows are
removed, and metadata replaced, one by one by key.
"""

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from hashret.results import State
from hashret.stores.protocol import FailedPath, ItemRow, Metadata, ModelKey
from hashret.stores.sqlite_connections import to_stored
from hashret.stores.sqlite_reads import FINGERPRINTS, FilterCache, SqliteSnapshot

MAX_STATES = 100_000  # that are recorded, some 3 MB; an index of an older one is rebuilt


class SqliteTransaction(SqliteSnapshot):
    """Writes to the database on `db`, which is in a transaction; see `hashret.stores.protocol.Transaction`."""

    def __init__(self, db: Database, path: Path, *, advance: bool) -> None:
        super().__init__(db, path, FilterCache())  # a cache of its own: no other connection sees this state
        current = super().state
        self._advance = advance
        self._state = State(current.generation + 1, secrets.token_hex(8)) if advance else current

    @property
    def state(self) -> State:
        return self._state

    def record_state(self) -> None:
        """Record the state that the transaction commits."""
        if self._advance:
            generation, state_id = self._state
            self._conn.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", self._state)
            self._conn.execute("DELETE FROM states WHERE generation <= ?", (generation - MAX_STATES,))
            self.put_setting("generation", str(generation))
            self.put_setting("state", state_id)

    def put(self, rows: Sequence[ItemRow]) -> list[int | None]:
        ids = self.find([row.sha256 for row in rows])
        fresh: dict[str, ItemRow] = {}
        for row in rows:
            if row.sha256 not in ids and row.code is not None:
                fresh.setdefault(row.sha256, row)
        highest = self.highest_id
        for sha256, row in fresh.items():
            ids[sha256] = highest = max(highest + 1, row.id or 0)
        now = _now()
        self._insert(
            "INSERT INTO items VALUES",
            ((ids[s], s, r.width, r.height, r.length, r.added or now, _json(r.metadata)) for s, r in fresh.items()),
        )
        fingerprint = self.settings["fingerprint"]
        self._insert("INSERT INTO codes VALUES", ((ids[s], fingerprint, row.code) for s, row in fresh.items()))
        self._insert("INSERT INTO changes VALUES", ((self._state.generation, "add", ids[sha256]) for sha256 in fresh))
        self._put_paths([row for row in rows if row.sha256 in ids], ids)
        return [ids.get(row.sha256) for row in rows]

    def _put_paths(self, rows: list[ItemRow], ids: dict[str, int]) -> None:
        """Assign paths to their items, and remove items that are left without a path."""
        names: dict[str, list[str]] = {}
        for row in rows:
            names.setdefault(row.root, []).append(row.name)
        affected = {
            item_id
            for root, root_names in names.items()
            for _, item_id in self._named("name, item_id", "paths", root, root_names)
        }
        roots = {root: to_stored(root) for root in names}
        paths = [
            (roots[r.root], to_stored(r.name), ids[r.sha256], r.label and to_stored(r.label), r.size, r.mtime_ns)
            for r in rows
        ]
        self._insert("INSERT OR REPLACE INTO paths VALUES", paths)
        if self._conn.execute("SELECT EXISTS (SELECT 1 FROM failures)").fetchone()[0]:
            self._insert("DELETE FROM failures WHERE (root, name) IN (VALUES", (path[:2] for path in paths), ")")
        last = {path[:2]: path[2] for path in paths}  # an archive may contain a name twice
        self._drop_orphans(affected.union(ids.values()).difference(last.values()))

    def _insert(self, sql: str, rows: Iterable[tuple[Any, ...]], end: str = "") -> None:
        """Execute a statement on rows of values, a thousand rows at a time."""
        rows = iter(rows)
        while chunk := list(islice(rows, 1000)):
            row = "(" + ", ".join("?" * len(chunk[0])) + ")"
            self._conn.execute(f"{sql} {', '.join([row] * len(chunk))}{end}", list(chain.from_iterable(chunk)))

    def put_failures(self, failures: Iterable[FailedPath]) -> None:
        rows = [
            failure._asdict() | {"root": to_stored(failure.root), "name": to_stored(failure.name), "seen": _now()}
            for failure in failures
        ]
        self._db.table("failures").upsert_all(rows, pk=("root", "name"))

    def remove(self, ids: Iterable[int] = (), paths: Iterable[tuple[str, str]] = ()) -> list[str]:
        affected = {i for i in ids if self._conn.execute("SELECT 1 FROM items WHERE id = ?", (i,)).fetchone()}
        self._conn.executemany("DELETE FROM paths WHERE item_id = ?", [(i,) for i in affected])
        for root, name in paths:
            key = to_stored(root), to_stored(name)
            found = self._conn.execute("SELECT item_id FROM paths WHERE root = ? AND name = ?", key)
            affected |= {row[0] for row in found}
            self._conn.execute("DELETE FROM paths WHERE root = ? AND name = ?", key)
            self._conn.execute("DELETE FROM failures WHERE root = ? AND name = ?", key)
        return self._drop_orphans(affected)

    def _drop_orphans(self, ids: set[int]) -> list[str]:
        """Remove those of the items that have no path; return their contents."""
        conn = self._conn
        models = conn.execute(FINGERPRINTS).fetchall() if ids else []
        removed = list[str]()
        for i in ids:
            if conn.execute("SELECT 1 FROM paths WHERE item_id = ? LIMIT 1", (i,)).fetchone() is None:
                removed += [row[0] for row in conn.execute("SELECT sha256 FROM items WHERE id = ?", (i,))]
                conn.executemany("DELETE FROM codes WHERE fingerprint = ? AND item_id = ?", [(f, i) for (f,) in models])
                conn.execute("DELETE FROM items WHERE id = ?", (i,))
                conn.execute("INSERT OR REPLACE INTO changes VALUES (?, 'remove', ?)", (self._state.generation, i))
        if ids:  # no verdict outlives its items
            self._db.table("verdicts").delete_where(
                "NOT EXISTS (SELECT 1 FROM items WHERE id = item_a)"
                " OR NOT EXISTS (SELECT 1 FROM items WHERE id = item_b)"
            )
        return removed

    def put_metadata(self, metadata: Mapping[int, Metadata]) -> None:
        rows = [(_json(row), i) for i, row in metadata.items()]
        self._conn.executemany("UPDATE items SET metadata = ? WHERE id = ?", rows)

    def put_codes(self, fingerprint: str, codes: Iterable[tuple[int, bytes]]) -> None:
        self._insert("INSERT OR REPLACE INTO codes VALUES", ((i, fingerprint, code) for i, code in codes))

    def switch_model(self, model: ModelKey) -> None:
        self._db.table("codes").delete_where("fingerprint <> ?", [model.fingerprint])
        self.put_setting("fingerprint", model.fingerprint)
        self.put_setting("bits", str(model.bits))
        self._db.table("settings").delete_where("key = 'calibration'")  # it was measured on the codes of another model
        self.forget_changes(self._state.generation)

    def put_verdict(self, a: int, b: int, verdict: str) -> None:
        row = {"item_a": min(a, b), "item_b": max(a, b), "verdict": verdict, "at": _now()}
        self._db.table("verdicts").upsert(row, pk=("item_a", "item_b"))

    def put_setting(self, key: str, value: str) -> None:
        self._db.table("settings").upsert({"key": key, "value": to_stored(value)}, pk="key")
        self.__dict__.pop("settings", None)  # the cached property

    def forget_changes(self, up_to: int) -> None:
        self._db.table("changes").delete_where("generation <= ?", [up_to])
        self._db.table("states").delete_where("generation < ?", [up_to])
        self.put_setting("changes_after", str(up_to))


def _json(metadata: Metadata | None) -> str | None:
    return None if metadata is None else json.dumps(metadata, ensure_ascii=False)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
