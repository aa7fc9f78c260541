"""Filters, compared with Python over the stored rows, and attacked."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hashret.errors import HashretError
from hashret.stores import filters
from hashret.stores.protocol import ItemRow
from hashret.stores.sqlite import SqliteStore

SETTINGS = {"fingerprint": "a" * 64, "bits": "16", "index": "bitflip"}
METADATA: list[dict[str, Any] | None] = [
    {"price": 3, "shop": "Zürich", "a.b": 1, "it's": True, "größe": 2},
    {"price": 20.5, "shop": None, "label": "not the path's"},
    {"price": "3", "sold": False},
    {},
    None,
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteStore]:
    """100 items with ids from 1: i × 10 wide, in the folders 0 to 6, every tenth under a second path."""
    made = SqliteStore.create(tmp_path_factory.mktemp("filters"), SETTINGS)
    contents = [content(i, f"{i % 7}/{i}.png") for i in range(1, 101)]
    contents += [content(i, f"copies/{i}.png") for i in range(10, 101, 10)]
    contents.append(content(1, "\udcff.png"))
    with made.transaction() as transaction:
        transaction.put(contents)
    yield made
    made.close()


def everything(store: SqliteStore) -> list[object]:
    with closing(sqlite3.connect(store.path)) as conn:
        return conn.execute("SELECT * FROM items").fetchall()


def content(i: int, name: str) -> ItemRow:
    label = name.split("/")[0] if "/" in name else None
    row = METADATA[i % 5 - 1] if i % 5 else None
    return ItemRow("/photos/", name, label, i, 7, f"{i:064x}", i, i * 10, 5, bytes(2), row, "2026-11-20T12:00:00Z")


def matching(store: SqliteStore, where: str) -> list[int]:
    with store.snapshot() as rows:
        ids = rows.ids(where=where)
    assert ids.dtype == "int64"
    found: list[int] = ids.tolist()
    assert found == sorted(set(found))
    return found


ALL = range(1, 101)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("width > 800", [i for i in ALL if i > 80]),
        ("1", list(ALL)),
        ("0", []),
        ("NULL", []),
        ("id IN (5, 3, 999)", [3, 5]),
        ("label = '3'", [i for i in ALL if i % 7 == 3]),
        ("label = 'copies' AND width > 500", [60, 70, 80, 90, 100]),
        ("label = '3' OR label = 'copies'", [i for i in ALL if i % 7 == 3 or i % 10 == 0]),
        ("paths.label = '3' AND items.width < 40", [3]),
        ('"label" = \'3\' AND "width" < 40', [3]),
        ("[label] = '3' AND `width` < 40", [3]),
        ("name LIKE 'COPIES/%'", list(range(10, 101, 10))),
        ("path GLOB '/photos/3/*' AND path LIKE '%1.png'", [31]),
        ("label IS NULL", [1]),  # the path that is not UTF-8
        ("price < 10", [i for i in ALL if i % 5 == 1]),
        ("PRICE < 10", None),  # keys are case-sensitive, unlike columns
        ("WIDTH < 30 AND Label = '1'", [1]),
        ("price = '3'", [i for i in ALL if i % 5 == 3]),
        ("price > 10 AND shop IS NULL", [i for i in ALL if i % 5 in (2, 3)]),  # in SQLite every text is greater than 10
        ("shop = 'Zürich'", [i for i in ALL if i % 5 == 1]),
        ("größe = 2", [i for i in ALL if i % 5 == 1]),
        ('"it\'s" AND "a.b" = 1', [i for i in ALL if i % 5 == 1]),
        ("metadata ->> 'label' = 'not the path''s'", [i for i in ALL if i % 5 == 2]),
        ("sold = 0", [i for i in ALL if i % 5 == 3]),
        ("sold IS NULL AND id < 6", [1, 2, 4, 5]),
        ("metadata IS NULL", [i for i in ALL if i % 5 == 0]),
        ("added < date('2026-12-01') AND id = 1", [1]),
        ("price < (SELECT max(width) FROM items) AND id < 7", [1, 2, 6]),
        ("id IN (SELECT item_id FROM paths WHERE name LIKE 'copies/%') AND NOT width > 200", [10, 20]),
        ("EXISTS (SELECT 1 FROM paths AS p WHERE p.item_id = id AND p.label = '0') AND id < 15", [7, 14]),
        ("id = (SELECT 3) OR id = (SELECT 4)", [3, 4]),
        ("length('(;--/*\"') = 7 AND id = 1", [1]),
        ("width > 990\n", [100]),
        ("id - -1 = 3", [2]),
    ],
)
def test_an_expression_selects_items(store: SqliteStore, where: str, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(HashretError, match="where: no such column: PRICE"):
            matching(store, where)
    else:
        assert matching(store, where) == expected


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("", "syntax error"),
        ("width >", "syntax error"),
        ("width > 800)", "a closing bracket without an opening one"),
        ("(width > 800", "a bracket is not closed"),
        ("nosuch = 1", "no such column: nosuch"),
        ('label = "cat"', r"no such column: cat \(a text has single quotes\)"),
        ("items.label = 1", "no such column: items.label"),
        ("x.y.z = 1", "no such column: x.y.z"),
        ("label = 'cat", 'near "\'"'),
        ("regexp_like(label, 'x')", "no such function: regexp_like|not authorized"),
        ("label REGEXP 'x'", "REGEXP"),
        ("name MATCH 'x'", "not authorized"),
        ("count(*) > 1", "misuse of aggregate"),
        ("1, 2", "row value misused"),
        ("id = ?", r"near '\?'"),
        ("id = :x", "near ':'"),
        ("id = $x", r"near '\$'"),
        ("id = @x", "near '@'"),
        ("1 COLLATE NOSUCH = 1", "no such collation sequence"),
        ("id IN nosuch", "no such table: nosuch"),
        ("\0", r"near '\\x00'"),
        ("label = '\ud800'", "surrogates not allowed"),
        ("abs(-9223372036854775807 - 1)", "integer overflow"),
        ("json_extract(name, '$.a')", "malformed JSON"),
        ("json_extract(metadata, 'a')", "JSON path error|bad JSON path"),
        ("'" + "x" * 20_000 + "'", "20,002 characters, more than 10,000"),
        ("+".join("1" * 2000), "maximum depth 1000"),
        ("(" * 500 + "1" + ")" * 500, "parser stack overflow|maximum depth|Recursion"),
    ],
)
def test_invalid_expressions_raise_an_error_of_one_line(store: SqliteStore, where: str, reason: str) -> None:
    with pytest.raises(HashretError, match=f"where: .*({reason})") as caught:
        matching(store, where)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert matching(store, "id = 1") == [1]


ATTACKS = [
    # escaping from the enclosing SELECT
    "1) UNION SELECT 5 --",
    "1) UNION SELECT 5 /*",
    "1); DELETE FROM items; --",
    "1; DELETE FROM items",
    "1 -- ",
    "1 /* */",
    "$a(') OR 1=1) UNION SELECT 5 --')",
    "')' = ') UNION SELECT 5 /*",
    "\") UNION SELECT 5 /*",
    "[)] UNION SELECT 5 /*",
    "1) UNION SELECT (5",
    # other statements and tables
    "ATTACH 'x.db' AS x",
    "id IN (DELETE FROM items RETURNING id)",
    "id IN (INSERT INTO items VALUES (1))",
    "id IN (PRAGMA user_version)",
    "id IN (SELECT 1 FROM pragma_table_info('items'))",
    "id IN (SELECT 1 FROM pragma_database_list)",
    "id IN (SELECT 1 FROM sqlite_master)",
    "id IN (SELECT 1 FROM sqlite_schema)",
    "id IN (SELECT 1 FROM temp.sqlite_master)",
    "id IN (SELECT 1 FROM sqlite_sequence)",
    "id IN (SELECT 1 FROM dbstat)",
    "id IN (SELECT 1 FROM sqlite_stmt)",
    "id IN (SELECT 1 FROM json_each('[1]'))",
    "id IN sqlite_sequence",
    "id IN json_each('[1]')",
    "(SELECT 1 FROM generate_series(1, 1000000000))",
    # functions that load, write, use much memory or time
    "load_extension('x.so')",
    "LOAD_EXTENSION('x.so')",
    "\"load_extension\"('x.so')",
    "readfile('/etc/passwd')",
    "writefile('x', 'y')",
    "randomblob(1000000000) IS NULL",
    "zeroblob(1000000000) IS NULL",
    "printf('%.*c', 10000000, 'x') IS NULL",
    "format('%.*c', 10000000, 'x') IS NULL",
    "hex(name) = ''",
    "replace(name, '.', name) = ''",
    "quote(name) = ''",
    "char(65) = 'A'",
    "random() > 0",
    "trim(name, name) = ''",
    "fts3_tokenizer('x') IS NULL",
    "sqlite_compileoption_get(1) IS NULL",
    "(SELECT group_concat(name) FROM paths) IS NULL",
    "(SELECT row_number() OVER () FROM paths) IS NULL",
    "json_group_array(name) IS NULL",
    # recursion, and SELECTs that SQLite would flatten
    "id IN (WITH RECURSIVE x(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM x) SELECT i FROM x)",
    "id IN (WITH x AS (SELECT 1) SELECT * FROM x)",
    "id IN (SELECT x+x FROM (SELECT id+id AS x FROM items))",
    "id IN (SELECT (SELECT 1))",
    "id IN (VALUES ((SELECT 1)))",
    "id IN (SELECT 1" + " UNION SELECT 1" * 10 + ")",
]  # fmt: skip


@pytest.mark.parametrize("where", ATTACKS)
def test_an_attack_is_refused_before_it_runs(
    store: SqliteStore, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = everything(store)
    monkeypatch.setattr(filters, "TIME_LIMIT", 0.2)  # so that the test fails soon if the authorizer fails
    with pytest.raises(HashretError, match="where: (?!it takes more than)"):
        matching(store, where)
    assert everything(store) == before and list(tmp_path.iterdir()) == []


BURNERS = [
    "(SELECT count(*) FROM paths a, paths b, paths c, paths d)",  # would end after some seconds
    "(SELECT count(*) FROM paths a, paths b, paths c, paths d, paths e)",
    "(SELECT count(*) FROM items a, items b, items c, items d WHERE a.id + b.id + c.id + d.id < 0) OR " * 3 + "0",
    "(SELECT count(DISTINCT a.name || b.name || c.name) FROM paths a, paths b, paths c, paths d)",
    "(SELECT 1 FROM paths a, paths b, paths c, paths d ORDER BY a.name || b.name || c.name || d.name LIMIT 1)",
    "(SELECT sum(a.name LIKE b.name || '%' || c.name) FROM paths a, paths b, paths c, paths d)",
    "(SELECT count(*) FROM items a, items b, items c WHERE '"
    + "a" * 3000
    + "' || a.id || b.id || c.id LIKE '%"
    + "a" * 400
    + "b')",
    "nosuch AND (SELECT count(*) FROM items a, items b, items c, items d)",
]


@pytest.mark.parametrize("where", BURNERS)
def test_slow_expressions_are_interrupted(store: SqliteStore, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "TIME_LIMIT", 0.2)
    before = threading.active_count()
    with pytest.raises(HashretError, match="where: (it takes more than|no such column: nosuch)"):
        matching(store, where)
    assert matching(store, "id = 1") == [1]
    assert threading.active_count() == before


@pytest.fixture
def reader(store: SqliteStore) -> Iterator[sqlite3.Connection]:
    """Return a connection of its own, with its own limits."""
    conn = sqlite3.connect(store.path)
    conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 300_000)
    yield conn
    conn.close()


@pytest.mark.parametrize(
    "where",
    [
        "width > 800",
        "width >",  # refused by SQLite
        "(width",  # refused before
        "hex(name) = ''",
        "nosuch = 1",
        "label = '\ud800'",
        "'" + "a" * 9000 + "' LIKE '" + "%" * 600 + "'",
        "(SELECT count(*) FROM paths a, paths b, paths c, paths d)",  # interrupted
    ],
)
def test_a_connection_is_left_as_it_was(
    reader: sqlite3.Connection, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its open transaction continues, and its limits, authorizer and progress handler are as before."""
    monkeypatch.setattr(filters, "TIME_LIMIT", 0.1)
    limits = {limit: reader.getlimit(limit) for limit in filters.LIMITS}
    reader.execute("BEGIN")
    rows = reader.execute("SELECT id FROM items ORDER BY id")
    assert next(rows) == (1,)
    try:
        assert filters.matching(reader, where).ids.tolist() == list(range(81, 101))
    except HashretError:
        assert where != "width > 800"
    assert reader.in_transaction and {limit: reader.getlimit(limit) for limit in filters.LIMITS} == limits
    assert [row[0] for row in rows] == list(ALL)[1:]
    assert reader.execute("SELECT length(hex(zeroblob(100000)))").fetchone() == (200_000,)
    assert reader.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 5
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) SELECT count(*) FROM n"
    end, numbers = time.thread_time() + 0.15, 10_000
    while time.thread_time() < end:  # longer than the time limit of a filter
        assert reader.execute(count, (numbers,)).fetchone() == (numbers,)
    reader.rollback()


