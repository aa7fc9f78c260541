"""The conformance suite of `CodeIndex`: every index in `INDEXES`, tested through its public methods alone."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from brute_force import (
    IndexMachine,
    as_items,
    assert_same,
    check_get,
    check_search,
    check_within,
    make_codes,
    shapes,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from hashret.errors import HashretError
from hashret.indexes import INDEXES, FaissIndex, Hits, RangeHits, from_spec, get_threads, index_class, set_threads

SPECS = sorted(INDEXES)
EXAMPLES = 200 if "HASHRET_SOAK" in os.environ else 25  # sequences of writes

pytestmark = pytest.mark.usefixtures("flip_early")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes, st.integers(1, 12) | st.just(500), st.integers(0, 40) | st.just(2000), st.data())
@pytest.mark.parametrize("spec", SPECS)
def test_equals_brute_force(
    spec: str, shape: tuple[int, int, int, float, int], k: int, radius: int, data: st.DataObject
) -> None:
    bits, count, n_centres, noise, seed = shape
    codes = make_codes(bits, count, seed, n_centres, noise)
    ids = np.random.default_rng(seed).permutation(count * 3)[:count].astype(np.int64) * data.draw(
        st.sampled_from([1, 1 << 40])
    )
    queries = np.concatenate([codes[:3], make_codes(bits, 3, seed + 1, n_centres, noise)])[
        data.draw(st.integers(0, 3)) :
    ]
    allowed = None
    if data.draw(st.booleans()):
        allowed = np.sort(np.concatenate([ids[:: data.draw(st.integers(1, 5))], [-3, 1 << 60]]).astype(np.int64))
    index = from_spec(bits, spec)
    assert len(index) == 0
    half = data.draw(st.integers(0, count))
    index.add(codes[:half], ids[:half])
    index.add(codes[half:], ids[half:])
    assert len(index) == count
    if data.draw(st.booleans()):  # so many that an index may rebuild itself
        removed = np.arange(count // 2 + 1) + (1 << 50)
        index.add(make_codes(bits, len(removed), seed + 2, n_centres, noise), removed)
        assert index.remove(removed) == len(removed)
    items = as_items(codes, ids)
    check_search(index, items, queries, k, allowed)
    check_within(index, items, queries, radius, allowed)
    check_get(index, items)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bits", [16, 64, 256])
def test_thousands_of_items_share_few_codes(spec: str, bits: int) -> None:
    few = make_codes(bits, 40, 3, 40, 0.5)
    codes, ids = few[np.random.default_rng(0).zipf(1.3, 4000) % 40], np.random.default_rng(1).permutation(4000)
    index, items = from_spec(bits, spec), as_items(codes, ids)
    index.add(codes, ids)
    check_search(index, items, few[:5], 700)
    check_within(index, items, few[:5], bits // 4)
    check_get(index, items)


@pytest.mark.parametrize("spec", SPECS)
def test_any_sequence_of_writes_equals_brute_force(spec: str, tmp_path: Path) -> None:
    machine = type("Machine", (IndexMachine,), {"spec": spec, "folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None))


@pytest.mark.parametrize("spec", SPECS)
def test_bad_arguments_are_rejected(spec: str) -> None:
    index = from_spec(64, spec)
    codes, ids = make_codes(64, 3, 1), np.array([5, 606, 7])
    index.add(codes, ids)
    for bad in (np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3], np.int32), ids[:, None], [8, 9, 10], ids[:2]):
        with pytest.raises(ValueError):
            index.add(codes, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-4"):
        index.add(codes, np.array([8, -4, 9]))
    with pytest.raises(ValueError, match="808"):
        index.add(codes, np.array([808, 9, 808]))
    with pytest.raises(ValueError, match="606"):
        index.add(codes, np.array([8, 606, 9]))
    assert len(index) == 3 and index.search(codes, 9).ids.shape == (3, 3)
    for other in (codes[:, :4], codes.astype(np.int8), codes[0], make_codes(72, 2, 1)):
        for method in (lambda x: index.add(x, ids + 9), lambda x: index.search(x, 1), lambda x: index.within(x, 1)):
            with pytest.raises(ValueError, match="codes"):
                method(other)
    for other in (np.array([5.0]), np.array([5], np.int32), ids[:, None], [5]):
        for read in (index.get, index.remove):
            with pytest.raises(ValueError, match="ids"):
                read(other)  # type: ignore[arg-type]
    for other in (5.0, "5", None, [5], 8, -1, 1 << 70, -(1 << 70)):
        assert other not in index
    assert 5 in index and np.int64(5) in index and np.uint8(7) in index
    for k in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match=str(k)):
            index.search(codes, k)  # type: ignore[arg-type]
    for radius in (-1, 2.5, None):
        with pytest.raises(ValueError, match=str(radius)):
            index.within(codes, radius)  # type: ignore[arg-type]
    for allowed in (np.array([7, 5]), np.array([5.0]), [5, 6]):
        with pytest.raises(ValueError, match="allowed"):
            index.search(codes, 1, allowed=allowed)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="allowed"):
            index.within(codes, 1, allowed=allowed)  # type: ignore[arg-type]
    for bits in (0, 7, 1032):
        with pytest.raises(ValueError, match=str(bits)):
            from_spec(bits, spec)
    with pytest.raises(ValueError, match="of no index"):
        from_spec(64, f"{spec}:of no index")


@pytest.mark.parametrize("spec", SPECS)
def test_arguments_are_neither_kept_nor_changed(spec: str) -> None:
    index = from_spec(64, spec)
    codes, ids = make_codes(64, 3000, 1), np.arange(3000)
    index.add(codes, ids)
    before = index.search(codes[:5], 3)
    assert codes.flags.writeable and ids.flags.writeable and before.ids.flags.writeable
    codes[:], ids[:] = 0, -1
    assert (index.search(make_codes(64, 3000, 1)[:5], 3).ids == before.ids).all()


@pytest.mark.parametrize("spec", SPECS)
def test_any_memory_layout(spec: str) -> None:
    index, codes = from_spec(64, spec), make_codes(64, 2000, 1)
    wide = np.arange(8000).reshape(2000, 4)
    index.add(codes, wide[:, 1])
    fixed = wide[:, 1].copy()
    fixed.flags.writeable = False
    for allowed in (wide[:, 1], fixed, np.sort(fixed)):
        assert (index.search(codes[:9], 4, allowed=allowed).ids == index.search(codes[:9], 4).ids).all()
    items = as_items(codes, wide[:, 1])
    for queries in (np.repeat(codes, 2, axis=0)[::2], np.repeat(codes, 2, axis=1)[:, ::2], np.asfortranarray(codes)):
        assert not queries.flags.c_contiguous
        check_search(index, items, queries[:9], 4)
        check_within(index, items, queries[:9], 7)
        assert index.remove(wide[::2, 1]) == 1000
        index.add(queries[::2], wide[::2, 1])
        assert (index.get(wide[::-1, 1]) == codes[::-1]).all()
    with pytest.raises(ValueError, match="codes"):
        index.search(np.asfortranarray(codes).astype(np.int8), 4)


@pytest.mark.parametrize("spec", SPECS)
def test_no_queries_and_no_items(spec: str) -> None:
    index, none = from_spec(64, spec), np.empty((0, 8), np.uint8)
    assert index.search(make_codes(64, 2, 1), 3).ids.shape == (2, 0)
    assert index.within(make_codes(64, 2, 1), 3).limits.tolist() == [0, 0, 0]
    index.add(make_codes(64, 30, 1), np.arange(30))
    assert index.search(none, 3).ids.shape == (0, 3)
    assert index.search(none, 99, allowed=np.array([2, 3, 77])).ids.shape == (0, 2)
    assert index.within(none, 3).limits.tolist() == [0]
    assert index.remove(np.empty(0, np.int64)) == 0
    assert index.search(make_codes(64, 2, 1), 3, allowed=np.empty(0, np.int64)).ids.shape == (2, 0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("share", [1, 2, 3])
def test_parts_of_a_batch_make_the_whole(spec: str, share: int) -> None:
    index, codes = from_spec(64, spec), make_codes(64, 3000, 1)
    index.add(codes, np.arange(3000))
    index.add(codes[:20], np.arange(3000, 3020))
    before = get_threads()
    set_threads(share)
    try:
        hits, ranges = index.search(codes[:50], 8), index.within(codes[:50], 6)
    finally:
        set_threads(before)
    assert index.searched.queries == 100
    for q in range(50):
        low, high = ranges.limits[q : q + 2]
        assert_same(Hits(hits.distances[q : q + 1], hits.ids[q : q + 1]), index.search(codes[q : q + 1], 8))
        alone = index.within(codes[q : q + 1], 6)
        assert_same(RangeHits(alone.limits, ranges.distances[low:high], ranges.ids[low:high]), alone)


@pytest.mark.parametrize("spec", SPECS)
def test_damaged_files_are_rejected(spec: str, tmp_path: Path) -> None:
    index, path = from_spec(64, spec), tmp_path / "index"
    index.add(make_codes(64, 1500, 1), np.arange(1500))
    index.add(make_codes(64, 5, 2), np.arange(2000, 2005))
    index.remove(np.arange(3))
    index.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    positions = [*range(24), *rng.integers(0, len(whole), 60).tolist(), len(whole) - 1]
    for position in positions:
        altered = bytearray(whole)
        altered[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        with pytest.raises(HashretError, match=str(path)):
            index_class(spec).load(path)
    for length in [0, 1, 8, 15, 16, 100, len(whole) - 64, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()]:
        path.write_bytes(whole[:length])
        for verify in (True, False):
            with pytest.raises(HashretError, match=str(path)):
                index_class(spec).load(path, verify=verify)
    path.write_bytes(whole + b"x")
    with pytest.raises(HashretError, match=str(path)):
        index_class(spec).load(path, verify=False)
    path.write_bytes(whole)
    for other in set(SPECS) - {spec}:
        with pytest.raises(HashretError, match=str(path)):
            INDEXES[other].load(path)
    assert len(index_class(spec).load(path)) == 1502


@pytest.mark.parametrize("spec", SPECS)
def test_a_failed_save_leaves_the_old_file(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, path = from_spec(64, spec), tmp_path / "index"
    index.add(make_codes(64, 15, 1), np.arange(15))
    index.save(path)
    index.remove(np.arange(3))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        index.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    assert len(index_class(spec).load(path)) == 15


@pytest.mark.parametrize("spec", SPECS)
def test_readers_see_before_or_after_a_write(spec: str) -> None:
    """A writer adds and removes blocks of ten equal codes; no reader may ever see part of a block."""
    index, codes = from_spec(64, spec), make_codes(64, 4000, 1, 400, 0.3)
    index.add(codes, np.arange(4000))
    query = codes[:1] ^ np.uint8(255)
    block = np.repeat(query, 10, axis=0)
    seen: set[tuple[int, ...]] = set()
    stop = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                for hits in (index.search(query, 20), index.within(query, 0)):
                    equal = hits.ids[hits.distances == 0].tolist()
                    assert len(equal) in (0, 10) and len({i // 10 for i in equal}) <= 1, equal
                    seen.add(tuple(equal))
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(150):
        ids = np.arange(10) + 10 * (1000 + turn)
        index.add(block, ids)
        if turn % 25 == 0:  # large enough for a compaction
            index.add(make_codes(64, 1500, turn, 400, 0.3), np.arange(1500) + 10**6)
            assert index.remove(np.arange(1500) + 10**6) == 1500
        assert index.remove(ids) == 10
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors, errors[0]
    assert () in seen and len(index) == 4000


@pytest.mark.parametrize("spec", SPECS)
def test_every_reader_finds_all_added_items(spec: str) -> None:
    """Many additions make an index compact itself; no reader may miss an item meanwhile."""
    index, codes = from_spec(64, spec), make_codes(64, 24_000, 1, 400, 0.3)
    added = 0
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while added < len(codes):
                count = added
                assert (index.get(np.arange(count)) == codes[:count]).all()
                assert all(i in index for i in range(count - 200, count, 50) if i >= 0)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for low in range(0, len(codes), 200):
        index.add(codes[low : low + 200], np.arange(low, low + 200))
        added = low + 200
    for reader in readers:
        reader.join()
    assert not errors, errors[0]


def test_a_spec_names_a_class_and_its_options() -> None:
    assert {name: index_class(name) for name in INDEXES} == INDEXES
    assert index_class("faiss:BIVF4") is FaissIndex
    graph = from_spec(72, "faiss:BHNSW8")
    assert isinstance(graph, FaissIndex) and (graph.bits, graph.factory) == (72, "BHNSW8")
    for spec in ("tree", "", "Bitflip", "tree:BFlat"):
        for function in (index_class, lambda spec: from_spec(64, spec)):
            with pytest.raises(ValueError, match=f"{spec!r}.*bitflip.*faiss:BFlat"):
                function(spec)
