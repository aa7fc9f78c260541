"""The filter `where`: an SQLite expression of the user that selects items, and can do nothing else.

The expression is untrusted. It becomes the WHERE clause of a SELECT, in three steps of defence. The tokens are checked
first: brackets and quotes must be balanced, and comments, parameters, further statements and nested SELECTs (which
SQLite flattens in exponential time) are refused. Then SQLite's authorizer refuses, at compile time, everything except
reads of the collection's tables and calls of the functions listed here. At last the query is interrupted after one
second of CPU time; limits on lengths bound the cost of a single function call, which cannot be interrupted.
"""

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.errors import HashretError, one_line
from hashret.results import is_key

TIME_LIMIT = 1.0  # seconds of CPU time
PROGRESS_STEPS = 1000  # instructions of SQLite's virtual machine between two checks of the time
MAX_CHARACTERS = 10_000
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 100_000,  # of a text, and of a row with its metadata
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 8,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 16,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
TABLES = frozenset({"items", "paths", "codes", "failures", "verdicts", "changes", "settings"})
PATH_COLUMNS = frozenset({"root", "name", "path", "label", "size", "mtime_ns", "item_id"})
OTHER_COLUMNS = frozenset(
    {"id", "sha256", "width", "height", "bytes", "added", "metadata"}  # of items
    | {"fingerprint", "code", "reason", "seen", "item_a", "item_b", "verdict", "at", "generation", "op", "key", "value"}
)
CLOCKS = frozenset(
    {"current_date", "current_time", "current_timestamp", "date", "datetime"}
    | {"julianday", "strftime", "time", "unixepoch"}
)
FUNCTIONS = CLOCKS | {
    *("abs", "ceil", "ceiling", "floor", "max", "min", "round", "sign", "sqrt"),
    *("glob", "instr", "length", "like", "lower", "substr", "substring", "upper"),
    *("->", "->>", "json_extract", "json_type", "coalesce", "ifnull", "iif", "nullif", "typeof"),
    *("avg", "count", "sum", "total"),
}
_TOKEN = re.compile(
    r"""(?P<text> '(?:[^']|'')*' )
    | (?P<quoted> "(?:[^"]|"")*" )
    | (?P<name> `(?:[^`]|``)*` | \[[^\]]*\] )
    | (?P<word> [^\W\d]\w* )
    | (?P<refused> -- | /\* | ['"`\[;:?@$#\\\0] )
    | (?P<other> . )""",
    re.VERBOSE | re.DOTALL,
)
_USER_ERRORS = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH}


class Matches(NamedTuple):
    """Ids of items, ascending, and whether they depend on the database alone, and not on the clock."""

    ids: NDArray[np.int64]
    cacheable: bool


def matching(conn: sqlite3.Connection, where: str) -> Matches:
    """Return the items that match the expression `where`, in the state that `conn` reads.

    A name in it is a column of `items`, a column of `paths`, `path` for the full path, or else a key of the metadata.
    An item matches if one of its paths does. Afterwards, also after an error, the connection has its transaction and
    its limits, but no authorizer and no progress handler. Raise HashretError with SQLite's reason.
    """
    quoted = _check(where)
    functions: set[str] = set()
    try:
        with _restricted(conn, functions):
            ids = _select_ids(conn, where, quoted)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extension
        if code == sqlite3.SQLITE_INTERRUPT:
            raise _filter_error(f"it takes more than {TIME_LIMIT:.0f} s of computing") from None
        if code not in _USER_ERRORS:
            raise
        raise _filter_error(one_line(error)) from None
    ids.sort()
    once = np.append(True, ids[1:] != ids[:-1])[: len(ids)]  # an item comes once for each path
    return Matches(ids[once], not functions & CLOCKS)


@contextmanager
def _restricted(conn: sqlite3.Connection, functions: set[str]) -> Iterator[None]:
    """Restrict the connection by `_authorizer`, `LIMITS`, and `TIME_LIMIT` of this thread's CPU time: the elapsed time
    may be longer on a busy machine."""
    end = time.thread_time() + TIME_LIMIT
    limits = {limit: conn.setlimit(limit, value) for limit, value in LIMITS.items()}
    conn.set_authorizer(_authorizer(functions))
    conn.set_progress_handler(lambda: time.thread_time() > end, PROGRESS_STEPS)
    try:
        yield
    finally:
        conn.set_progress_handler(None, 0)
        conn.set_authorizer(None)
        for limit, value in limits.items():
            conn.setlimit(limit, value)


