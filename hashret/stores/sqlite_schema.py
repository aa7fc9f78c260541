"""The schema of a collection's database, which other programs may read, and the upgrades of older versions.

The schema is SQL because sqlite-utils supports neither WITHOUT ROWID nor indexes on expressions, nor AUTOINCREMENT,
which guarantees that ids are never reused.
"""

import sqlite3
from collections.abc import Callable

SCHEMA_VERSION = 3  # PRAGMA user_version
# Digests are random, so each commit writes to pages throughout their index. The first eight of their 64 characters are
# almost always unique, and their index is a quarter of the size and twice as fast.
_ITEMS = """
CREATE TABLE items (
  id INTEGER PRIMARY KEY AUTOINCREMENT, sha256 TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
  bytes INTEGER NOT NULL, added TEXT NOT NULL, metadata TEXT);
CREATE INDEX items_by_sha256 ON items(substr(sha256, 1, 8));
"""
_STATES = "CREATE TABLE states (generation INTEGER PRIMARY KEY, id TEXT NOT NULL);"
SCHEMA = f"""{_ITEMS}{_STATES}
CREATE TABLE paths (
  root NOT NULL, name NOT NULL, item_id INTEGER NOT NULL REFERENCES items(id), label TEXT,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, PRIMARY KEY (root, name)) WITHOUT ROWID;
CREATE INDEX paths_by_item ON paths(item_id);
CREATE TABLE codes (
  item_id INTEGER NOT NULL REFERENCES items(id), fingerprint TEXT NOT NULL, code BLOB NOT NULL,
  PRIMARY KEY (fingerprint, item_id)) WITHOUT ROWID;
CREATE TABLE failures (
  root NOT NULL, name NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, reason TEXT NOT NULL,
  seen TEXT NOT NULL, PRIMARY KEY (root, name)) WITHOUT ROWID;
CREATE TABLE verdicts (
  item_a INTEGER NOT NULL, item_b INTEGER NOT NULL, verdict TEXT NOT NULL, at TEXT NOT NULL,
  PRIMARY KEY (item_a, item_b)) WITHOUT ROWID;
CREATE TABLE changes (
  generation INTEGER NOT NULL, op TEXT NOT NULL, item_id INTEGER NOT NULL,
  PRIMARY KEY (generation, item_id, op)) WITHOUT ROWID;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

# The columns of each table, in the order in which recovery reads and writes them.
COLUMNS = {
    "items": ("id", "sha256", "width", "height", "bytes", "added", "metadata"),
    "paths": ("root", "name", "item_id", "label", "size", "mtime_ns"),
    "codes": ("item_id", "fingerprint", "code"),
    "failures": ("root", "name", "size", "mtime_ns", "reason", "seen"),
    "verdicts": ("item_a", "item_b", "verdict", "at"),
    "settings": ("key", "value"),
    "changes": ("generation", "op", "item_id"),
    "sqlite_sequence": ("name", "seq"),
}

# The statements that upgrade each version to the next.
UPGRADES = {
    1: f"""
ALTER TABLE items RENAME TO items_1;
{_ITEMS}
INSERT INTO items SELECT * FROM items_1;
DELETE FROM sqlite_sequence WHERE name = 'items';
INSERT INTO sqlite_sequence SELECT 'items', seq FROM sqlite_sequence WHERE name = 'items_1';
DROP TABLE items_1;
""",
    2: f"""
{_STATES}
INSERT INTO states SELECT CAST(value AS INTEGER), lower(hex(randomblob(8))) FROM settings WHERE key = 'generation';
INSERT INTO settings SELECT 'state', id FROM states;
""",
}


def upgrade(conn: sqlite3.Connection, back_up: Callable[[int], None]) -> None:
    """Upgrade a database of an older version to `SCHEMA_VERSION`, in one transaction.

    `back_up` is called with the version before the first change, while no other process can write to the database.
    """
    conn.execute("PRAGMA legacy_alter_table = ON")  # foreign keys keep referring to the table's old name
    conn.execute("BEGIN IMMEDIATE")
    try:
        first = conn.execute("PRAGMA user_version").fetchone()[0]
        if first < SCHEMA_VERSION:  # another process may have upgraded it meanwhile
            back_up(first)
        for version in range(first, SCHEMA_VERSION):
            for statement in UPGRADES[version].split(";"):
                conn.execute(statement)
            conn.execute(f"PRAGMA user_version = {version + 1}")
        conn.execute("COMMIT")
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise
    finally:
        conn.execute("PRAGMA legacy_alter_table = OFF")
