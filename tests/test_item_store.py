"""The conformance suite of `ItemStore`: every store passes it, through its public methods alone."""

import hashlib
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from dict_store import DictStore
from hypothesis import given, settings
from hypothesis import strategies as st

from hashret.collection import Collection
from hashret.collection.index_cache import IndexCache
from hashret.collection.models import Models
from hashret.collection.originals import Originals
from hashret.errors import HashretError, TooLarge
from hashret.hasher import Hasher
from hashret.results import BLOBS, Root, State
from hashret.stores.protocol import FailedPath, ItemRow, ItemStore, KnownPath, ModelKey, Snapshot, Transaction
from hashret.stores.sqlite import SqliteStore

MODEL, OTHER = "a" * 64, "b" * 64
ROOT = Root("/photos/")
SETTINGS = {"fingerprint": MODEL, "bits": "16", "index": "bitflip"}
Make: TypeAlias = Callable[[Path, dict[str, str]], ItemStore]
STORES: dict[str, Make] = {"sqlite": SqliteStore.create, "dict": lambda folder, settings: DictStore(settings)}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ItemStore]:
    store = STORES[request.param](tmp_path, SETTINGS)
    yield store
    store.close()


def row(name: str, text: str, *, root: str = ROOT, label: str | None = None, with_code: bool = True) -> ItemRow:
    """Return the row of a path; its code is derived from the text."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape"))
    code = digest.digest()[:2] if with_code else None
    return ItemRow(root, name, label, len(text), 7, digest.hexdigest(), len(text), 3, 4, code)


def put(store: ItemStore, *rows: ItemRow) -> list[int | None]:
    with store.exclusive(), store.transaction() as transaction:
        return transaction.put(rows)


def fail(store: ItemStore, *failures: tuple[str, int, int, str], root: str = ROOT) -> None:
    with store.exclusive(), store.transaction() as transaction:
        transaction.put_failures(FailedPath(root, *failure) for failure in failures)


def remove(store: ItemStore, ids: tuple[int, ...] = (), names: tuple[str, ...] = (), root: str = ROOT) -> list[str]:
    with store.exclusive(), store.transaction() as transaction:
        return transaction.remove(iter(ids), iter([(root, name) for name in names]))


def codes(snapshot: Snapshot, model: ModelKey | None = None) -> dict[int, bytes]:
    ids, found = snapshot.codes(model=model)
    assert ids.dtype == np.int64 and ids.tolist() == sorted(ids.tolist())
    assert found.dtype == np.uint8 and found.shape == (len(ids), (model or snapshot.settings.model).bits // 8)
    return {i: code.tobytes() for i, code in zip(ids.tolist(), found, strict=True)}


def test_a_new_store_has_its_settings_and_no_items(store: ItemStore) -> None:
    with store.snapshot() as snapshot:
        assert {key: snapshot.settings[key] for key in SETTINGS} == SETTINGS
        assert snapshot.settings.generation == snapshot.state.generation == 0
        assert snapshot.settings.model == (MODEL, 16) and (snapshot.settings.generation, snapshot.settings.index) == (
            0,
            "bitflip",
        )
        assert [snapshot.count(table) for table in ("items", "paths", "failures", "changes")] == [0] * 4
        assert (
            snapshot.ids().tolist() == []
            and snapshot.items([1]) == {}
            and codes(snapshot) == {}
            and snapshot.roots() == []
        )
        with pytest.raises(HashretError, match="damaged .*no setting cache"):
            snapshot.settings["cache"]


def test_ids_are_never_reused(store: ItemStore) -> None:
    assert put(store, row("a", "a"), row("b", "b"), row("c", "c")) == [1, 2, 3]
    assert set(remove(store, (3, 2))) == {row("", "b").sha256, row("", "c").sha256}
    assert put(store, row("c", "c")) == [4]
    remove(store, (4, 1))
    assert put(store, row("d", "d")) == [5]
    assert put(store, row("e", "e")._replace(id=3), row("f", "f")._replace(id=70), row("g", "g")) == [6, 70, 71]


def test_an_item_is_a_content_with_any_number_of_paths(store: ItemStore) -> None:
    first = row("b/x.png", "x", label="b")
    assert put(store, first, row("a/x.png", "x"), row("y.png", "y")) == [1, 1, 2]
    assert put(store, row("x.png", "x", root="/more/", with_code=False)) == [1]
    with store.snapshot() as snapshot:
        item = snapshot.items([1])[1]
        assert item.paths == ["/more/x.png", "/photos/a/x.png", "/photos/b/x.png"] and item.label == "b"
        assert (item.sha256, item.width, item.height, item.bytes, item.metadata) == (first.sha256, 3, 4, 1, None)
        assert item.added.endswith("Z") and len(item.added) == 20
        assert snapshot.items(iter([2, 99])).keys() == {2} and snapshot.items([2])[2].paths == ["/photos/y.png"]
        assert codes(snapshot) == {1: first.code, 2: row("", "y").code}
        assert snapshot.find([first.sha256, "nothing"]) == {first.sha256: 1}
        assert snapshot.roots() == ["/more/", "/photos/"] and all(isinstance(root, Root) for root in snapshot.roots())
        assert snapshot.known_paths(ROOT, ["a/x.png", "z.png"]) == {"a/x.png": KnownPath(1, 1, 7, False)}
        assert [snapshot.count(table) for table in ("items", "paths", "failures", "changes")] == [2, 4, 0, 2]
        found = sorted(snapshot.paths([1]))
        assert [(ref.root, ref.name, ref.item_id, ref.mtime_ns) for ref in found] == [
            ("/more/", "x.png", 1, 7), ("/photos/", "a/x.png", 1, 7), ("/photos/", "b/x.png", 1, 7)
        ]  # fmt: skip


def test_an_item_is_removed_with_its_last_path(store: ItemStore) -> None:
    put(store, row("a", "one"), row("b", "one"), row("c", "two"))
    put(store, row("a", "three"))  # "one" is still at b
    with store.snapshot() as snapshot:
        assert set(codes(snapshot)) == {1, 2, 3}
    put(store, row("b", "three", with_code=False))
    with store.snapshot() as snapshot:
        assert (
            set(codes(snapshot)) == {2, 3}
            and snapshot.items([1]) == {}
            and snapshot.find([row("", "one").sha256]) == {}
        )
    assert remove(store, names=("c", "a", "nothing")) == [row("", "two").sha256]
    with store.snapshot() as snapshot:
        assert set(codes(snapshot)) == {3} and snapshot.items([3])[3].paths == ["/photos/b"]


def test_contents_that_swap_paths_keep_their_items(store: ItemStore) -> None:
    put(store, row("a", "one"), row("b", "two"))
    assert put(store, row("a", "two", with_code=False), row("b", "one", with_code=False)) == [2, 1]
    with store.snapshot() as snapshot:
        assert {i: item.paths for i, item in snapshot.items([1, 2]).items()} == {1: ["/photos/b"], 2: ["/photos/a"]}


def test_a_removed_content_without_a_code_is_not_stored(store: ItemStore) -> None:
    put(store, row("a", "one"))
    put(store, row("a", "two"))
    assert put(store, row("b", "one", with_code=False), row("c", "two", with_code=False)) == [None, 2]
    with store.snapshot() as snapshot:
        assert snapshot.known_paths(ROOT, ["b", "c"]).keys() == {"c"}
    assert put(store, row("b", "one")) == [3]


def test_a_duplicate_name_leaves_no_item_without_a_path(store: ItemStore) -> None:
    put(store, row("a", "one"), row("a", "two"))
    with store.snapshot() as snapshot:
        assert list(codes(snapshot).values()) == [row("a", "two").code]
    put(store, row("a", "three"), row("b", "two"), row("a", "four"))
    with store.snapshot() as snapshot:
        found = snapshot.items(codes(snapshot))
        assert sorted(item.paths for item in found.values()) == [["/photos/a"], ["/photos/b"]]
        assert snapshot.count("items") == 2


def test_the_first_metadata_stay_until_they_are_replaced(store: ItemStore) -> None:
    put(store, row("a", "a")._replace(metadata={"taken": "Zürich", "n": [1, None]}), row("b", "b"))
    put(store, row("c", "a")._replace(metadata={"taken": "elsewhere"}))
    with store.snapshot() as snapshot:
        assert (
            snapshot.items([1])[1].metadata == {"taken": "Zürich", "n": [1, None]}
            and snapshot.items([2])[2].metadata is None
        )
    with store.exclusive(), store.transaction() as transaction:
        transaction.put_metadata({1: {"price": 0.5}, 2: {}})
    with store.snapshot() as snapshot:
        assert {i: item.metadata for i, item in snapshot.items([1, 2]).items()} == {1: {"price": 0.5}, 2: {}}
        assert {i: item.metadata for i, item in snapshot.items([1, 2], metadata=False).items()} == {1: None, 2: None}


def test_items_are_read_up_to_a_number_of_bytes(store: ItemStore) -> None:
    text = {"text": "x" * 10_000}
    put(store, row("a", "a")._replace(metadata=text), row("b", "b"), *(row(f"{i:0200}", "c") for i in range(20)))
    with store.snapshot() as snapshot:
        whole = snapshot.items([1, 2, 3])
        assert snapshot.items([1, 2, 3], max_bytes=100_000) == whole
        for ids in ([1, 2], [3]):
            with pytest.raises(TooLarge, match="read fewer"):
                snapshot.items(ids, max_bytes=3000)
        assert snapshot.items([1, 2], max_bytes=3000, metadata=False) == {
            1: whole[1]._replace(metadata=None),
            2: whole[2],
        }


ODD = [
    os.fsdecode(b"\xff\xfe.png"),
    os.fsdecode(b"caf\xe9/x.png"),
    "café/y.png",
    "🦔.png",
    "new\nline",
    'a"b\\c',
    "a'b",
    "zero\0zero",
]


def test_names_may_be_anything(store: ItemStore) -> None:
    root = Root(os.fsdecode(b"/caf\xe9/"))
    assert put(store, *(row(name, name, root=root, label=name[:5]) for name in ODD)) == [*range(1, len(ODD) + 1)]
    put(store, row("plain", ODD[0], with_code=False))
    with store.snapshot() as snapshot:
        for i, name in enumerate(ODD, 1):
            item = snapshot.items([i])[i]
            assert root + name in item.paths and item.label == name[:5]
            assert snapshot.known_paths(root, [name])[name].item_id == i
            assert [ref.item_id for ref in snapshot.paths_at(root + name)] == [i]
        assert set(snapshot.roots()) == {root, ROOT} and set(snapshot.names(root)) == set(ODD)
    fail(store, *((name, 1, 2, "broken") for name in ODD[:3]), root=root)
    with store.snapshot() as snapshot:
        assert all(path.failed for path in snapshot.known_paths(root, ODD[:3]).values())
        assert sorted(snapshot.names(root)) == sorted(ODD)  # each name once
        assert {failure.path for _, failure in snapshot.failures()} == {root + name for name in ODD[:3]}
    remove(store, names=tuple(ODD[1:]), root=root)
    with store.snapshot() as snapshot:
        assert set(codes(snapshot)) == {1} and snapshot.items([1])[1].paths == sorted(["/photos/plain", root + ODD[0]])
        assert list(snapshot.known_paths(root, ODD)) == [ODD[0]]


def test_failures_stay_until_the_path_is_readable(store: ItemStore) -> None:
    put(store, row("a", "a"))
    fail(store, ("a", 5, 6, "broken"), ("b", 8, 9, "no image"))
    with store.snapshot() as snapshot:
        assert snapshot.known_paths(ROOT, ["a", "b"]) == {
            "a": KnownPath(1, 5, 6, True),
            "b": KnownPath(None, 8, 9, True),
        }
        assert codes(snapshot) == {1: row("a", "a").code}  # the old content stays
        found = [(root, failure.path, failure.reason) for root, failure in snapshot.failures()]
        assert found == [(ROOT, "/photos/a", "broken"), (ROOT, "/photos/b", "no image")]
    fail(store, ("b", 8, 10, "still no image"))
    with store.snapshot() as snapshot:
        assert snapshot.known_paths(ROOT, ["b"])["b"].mtime_ns == 10 and snapshot.count("failures") == 2
    assert put(store, row("b", "b")) == [2]
    with store.snapshot() as snapshot:
        assert snapshot.known_paths(ROOT, ["b"]) == {"b": KnownPath(2, 1, 7, False)} and snapshot.count("failures") == 1
    remove(store, names=("a",))
    with store.snapshot() as snapshot:
        assert snapshot.count("failures") == 0 and set(codes(snapshot)) == {2}


def test_roots_are_those_of_paths_and_failures(store: ItemStore) -> None:
    put(store, row("a.png", "a", root="/other/"))
    fail(store, ("b.png", 3, 7, "broken"))
    put(store, row("c.png", "c", root="/other/more/"))
    with store.snapshot() as snapshot:
        assert snapshot.roots() == ["/other/", "/other/more/", ROOT]
        assert list(snapshot.names("/nothing/")) == [] and list(snapshot.names("/other/")) == ["a.png"]


def test_paths_at_or_below_a_path(store: ItemStore) -> None:
    put(store, row("a/x.png", "1"), row("a/b/y.png", "2"), row("ab.png", "3"), row("z.png", "4", root="/photos/a/"))
    put(
        store,
        row("i.png", "5", root="/photos/c.zip!/"),
        row("0", "6", root="/photos/d.npy#"),
        row("x", "7", root=BLOBS),
    )
    fail(store, ("a/broken.png", 1, 2, "broken"))
    with store.snapshot() as snapshot:

        def paths_at(path: str) -> set[str]:
            return {ref.root + ref.name for ref in snapshot.paths_at(path)}

        below_a = {"/photos/a/x.png", "/photos/a/b/y.png", "/photos/a/z.png", "/photos/a/broken.png"}
        assert paths_at("/photos/a") == paths_at("/photos/a/") == below_a
        assert paths_at("/photos/a/x.png") == {"/photos/a/x.png"} and paths_at("/photos/a/x") == set()
        assert paths_at("/photos/c.zip") == {"/photos/c.zip!/i.png"} == paths_at("/photos/c.zip!/i.png")
        assert paths_at("/photos/d.npy") == {"/photos/d.npy#0"} == paths_at("/photos/d.npy#0")
        assert paths_at("blobs/x") == {"blobs/x"} and paths_at("/elsewhere") == set()
        assert len(paths_at("/photos")) == 7 and len(paths_at("/")) == 7
        assert [ref.item_id for ref in snapshot.paths_at("/photos/a/broken.png")] == [None]


def test_removing_items_removes_their_paths_codes_and_verdicts(store: ItemStore) -> None:
    put(store, row("a", "one"), row("b", "one"), row("c", "two"), row("d", "three"))
    with store.exclusive(), store.transaction(advance=False) as transaction:
        transaction.put_codes(OTHER, [(1, b"12"), (2, b"34"), (3, b"56")])
        transaction.put_verdict(2, 1, "same")
        transaction.put_verdict(2, 3, "different")
    assert remove(store, (1, 7, 1)) == [row("", "one").sha256]
    with store.snapshot() as snapshot:
        assert codes(snapshot) == {2: row("", "two").code, 3: row("", "three").code}
        assert codes(snapshot, ModelKey(OTHER, 16)) == {2: b"34", 3: b"56"}
        assert snapshot.known_paths(ROOT, ["a", "b", "c"]) == {"c": KnownPath(2, 3, 7, False)}
        assert snapshot.verdicts("same").shape == (0, 2) and snapshot.verdicts("different").tolist() == [[2, 3]]


def test_a_verdict_replaces_an_earlier_one(store: ItemStore) -> None:
    put(store, *(row(name, name) for name in "abc"))
    for a, b, verdict in ((1, 2, "same"), (3, 2, "same"), (2, 1, "different")):
        with store.exclusive(), store.transaction() as transaction:
            transaction.put_verdict(a, b, verdict)
    with store.snapshot() as snapshot:
        assert snapshot.verdicts("same").tolist() == [[2, 3]] and snapshot.verdicts("different").tolist() == [[1, 2]]
        assert snapshot.verdicts("same").dtype == np.int64


def test_ids_come_in_pages(store: ItemStore) -> None:
    put(store, *(row(str(i), str(i)) for i in range(7)))
    remove(store, (3,))
    with store.snapshot() as snapshot:
        assert snapshot.ids().tolist() == [1, 2, 4, 5, 6, 7] and snapshot.ids().dtype == np.int64
        assert (
            snapshot.ids(2, 3).tolist() == [4, 5, 6]
            and snapshot.ids(7).tolist() == []
            and snapshot.ids(6, 10).tolist() == [7]
        )


def test_codes_of_selected_items(store: ItemStore) -> None:
    put(store, *(row(str(i), str(i)) for i in range(100)))
    with store.snapshot() as snapshot:
        ids, found = snapshot.codes([7, 3, 500, 7])
        assert ids.tolist() == [3, 7] and found.tobytes() == row("", "2").code + row("", "6").code  # type: ignore[operator]
        ids, found = snapshot.codes([])
        assert ids.shape == (0,) and found.shape == (0, 2)
        ids, found = snapshot.codes(max_items=10)
        assert ids.tolist() == [*range(1, 101, 10)] and found.shape == (10, 2)
        assert snapshot.codes(max_items=100)[0].tolist() == [*range(1, 101)]
        with pytest.raises(HashretError, match="damaged .*not of 64 bits"):
            snapshot.codes(model=ModelKey(MODEL, 64))
        ids, found = snapshot.codes(model=ModelKey(OTHER, 64))
        assert ids.shape == (0,) and found.shape == (0, 8)


def test_a_transaction_makes_the_next_generation_and_sees_itself(store: ItemStore) -> None:
    states = set()
    for expected in (1, 2):
        with store.exclusive(), store.transaction() as transaction:
            assert transaction.state.generation == expected and transaction.state not in states
            assert transaction.put([row(str(expected), str(expected))]) == [expected]
            assert transaction.items([expected])[expected].paths == [f"/photos/{expected}"]
            transaction.put_setting("data_root", "/data")
            assert transaction.settings["data_root"] == "/data"
        with store.snapshot() as snapshot:
            assert snapshot.settings.generation == snapshot.state.generation == expected
            states.add(snapshot.state)
    assert len(states) == 2
    with store.exclusive(), store.transaction(advance=False) as transaction:
        assert transaction.state in states and transaction.state.generation == 2
        transaction.put_setting("cache", "{}")
    with store.snapshot() as snapshot:
        assert snapshot.settings.generation == 2 and snapshot.settings["cache"] == "{}"
        assert snapshot.state in states  # no data that results depend on has changed


def test_writes_are_unseen_until_the_transaction_ends(store: ItemStore) -> None:
    put(store, row("a", "one"))
    seen = list[set[int]]()

    def look() -> None:
        with store.snapshot() as snapshot:
            seen.append(set(codes(snapshot)))

    def look_in_a_thread() -> None:
        reader = threading.Thread(target=look)
        reader.start()
        reader.join()

    with store.exclusive(), store.transaction() as transaction:
        transaction.put([row("b", "two")])
        look_in_a_thread()
    look_in_a_thread()
    assert seen == [{1}, {1, 2}]


def test_threads_that_write_wait_for_each_other(store: ItemStore) -> None:
    order = list[str]()

    def write() -> None:
        order.append("waits")
        with store.exclusive(), store.transaction() as transaction:
            order.append("writes")
            transaction.put([row("b", "two")])

    with store.exclusive():
        writer = threading.Thread(target=write)
        writer.start()
        while not order:
            pass
        with store.transaction() as transaction:
            transaction.put([row("a", "one")])
        order.append("is done")
    writer.join()
    assert order == ["waits", "is done", "writes"]
    with store.snapshot() as snapshot:
        assert snapshot.settings.generation == 2 and set(codes(snapshot)) == {1, 2}


def test_a_store_has_few_methods() -> None:
    verbs = {name for name, member in vars(Snapshot).items() if callable(member) and not name.startswith("_")}
    writes = {name for name, member in vars(Transaction).items() if callable(member) and not name.startswith("_")}
    assert len(verbs | writes) == len(verbs) + len(writes) <= 25


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_a_transaction_that_fails_or_is_rolled_back_leaves_nothing(
    store: ItemStore, error: type[BaseException] | None
) -> None:
    put(store, row("a", "one"))

    def write() -> None:
        with store.exclusive(), store.transaction(rollback=error is None) as transaction:
            transaction.put([row("a", "two"), row("b", "three")])
            transaction.put_failures([FailedPath(ROOT, "c", 1, 2, "broken")])
            transaction.put_setting("data_root", "/data")
            if error is not None:
                raise error

    if error is None:
        write()
    else:
        with pytest.raises(error):
            write()
    with store.snapshot() as snapshot:
        assert codes(snapshot) == {1: row("", "one").code} and list(snapshot.names(ROOT)) == ["a"]
        assert snapshot.settings.generation == 1 and "data_root" not in snapshot.settings
    assert put(store, row("b", "two")) == [2]


def test_a_snapshot_reads_one_state(store: ItemStore) -> None:
    put(store, row("a", "one"))

    def write() -> None:
        put(store, row("b", "two"))
        remove(store, (1,))

    with store.snapshot() as snapshot:
        state = snapshot.state
        writer = threading.Thread(target=write)
        writer.start()
        writer.join()
        assert snapshot.settings.generation == 1 and set(codes(snapshot)) == {1}
        assert snapshot.items([1])[1].paths == ["/photos/a"]
    with store.snapshot() as snapshot:
        assert snapshot.settings.generation == 3 and set(codes(snapshot)) == {2} and snapshot.state != state


@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(STORES)))
@settings(max_examples=40, deadline=None)
def test_changes_lead_from_every_generation_to_the_last(
    tmp_path_factory: pytest.TempPathFactory, seed: int, name: str
) -> None:
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("changes")
    store = STORES[name](folder, SETTINGS)

    def now() -> tuple[State, dict[int, bytes]]:
        with store.snapshot() as snapshot:
            return snapshot.state, codes(snapshot)

    states = [now()]
    for _ in range(rng.randrange(1, 12)):
        with store.exclusive(), store.transaction() as transaction:
            for _ in range(rng.randrange(3)):
                if rng.random() < 0.6:
                    drawn = [row(rng.choice("abcd"), rng.choice("uvwxyz")) for _ in range(rng.randrange(4))]
                    transaction.put(drawn)
                elif rng.random() < 0.5:
                    transaction.remove(paths=[(ROOT, name) for name in rng.sample("abcd", 2)])
                else:
                    transaction.remove(rng.sample(range(1, 10), 3))
            assert transaction.state.generation == len(states)
            committed = transaction.state
        states.append(now())
        assert states[-1][0] == committed
    forgotten = rng.randrange(len(states))
    with store.exclusive(), store.transaction(advance=False) as transaction:
        transaction.forget_changes(forgotten)
    for since, state in states:
        with store.snapshot() as snapshot:
            changes = snapshot.changes(since)
            assert snapshot.changes(since._replace(id="0" * 16)) is None  # of another history
        assert (changes is None) == (since.generation < forgotten)
        if changes is not None:
            removed, added = changes.removed.tolist(), changes.added.tolist()
            assert set(removed).isdisjoint(added) and set(added).isdisjoint(state)
            state = {i: code for i, code in state.items() if i not in removed}
            assert state | dict(zip(added, map(bytes, changes.codes), strict=True)) == states[-1][1]
    store.close()
    shutil.rmtree(folder)


def test_switching_models_is_one_step(store: ItemStore) -> None:
    with store.snapshot() as snapshot:
        first = snapshot.state
    put(store, row("a", "one"), row("b", "two"), row("c", "two", with_code=False))
    other = ModelKey(OTHER, 64)
    with store.exclusive(), store.transaction(advance=False) as transaction:
        transaction.put_codes(OTHER, [(1, b"12345678")])
        transaction.put_setting("calibration", "of the old codes")
    with store.snapshot() as snapshot:
        assert snapshot.without_code(OTHER).tolist() == [2] and snapshot.without_code(MODEL).tolist() == []
    with store.exclusive(), store.transaction(advance=False) as transaction:
        transaction.put_codes(OTHER, [(2, b"abcdefgh")])
    with store.snapshot() as snapshot:
        assert set(codes(snapshot)) == {1, 2}  # the old codes stay until the switch
    with store.exclusive(), store.transaction() as transaction:
        transaction.switch_model(other)
        state = transaction.state
    with store.snapshot() as snapshot:
        assert snapshot.settings.model == other and "calibration" not in snapshot.settings
        assert codes(snapshot) == {1: b"12345678", 2: b"abcdefgh"} and codes(snapshot, ModelKey(MODEL, 16)) == {}
        assert snapshot.changes(first) is None and snapshot.changes(state) is not None
        assert snapshot.without_code(MODEL).tolist() == [1, 2]


def test_items_are_ranked_by_which_copy_to_keep(store: ItemStore) -> None:
    small, large = row("s", "small"), row("l", "large")._replace(width=30)
    older = row("o", "older")._replace(mtime_ns=3, length=2)
    put(
        store,
        small,
        large,
        older,
        row("x/s", "small")._replace(mtime_ns=9),
        row("b", "blob", root=BLOBS)._replace(mtime_ns=0),
    )
    with store.snapshot() as snapshot:
        largest, oldest, under = (snapshot.ranking(keep) for keep in ("largest", "oldest", "/photos/x"))
        assert largest.ids.tolist() == [2, 1, 4, 3] and largest.paths.tolist() == [1, 2, 1, 1]
        assert oldest.ids.tolist() == [3, 1, 2, 4] and under.ids.tolist() == [1, 2, 4, 3]
        with pytest.raises(HashretError, match="nothing is indexed under /elsewhere"):
            snapshot.ranking("/elsewhere")


def test_item_rows_recreate_the_same_items(store: ItemStore, tmp_path: Path) -> None:
    put(store, row("a", "one", label="x"), row("b", "one"), row("c", "two")._replace(metadata={"n": 1}), row("d", "3"))
    remove(store, (2,))
    put(store, row("e", "two"))
    (tmp_path / "again").mkdir()
    again = STORES["sqlite"](tmp_path / "again", SETTINGS)
    with store.snapshot() as snapshot:
        assert [found.id for found in snapshot.item_rows()] == [1, 1, 3, 4]
        put(again, *snapshot.item_rows())
        with again.snapshot() as copied:
            assert copied.items([1, 2, 3, 4]) == snapshot.items([1, 2, 3, 4]) and codes(copied) == codes(snapshot)
    again.close()


def test_a_collection_works_on_any_store(store: ItemStore, tmp_path: Path) -> None:
    """A collection works on every store, except for filters."""
    photos = tmp_path / "photos"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    photos.mkdir()
    np.save(photos / "images.npy", images)
    hasher, other = (Hasher("lsh", 16).fit(images, seed=seed) for seed in (0, 1))
    folder = tmp_path / "collection"
    folder.mkdir()
    with store.exclusive(), store.transaction() as transaction:
        transaction.switch_model(ModelKey(hasher.fingerprint, 16))
    hasher.save(folder / "models" / hasher.fingerprint)
    collection = Collection(
        store, IndexCache(folder / "index", store), Originals(folder), Models(folder / "models", store)
    )
    report = collection.index(photos / "images.npy")
    assert (report.added, len(collection)) == (40, 40)
    assert collection.index(photos / "images.npy").unchanged == 40
    hits = collection.query(images[7], k=3)
    assert (hits[0].distance, hits[0].path) == (0, f"{photos}/images.npy#7")
    assert [hit.id for hit in collection.query_item(8, k=2)] == [hit.id for hit in collection.query(images[7], k=3)[1:]]
    assert collection.add([255 - images[0]]) == [41] and (folder / "blobs").is_dir()
    collection.verdict(8, hits[1].id, "different")
    assert hits[1].id not in [hit.id for hit in collection.query(images[7], k=40)]
    assert collection.reindex(other) == 0 and collection.fingerprint == other.fingerprint
    assert collection.query(images[7], k=1)[0].id == 8
    assert collection.remove([8, f"{photos}/images.npy#9"]) == 2 and len(collection) == 39
    assert [len(group.items) for group in collection.dupes(16)] == [39]
    assert collection.export(tmp_path / "items.jsonl") == 39 and collection.info()["items"] == 39
    collection.close()