def test_a_filter_cannot_write_through_a_connection_that_can(reader: sqlite3.Connection) -> None:
    """A statement that escaped from the filter would be refused too."""
    for sql in ("DELETE FROM items", "PRAGMA user_version = 9", "CREATE TABLE x (y)", "ATTACH ':memory:' AS x"):
        with filters._restricted(reader, set()), pytest.raises(sqlite3.DatabaseError, match=r"not authorized|too many"):
            reader.execute(sql)
        reader.rollback()


def test_results_that_depend_on_the_clock_are_not_cached(reader: sqlite3.Connection) -> None:
    for _ in range(2):  # also if the statement is already prepared
        assert not filters.matching(reader, "added < datetime('now', '+99 years')").cacheable
        assert filters.matching(reader, "width > 800").cacheable


def test_the_connection_is_read_only(store: SqliteStore) -> None:
    with store.snapshot() as rows:
        rows.ids(where="1")
        for sql in ("DELETE FROM items", "PRAGMA user_version = 9", "CREATE TABLE x (y)"):
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                rows._conn.execute(sql)


def test_a_result_is_cached_until_the_state_changes(tmp_path: Path) -> None:
    store = SqliteStore.create(tmp_path, SETTINGS)
    with store.transaction() as transaction:
        transaction.put([content(3, "a.png")])
    dated = "added < datetime('now', '+99 years')"
    with store.snapshot() as rows:
        kept = rows.ids(where="width < 90")
        assert kept.tolist() == [1] and rows._matching("width < 90") is rows._matching("width < 90")
        assert rows._matching(dated) is not rows._matching(dated)
        rows.ids(where="width < 90")
        with store.transaction() as transaction:
            transaction.put([content(6, "b.png")])
            assert transaction.ids(where="width < 90").tolist() == [1, 2]  # of a state that no other connection sees
        assert rows.ids(where="width < 90").tolist() == [1]
    assert matching(store, "width < 90") == [1, 2]  # the same filter of a later state
    with store.snapshot() as rows:
        assert rows.ids(1, where="width < 90").tolist() == [2] and rows.ids(0, 1, "width < 90").tolist() == [1]
    store.close()


def test_metadata_that_are_not_json_are_reported(tmp_path: Path) -> None:
    store = SqliteStore.create(tmp_path, SETTINGS)
    with store.transaction() as transaction:
        transaction.put([content(1, "a.png")])
        transaction._conn.execute("UPDATE items SET metadata = ?", (json.dumps({"price": 1}) + "}",))
    with pytest.raises(HashretError, match="where: malformed JSON"):
        matching(store, "price = 1")
    store.close()
