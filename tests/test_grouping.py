import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.collection import grouping
from hashret.collection.grouping import cluster_members, single_linkage, star_clustering

Pairs = NDArray[np.int64]
SOAK = "HASHRET_SOAK" in os.environ


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Draw codes near a few centres, many of them equal, with labelled pairs and ranks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, width, centres = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 8, 9])), draw(st.integers(1, 8))
    flips = np.packbits(rng.random((n, 8 * width)) < draw(st.sampled_from([0.0, 0.01, 0.1])), axis=1)
    codes = rng.integers(0, 256, (centres, width), np.uint8)[rng.integers(0, centres, n)] ^ flips
    pairs = np.array([pair for pair in rng.integers(0, n, (8, 2)).tolist() if pair[0] != pair[1]], np.int64)
    pairs = np.unique(np.sort(pairs.reshape(-1, 2), axis=1), axis=0)
    verdicts = rng.integers(0, draw(st.integers(2, 3)), len(pairs))
    return {
        "codes": codes,
        "radius": draw(st.integers(0, 12)),
        "same": pairs[verdicts == 0],
        "different": pairs[verdicts == 1],
        "rank": rng.permutation(n),
    }


def linked(codes: Codes, radius: int, same: Pairs, different: Pairs) -> NDArray[np.bool_]:
    """Return the adjacency matrix (n, n) of the neighbour graph by brute force."""
    near = hamming(codes, codes) <= radius
    for pairs, value in ((different, False), (same, True)):
        near[tuple(pairs.T)] = near[tuple(pairs[:, ::-1].T)] = value
    return np.asarray(near)


def partition(numbers: NDArray[Any]) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in np.unique(numbers)}


def chains(near: NDArray[np.bool_]) -> set[frozenset[int]]:
    left, found = set(range(len(near))), set()
    while left:
        reached, before = {min(left)}, set[int]()
        while reached != before:
            before, reached = reached, reached | set(np.flatnonzero(near[sorted(reached)].any(axis=0)).tolist())
        found.add(frozenset(reached))
        left -= reached
    return found


def best_copies(near: NDArray[np.bool_], rank: NDArray[np.int64]) -> set[frozenset[int]]:
    left, found = set(range(len(near))), set()
    for best in np.argsort(rank).tolist():
        if best in left:
            members = {i for i in left if near[best, i]}
            found.add(frozenset(members))
            left -= members
    return found


@pytest.fixture(params=[(64, 1 << 14, 1 << 23), (1, 3, 0)], ids=["large", "small"], autouse=True, scope="module")
def batches(request: pytest.FixtureRequest) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("MIN_BATCH", "MAX_BATCH", "MAX_PAIRS"), request.param, strict=True):
            patch.setattr(grouping, name, value)
        yield


@given(cases())
@settings(deadline=None, max_examples=100 if SOAK else 30)
def test_single_linkage_equals_brute_force(case: dict[str, Any]) -> None:
    verdicts = {verdict: case[verdict] for verdict in ("same", "different")}
    found = single_linkage(case["codes"], case["radius"], **verdicts)
    assert partition(found) == chains(linked(case["codes"], case["radius"], **verdicts))


@given(cases())
@settings(deadline=None, max_examples=100 if SOAK else 30)
def test_star_clustering_equals_brute_force(case: dict[str, Any]) -> None:
    verdicts = {verdict: case[verdict] for verdict in ("same", "different")}
    found = star_clustering(case["codes"], case["radius"], case["rank"], **verdicts)
    assert partition(found) == best_copies(linked(case["codes"], case["radius"], **verdicts), case["rank"])


@given(cases())
@settings(deadline=None, max_examples=100 if SOAK else 30)
def test_cluster_members_are_ordered_by_rank(case: dict[str, Any]) -> None:
    numbers = star_clustering(case["codes"], case["radius"], case["rank"])
    found = cluster_members(numbers, case["rank"])
    assert {frozenset(rows.tolist()) for rows in found} == {rows for rows in partition(numbers) if len(rows) > 1}
    for rows in found:
        assert case["rank"][rows].tolist() == sorted(case["rank"][rows])
        assert (hamming(case["codes"][rows[:1]], case["codes"][rows]) <= case["radius"]).all()


def test_a_hundred_thousand_equal_codes_are_one_cluster() -> None:
    codes = np.zeros((100_000, 8), np.uint8)
    codes[-1] = 255
    pair = np.array([[0, 99_999]])
    rank = np.arange(len(codes))
    for alone, joined in (
        (single_linkage(codes, 3), single_linkage(codes, 3, same=pair)),
        (star_clustering(codes, 3, rank), star_clustering(codes, 3, rank, same=pair)),
    ):
        assert sorted(np.unique(alone, return_counts=True)[1].tolist()) == [1, 99_999]
        assert np.unique(joined).size == 1


def test_a_label_belongs_to_two_items_and_not_to_their_codes() -> None:
    codes = np.zeros((4, 2), np.uint8)
    different = np.array([[0, 1]])
    assert partition(single_linkage(codes, 0, different=different)) == {frozenset(range(4))}  # through 2 and 3
    assert partition(single_linkage(codes[:2], 0, different=different)) == {frozenset([0]), frozenset([1])}
    assert partition(star_clustering(codes, 0, np.arange(4), different=different)) == {
        frozenset([0, 2, 3]),
        frozenset([1]),
    }


def test_no_codes_have_no_clusters() -> None:
    none = np.empty((0, 4), np.uint8)
    assert (
        cluster_members(single_linkage(none, 3), np.arange(0))
        == cluster_members(star_clustering(none, 3, np.arange(0)), np.arange(0))
        == []
    )


@pytest.mark.parametrize("radius", [-1, 1.5])
def test_invalid_distances_raise_errors(radius: Any) -> None:
    with pytest.raises(ValueError, match="max_distance must be an integer of at least 0"):
        single_linkage(np.zeros((2, 4), np.uint8), radius)