def _select_ids(conn: sqlite3.Connection, where: str, names: list[str]) -> NDArray[np.int64]:
    """Return the ids of the matching items, repeated for each matching path.

    SQLite reports an unknown name in its error message only: each one is resolved, and the SELECT, which then provides
    it, is run again.
    """
    keys: list[str] = []
    paths = False
    resolved: set[str] = set()
    while True:
        for name in names:
            if name.lower().removeprefix("paths.") in PATH_COLUMNS:
                paths = True
            elif _has_key(conn, name):
                keys.append(name)
            elif name.lower() not in OTHER_COLUMNS:
                raise _filter_error(f"no such column: {name} (a text has single quotes)")
        resolved.update(names)
        try:
            return np.fromiter((row[0] for row in conn.execute(_select(where, keys, paths))), np.int64)
        except sqlite3.OperationalError as error:
            name = str(error).removeprefix("no such column: ")
            if name == str(error) or name in resolved:
                raise
            names = [name]


def _check(where: str) -> list[str]:
    """Return the names in double quotes; raise HashretError unless `where` is a single expression."""
    if not isinstance(where, str):
        raise ValueError(f"where must be a text, not {type(where).__name__}")
    if len(where) > MAX_CHARACTERS:
        raise _filter_error(f"{len(where):,} characters, more than {MAX_CHARACTERS:,}")
    quoted: list[str] = []
    selects = [0]  # for each level of brackets, outermost first, whether it contains a SELECT
    for token in _TOKEN.finditer(where):
        text = token.group()
        if token.lastgroup == "refused":
            raise _filter_error(f"near {text!r}: comments, parameters, further statements and open quotes are refused")
        if token.lastgroup == "quoted":
            quoted.append(text[1:-1].replace('""', '"'))
        elif text.upper() in ("SELECT", "VALUES", "WITH"):
            if text.upper() == "WITH" or any(selects[:-1]):
                raise _filter_error(f"near {text!r}: a SELECT cannot be within another")
            selects[-1] = 1
        elif text == "(":
            selects.append(0)
        elif text == ")" and len(selects) == 1:
            raise _filter_error("a closing bracket without an opening one")
        elif text == ")":
            selects.pop()
    if len(selects) > 1:
        raise _filter_error("a bracket is not closed")
    return quoted


def _select(where: str, keys: list[str], paths: bool) -> str:
    """Return the SELECT around the expression, with metadata keys as columns, joined with `paths` if necessary."""
    columns = "".join(f""", json_extract(metadata, '{_json_path(key)}') AS "{key}\"""" for key in keys)
    join = " JOIN (SELECT *, root || name AS path FROM paths) AS paths ON item_id = id" if paths else ""
    return f"SELECT id FROM (SELECT *{columns} FROM items) AS items{join} WHERE (\n{where}\n)"


def _json_path(key: str) -> str:
    """Return the JSON path of a key, escaped for a string literal in SQL."""
    return f'$."{key}"'.replace("'", "''")


def _has_key(conn: sqlite3.Connection, name: str) -> bool:
    """Return whether the metadata of any item has this key."""
    sql = f"SELECT EXISTS (SELECT 1 FROM items WHERE json_type(metadata, '{_json_path(name)}') IS NOT NULL)"
    return is_key(name) and bool(conn.execute(sql).fetchone()[0])


def _authorizer(functions: set[str]) -> Callable[..., int]:
    """Return an authorizer that allows SELECT on `TABLES` and calls of `FUNCTIONS`, and adds the called functions to
    `functions`."""

    def allows(action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            functions.add(str(second))
        allowed = (
            action == sqlite3.SQLITE_SELECT
            or (action == sqlite3.SQLITE_READ and first in TABLES)
            or (action == sqlite3.SQLITE_FUNCTION and second in FUNCTIONS)
        )
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    return allows


def _filter_error(reason: str) -> HashretError:
    return HashretError(f"where: {reason}: give an SQLite expression such as label = 'cat' AND width > 800")
