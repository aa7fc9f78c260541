import copy
from pathlib import Path

import numpy as np
import pytest
from dict_store import DictStore

from hashret.codes import Codes, hamming
from hashret.collection import index_cache
from hashret.collection.index_cache import IndexCache
from hashret.results import Root
from hashret.stores.protocol import ItemRow
from hashret.stores.sqlite import SqliteStore

SETTINGS = {"fingerprint": "a" * 64, "bits": "64", "index": "bitflip"}


def rows(first: int, count: int) -> list[ItemRow]:
    codes = np.random.default_rng(first).integers(0, 256, (count, 8), np.uint8)
    return [
        ItemRow(Root("/p/"), str(i), None, 1, 1, f"{i:064x}", 1, 1, 1, code.tobytes())
        for i, code in enumerate(codes, first)
    ]


def check(store: SqliteStore | DictStore, cache: IndexCache, near: int = 0) -> None:
    """Compare the current index with brute force, for random codes and the code of the row `near`."""
    before = cache.current
    with store.snapshot() as snapshot:
        current = cache.index_for(snapshot, before)
        ids, codes = snapshot.codes()
    assert current is not None and cache.current is current
    queries: Codes = np.concatenate([np.random.default_rng(99).integers(0, 256, (5, 8), np.uint8), codes[near, None]])
    hits = current.code_index.search(queries, 10)
    for distances, row, found in zip(hamming(queries, codes), hits.distances.tolist(), hits.ids.tolist(), strict=True):
        nearest = np.lexsort((ids, distances))[:10]
        assert (row, found) == (distances[nearest].tolist(), ids[nearest].tolist())


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    made = SqliteStore.create(tmp_path, SETTINGS)
    with made.transaction() as transaction:
        transaction.put(rows(0, 2000))
    return made


def test_an_altered_cache_file_is_not_loaded(tmp_path: Path, store: SqliteStore) -> None:
    """The changed byte is in a code, so that neither the size nor the header differs."""
    cache = IndexCache(tmp_path / "index", store)
    cache.persist()
    check(store, IndexCache(tmp_path / "index", store))
    (file,) = (tmp_path / "index").iterdir()
    data = bytearray(file.read_bytes())
    with store.snapshot() as snapshot:
        _, codes = snapshot.codes()
    word = codes[1000].view(">u8").astype("<u8").tobytes()
    position = data.find(word)
    while position >= 0:
        data[position] ^= 255
        position = data.find(word, position + 1)
    assert bytes(data) != file.read_bytes()
    file.write_bytes(data)
    check(store, IndexCache(tmp_path / "index", store), near=1000)
    store.close()


def test_a_cache_is_updated_by_later_changes(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = IndexCache(tmp_path / "index", store)
    cache.persist()
    (file,) = (tmp_path / "index").iterdir()
    with store.transaction() as transaction:
        transaction.put(rows(2000, 100))
        transaction.remove(range(10, 60))
    with monkeypatch.context() as patch:
        patch.setattr(IndexCache, "_build", None)  # neither of them is rebuilt
        for followed in (cache, IndexCache(tmp_path / "index", store)):
            check(store, followed)
    cache.persist()  # too few changes to rewrite it
    assert list((tmp_path / "index").iterdir()) == [file]
    monkeypatch.setattr(index_cache, "FEW_CHANGES", 50)
    with store.transaction() as transaction:
        transaction.put(rows(3000, 50))
    cache.persist()
    (later,) = (tmp_path / "index").iterdir()
    assert later != file
    check(store, IndexCache(tmp_path / "index", store))
    store.close()


def test_no_index_of_an_earlier_state_is_returned(tmp_path: Path, store: SqliteStore) -> None:
    cache = IndexCache(tmp_path / "index", store)
    with store.snapshot() as snapshot:
        assert snapshot.settings.generation == 1
        with store.transaction() as transaction:
            transaction.put(rows(2000, 50))
        with SqliteStore(tmp_path, read_only=True).snapshot() as later:
            assert cache.index_for(later, None) is not None
        assert cache.index_for(snapshot, None) is None
    check(store, cache)
    store.close()


def test_states_of_one_generation_are_distinguished(tmp_path: Path) -> None:
    """A backup was restored, and as many transactions were committed as to the replaced store."""
    store = DictStore(SETTINGS)
    backup = copy.deepcopy(store._tables)
    cache = IndexCache(tmp_path / "index", store)
    for restored in (False, True):
        if restored:
            store._tables = backup
        with store.transaction() as transaction:
            transaction.put(rows(500 * restored, 100))
            assert transaction.state.generation == 1
        check(store, cache)
