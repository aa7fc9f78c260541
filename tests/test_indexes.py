import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hashret.codes import hamming
from hashret.errors import HashretError
from hashret.indexes import (
    BitFlipIndex,
    CodeIndex,
    FaissIndex,
    Hits,
    RangeHits,
    get_threads,
    segments,
    set_threads,
    streaming,
    tables,
    updatable,
)
from hashret.indexes import files as formats
from hashret.indexes.kernels import STRETCH
from hashret.indexes.kernels_codes import BLOCK
from hashret.indexes.threads import split
from hashret.indexes.updatable import UpdatableIndex

Array = np.ndarray[Any, Any]
Items = dict[int, bytes]

CLASSES: dict[str, type[BitFlipIndex] | type[FaissIndex]] = {"bitflip": BitFlipIndex, "faiss": FaissIndex}
ENGINES = sorted(CLASSES)
FACTORIES = ["BFlat", "BIVF4", "BHNSW8"]


@pytest.fixture(autouse=True)
def flip_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tables, and use them, at sizes that brute force can judge."""
    monkeypatch.setattr(tables, "MIN_CODES", 2)
    monkeypatch.setattr(tables, "SIFT_CODES", 64)
    monkeypatch.setattr(tables, "SCAN", 100.0)


def judge(items: Items, queries: Array, allowed: Array | None = None) -> tuple[Array, Array]:
    """Every qualifying item for each query: distances and ids, (q, n), ordered by (distance, id)."""
    ids = np.array(sorted(set(items) & set(items if allowed is None else allowed.tolist())), np.int64)
    codes = np.frombuffer(b"".join(items[i] for i in ids.tolist()), np.uint8).reshape(len(ids), queries.shape[1])
    distances = hamming(queries, codes)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, axis=1), ids[order]


def check_search(index: CodeIndex, items: Items, queries: Array, k: int, allowed: Array | None = None) -> None:
    hits, (distances, ids) = index.search(queries, k, allowed=allowed), judge(items, queries, allowed)
    assert hits.distances.dtype == np.int32 and hits.ids.dtype == np.int64
    assert hits.ids.shape == hits.distances.shape == (len(queries), min(k, ids.shape[1]))
    assert_honest(hits.distances, hits.ids, items, queries, allowed)
    if index.exact:
        assert (hits.distances == distances[:, :k]).all()
    if isinstance(index, BitFlipIndex):
        assert (hits.ids == ids[:, :k]).all()


def check_within(index: CodeIndex, items: Items, queries: Array, radius: int, allowed: Array | None = None) -> None:
    hits, (distances, ids) = index.within(queries, radius, allowed=allowed), judge(items, queries, allowed)
    assert hits.limits.dtype == np.int64 and hits.limits[0] == 0 and len(hits.limits) == len(queries) + 1
    assert hits.distances.dtype == np.int32 and hits.ids.dtype == np.int64
    assert len(hits.distances) == len(hits.ids) == hits.limits[-1]
    for q, (low, high) in enumerate(zip(hits.limits[:-1], hits.limits[1:], strict=True)):
        assert_honest(hits.distances[None, low:high], hits.ids[None, low:high], items, queries[q : q + 1], allowed)
        assert (hits.distances[low:high] <= radius).all()
        if index.exact:  # all of them: a radius leaves no choice among ties
            count = (distances[q] <= radius).sum()
            assert hits.ids[low:high].tolist() == ids[q, :count].tolist()


def assert_honest(distances: Array, ids: Array, items: Items, queries: Array, allowed: Array | None) -> None:
    """What any index owes, exact or not: true distances, ids that qualify, each once, in order."""
    for row, (query, near) in enumerate(zip(queries, ids.tolist(), strict=True)):
        assert len(set(near)) == len(near) and set(near) <= set(items)
        assert allowed is None or set(near) <= set(allowed.tolist())
        codes = np.frombuffer(b"".join(items[i] for i in near), np.uint8).reshape(len(near), len(query))
        assert (distances[row] == hamming(query[None], codes)[0]).all()
        assert sorted(zip(distances[row].tolist(), near, strict=True)) == list(
            zip(distances[row].tolist(), near, strict=True)
        )


def make(bits: int, count: int, seed: int, centres: int = 6, noise: float = 0.05) -> Array:
    """Codes around a few centres, so that distances tie and codes collide; the same centres for the same bits."""
    rng = np.random.default_rng(seed)
    near = np.random.default_rng(bits).random((centres, bits)) < 0.5
    bits_ = near[rng.integers(0, centres, count)] ^ (rng.random((count, bits)) < noise * rng.random((count, 1)))
    return np.packbits(bits_, axis=1)


def as_items(codes: Array, ids: Array) -> Items:
    return {i: code.tobytes() for i, code in zip(ids.tolist(), codes, strict=True)}


shapes = st.tuples(
    st.integers(1, 128).map(lambda width: width * 8) | st.sampled_from([8, 16, 24, 32, 48, 64, 72, 128, 200, 256]),
    st.sampled_from([0, 1, 2, 5, 40, 200]),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.03, 0.2, 1.0]),
    st.integers(0, 1000),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes, st.integers(1, 12) | st.just(500), st.integers(0, 40) | st.just(2000), st.data())
@pytest.mark.parametrize("engine", ENGINES)
def test_equals_brute_force(
    engine: str, shape: tuple[int, int, int, float, int], k: int, radius: int, data: st.DataObject
) -> None:
    bits, count, centres, noise, seed = shape
    codes = make(bits, count, seed, centres, noise)
    ids = np.random.default_rng(seed).permutation(count * 3)[:count].astype(np.int64) * data.draw(
        st.sampled_from([1, 1 << 40])
    )
    queries = np.concatenate([codes[:3], make(bits, 3, seed + 1, centres, noise)])[data.draw(st.integers(0, 3)) :]
    allowed = None
    if data.draw(st.booleans()):
        allowed = np.sort(np.concatenate([ids[:: data.draw(st.integers(1, 5))], [-3, 1 << 60]]).astype(np.int64))
    index = CLASSES[engine](bits)
    assert len(index) == 0
    half = data.draw(st.integers(0, count))
    index.add(codes[:half], ids[:half])
    index.add(codes[half:], ids[half:])
    assert len(index) == count
    if data.draw(st.booleans()):
        index._state = index._merged(index._state)
    items = as_items(codes, ids)
    check_search(index, items, queries, k, allowed)
    check_within(index, items, queries, radius, allowed)


@pytest.mark.parametrize("bits", [8, 24, 64, 72, 128, 1024])
@pytest.mark.parametrize("scan", [0.001, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("least", [64, 10**6])
def test_flipping_and_scanning_agree_wherever_the_planner_switches(
    bits: int, scan: float, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SCAN", scan)
    monkeypatch.setattr(tables, "SIFT_CODES", least)
    codes, queries, ids = make(bits, 5000, 1, 40, 0.2), make(bits, 60, 2, 40, 0.2), np.arange(5000) * 7
    index, items = BitFlipIndex(bits), as_items(codes, ids)
    index.add(codes, ids)
    assert index._state.base.plan.tolist() != [-1, -1, -1, -1, -1, 0]
    assert (len(index._state.base.sifts) > 0) == (least == 64 and bits <= 128)
    for k in (1, 10, 300):
        check_search(index, items, queries, k)
        check_search(index, items, queries, k, np.sort(np.random.default_rng(k).permutation(ids)[:1000]))
    for radius in (0, 3, 11):
        check_within(index, items, queries, radius)


@pytest.mark.parametrize("bits", [64, 128, 256, 320])
@pytest.mark.parametrize("flips", ["none", "all", "some"])
@pytest.mark.parametrize("least", [64, 10**6])
def test_scanning_goes_on_where_flipping_stopped(
    bits: int, flips: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks, a last one that is short, codes that share ids or do not, dead items or none, any planner."""
    monkeypatch.setattr(tables, "SIFT_CODES", least)
    budget = {"none": 0, "all": 10**6, "some": 300}[flips]
    monkeypatch.setattr(tables, "_plan", lambda *asked: np.array([bits // 18, *[bits // 9] * 4, budget]))
    queries = make(bits, 30, 2, 400, 0.2)
    for count, share in ((5000, 5000), (7000, 6500)):
        codes, ids = make(bits, count, 1, 400, 0.2), np.random.default_rng(3).permutation(count)
        codes[share:] = codes[: count - share]
        index, items = BitFlipIndex(bits), as_items(codes, ids)
        index.add(codes, ids)
        index._state = index._merged(index._state)
        base = index._state.base
        assert len(base.codes) == len(np.unique(codes, axis=0)) and (len(base.codes) == count or len(base.starts))
        for gone in (ids[::9], ids[1::9]):
            for k in (1, 3, 10, 200):
                check_search(index, items, queries, k)
                check_search(index, items, queries[k % 30 :][:1], k)
            check_search(index, items, queries, 4, np.sort(ids[::3]))
            for radius in (bits // 9 - 2, bits // 9 + 2):
                check_within(index, items, queries, radius)
            assert index.remove(gone) == len(gone)
            items = {i: code for i, code in items.items() if i not in set(gone.tolist())}


@pytest.mark.parametrize("bits", [24, 64, 128])
@pytest.mark.parametrize("k", [1, 1500, 9000])
def test_more_codes_are_near_than_a_scan_puts_aside(bits: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MIN_CODES", 10**6)
    codes, ids = np.random.default_rng(1).integers(0, 256, (8000, bits // 8), np.uint8), np.arange(8000)[::-1].copy()
    index, items = BitFlipIndex(bits), as_items(codes, ids)
    index.add(codes, ids)
    room = []

    def search() -> None:  # in a thread of its own, which has no more room than this index needs
        check_search(index, items, codes[:3], k)
        check_search(index, items, codes[:3], k, ids[::-3].copy())
        room.append(len(segments.workspace(index._state.base, 3).aside))

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert room == [BLOCK]


@pytest.mark.parametrize("bits", [64, 128])
@pytest.mark.parametrize("beyond", [-1, 1, BLOCK + 77, 2 * BLOCK])
def test_a_scan_goes_from_one_stretch_to_the_next(bits: int, beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MIN_CODES", 10**9)
    rng, count = np.random.default_rng(1), STRETCH * BLOCK + beyond
    codes = rng.integers(0, 256, (count, bits // 8), np.uint8)
    queries = np.concatenate([codes[-2:], rng.integers(0, 256, (2, bits // 8), np.uint8)])
    index = BitFlipIndex(bits)
    index.add(codes, np.arange(count))
    order = np.argsort(hamming(queries, codes), axis=1, kind="stable")
    for k in (1, 10, 1200):
        for some in (queries, queries[:1], queries[3:]):
            assert np.array_equal(index.search(some, k).ids, order[[q.tolist() in some.tolist() for q in queries], :k])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [16, 64, 256])
def test_thousands_of_items_share_few_codes(engine: str, bits: int) -> None:
    few = make(bits, 40, 3, 40, 0.5)
    codes, ids = few[np.random.default_rng(0).zipf(1.3, 4000) % 40], np.random.default_rng(1).permutation(4000)
    index, items = CLASSES[engine](bits), as_items(codes, ids)
    index.add(codes, ids)
    assert len(index._state.base.codes) <= 40
    check_search(index, items, few[:5], 700)
    check_within(index, items, few[:5], bits // 4)


class Life(RuleBasedStateMachine):
    """Any sequence of writes leaves an index that answers as brute force does."""

    engine: str
    folder: Path

    @initialize(bits=st.sampled_from([8, 16, 64, 72, 136]), seed=st.integers(0, 10**6), count=st.integers(0, 2000))
    def start(self, bits: int, seed: int, count: int) -> None:
        self.bits = bits
        self.index = CLASSES[self.engine](bits)
        self.items: Items = {}
        self.add(seed, count)

    def some_ids(self, seed: int, count: int) -> Array:
        return np.unique(np.random.default_rng(seed).integers(0, 3000, count))

    @rule(seed=st.integers(0, 10**6), count=st.sampled_from([0, 1, 3, 60, 1500]))
    def add(self, seed: int, count: int) -> None:
        ids = np.random.default_rng(seed).permutation([i for i in self.some_ids(seed, count) if i not in self.items])
        ids = ids.astype(np.int64)
        codes = make(self.bits, len(ids), seed)
        self.index.add(codes, ids)
        self.items |= as_items(codes, ids)

    @rule(seed=st.integers(0, 10**6), count=st.sampled_from([1, 5]))
    def refuse_what_is_there(self, seed: int, count: int) -> None:
        ids = np.setdiff1d(self.some_ids(seed, count), list(self.items)).astype(np.int64)
        clash = np.array(list(self.items)[seed % max(1, len(self.items)) :][:1] or [*ids[:1].tolist()], np.int64)
        ids = np.concatenate([ids, clash])
        if len(clash):
            with pytest.raises(ValueError, match=str(clash[0])):
                self.index.add(make(self.bits, len(ids), seed), ids)

    @rule(seed=st.integers(0, 10**6), count=st.sampled_from([0, 1, 40, 900]))
    def remove(self, seed: int, count: int) -> None:
        ids = np.random.default_rng(seed).integers(-10, 3000, count)
        there = set(ids.tolist()) & set(self.items)
        assert self.index.remove(ids) == len(there)
        for i in there:
            del self.items[i]

    @rule()
    def remove_all(self) -> None:
        assert self.index.remove(np.array([*self.items, *self.items], np.int64)) == len(self.items)
        self.items = {}

    @rule(verify=st.booleans())
    def save_and_load(self, verify: bool) -> None:
        self.index.save(self.folder / "index")
        self.index = CLASSES[self.engine].load(self.folder / "index", verify=verify)
        assert [path.name for path in self.folder.iterdir()] == ["index"]

    @rule(seed=st.integers(0, 10**6), k=st.sampled_from([1, 7, 100]), radius=st.sampled_from([0, 2, 9, 70]))
    def ask(self, seed: int, k: int, radius: int) -> None:
        queries = make(self.bits, 3, seed)
        allowed = None if seed % 3 == 0 else self.some_ids(seed, 300 * (seed % 3) ** 3)
        check_search(self.index, self.items, queries, k, allowed)
        check_within(self.index, self.items, queries, radius, allowed)

    @invariant()
    def is_as_before(self) -> None:
        if hasattr(self, "items"):
            assert len(self.index) == len(self.items)
            check_search(self.index, self.items, make(self.bits, 2, len(self.items)), 5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beside", [False, True])
def test_any_life(engine: str, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if beside:
        monkeypatch.setattr(updatable, "_LARGE", 0)  # threads merge, however few there are
    machine = type("Machine", (Life,), {"engine": engine, "folder": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=100, stateful_step_count=30, deadline=None))


@pytest.mark.parametrize("factory", FACTORIES)
def test_faiss_factories_are_complete(factory: str, tmp_path: Path) -> None:
    codes, ids, queries = make(64, 3000, 1, 30, 0.3), np.arange(3000)[::-1].copy(), make(64, 20, 2, 30, 0.3)
    index, items = FaissIndex(64, factory), as_items(codes, ids)
    assert index.exact == (factory == "BFlat")
    index.add(codes, ids)
    assert index._state.engine is not None
    assert index.remove(ids[:500]) == 500
    items = dict(list(items.items())[500:])
    index.save(tmp_path / "index")
    for same in (index, FaissIndex.load(tmp_path / "index")):
        assert same.factory == factory and same._state.engine is not None
        for k in (1, 10, 2499, 3000):  # the longest rows show that what FAISS leaves short is filled
            check_search(same, items, queries, k)
            check_search(same, items, queries, k, np.arange(0, 3000, 7))
        check_within(same, items, queries, 12)
        recall = (same.search(queries, 5).distances == judge(items, queries)[0][:, :5]).mean()
        assert recall >= 0.9


def test_a_graph_over_distinct_codes_stands_collisions() -> None:
    few = make(64, 400, 1, 400, 0.5)
    rng = np.random.default_rng(0)
    codes, ids, queries = few[rng.zipf(1.2, 20_000) % 400], np.arange(20_000), make(64, 300, 2, 400, 0.2)
    index = FaissIndex(64, "BHNSW16")
    index.add(codes, ids)
    nearest = hamming(queries, few).min(axis=1)
    assert (index.search(queries, 10).distances[:, 0] == nearest).mean() >= 0.99


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_arguments_are_refused(engine: str) -> None:
    index = CLASSES[engine](64)
    codes, ids = make(64, 3, 1), np.array([5, 6, 7])
    index.add(codes, ids)
    for bad in (np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3], np.int32), ids[:, None], [8, 9, 10], ids[:2]):
        with pytest.raises(ValueError):
            index.add(codes, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-4"):
        index.add(codes, np.array([8, -4, 9]))
    with pytest.raises(ValueError, match="8 comes twice"):
        index.add(codes, np.array([8, 9, 8]))
    with pytest.raises(ValueError, match="6 is in the index"):
        index.add(codes, np.array([8, 6, 9]))
    assert len(index) == 3 and index.search(codes, 9).ids.shape == (3, 3)
    for other in (codes[:, :4], codes.astype(np.int8), codes[0], make(72, 2, 1)):
        for call in (lambda x: index.add(x, ids + 9), lambda x: index.search(x, 1), lambda x: index.within(x, 1)):
            with pytest.raises(ValueError):
                call(other)
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
            CLASSES[engine](bits)


@pytest.mark.parametrize("factory", ["Flat", "BFlat,x", "BIVF0", "BHash8", ""])
def test_unknown_factories_are_refused(factory: str) -> None:
    with pytest.raises(ValueError, match="factory"):
        FaissIndex(64, factory)


@pytest.mark.parametrize("engine", ENGINES)
def test_arguments_stay_as_they_were(engine: str) -> None:
    index = CLASSES[engine](64)
    codes, ids = make(64, 3000, 1), np.arange(3000)
    index.add(codes, ids)
    before = index.search(codes[:5], 3)
    assert codes.flags.writeable and ids.flags.writeable and before.ids.flags.writeable
    codes[:], ids[:] = 0, -1
    assert (index.search(make(64, 3000, 1)[:5], 3).ids == before.ids).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_any_memory_layout_of_ids(engine: str) -> None:
    index, codes = CLASSES[engine](64), make(64, 2000, 1)
    wide = np.arange(8000).reshape(2000, 4)
    index.add(codes, wide[:, 1])
    fixed = wide[:, 1].copy()
    fixed.flags.writeable = False
    for allowed in (wide[:, 1], fixed, np.sort(fixed)):
        assert (index.search(codes[:9], 4, allowed=allowed).ids == index.search(codes[:9], 4).ids).all()
    assert index.remove(wide[::2, 1]) == 1000


@pytest.mark.parametrize("engine", ENGINES)
def test_no_queries_and_no_items(engine: str) -> None:
    index, none = CLASSES[engine](64), np.empty((0, 8), np.uint8)
    assert index.search(make(64, 2, 1), 3).ids.shape == (2, 0)
    assert index.within(make(64, 2, 1), 3).limits.tolist() == [0, 0, 0]
    index.add(make(64, 30, 1), np.arange(30))
    assert index.search(none, 3).ids.shape == (0, 3)
    assert index.search(none, 99, allowed=np.array([2, 3, 77])).ids.shape == (0, 2)
    assert index.within(none, 3).limits.tolist() == [0]
    assert index.remove(np.empty(0, np.int64)) == 0
    assert index.search(make(64, 2, 1), 3, allowed=np.empty(0, np.int64)).ids.shape == (2, 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [1, 2, 3])
def test_parts_of_a_batch_make_the_whole(engine: str, share: int) -> None:
    index, codes = CLASSES[engine](64), make(64, 3000, 1)
    index.add(codes, np.arange(3000))
    index.add(codes[:20], np.arange(3000, 3020))
    set_threads(share)
    try:
        hits, ranges = index.search(codes[:50], 8), index.within(codes[:50], 6)
    finally:
        set_threads(2)
    for q in range(50):
        low, high = ranges.limits[q : q + 2]
        assert_same(Hits(hits.distances[q : q + 1], hits.ids[q : q + 1]), index.search(codes[q : q + 1], 8))
        one = index.within(codes[q : q + 1], 6)
        assert_same(RangeHits(one.limits, ranges.distances[low:high], ranges.ids[low:high]), one)


def test_queries_that_cost_more_by_flipping_make_way_for_a_scan_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_plan", lambda *asked: np.array([0, 30, -1, 30, 30, 10**6]))  # all are dear
    codes, queries, ids = make(64, 5000, 1, 40, 0.2), make(64, 60, 2, 40, 0.2), np.arange(5000)
    index = BitFlipIndex(64)
    index.add(codes, ids)
    before = get_threads()
    set_threads(1)
    try:
        looked = []
        for asked in (queries[:8], queries[:31], queries):
            probes = index.searched.probes
            check_search(index, as_items(codes, ids), asked, 10)
            looked.append(index.searched.probes - probes)
    finally:
        set_threads(before)
    m = len(index._state.base.cuts)
    assert looked[0] > 8 * m and looked[1] > 31 * m  # few queries flip to the end
    assert looked[2] == looked[0] + 52 * m  # of many the first eight do, the others look up one bucket a table


@pytest.mark.parametrize("threads", [1, 2])
def test_every_look_up_is_counted(threads: int) -> None:
    index, codes = BitFlipIndex(64), make(64, 3000, 1)
    index.add(codes, np.arange(3000))
    base = index._state.base
    widths, deepest = base.cuts[:, 1].tolist(), int(base.plan[3])
    m = len(widths)
    assert m < deepest and index.searched == (0, 0)
    expected = 0
    set_threads(threads)
    try:
        for radius in (0, m + 1):  # the first look-ups of all tables are made together
            index.within(codes[:40], radius)
            expected += 40 * sum(math.comb(widths[level % m], level // m) for level in range(max(m, radius + 1)))
            assert index.searched[1] == expected
        index.search(codes[:40], 1)  # each is met at once
        assert index.searched == (120, expected + 40 * m)
        index.search(codes[:40], 1, allowed=np.arange(3))  # three codes are scanned
        assert index.searched == (160, expected + 40 * m)
    finally:
        set_threads(2)
    index.add(make(64, 3000, 2), np.arange(3000, 6000))
    assert index.searched == (160, expected + 40 * m)


def gathered(bits: int, count: int, noise: float, lost: int, seed: int = 0) -> tuple[Array, Array]:
    """Codes around centres, some hundred around each, but `lost` of them anywhere; and queries of both kinds."""
    rng = np.random.default_rng(seed)
    centres = rng.random((count // 200, bits)) < 0.5
    around = centres[rng.integers(0, len(centres), count + 30)] ^ (rng.random((count + 30, bits)) < noise)
    around[:lost], around[-5:] = rng.random((lost, bits)) < 0.5, rng.random((5, bits)) < 0.5
    return np.packbits(around[:-30], axis=1), np.packbits(around[-30:], axis=1)


@pytest.mark.parametrize("bits", [72, 128, 200, 256, 1024])
@pytest.mark.parametrize("noise", [0.03, 0.08])
@pytest.mark.parametrize("lost", [0, 30])
def test_codes_that_gather_are_found_by_balls(bits: int, noise: float, lost: int, tmp_path: Path) -> None:
    codes, queries = gathered(bits, 12_000, noise, lost)
    codes[-500:] = codes[5000:5500]  # some items share a code
    ids = np.random.default_rng(1).permutation(len(codes))
    index, items = BitFlipIndex(bits), as_items(codes, ids)
    index.add(codes, ids)
    index.save(tmp_path / "index")
    base = index._state.base
    assert sorted(base.members.tolist()) == list(range(len(base.codes)))  # each is in one
    assert 60 <= len(base.radii) <= 70 + lost
    own = np.repeat(np.arange(len(base.radii)), np.diff(base.begins))
    differing = segments.from_words(np.ascontiguousarray(base.centres[:, own].T), 64 * len(base.centres))
    differing ^= segments.from_words(base.codes[base.members], 64 * len(base.centres))
    assert (np.bitwise_count(differing).sum(axis=1) <= base.radii[own]).all()
    for same in (index, BitFlipIndex.load(tmp_path / "index")):
        probes = same.searched.probes
        check_search(same, items, queries[:-5], 10)
        check_within(same, items, queries[:-5], bits // 6)
        assert same.searched.probes == probes  # nothing was flipped
        for k in (1, 300, 2000):
            check_search(same, items, queries, k)
            check_search(same, items, queries, k, np.sort(ids[::3]))
        for radius in (0, 5, bits // 3, bits):
            check_within(same, items, queries, radius)
        assert same.remove(ids[::2]) == 6000
        check_search(same, dict(list(items.items())[1::2]), queries, 10)
        check_within(same, dict(list(items.items())[1::2]), queries, bits // 6)


def test_balls_that_would_not_do_are_left_alone() -> None:
    codes, queries = gathered(128, 12_000, 0.05, 0)
    index, items = BitFlipIndex(128), as_items(codes, np.arange(12_000))
    index.add(codes, np.arange(12_000))
    base = index._state.base
    index._state = index._state._replace(base=base._replace(plan=np.array([3, 20, 20, 20, 128, 150])))
    probes = index.searched.probes
    check_search(index, items, queries, 10)  # a ball holds more codes than cost as much as a scan
    assert index.searched.probes > probes
    few = BitFlipIndex(64)
    few.add(codes[:, :8].copy(), np.arange(12_000))
    scattered = BitFlipIndex(128)
    scattered.add(gathered(128, 12_000, 0.05, 1000)[0], np.arange(12_000))
    assert len(base.radii) and not len(few._state.base.radii) and not len(scattered._state.base.radii)


def test_one_thread_searches_indexes_of_all_kinds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a search scribbles on is kept for the next, and has to be large enough for all that comes after."""
    kinds = []
    for bits, count, least in ((64, 500, 10**6), (64, 3000, 2), (256, 3000, 2), (128, 6000, 2), (24, 2000, 2)):
        monkeypatch.setattr(tables, "MIN_CODES", least)
        codes, queries = gathered(bits, count, 0.05, 0)
        index = BitFlipIndex(bits)
        index.add(codes, np.arange(count))
        kinds.append((index, as_items(codes, np.arange(count)), queries))
    for asked in (1, 30):
        for index, items, queries in [*kinds, *kinds[::-1]]:
            check_search(index, items, queries[:asked], 5)
            check_within(index, items, queries[:asked], index.bits // 8)


def assert_same(a: tuple[Array, ...], b: tuple[Array, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("engine", ENGINES)
def test_damaged_files_are_refused(engine: str, tmp_path: Path) -> None:
    index, path = CLASSES[engine](64), tmp_path / "index"
    index.add(make(64, 1500, 1), np.arange(1500))
    index.add(make(64, 5, 2), np.arange(2000, 2005))
    index.remove(np.arange(3))
    index.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    places = [*range(24), *rng.integers(0, len(whole), 60).tolist(), len(whole) - 1]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        with pytest.raises(HashretError, match="index"):
            CLASSES[engine].load(path)
    for length in [0, 1, 8, 15, 16, 100, len(whole) - 64, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()]:
        path.write_bytes(whole[:length])
        for verify in (True, False):
            with pytest.raises(HashretError, match=str(path)):
                CLASSES[engine].load(path, verify=verify)
    path.write_bytes(whole + b"x")
    with pytest.raises(HashretError, match=str(path)):
        CLASSES[engine].load(path, verify=False)
    path.write_bytes(whole)
    for other in set(ENGINES) - {engine}:
        with pytest.raises(HashretError, match=engine):
            CLASSES[other].load(path)
    assert len(CLASSES[engine].load(path)) == 1502


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells how files are mapped on Linux alone")
def test_no_more_of_a_mapped_index_is_read_than_is_wanted(tmp_path: Path) -> None:
    index = BitFlipIndex(64)
    index.add(make(64, 20_000, 1, 400, 0.3), np.arange(20_000))
    index.save(tmp_path / "index")
    loaded = BitFlipIndex.load(tmp_path / "index", verify=False)
    parts = Path("/proc/self/smaps").read_text().split("VmFlags:")
    flags = [after.splitlines()[0].split() for part, after in itertools.pairwise(parts) if str(tmp_path) in part]
    assert ["rr" in flag for flag in flags].count(True) >= 2 and not all("rr" in flag for flag in flags)
    assert_same(loaded.search(make(64, 9, 2), 5), index.search(make(64, 9, 2), 5))


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_waits_for_a_merge(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatable, "_LARGE", 0)
    index, codes = CLASSES[engine](64), make(64, 9000, 1)
    begun, may_end, merged = threading.Event(), threading.Event(), UpdatableIndex._merged

    def slowly(self: UpdatableIndex, state: Any, *more: Any) -> Any:
        begun.set()
        assert may_end.wait(60)
        return merged(self, state, *more)

    items = as_items(codes[:3000], np.arange(3000))
    index.add(codes[:3000], np.arange(3000))  # which is many times what a tail should hold
    while index._since is not None:
        time.sleep(0.001)
    base = index._state.base
    monkeypatch.setattr(UpdatableIndex, "_merged", slowly)
    for low in range(3000, 5000, 200):
        index.add(codes[low : low + 200], np.arange(low, low + 200))
        items |= as_items(codes[low : low + 200], np.arange(low, low + 200))
        check_search(index, items, codes[:20], 7)
    assert begun.wait(60) and index._state.base.codes is base.codes
    gone = np.arange(0, 5000, 3)  # of what is being merged, and of what came since
    assert index.remove(gone) == len(gone) and index.remove(gone) == 0
    items = {i: code for i, code in items.items() if i % 3}
    index.add(codes[5000:5010], gone[:10])  # ids that are free again
    items |= as_items(codes[5000:5010], gone[:10])
    check_search(index, items, codes[:20], 7)
    assert index._state.base.codes is base.codes
    may_end.set()
    while index._since is not None:
        time.sleep(0.001)
    assert len(index._state.base.ids) > len(base.ids)
    check_search(index, items, codes[:20], 7)
    check_within(index, items, codes[:20], 9)
    may_end.clear()
    begun.clear()
    assert index.remove(np.array([*items][: len(items) // 2])) == len(items) // 2 and begun.wait(60)
    items = dict([*items.items()][len(items) // 2 :])
    monkeypatch.undo()
    index.add(codes[5010:], np.arange(5010, 9000))  # so many that nobody waits for the other
    items |= as_items(codes[5010:], np.arange(5010, 9000))
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "hashret-merge":
            thread.join()
    check_search(index, items, codes[:20], 7)
    assert len(index) == len(items)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_came_beside_a_merge_is_merged_too_if_it_is_much(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updatable, "_LARGE", 0)
    index, codes = CLASSES[engine](64), make(64, 4000, 1)
    may_end, merged, merges = threading.Event(), UpdatableIndex._merged, []

    def slowly(self: UpdatableIndex, state: Any, *more: Any) -> Any:
        merges.append(len(state.tail.ids))
        assert may_end.wait(60)
        return merged(self, state, *more)

    monkeypatch.setattr(UpdatableIndex, "_merged", slowly)
    for low in range(0, 4000, 500):  # the first merge begins with more than 1,024 items, and ends after the last
        index.add(codes[low : low + 500], np.arange(low, low + 500))
    may_end.set()
    while index._since is not None:
        time.sleep(0.001)
    assert merges[0] < len(index._state.base.ids) and len(merges) > 1
    assert len(index._state.tail.ids) <= index._longest_tail(index._state)
    check_search(index, as_items(codes[:4000], np.arange(4000)), codes[:20], 7)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_save_leaves_the_old_file(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, path = CLASSES[engine](64), tmp_path / "index"
    index.add(make(64, 15, 1), np.arange(15))
    index.save(path)
    index.remove(np.arange(3))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        index.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    assert len(CLASSES[engine].load(path)) == 15


@pytest.mark.parametrize("engine", ENGINES)
def test_readers_see_before_or_after_a_write(engine: str) -> None:
    """A writer moves blocks of ten equal codes in and out as a whole; no reader may ever see part of a block."""
    index, codes = CLASSES[engine](64), make(64, 4000, 1, 400, 0.3)
    index.add(codes, np.arange(4000))
    query = codes[:1] ^ np.uint8(255)
    block = np.repeat(query, 10, axis=0)
    seen: set[tuple[int, ...]] = set()
    stop = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                for found in (index.search(query, 20), index.within(query, 0)):
                    equal = found.ids[found.distances == 0].tolist()
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
        if turn % 25 == 0:  # large enough to build a new base
            index.add(make(64, 1500, turn, 400, 0.3), np.arange(1500) + 10**6)
            assert index.remove(np.arange(1500) + 10**6) == 1500
        assert index.remove(ids) == 10
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors, errors[0]
    assert () in seen and len(index) == 4000


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split what a few kilobytes hold into few files, again and again, and read little at a time."""
    for name, value in {"PART": 600, "PASS": 300, "BLOCK": 128, "FANOUT": 5, "OVERSAMPLING": 4}.items():
        monkeypatch.setattr(streaming, name, value)


def in_batches(codes: Array, ids: Array, size: int) -> Iterator[tuple[Array, Array]]:
    for begin in range(0, len(ids), size):
        yield codes[begin : begin + size], ids[begin : begin + size]


def skewed(kind: str, bits: int, count: int) -> Array:
    codes = make(bits, count, 1, 40, 0.3)
    if kind == "all equal":
        codes[:] = codes[0]
    elif kind == "few":
        codes = codes[np.random.default_rng(0).zipf(1.3, count) % 40]
    elif kind == "one in most":
        codes[: count - 20] = codes[-1]
    elif kind == "equal at first":  # most bytes of the records say nothing
        codes[:, : bits // 8 - 1] = 0
    elif kind == "ascending":
        codes = codes[np.lexsort(codes.T[::-1])]
    return codes


@pytest.mark.parametrize("bits", [8, 64, 72, 1024])
@pytest.mark.parametrize("kind", ["any", "all equal", "few", "one in most", "equal at first", "ascending"])
@pytest.mark.parametrize("parts", ["tiny", "large"])
def test_a_build_on_disk_leaves_what_add_and_save_do(
    bits: int, kind: str, parts: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if parts == "tiny":
        request.getfixturevalue("tiny_parts")
    codes, ids = skewed(kind, bits, 2500), np.random.default_rng(2).permutation(7500)[:2500] << 40
    told: list[tuple[str, int]] = []
    built = BitFlipIndex.build(
        tmp_path / "built", bits, in_batches(codes, ids, 700), progress=lambda *news: told.append(news)
    )
    assert told[0] == ("reading", 700) and {stage for stage, _ in told} >= {"reading", "sorting", "ids"}
    assert ("sorting", 2500) in told and ("ids", 2500) in told
    added = BitFlipIndex(bits)
    added.add(codes, ids)
    added.save(tmp_path / "added")
    made, arrays = formats.read(tmp_path / "built", "bitflip", verify=True)
    expected, same = formats.read(tmp_path / "added", "bitflip", verify=True)
    assert made == expected and arrays.keys() == same.keys()
    for name, array in arrays.items():
        assert array.dtype == same[name].dtype and array.shape == same[name].shape, name
        assert (array == same[name]).all(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["added", "built"]

    items, queries = as_items(codes, ids), np.concatenate([codes[:3], make(bits, 6, 3, 40, 0.3)])
    for index in (built, BitFlipIndex.load(tmp_path / "built")):
        check_search(index, items, queries, 7)
        check_search(index, items, queries, 7, np.sort(ids[::5]))
        check_within(index, items, queries, bits // 5)
    more, fresh = make(bits, 1500, 5, 40, 0.3), np.arange(1500) * 2 + 1
    for low, high in ((0, 5), (5, 1500)):  # into the tail, into a new base
        with pytest.raises(ValueError, match=str(ids[-1])):
            built.add(more[:1], ids[-1:])
        built.add(more[low:high], fresh[low:high])
        assert built.remove(ids[low:high]) == high - low
        items = {i: code for i, code in items.items() if i not in set(ids[low:high].tolist())}
        items |= as_items(more[low:high], fresh[low:high])
        check_search(built, items, queries, 7)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes, st.integers(1, 300), st.integers(0, 40))
def test_a_build_on_disk_equals_brute_force(
    tmp_path: Path, tiny_parts: None, shape: tuple[int, int, int, float, int], size: int, radius: int
) -> None:
    bits, count, centres, noise, seed = shape
    codes, ids = make(bits, count, seed, centres, noise), np.random.default_rng(seed).permutation(count * 3)[:count]
    index = BitFlipIndex.build(tmp_path / "index", bits, in_batches(codes, ids, size))
    queries, items = np.concatenate([codes[:2], make(bits, 3, seed + 1, centres, noise)]), as_items(codes, ids)
    assert len(index) == count
    check_search(index, items, queries, size)
    check_within(index, items, queries, radius)


def test_no_batches_and_empty_batches_build_an_empty_index(tmp_path: Path) -> None:
    none = np.empty((0, 8), np.uint8), np.empty(0, np.int64)
    for batches in ([], [none, none]):
        index = BitFlipIndex.build(tmp_path / "index", 64, batches)
        assert len(index) == 0 and index.search(make(64, 2, 1), 3).ids.shape == (2, 0)
        index.add(make(64, 2, 1), np.array([4, 5]))
        assert index.search(make(64, 1, 1), 1).ids.tolist() == [[4]]


@pytest.mark.parametrize("parts", ["tiny", "large"])
def test_a_build_refuses_what_add_does(parts: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if parts == "tiny":
        request.getfixturevalue("tiny_parts")
    codes, ids = make(64, 1000, 1), np.arange(1000)[::-1].copy()
    all_same, once_more, negative = ids * 0, ids.copy(), ids.copy()
    once_more[3], negative[3] = ids[990], -4
    bad: list[tuple[Any, Any, str]] = [
        (codes, once_more, "id 9 comes twice"),
        (codes, all_same, "id 0 comes twice"),
        (codes[np.zeros(1000, np.int64)], all_same, "id 0 comes twice"),
        (codes, negative, "-4"),
        (codes, ids[:-1], "999"),
        (codes, ids.astype(np.int32), "int32"),
        (codes[:, :4].copy(), ids, "32"),
        (codes.astype(np.int8), ids, "int8"),
    ]
    for codes_, ids_, text in bad:
        with pytest.raises(ValueError, match=text):
            BitFlipIndex.build(tmp_path / "index", 64, [(codes[:0], ids[:0]), (codes_, ids_)])
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="12"):
        BitFlipIndex.build(tmp_path / "index", 12, [])


@pytest.mark.parametrize("stage", ["reading", "sorting", "ids", "tables", "fsync"])
def test_an_interrupted_build_leaves_nothing_but_what_was_there(
    stage: str, tmp_path: Path, tiny_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, ids = make(64, 1000, 1, 40, 0.3), np.arange(1000)
    halted = []

    def halt(reached: str, done: int) -> None:
        if reached == stage and done:
            halted.append(sorted(path.name for path in tmp_path.rglob("*")))
            raise KeyboardInterrupt

    if stage == "fsync":
        monkeypatch.setattr(os, "fsync", lambda descriptor: halt("fsync", 1))
    for left in ([], ["index"]):
        with pytest.raises(KeyboardInterrupt):
            BitFlipIndex.build(tmp_path / "index", 64, in_batches(codes, ids, 300), progress=halt)
        assert [path.name for path in tmp_path.iterdir()] == left
        (tmp_path / "index").write_bytes(b"what was there")
    assert len(halted[0]) > 1 and (tmp_path / "index").read_bytes() == b"what was there"


ASK = """
import json, sys, time
import numpy as np
from hashret.indexes import BitFlipIndex, FaissIndex, jit
index = BitFlipIndex(64)
codes = np.arange(3000 * 8, dtype=np.uint32).astype(np.uint8).reshape(3000, 8)
index.add(codes, np.arange(3000))
index.search(codes[:2], 3), index.within(codes[:2], 3)
kernels = [module for name, module in sys.modules.items() if name.startswith("hashret.indexes.kernels")]
compiled = {id(k): k for module in kernels for k in vars(module).values() if hasattr(k, "stats")}.values()
print(json.dumps({
    "file": jit.__file__,
    "folder": jit.CACHE_FOLDER,
    "misses": sum(sum(kernel.stats.cache_misses.values()) for kernel in compiled),
    "hits": sum(sum(kernel.stats.cache_hits.values()) for kernel in compiled),
    "heavy": [name for name in ("torch", "sqlite3", "faiss") if name in sys.modules],
}))
"""


def ask(package: Path, cache: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(package), "XDG_CACHE_HOME": str(cache)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", ASK]
    run = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_kernels_are_compiled_once_per_machine_and_again_when_any_source_changes(tmp_path: Path) -> None:
    import hashret

    home = Path(hashret.__file__).parent
    package = tmp_path / "package" / "hashret"
    (package / "indexes").mkdir(parents=True)
    for source in [*home.glob("*.py"), *home.glob("indexes/*.py")]:
        (package / source.relative_to(home)).write_bytes(source.read_bytes())
    for folder in (package / "indexes", package):
        folder.chmod(0o555)  # as installed for all users
    first, second = (ask(package.parent, tmp_path / "cache") for _ in range(2))
    assert Path(first["file"]).is_relative_to(package)
    assert first["misses"] > 0 and first["folder"].startswith(str(tmp_path / "cache"))
    assert second["misses"] == 0 and second["hits"] > 0 and second["heavy"] == []
    assert not list(package.rglob("__pycache__"))
    (package / "indexes").chmod(0o755)
    with (package / "indexes" / "kernels.py").open("a") as kernels:
        kernels.write("\nEDITED = True\n")
    assert ask(package.parent, tmp_path / "cache")["folder"] != first["folder"]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 16, 100, 7171])
def test_parts_of_a_batch_come_in_order_whoever_searches_them(threads: int, count: int) -> None:
    before = get_threads()
    set_threads(threads)
    try:
        parts = split(count, lambda low, high: list(range(low, high)))
        with pytest.raises(ZeroDivisionError):
            split(max(count, 1), lambda low, high: 1 // (high < count))
    finally:
        set_threads(before)
    assert [i for part in parts for i in part] == list(range(count))
