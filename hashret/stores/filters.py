"""`where`: the items that an SQLite expression of the user's holds for, and nothing else that SQL could do.

The expression becomes the condition of a SELECT of ours, and may come from anywhere, so it is trusted with nothing. Its
tokens are looked at first: brackets and quotes must close, and there is no comment, parameter, second statement or
SELECT within a SELECT (SQLite unfolds those, and takes exponential time to). Then SQLite itself refuses, while it
compiles, every action but reading, every table but the collection's and every function but those below, and gives up
once it has computed for a second. What one call of a function can cost is bounded by the lengths that it may see.
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

SECONDS = 1.0
PROGRESS_STEPS = 1000  # of SQLite's virtual machine, after which the time is looked at
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
_USERS_FAULTS = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH}


class Matching(NamedTuple):
    """Ids of items, ascending, and whether they stay the same while the database does."""

    ids: NDArray[np.int64]
    lasting: bool


def matching(conn: sqlite3.Connection, where: str) -> Matching:
    """The items that the expression `where` holds for, of the state that `conn` reads.

    Names are columns of `items`, or of `paths` besides `path`, the whole one: then an item qualifies if it does with
    one of its paths. Any other name is a key of the metadata. The connection, which needs no right to write, is left as
    it was, also after an error: its limits, no authorizer, no progress handler, and its transaction. Raises
    HashretError with SQLite's reason.
    """
    quoted = _check(where)
    functions: set[str] = set()
    try:
        with _restricted(conn, functions):
            ids = _select_ids(conn, where, quoted)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extension
        if code == sqlite3.SQLITE_INTERRUPT:
            raise _refusal(f"it was given up after computing for {SECONDS:.0f} s") from None
        if code not in _USERS_FAULTS:
            raise
        raise _refusal(one_line(error)) from None
    ids.sort()
    once = np.append(True, ids[1:] != ids[:-1])[: len(ids)]  # an item comes for each of its paths
    return Matching(ids[once], not functions & CLOCKS)


@contextmanager
def _restricted(conn: sqlite3.Connection, functions: set[str]) -> Iterator[None]:
    """Let SQLite refuse what `_authorizer` does, and lengths over `LIMITS`, and stop once this thread has computed for
    `SECONDS`: on a busy machine longer may have passed."""
    end = time.thread_time() + SECONDS
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
    """The ids of the items, one for each path that qualifies. SQLite says only in an error which name it does not know:
    then that is looked up, and the SELECT, which now provides it, tried again."""
    keys: list[str] = []
    paths = False
    tried: set[str] = set()
    while True:
        for name in names:
            if name.lower().removeprefix("paths.") in PATH_COLUMNS:
                paths = True
            elif _has_key(conn, name):
                keys.append(name)
            elif name.lower() not in OTHER_COLUMNS:
                raise _refusal(f"no such column: {name} (a text has single quotes)")
        tried.update(names)
        try:
            return np.fromiter((row[0] for row in conn.execute(_select(where, keys, paths))), np.int64)
        except sqlite3.OperationalError as error:
            name = str(error).removeprefix("no such column: ")
            if name == str(error) or name in tried:
                raise
            names = [name]


def _check(where: str) -> list[str]:
    """The names in double quotes; raises HashretError unless `where` can be nothing but one expression."""
    if not isinstance(where, str):
        raise ValueError(f"where must be a text, not {type(where).__name__}")
    if len(where) > MAX_CHARACTERS:
        raise _refusal(f"{len(where):,} characters, more than {MAX_CHARACTERS:,}")
    quoted: list[str] = []
    selects = [0]  # for each open bracket, and for none, how many SELECTs enclose what is in it
    for token in _TOKEN.finditer(where):
        text = token.group()
        if token.lastgroup == "refused":
            raise _refusal(f"near {text!r}: no comment, parameter, second statement or open quote can be in it")
        if token.lastgroup == "quoted":
            quoted.append(text[1:-1].replace('""', '"'))
        elif text.upper() in ("SELECT", "VALUES", "WITH"):
            if text.upper() == "WITH" or any(selects[:-1]):
                raise _refusal(f"near {text!r}: a SELECT cannot be within another")
            selects[-1] = 1
        elif text == "(":
            selects.append(0)
        elif text == ")" and len(selects) == 1:
            raise _refusal("a bracket closes that was not opened")
        elif text == ")":
            selects.pop()
    if len(selects) > 1:
        raise _refusal("a bracket is not closed")
    return quoted


def _select(where: str, keys: list[str], paths: bool) -> str:
    """Our SELECT around the expression: what it knows by name, and the join that its names make necessary."""
    columns = "".join(f""", json_extract(metadata, '{_json_path(key)}') AS "{key}\"""" for key in keys)
    join = " JOIN (SELECT *, root || name AS path FROM paths) AS paths ON item_id = id" if paths else ""
    return f"SELECT id FROM (SELECT *{columns} FROM items) AS items{join} WHERE (\n{where}\n)"


def _json_path(key: str) -> str:
    """Where a key's value is, as part of a text in SQL."""
    return f'$."{key}"'.replace("'", "''")


def _has_key(conn: sqlite3.Connection, name: str) -> bool:
    """Whether the metadata of any item has this key."""
    sql = f"SELECT EXISTS (SELECT 1 FROM items WHERE json_type(metadata, '{_json_path(name)}') IS NOT NULL)"
    return is_key(name) and bool(conn.execute(sql).fetchone()[0])


def _authorizer(functions: set[str]) -> Callable[..., int]:
    """What SQLite asks as it compiles: reading these tables, and these functions, which are noted, is all it may do."""

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


def _refusal(reason: str) -> HashretError:
    return HashretError(f"where: {reason}: give an SQLite expression such as label = 'cat' AND width > 800")
