"""`SqliteSnapshot`: the reads of the SQLite store, within one transaction of a connection.

Rows are read in thousands, so they stay the tuples that sqlite3 returns: sqlite-utils would build a dictionary for
each. The file is longer than most because it contains all reads of the protocol.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlite_utils import Database

from hashret.codes import Codes
from hashret.errors import HashretError, TooLarge, damaged, one_line
from hashret.results import Failure, Item, Root, State
from hashret.stores.filters import matching
from hashret.stores.protocol import Changes, Ids, ItemRow, KnownPath, ModelKey, PathRef, Ranking, Settings
from hashret.stores.sqlite_connections import from_stored, to_stored

P = ParamSpec("P")
R = TypeVar("R")

_IN_LIST = "IN (SELECT value FROM json_each(?))"

# A loose index scan for the distinct values of a table's first key column: SELECT DISTINCT would read every row.
_FIRST_KEYS = """
WITH RECURSIVE step(key) AS (
  SELECT min({key}) FROM {table}
  UNION SELECT (SELECT min({key}) FROM {table} WHERE {key} > step.key) FROM step)
SELECT key FROM step WHERE key IS NOT NULL
"""
PATH_BYTES = 200  # that a path takes in memory besides its characters
FINGERPRINTS = _FIRST_KEYS.format(key="fingerprint", table="codes")

_PATTERNS = {
    "fingerprint": re.compile("[0-9a-f]{64}"),
    "bits": re.compile("[0-9]{1,4}"),
    "generation": re.compile("[0-9]{1,18}"),
    "changes_after": re.compile("[0-9]{1,18}"),
    "state": re.compile("[0-9a-f]{16}"),
}


class CachedFilter(NamedTuple):
    """The items that match a filter in one state."""

    where: str
    state: State
    ids: Ids


class _ByteLimit:
    """A limit on bytes that are read; None for no limit."""

    def __init__(self, max_bytes: int | None) -> None:
        self._max_bytes, self._count = max_bytes, 0

    def count(self, size: int) -> None:
        self._count += size
        if self._max_bytes is not None and self._count > self._max_bytes:
            raise TooLarge(f"the items have more than {self._max_bytes:,} bytes of paths and metadata: read fewer")


class FilterCache:
    """The result of the last filter that depends on the state alone; all threads share it."""

    last: CachedFilter | None = None


def _reports_damage(
    read: Callable[Concatenate["SqliteSnapshot", P], R],
) -> Callable[Concatenate["SqliteSnapshot", P], R]:
    """Report values that hashret never writes, such as text in a column of integers, as damage."""

    @wraps(read)
    def method(snapshot: "SqliteSnapshot", /, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return read(snapshot, *arguments, **options)
        except (TypeError, ValueError, OverflowError, LookupError, RecursionError) as error:
            raise damaged(snapshot.path, one_line(error)) from error

    return method


class SqliteSnapshot:
    """Reads of the database at `path`, on `db`, which is in a transaction; see `hashret.stores.protocol.Snapshot`."""

    def __init__(self, db: Database, path: Path, filters: FilterCache) -> None:
        self.path = path
        self._db = db
        self._conn = db.conn
        self._filters = filters

    @cached_property
    def settings(self) -> Settings:
        """All settings. Raise HashretError for an impossible value."""
        rows = self._conn.execute("SELECT key, value FROM settings")
        settings = Settings({key: from_stored(value) for key, value in rows}, str(self.path))
        for key, pattern in _PATTERNS.items():
            if key in settings and not pattern.fullmatch(settings[key]):
                raise damaged(self.path, f"its setting {key} is {settings[key]!r}")
        return settings

    @property
    def state(self) -> State:
        settings = self.settings
        return State(settings.generation, settings.get("state", ""))  # version 2 of the schema has no states

    def count(self, table: Literal["items", "paths", "failures", "changes"], after: int = 0) -> int:
        if table == "changes":
            return self._db.table(table).count_where("generation > ?", [after])
        return self._db.table(table).count

    def ids(self, after: int = 0, limit: int | None = None, where: str | None = None) -> Ids:
        if where is None:
            rows = self._conn.execute(
                "SELECT id FROM items WHERE id > ? ORDER BY id LIMIT ?", (after, -1 if limit is None else limit)
            )
            return np.fromiter((row[0] for row in rows), np.int64)
        ids = self._matching(where)
        if not after and limit is None:
            return ids
        start = int(np.searchsorted(ids, after, side="right"))
        return ids[start : None if limit is None else start + limit]

    def _matching(self, where: str) -> Ids:
        last = self._filters.last
        if last is not None and (last.where, last.state) == (where, self.state):
            return last.ids
        matches = matching(self._conn, where)
        if matches.cacheable:
            self._filters.last = CachedFilter(where, self.state, matches.ids)
        return matches.ids

    @_reports_damage
    def items(self, ids: Iterable[int], *, metadata: bool = True, max_bytes: int | None = None) -> dict[int, Item]:
        ids_json, limit = json.dumps(list(ids)), _ByteLimit(max_bytes)
        paths: dict[int, list[tuple[str, str | None]]] = {}
        sql = f"SELECT item_id, root, name, label FROM paths WHERE item_id {_IN_LIST}"
        for i, root, name, label in self._conn.execute(sql, (ids_json,)):
            limit.count(len(root) + len(name) + PATH_BYTES)
            paths.setdefault(i, []).append((from_stored(root) + from_stored(name), label and from_stored(label)))
        items = {}
        columns = f"id, sha256, width, height, bytes, added, {'metadata' if metadata else 'NULL'}"
        for row in self._conn.execute(f"SELECT {columns} FROM items WHERE id {_IN_LIST}", (ids_json,)):
            i, sha256, width, height, size, added, metadata_json = row
            limit.count(len(metadata_json or ""))
            item_paths = sorted(paths.get(i, []), key=lambda path: path[0])
            label = next((label for _, label in item_paths if label is not None), None)
            distinct = list(dict.fromkeys(path for path, _ in item_paths))  # a file may be indexed under two roots
            items[i] = Item(i, sha256, width, height, size, added, _from_json(metadata_json), distinct, label)
        return items

    @_reports_damage
    def codes(
        self, ids: Sequence[int] | None = None, *, model: ModelKey | None = None, max_items: int | None = None
    ) -> tuple[Ids, Codes]:
        model = model or self.settings.model
        if max_items is not None and (items := self.count("items")) > max_items:
            ids = self.ids()[:: -(-items // max_items)].tolist()
        if ids is None:
            return self._codes(model, "")
        return self._codes(model, f"AND item_id {_IN_LIST}", json.dumps(list(ids)))

    def _codes(self, model: ModelKey, condition: str, *values: str | int) -> tuple[Ids, Codes]:
        """Return ids, ascending, and codes of a model, only of rows that meet an SQL condition if one is given."""
        all_ids: list[int] = []
        all_codes = bytearray()
        sql = f"SELECT item_id, code FROM codes WHERE fingerprint = ? {condition} ORDER BY item_id"
        rows = self._conn.execute(sql, (model.fingerprint, *values))
        while chunk := rows.fetchmany(10_000):
            chunk_ids, chunk_codes = zip(*chunk, strict=True)
            if set(map(len, chunk_codes)) != {model.bits // 8}:
                raise damaged(self.path, f"codes are not of {model.bits} bits")
            all_ids += chunk_ids
            all_codes += b"".join(chunk_codes)
        if all_ids and all_ids[0] < 0:
            raise damaged(self.path, f"an item has the id {all_ids[0]}")
        codes = np.frombuffer(bytes(all_codes), np.uint8).reshape(len(all_ids), model.bits // 8)
        return np.array(all_ids, np.int64), codes

    @property
    def highest_id(self) -> int:
        """The highest id that was ever assigned."""
        sql = "SELECT CAST(max(seq) AS INTEGER) FROM sqlite_sequence WHERE name = 'items'"
        highest = int(self._conn.execute(sql).fetchone()[0] or 0)
        if not 0 <= highest < 2**62:
            raise damaged(self.path, f"the last item had the id {highest}")
        return highest

    def find(self, sha256s: Sequence[str]) -> dict[str, int]:
        sql = (
            "SELECT sha256, items.id FROM json_each(?) CROSS JOIN items ON substr(sha256, 1, 8) = substr(value, 1, 8)"
            " AND sha256 = value"
        )
        return dict(self._conn.execute(sql, (json.dumps(sha256s),)))

    def paths(self, ids: Iterable[int]) -> list[PathRef]:
        sql = f"SELECT root, name, item_id, mtime_ns FROM paths WHERE item_id {_IN_LIST}"
        rows = self._conn.execute(sql, (json.dumps(list(ids)),))
        return [PathRef(Root(from_stored(root)), from_stored(name), *rest) for root, name, *rest in rows]

    def paths_at(self, path: str) -> list[PathRef]:
        return [ref for table in ("paths", "failures") for ref in self._paths_at(table, path)]

    def _paths_at(self, table: str, path: str) -> Iterator[PathRef]:
        columns = f"name, {'item_id' if table == 'paths' else 'NULL'}, mtime_ns"
        sql = f"SELECT {columns} FROM {table} WHERE root = ?"
        folder = path.rstrip("/") + "/"
        for root in self._roots(table):
            if root.within(path):
                rows = self._conn.execute(sql, (to_stored(root),)).fetchall()
            elif path.startswith(root):
                rows = list(self._named(columns, table, root, [path.removeprefix(root)]))
                below = folder.removeprefix(root)
                # "0" follows "/", so the range has exactly the names in the folder. Names stored as bytes sort apart.
                for low in {to_stored(below), os.fsencode(below)}:
                    high = low[:-1] + "0" if isinstance(low, str) else low[:-1] + b"0"
                    rows += self._conn.execute(f"{sql} AND name >= ? AND name < ?", (to_stored(root), low, high))
            else:
                continue
            yield from (PathRef(root, from_stored(name), *rest) for name, *rest in rows)

    def roots(self) -> list[Root]:
        return sorted({*self._roots("paths"), *self._roots("failures")})

    def _roots(self, table: str) -> list[Root]:
        rows = self._conn.execute(_FIRST_KEYS.format(key="root", table=table))
        return [Root(from_stored(row[0])) for row in rows]

    def known_paths(self, root: str, names: Sequence[str]) -> dict[str, KnownPath]:
        paths_by_name = {
            name: KnownPath(item_id, size, mtime_ns, False)
            for name, item_id, size, mtime_ns in self._named("name, item_id, size, mtime_ns", "paths", root, names)
        }
        for name, size, mtime_ns in self._named("name, size, mtime_ns", "failures", root, names):
            item_id = paths_by_name[name].item_id if name in paths_by_name else None
            paths_by_name[name] = KnownPath(item_id, size, mtime_ns, True)
        return paths_by_name

    def _named(self, columns: str, table: str, root: str, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Iterate over the rows with these names; the first of `columns` is the name."""
        stored = [to_stored(name) for name in names]
        # One statement for all names is ten times as fast as one each. Bytes cannot be in JSON, and SQLite cuts a text
        # from JSON at a zero character, so these names take a statement each.
        text = json.dumps([name for name in stored if isinstance(name, str) and "\0" not in name])
        sql = f"SELECT {columns} FROM {table} WHERE root = ? AND name"
        yield from self._conn.execute(f"{sql} {_IN_LIST}", (to_stored(root), text))
        for name in stored:
            if isinstance(name, bytes) or "\0" in name:
                for row in self._conn.execute(f"{sql} = ?", (to_stored(root), name)):
                    yield from_stored(row[0]), *row[1:]

    def names(self, root: str) -> Iterator[str]:
        sql = "SELECT name FROM paths WHERE root = :root UNION SELECT name FROM failures WHERE root = :root"
        return (from_stored(row[0]) for row in self._conn.execute(sql, {"root": to_stored(root)}))

    def failures(self) -> Iterator[tuple[Root, Failure]]:
        for root, name, reason, seen in self._conn.execute("SELECT root, name, reason, seen FROM failures"):
            yield Root(from_stored(root)), Failure(from_stored(root) + from_stored(name), reason, seen)

    @_reports_damage
    def changes(self, since: State) -> Changes | None:
        generation = since.generation
        if generation < int(self.settings["changes_after"]) or "state" not in self.settings:
            return None
        recorded = self._conn.execute("SELECT id FROM states WHERE generation = ?", (generation,)).fetchone()
        if recorded != (since.id,):
            return None
        # Ids are never reused: an item that was added and removed since has no code now, and had none at `since`.
        added = "SELECT item_id FROM changes WHERE generation > ? AND op = 'add'"
        ids, codes = self._codes(self.settings.model, f"AND item_id IN ({added})", generation)
        others = "SELECT item_id FROM changes WHERE generation > ? AND op <> 'add'"
        removed = self._conn.execute(
            f"{others} AND item_id NOT IN ({added}) ORDER BY item_id", (generation, generation)
        )
        return Changes(np.fromiter((row[0] for row in removed), np.int64), ids, codes)

    def item_rows(self) -> Iterator[ItemRow]:
        sql = (
            "SELECT root, name, label, size, mtime_ns, sha256, bytes, width, height, code, metadata, added, id"
            " FROM items JOIN codes ON codes.item_id = id AND fingerprint = ? JOIN paths ON paths.item_id = id"
            " ORDER BY id, root, name"
        )
        for values in self._conn.execute(sql, (self.settings["fingerprint"],)):
            row = ItemRow(*values)
            yield row._replace(
                root=from_stored(row.root),
                name=from_stored(row.name),
                label=row.label and from_stored(row.label),
                metadata=_from_json(values[10]),
            )

    def verdicts(self, verdict: str) -> Ids:
        rows = self._conn.execute("SELECT item_a, item_b FROM verdicts WHERE verdict = ?", (verdict,)).fetchall()
        return np.array(rows, np.int64).reshape(-1, 2)

    def ranking(self, keep: str) -> Ranking:
        order, values = "width * height DESC, bytes DESC, id", dict[str, bytes | int]()
        if keep == "oldest":  # a content without a file has the time at which it was added
            file_time = "SELECT min(nullif(mtime_ns, 0)) FROM paths WHERE item_id = id"
            order = f"coalesce(({file_time}), strftime('%s', added) * 1000000000), id"
        elif keep != "largest":
            folder = os.fsencode(keep.rstrip("/") + "/")
            values = {"folder": folder, "length": len(folder)}
            in_folder = "SELECT 1 FROM paths WHERE substr(CAST(root || name AS BLOB), 1, :length) = :folder"
            if self._conn.execute(f"{in_folder} LIMIT 1", values).fetchone() is None:
                raise HashretError(f"nothing is indexed under {keep}: keep the largest, the oldest, or another folder")
            order = f"EXISTS ({in_folder} AND item_id = id) DESC, {order}"
        rows = self._conn.execute(f"SELECT id FROM items ORDER BY {order}", values)
        ids: NDArray[np.int64] = np.fromiter((row[0] for row in rows), np.int64)
        paths = np.ones(len(ids), np.int64)
        multiple = "SELECT item_id, count(*) FROM paths GROUP BY item_id HAVING count(*) > 1"
        counts = np.array(self._conn.execute(multiple).fetchall(), np.int64).reshape(-1, 2)
        by_id = ids.argsort()
        paths[by_id[ids.searchsorted(counts[:, 0], sorter=by_id)]] = counts[:, 1]
        return Ranking(ids, paths)

    def without_code(self, fingerprint: str) -> Ids:
        sql = "SELECT id FROM items WHERE id NOT IN (SELECT item_id FROM codes WHERE fingerprint = ?) ORDER BY id"
        return np.fromiter((row[0] for row in self._conn.execute(sql, (fingerprint,))), np.int64)


def _from_json(metadata: str | None) -> dict[str, Any] | None:
    return None if metadata is None else json.loads(metadata)
