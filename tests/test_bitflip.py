"""`BitFlipIndex`: its kernels and planner, wherever they switch between clusters, flips and scans."""

import math
import threading
from pathlib import Path

import numpy as np
import pytest
from brute_force import as_items, check_search, check_within, make_clusters, make_codes

from hashret.codes import hamming
from hashret.indexes import BitFlipIndex, get_threads, segments, set_threads, tables
from hashret.indexes.kernels import CHUNK_BLOCKS, Plan
from hashret.indexes.kernels_codes import BLOCK

pytestmark = pytest.mark.usefixtures("flip_early")


@pytest.mark.parametrize("bits", [8, 24, 64, 72, 128, 1024])
@pytest.mark.parametrize("scan", [0.001, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("min_prefilter_codes", [64, 10**6])
def test_flipping_and_scanning_agree_wherever_the_planner_switches(
    bits: int, scan: float, min_prefilter_codes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SCAN_NS", scan)
    monkeypatch.setattr(tables, "MIN_PREFILTER_CODES", min_prefilter_codes)
    codes, queries, ids = make_codes(bits, 5000, 1, 40, 0.2), make_codes(bits, 60, 2, 40, 0.2), np.arange(5000) * 7
    index, items = BitFlipIndex(bits), as_items(codes, ids)
    index.add(codes, ids)
    assert index._state.main.plan.tolist() != segments.NO_PLAN.tolist()
    assert (len(index._state.main.signatures) > 0) == (min_prefilter_codes == 64 and bits <= 128)
    for k in (1, 10, 300):
        check_search(index, items, queries, k)
        check_search(index, items, queries, k, np.sort(np.random.default_rng(k).permutation(ids)[:1000]))
    for radius in (0, 3, 11):
        check_within(index, items, queries, radius)


@pytest.mark.parametrize("bits", [64, 128, 256, 320])
@pytest.mark.parametrize("flips", ["none", "all", "some"])
@pytest.mark.parametrize("min_prefilter_codes", [64, 10**6])
def test_scanning_goes_on_where_flipping_stopped(
    bits: int, flips: str, min_prefilter_codes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks with a short last one, codes with one id or several, with and without tombstones, any plan."""
    monkeypatch.setattr(tables, "MIN_PREFILTER_CODES", min_prefilter_codes)
    last, budget = bits // 9, {"none": 0, "all": 10**6, "some": 300}[flips]
    plan = Plan(bits // 18, last, last, last, last, budget)
    monkeypatch.setattr(tables, "_make_plan", lambda *arguments: plan)
    queries = make_codes(bits, 30, 2, 400, 0.2)
    for count, share in ((5000, 5000), (7000, 6500)):
        codes, ids = make_codes(bits, count, 1, 400, 0.2), np.random.default_rng(3).permutation(count)
        codes[share:] = codes[: count - share]
        index, items = BitFlipIndex(bits), as_items(codes, ids)
        index.add(codes, ids)
        index._state = index._compact(index._state)
        main = index._state.main
        assert len(main.codes) == len(np.unique(codes, axis=0))
        assert len(main.codes) == count or len(main.shared_offsets)
        for removed in (ids[::9], ids[1::9]):
            for k in (1, 3, 10, 200):
                check_search(index, items, queries, k)
                check_search(index, items, queries[k % 30 :][:1], k)
            check_search(index, items, queries, 4, np.sort(ids[::3]))
            for radius in (bits // 9 - 2, bits // 9 + 2):
                check_within(index, items, queries, radius)
            assert index.remove(removed) == len(removed)
            items = {i: code for i, code in items.items() if i not in set(removed.tolist())}


@pytest.mark.parametrize("bits", [24, 64, 128])
@pytest.mark.parametrize("k", [1, 1500, 9000])
def test_more_codes_are_near_than_the_shortlist_of_a_scan_holds(
    bits: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MIN_CODES", 10**6)
    codes, ids = np.random.default_rng(1).integers(0, 256, (8000, bits // 8), np.uint8), np.arange(8000)[::-1].copy()
    index, items = BitFlipIndex(bits), as_items(codes, ids)
    index.add(codes, ids)
    shortlist_sizes = []

    def search() -> None:  # in a new thread, whose workspace is no larger than this index needs
        check_search(index, items, codes[:3], k)
        check_search(index, items, codes[:3], k, ids[::-3].copy())
        shortlist_sizes.append(len(segments.get_workspace(index._state.main, 3).shortlist))

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert shortlist_sizes == [BLOCK]


@pytest.mark.parametrize("bits", [64, 128])
@pytest.mark.parametrize("beyond", [-1, 1, BLOCK + 77, 2 * BLOCK])
def test_a_scan_goes_from_one_chunk_to_the_next(bits: int, beyond: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MIN_CODES", 10**9)
    rng, count = np.random.default_rng(1), CHUNK_BLOCKS * BLOCK + beyond
    codes = rng.integers(0, 256, (count, bits // 8), np.uint8)
    queries = np.concatenate([codes[-2:], rng.integers(0, 256, (2, bits // 8), np.uint8)])
    index = BitFlipIndex(bits)
    index.add(codes, np.arange(count))
    order = np.argsort(hamming(queries, codes), axis=1, kind="stable")
    for k in (1, 10, 1200):
        for rows in (slice(None), slice(1), slice(3, None)):
            assert np.array_equal(index.search(queries[rows], k).ids, order[rows, :k])


def test_queries_that_cost_more_by_flipping_share_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    # For every query, flipping costs more than a shared scan.
    plan = Plan(0, 30, -1, 30, promising_distance=30, candidate_budget=10**6)
    monkeypatch.setattr(tables, "_make_plan", lambda *arguments: plan)
    codes, queries, ids = make_codes(64, 5000, 1, 40, 0.2), make_codes(64, 60, 2, 40, 0.2), np.arange(5000)
    index = BitFlipIndex(64)
    index.add(codes, ids)
    before = get_threads()
    set_threads(1)
    try:
        probes = []
        for count in (8, 31, 60):
            before_search = index.searched.probes
            check_search(index, as_items(codes, ids), queries[:count], 10)
            probes.append(index.searched.probes - before_search)
    finally:
        set_threads(before)
    m = len(index._state.main.layout)
    assert probes[0] > 8 * m and probes[1] > 31 * m  # few queries flip to the end
    assert probes[2] == probes[0] + 52 * m  # of many queries the first eight do, the others probe one bucket a table


@pytest.mark.parametrize("threads", [1, 2])
def test_every_probe_is_counted(threads: int) -> None:
    index, codes = BitFlipIndex(64), make_codes(64, 3000, 1)
    index.add(codes, np.arange(3000))
    main = index._state.main
    widths, last_level = main.layout[:, 1].tolist(), Plan(*main.plan.tolist()).last_level
    m = len(widths)
    assert m < last_level and index.searched == (0, 0)
    expected = 0
    set_threads(threads)
    try:
        for radius in (0, m + 1):  # the first buckets of all tables are probed together
            index.within(codes[:40], radius)
            expected += 40 * sum(math.comb(widths[level % m], level // m) for level in range(max(m, radius + 1)))
            assert index.searched[1] == expected
        index.search(codes[:40], 1)  # each is found at level 0
        assert index.searched == (120, expected + 40 * m)
        index.search(codes[:40], 1, allowed=np.arange(3))  # three codes are scanned
        assert index.searched == (160, expected + 40 * m)
    finally:
        set_threads(2)
    index.add(make_codes(64, 3000, 2), np.arange(3000, 6000))
    assert index.searched == (160, expected + 40 * m)


@pytest.mark.parametrize("bits", [72, 128, 200, 256, 1024])
@pytest.mark.parametrize("noise", [0.03, 0.08])
@pytest.mark.parametrize("outliers", [0, 30])
def test_clustered_codes_are_found_in_clusters(bits: int, noise: float, outliers: int, tmp_path: Path) -> None:
    codes, queries = make_clusters(bits, 12_000, noise, outliers)
    codes[-500:] = codes[5000:5500]  # some items share a code
    ids = np.random.default_rng(1).permutation(len(codes))
    index, items = BitFlipIndex(bits), as_items(codes, ids)
    index.add(codes, ids)
    index.save(tmp_path / "index")
    main = index._state.main
    assert sorted(main.members.tolist()) == list(range(len(main.codes)))  # each is in one cluster
    assert 60 <= len(main.radii) <= 70 + outliers
    assignment = np.repeat(np.arange(len(main.radii)), np.diff(main.member_offsets))
    differences = segments.from_words(np.ascontiguousarray(main.pivots[:, assignment].T), 64 * len(main.pivots))
    differences ^= segments.from_words(main.codes[main.members], 64 * len(main.pivots))
    assert (np.bitwise_count(differences).sum(axis=1) <= main.radii[assignment]).all()
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


def test_clusters_that_do_not_help_are_not_used() -> None:
    codes, queries = make_clusters(128, 12_000, 0.05, 0)
    index, items = BitFlipIndex(128), as_items(codes, np.arange(12_000))
    index.add(codes, np.arange(12_000))
    main = index._state.main
    plan = np.array(Plan(3, 20, 20, 20, promising_distance=128, candidate_budget=150))
    index._state = index._state._replace(main=main._replace(plan=plan))
    probes = index.searched.probes
    check_search(index, items, queries, 10)  # a cluster holds more codes than the budget
    assert index.searched.probes > probes
    short = BitFlipIndex(64)
    short.add(codes[:, :8].copy(), np.arange(12_000))
    scattered = BitFlipIndex(128)
    scattered.add(make_clusters(128, 12_000, 0.05, 1000)[0], np.arange(12_000))
    assert len(main.radii) and not len(short._state.main.radii) and not len(scattered._state.main.radii)
