import hashlib
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashret.errors import HashretError
from hashret.stores.sqlite import Content, Seen, Store

MODEL, OTHER = "a" * 64, "b" * 64
ROOT = "/photos/"

# DESIGN §4: other programs read these names.
TABLES = {
    "items": ["id", "sha256", "width", "height", "bytes", "added", "metadata"],
    "paths": ["root", "name", "item_id", "label", "size", "mtime_ns"],
    "codes": ["item_id", "fingerprint", "code"],
    "failures": ["root", "name", "size", "mtime_ns", "reason", "seen"],
    "verdicts": ["item_a", "item_b", "verdict", "at"],
    "changes": ["generation", "op", "item_id"],
    "settings": ["key", "value"],
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.create(tmp_path / "items.db", {"fingerprint": MODEL, "bits": "16", "index": "bitflip"})
    yield made
    made.close()


def content(name: str, text: str, *, root: str = ROOT, label: str | None = None, known: bool = False) -> Content:
    """What is found at a path; the code is made of the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape"))
    code = None if known else digest.digest()[:2]
    return Content(root, name, label, len(text), 7, digest.hexdigest(), len(text), 3, 4, code)


def put(store: Store, *contents: Content) -> list[int | None]:
    with store.write() as generation:
        return store.put(contents, MODEL, generation)


def codes(store: Store, fingerprint: str = MODEL) -> dict[int, bytes]:
    ids, found = store.codes(fingerprint, 16)
    assert ids.dtype == np.int64 and ids.tolist() == sorted(ids.tolist())
    return {i: code.tobytes() for i, code in zip(ids.tolist(), found, strict=True)}


def everything(store: Store) -> list[list[tuple[object, ...]]]:
    """All rows of all tables."""
    return [store.db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES]


# The file


def test_the_schema_is_the_contract(store: Store) -> None:
    with sqlite3.connect(store.path) as conn:
        tables = conn.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        assert {name for (name,) in tables} == set(TABLES)
        for table, columns in TABLES.items():
            assert [row[1] for row in conn.execute(f"PRAGMA table_info({table})")] == columns
        assert conn.execute("PRAGMA user_version").fetchone() == (2,)
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        (items,) = conn.execute("SELECT sql FROM sqlite_schema WHERE name = 'items'").fetchone()
        assert "id INTEGER PRIMARY KEY AUTOINCREMENT" in items
    conn.close()
    assert store.db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit is on the disk


def test_a_new_database_knows_its_settings(store: Store) -> None:
    with store.read() as told:
        assert told == {
            "fingerprint": MODEL, "bits": "16", "index": "bitflip", "generation": "0", "changes_after": "0"
        }  # fmt: skip
    assert store.count("items") == 0


def test_a_newer_database_is_refused_unchanged(store: Store) -> None:
    store.db.execute("PRAGMA user_version = 3")
    store.close()
    before = store.path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(HashretError, match="newer hashret: upgrade"):
            Store(store.path, read_only=read_only)
    assert store.path.read_bytes() == before


def of_version_1(store: Store) -> Path:
    """The file of a store as the first version had it, where digests were UNIQUE."""
    path = store.path
    store.close()
    with sqlite3.connect(path) as conn:
        rows = conn.execute("SELECT * FROM items").fetchall()
        sequence = conn.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
        conn.execute("DROP TABLE items")
        conn.execute(
            "CREATE TABLE items (id INTEGER PRIMARY KEY AUTOINCREMENT, sha256 TEXT NOT NULL UNIQUE,"
            " width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL, added TEXT NOT NULL,"
            " metadata TEXT)"
        )
        conn.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        conn.execute("DELETE FROM sqlite_sequence WHERE name = 'items'")
        if sequence:
            conn.execute("INSERT INTO sqlite_sequence VALUES ('items', ?)", sequence)
        conn.execute("PRAGMA user_version = 1")
    conn.close()
    return path


def test_an_older_database_is_kept_and_brought_up_to_date(store: Store) -> None:
    contents = [content(name, name) for name in ("a", "b", "c")]
    with store.write() as generation:
        ids = store.put(contents, MODEL, generation)
    with store.write() as generation:
        store.remove_items([3], generation)  # whose number is nobody's again
    before, schema = everything(store), "SELECT name, sql FROM sqlite_schema ORDER BY name"
    fresh = store.db.execute(schema).fetchall()
    path = of_version_1(store)
    reading = Store(path, read_only=True)
    assert reading.find([one.sha256 for one in contents]) == {contents[0].sha256: 1, contents[1].sha256: 2}
    reading.close()

    upgraded = Store(path)
    assert everything(upgraded) == before and ids == [1, 2, 3] and upgraded.highest() == 3
    assert upgraded.db.execute(schema).fetchall() == fresh
    assert upgraded.db.execute("PRAGMA user_version").fetchone() == (2,)
    assert upgraded.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with upgraded.write() as generation:
        assert upgraded.put([*contents[1:], content("d", "d")], MODEL, generation) == [2, 4, 5]
    upgraded.close()
    kept = path.with_name("items.db.1")
    assert {file.name for file in path.parent.iterdir()} == {"items.db", kept.name}
    with sqlite3.connect(kept) as conn:
        assert conn.execute("PRAGMA user_version").fetchone() == (1,)
        assert conn.execute("SELECT id FROM items ORDER BY id").fetchall() == [(1,), (2,)]
    conn.close()


def test_an_upgrade_that_fails_changes_nothing(store: Store) -> None:
    path = of_version_1(store)
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE items_1 (x)")
    conn.close()
    for _ in range(2):
        with pytest.raises(HashretError, match="is damaged .*items_1"):
            Store(path)
        with sqlite3.connect(path) as conn:
            assert conn.execute("PRAGMA user_version").fetchone() == (1,)
            assert conn.execute("SELECT count(*) FROM items").fetchone() == (0,)
        conn.close()


def test_digests_with_one_beginning_are_told_apart(store: Store) -> None:
    alike = [content(str(i), "")._replace(sha256=f"{i:08x}"[::-1].rjust(64, "0")) for i in range(50)]
    with store.write() as generation:
        assert store.put(alike, MODEL, generation) == list(range(1, 51))
    assert store.find([one.sha256 for one in alike]) == {one.sha256: i + 1 for i, one in enumerate(alike)}
    assert store.find(["0" * 63 + "f", "0" * 63, "0" * 8, ""]) == {}
    plan = store.db.execute(
        "EXPLAIN QUERY PLAN SELECT sha256, items.id FROM json_each('[]') CROSS JOIN items"
        " ON substr(sha256, 1, 8) = substr(value, 1, 8) AND sha256 = value"
    )
    assert any("USING INDEX items_by_sha256" in row[3] for row in plan)


@pytest.mark.parametrize("data", [b"", b"no database at all" * 300, bytes(8192), b"SQLite format 3\0" + bytes(4000)])
def test_what_is_no_database_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "items.db"
    path.write_bytes(data)
    for read_only in (False, True):
        with pytest.raises(HashretError, match="is damaged|no database of a collection"):
            Store(path, read_only=read_only)
    assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]  # whatever it is, it is someone's


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.db"
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT)")
    with pytest.raises(HashretError, match="no database of a collection"):
        Store(path)
    conn.execute("PRAGMA user_version = 1")
    conn.close()
    with pytest.raises(HashretError, match="no database of a collection"), Store(path).read():
        pass


def test_a_database_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "items.db", tmp_path / "nowhere" / "items.db"):
        with pytest.raises(HashretError, match="no collection at .*hashret index"):
            Store(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["per%cent", "what?", "half#", "two words", os.fsdecode(b"\xff\xfe"), "line\nfeed"])
def test_the_database_may_lie_anywhere(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    store = Store.create(tmp_path / folder / "items.db", {})
    assert put(store, content("a.png", "a")) == [1]
    store.close()
    for read_only in (True, False):
        again = Store(store.path, read_only=read_only)
        assert again.count("items") == 1
        again.close()


def test_creating_leaves_nothing_half_made(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.Error):
        Store.create(tmp_path / "items.db", {"a setting that": object()})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_creating_does_not_take_up_what_a_crash_left(tmp_path: Path) -> None:
    other = Store.create(tmp_path / "other.db", {})
    put(other, content("a.png", "a"))
    for suffix in ("", "-wal", "-shm"):  # as they are while it is open
        shutil.copy(tmp_path / f"other.db{suffix}", tmp_path / f"items.db.new{suffix}")
    other.close()
    store = Store.create(tmp_path / "items.db", {})
    assert store.count("items") == 0
    store.close()
    assert {path.name for path in tmp_path.iterdir()} == {"other.db", "items.db"}


# Items and paths


def test_ids_are_never_used_again(store: Store) -> None:
    assert put(store, content("a", "a"), content("b", "b"), content("c", "c")) == [1, 2, 3]
    with store.write() as generation:
        assert store.remove_items([3, 2], generation) == [content("c", "c").sha256, content("b", "b").sha256]
    assert put(store, content("c", "c")) == [4]
    with store.write() as generation:
        store.remove_items([4, 1], generation)
    store.close()
    again = Store(store.path)
    assert put(again, content("d", "d")) == [5]
    again.close()


def test_an_item_is_a_content_with_any_number_of_paths(store: Store) -> None:
    first = content("b/x.png", "x", label="b")
    assert put(store, first, content("a/x.png", "x"), content("y.png", "y")) == [1, 1, 2]
    assert put(store, content("x.png", "x", root="/more/", known=True)) == [1]
    item = store.items([1])[1]
    assert item.paths == ["/more/x.png", "/photos/a/x.png", "/photos/b/x.png"] and item.label == "b"
    assert (item.sha256, item.width, item.height, item.bytes, item.metadata) == (first.sha256, 3, 4, 1, None)
    assert item.added.endswith("Z") and len(item.added) == 20
    assert store.items([2, 99])[2].paths == ["/photos/y.png"] and 99 not in store.items([2, 99])
    assert codes(store) == {1: first.code, 2: content("", "y").code}
    assert store.find([first.sha256, "nothing"]) == {first.sha256: 1}
    assert store.roots() == ["/more/", "/photos/"]
    assert store.seen(ROOT, ["a/x.png", "z.png"]) == {"a/x.png": Seen(1, 1, 7, False)}


def test_an_item_goes_with_its_last_path(store: Store) -> None:
    put(store, content("a", "one"), content("b", "one"), content("c", "two"))
    put(store, content("a", "three"))  # one is still at b
    assert set(codes(store)) == {1, 2, 3}
    put(store, content("b", "three", known=True))
    assert set(codes(store)) == {2, 3} and store.items([1]) == {} and store.find([content("", "one").sha256]) == {}
    with store.write() as generation:
        store.remove_paths(ROOT, ["c", "a", "nothing"], generation)
    assert set(codes(store)) == {3} and store.items([3])[3].paths == ["/photos/b"]


def test_contents_that_change_places_keep_their_items(store: Store) -> None:
    put(store, content("a", "one"), content("b", "two"))
    assert put(store, content("a", "two", known=True), content("b", "one", known=True)) == [2, 1]
    assert {i: item.paths for i, item in store.items([1, 2]).items()} == {1: ["/photos/b"], 2: ["/photos/a"]}


def test_a_content_that_is_known_no_more_is_not_stored(store: Store) -> None:
    put(store, content("a", "one"))
    put(store, content("a", "two"))
    assert put(store, content("b", "one", known=True), content("c", "two", known=True)) == [None, 2]
    assert "b" not in store.seen(ROOT, ["b"])
    assert put(store, content("b", "one")) == [3]


def test_a_name_that_comes_twice_leaves_no_item_without_a_path(store: Store) -> None:
    put(store, content("a", "one"), content("a", "two"))
    assert list(codes(store).values()) == [content("a", "two").code]
    put(store, content("a", "three"), content("b", "two"), content("a", "four"))
    found = store.items(codes(store))
    assert sorted(item.paths for item in found.values()) == [["/photos/a"], ["/photos/b"]]
    assert store.count("items") == 2


def test_metadata_is_that_of_the_first_time(store: Store) -> None:
    put(store, content("a", "a")._replace(metadata={"taken": "Zürich", "n": [1, None]}), content("b", "b"))
    put(store, content("c", "a")._replace(metadata={"taken": "elsewhere"}))
    assert store.items([1])[1].metadata == {"taken": "Zürich", "n": [1, None]}
    (told,) = store.db.execute("SELECT metadata ->> 'taken' FROM items WHERE id = 1").fetchone()
    assert told == "Zürich"  # it is JSON to SQLite


ODD = [
    os.fsdecode(b"\xff\xfe.png"),
    os.fsdecode(b"caf\xe9/x.png"),
    "café/y.png",
    "🦔.png",
    "new\nline",
    'a"b\\c',
    "a'b",
]


def test_paths_that_are_no_utf8_are_kept_as_bytes(store: Store) -> None:
    root = os.fsdecode(b"/caf\xe9/")
    assert put(store, *(content(name, name, root=root, label=name[:5]) for name in ODD)) == [*range(1, len(ODD) + 1)]
    put(store, content("plain", ODD[0], known=True))
    for i, name in enumerate(ODD, 1):
        item = store.items([i])[i]
        assert root + name in item.paths and item.label == name[:5]
        assert store.seen(root, [name])[name].item_id == i
        assert store.uncoded(root, name, OTHER) == (i, content("", name).sha256)
    kinds = dict(store.db.execute("SELECT typeof(name), count(*) FROM paths WHERE typeof(root) = 'blob' GROUP BY 1"))
    assert kinds == {"blob": 2, "text": 5}
    assert (os.fsencode(ODD[1]),) in store.db.execute("SELECT name FROM paths").fetchall()
    assert set(store.roots()) == {root, ROOT}
    with store.write() as generation:
        store.put_failures((root, name, 1, 2, "broken") for name in ODD[:3])
        assert all(seen.failed for seen in store.seen(root, ODD[:3]).values())
        assert store.paths_not_in(root, ODD[1:]) == (len(ODD), [ODD[0]])
        store.remove_paths(root, ODD[1:], generation)
    assert set(codes(store)) == {1} and store.items([1])[1].paths == sorted(["/photos/plain", root + ODD[0]])
    assert list(store.seen(root, ODD)) == [ODD[0]]


def test_a_root_is_known_by_a_path_or_a_failure(store: Store) -> None:
    assert not store.knows(ROOT)
    put(store, content("a.png", "a", root="/other/"))
    assert not store.knows(ROOT) and store.knows("/other/")
    with store.write():
        store.put_failures([(ROOT, "b.png", 3, 7, "broken")])
    assert store.knows(ROOT)
    put(store, content("b.png", "b"))
    assert store.knows(ROOT) and not store.knows(ROOT + "b.png")


def test_failures_are_remembered_until_the_path_is_good(store: Store) -> None:
    put(store, content("a", "a"))
    with store.write():
        store.put_failures([(ROOT, "a", 5, 6, "broken"), (ROOT, "b", 8, 9, "no image")])
    assert store.seen(ROOT, ["a", "b"]) == {"a": Seen(1, 5, 6, True), "b": Seen(None, 8, 9, True)}
    assert codes(store) == {1: content("a", "a").code}  # what was there stays
    with store.write():
        store.put_failures([(ROOT, "b", 8, 10, "still no image")])
    assert store.seen(ROOT, ["b"])["b"].mtime_ns == 10 and store.count("failures") == 2
    assert put(store, content("b", "b")) == [2]
    assert store.seen(ROOT, ["b"]) == {"b": Seen(2, 1, 7, False)}
    with store.write() as generation:
        assert store.paths_not_in(ROOT, []) == (2, ["a", "b"])
        store.remove_paths(ROOT, ["a"], generation)
    assert store.count("failures") == 0 and set(codes(store)) == {2}


def test_paths_not_in_a_listing(store: Store) -> None:
    put(store, content("a", "a"), content("b", "b"), content("c", "c"), content("d", "d", root="/photos/more/"))
    with store.write():
        store.put_failures([(ROOT, "e", 1, 2, "broken")])
        assert store.paths_not_in(ROOT, iter(["c", "a", "new", "c"])) == (4, ["b", "e"])
        assert store.paths_not_in(ROOT, iter(["a", "b", "c", "e"])) == (4, [])
        assert store.paths_not_in("/nothing/", []) == (0, [])


def test_removing_items_forgets_all_of_them(store: Store) -> None:
    put(store, content("a", "one"), content("b", "one"), content("c", "two"))
    with store.write(step=0):
        store.put_codes(OTHER, [(1, b"12"), (2, b"34")])
    with store.write() as generation:
        assert store.remove_items(iter([1, 7, 1]), generation) == [content("", "one").sha256]
    assert codes(store) == {2: content("", "two").code} and codes(store, OTHER) == {2: b"34"}
    assert store.seen(ROOT, ["a", "b", "c"]) == {"c": Seen(2, 3, 7, False)}


def test_codes_of_another_width_are_called_damage(store: Store) -> None:
    put(store, content("a", "a"))
    with pytest.raises(HashretError, match="not of 64 bits"):
        store.codes(MODEL, 64)
    ids, found = store.codes(MODEL, 16, [1, 2])
    assert ids.tolist() == [1] and found.shape == (1, 2)
    ids, found = store.codes(OTHER, 64)
    assert ids.shape == (0,) and found.shape == (0, 8) and found.dtype == np.uint8


# Generations


def test_a_write_moves_to_the_next_generation(store: Store) -> None:
    for expected in (1, 2):
        with store.write() as generation:
            assert generation == expected
    with store.write(step=0) as generation:
        assert generation == 2
    with store.read() as told:
        assert told["generation"] == "2"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    put(store, content("a", "one"))
    before = everything(store)
    with pytest.raises(error), store.write() as generation:
        store.put([content("a", "two"), content("b", "three")], MODEL, generation)
        store.put_failures([(ROOT, "c", 1, 2, "broken")])
        raise error
    assert everything(store) == before
    assert put(store, content("b", "two")) == [2]


def test_a_full_disk_leaves_nothing(store: Store) -> None:
    put(store, content("a", "one"))
    before = everything(store)
    store.db.execute(f"PRAGMA max_page_count = {store.db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(HashretError, match="disk of .* is full"):
        put(store, *(content(f"{i:0200d}", str(i)) for i in range(200)))
    assert everything(store) == before
    store.db.execute("PRAGMA max_page_count = 100000")
    assert put(store, content("b", "two")) == [2]


def test_a_reader_sees_one_generation(store: Store) -> None:
    put(store, content("a", "one"))
    other = Store(store.path, read_only=True)
    with other.read() as told:
        put(store, content("b", "two"))
        with store.write() as generation:
            store.remove_items([1], generation)
        assert told["generation"] == "1" and set(codes(other)) == {1} and other.items([1])[1].paths == ["/photos/a"]
    with other.read() as told:
        assert told["generation"] == "3" and set(codes(other)) == {2}
    other.close()


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_changes_lead_from_every_generation_to_the_last(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)
    folder = tmp_path_factory.mktemp("changes")
    store = Store.create(folder / "items.db", {"fingerprint": MODEL})
    states = [codes(store)]
    for _ in range(chance.randrange(1, 12)):
        with store.write() as generation:
            for _ in range(chance.randrange(3)):
                if chance.random() < 0.6:
                    some = [content(chance.choice("abcd"), chance.choice("uvwxyz")) for _ in range(chance.randrange(4))]
                    store.put(some, MODEL, generation)
                elif chance.random() < 0.5:
                    store.remove_paths(ROOT, chance.sample("abcd", 2), generation)
                else:
                    store.remove_items(chance.sample(range(1, 10), 3), generation)
        assert generation == len(states)
        states.append(codes(store))
    forgotten = chance.randrange(len(states))
    with store.write(step=0):
        store.forget_changes(forgotten)
    for since, state in enumerate(states):
        changes = store.changes(since, MODEL, 16)
        assert (changes is None) == (since < forgotten)
        if changes is not None:
            removed, added = changes.removed.tolist(), changes.added.tolist()
            assert set(removed).isdisjoint(added) and set(added).isdisjoint(state)
            state = {i: code for i, code in state.items() if i not in removed}
            assert state | dict(zip(added, map(bytes, changes.codes), strict=True)) == states[-1]
    store.close()
    shutil.rmtree(folder)


def test_switching_models_is_one_step(store: Store) -> None:
    put(store, content("a", "one"), content("b", "two"), content("c", "two", known=True))
    assert store.uncoded(ROOT, "c", OTHER) == (2, content("", "two").sha256)
    assert store.uncoded(ROOT, "c", MODEL) is None and store.uncoded(ROOT, "nothing", OTHER) is None
    with store.write(step=0):
        store.put_codes(OTHER, [(1, b"12345678")])
    assert store.without_code(OTHER) == [2] and store.without_code(MODEL) == []
    assert store.uncoded(ROOT, "a", OTHER) is None
    with store.write(step=0):
        store.put_codes(OTHER, [(2, b"abcdefgh")])
    assert set(codes(store)) == {1, 2}  # the old ones are there until the switch
    with store.write() as generation:
        store.switch(OTHER, 64, generation)
    ids, found = store.codes(OTHER, 64)
    assert ids.tolist() == [1, 2] and found.tobytes() == b"12345678abcdefgh"
    assert codes(store) == {}
    with store.read() as told:
        assert told["fingerprint"] == OTHER and told["bits"] == "64"
    assert store.changes(0, OTHER, 64) is None and store.changes(generation, OTHER, 64) is not None


# Readers and threads


def test_a_read_only_store_writes_nothing(store: Store) -> None:
    put(store, content("a", "one"))
    before = everything(store)
    other = Store(store.path, read_only=True)
    with pytest.raises(HashretError, match="cannot be written to: open it read-only"):
        put(other, content("b", "two"))
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        other.db.execute("DELETE FROM items")
    assert everything(other) == before == everything(store)
    other.close()


def test_every_thread_reads_for_itself_and_leaves_no_file_open(store: Store) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("there is no /proc here to count open files in")
    put(store, content("a", "one"))
    before = len(list(descriptors.iterdir()))
    found = []

    def look() -> None:
        with store.read():
            found.append(set(codes(store)))

    for _ in range(20):
        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [{1}] * 60
    assert len(list(descriptors.iterdir())) <= before + 3


def test_a_store_can_be_closed_from_another_thread(store: Store) -> None:
    put(store, content("a", "one"))
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join()
    assert not store.path.with_name("items.db-wal").exists()  # the last connection has taken it in
