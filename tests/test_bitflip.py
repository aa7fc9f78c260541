"""`BitFlipIndex`: its kernels and planner wherever they switch from balls to flips to scans."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest
from brute_force import as_items, check_search, check_within, gathered, make

from hashret.codes import hamming
from hashret.indexes import BitFlipIndex, get_threads, segments, set_threads, tables
from hashret.indexes.kernels import STRETCH, Plan
from hashret.indexes.kernels_codes import BLOCK

pytestmark = pytest.mark.usefixtures("flip_early")


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
    assert index._state.base.plan.tolist() != segments.NO_PLAN.tolist()
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
    deepest, budget = bits // 9, {"none": 0, "all": 10**6, "some": 300}[flips]
    plan = Plan(bits // 18, deepest, deepest, deepest, deepest, budget)
    monkeypatch.setattr(tables, "_plan", lambda *asked: plan)
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


def test_queries_that_cost_more_by_flipping_make_way_for_a_scan_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tables, "_plan", lambda *asked: Plan(0, cheap=30, quarter=-1, last=30, promising=30, budget=10**6)
    )  # all are dear
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
    widths, deepest = base.cuts[:, 1].tolist(), Plan(*base.plan.tolist()).last
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
    index._state = index._state._replace(
        base=base._replace(plan=np.array(Plan(3, 20, 20, 20, promising=128, budget=150)))
    )
    probes = index.searched.probes
    check_search(index, items, queries, 10)  # a ball holds more codes than cost as much as a scan
    assert index.searched.probes > probes
    few = BitFlipIndex(64)
    few.add(codes[:, :8].copy(), np.arange(12_000))
    scattered = BitFlipIndex(128)
    scattered.add(gathered(128, 12_000, 0.05, 1000)[0], np.arange(12_000))
    assert len(base.radii) and not len(few._state.base.radii) and not len(scattered._state.base.radii)
