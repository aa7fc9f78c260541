"""Checks of indexes against brute force, and codes with many ties and duplicates to check them with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hashret.codes import hamming
from hashret.indexes import BitFlipIndex, CodeIndex, from_spec, index_class

Array = np.ndarray[Any, Any]
Items = dict[int, bytes]


def exact_search(items: Items, queries: Array, allowed: Array | None = None) -> tuple[Array, Array]:
    """Return all qualifying items for each query: distances and ids, (q, n), ordered by (distance, id)."""
    ids = np.array(sorted(set(items) & set(items if allowed is None else allowed.tolist())), np.int64)
    codes = np.frombuffer(b"".join(items[i] for i in ids.tolist()), np.uint8).reshape(len(ids), queries.shape[1])
    distances = hamming(queries, codes)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, axis=1), ids[order]


def check_search(index: CodeIndex, items: Items, queries: Array, k: int, allowed: Array | None = None) -> None:
    hits = index.search(queries, k, allowed=allowed)
    queries = np.ascontiguousarray(queries)
    distances, ids = exact_search(items, queries, allowed)
    assert hits.distances.dtype == np.int32 and hits.ids.dtype == np.int64
    assert hits.ids.shape == hits.distances.shape == (len(queries), min(k, ids.shape[1]))
    assert_valid(hits.distances, hits.ids, items, queries, allowed)
    if index.exact:
        assert (hits.distances == distances[:, :k]).all()
    if isinstance(index, BitFlipIndex):
        assert (hits.ids == ids[:, :k]).all()


def check_within(index: CodeIndex, items: Items, queries: Array, radius: int, allowed: Array | None = None) -> None:
    hits = index.within(queries, radius, allowed=allowed)
    queries = np.ascontiguousarray(queries)
    distances, ids = exact_search(items, queries, allowed)
    assert hits.limits.dtype == np.int64 and hits.limits[0] == 0 and len(hits.limits) == len(queries) + 1
    assert hits.distances.dtype == np.int32 and hits.ids.dtype == np.int64
    assert len(hits.distances) == len(hits.ids) == hits.limits[-1]
    for q, (low, high) in enumerate(zip(hits.limits[:-1], hits.limits[1:], strict=True)):
        assert_valid(hits.distances[None, low:high], hits.ids[None, low:high], items, queries[q : q + 1], allowed)
        assert (hits.distances[low:high] <= radius).all()
        if index.exact:  # a radius leaves no choice among ties
            count = (distances[q] <= radius).sum()
            assert hits.ids[low:high].tolist() == ids[q, :count].tolist()


def check_get(index: CodeIndex, items: Items) -> None:
    ids = np.random.default_rng(len(items)).permutation([*items, *list(items)[:3]]).astype(np.int64)
    codes = index.get(ids)
    assert codes.dtype == np.uint8 and codes.shape == (len(ids), index.bits // 8)
    assert as_items(codes, ids) == items
    assert all(i in index for i in ids[:20].tolist())
    for absent in {-1, 0, 1, 7, 2999, 1 << 62} - set(items):
        assert absent not in index
        with pytest.raises(KeyError, match=rf"(?<!\d){absent}\b"):
            index.get(np.array([*list(items)[:2], absent, *list(items)[:2]], np.int64))


def assert_valid(distances: Array, ids: Array, items: Items, queries: Array, allowed: Array | None) -> None:
    """Check what holds for every index, exact or not: true distances; qualifying ids, each once and in order."""
    for row, (query, hits) in enumerate(zip(queries, ids.tolist(), strict=True)):
        assert len(set(hits)) == len(hits) and set(hits) <= set(items)
        assert allowed is None or set(hits) <= set(allowed.tolist())
        codes = np.frombuffer(b"".join(items[i] for i in hits), np.uint8).reshape(len(hits), len(query))
        assert (distances[row] == hamming(query[None], codes)[0]).all()
        assert sorted(zip(distances[row].tolist(), hits, strict=True)) == list(
            zip(distances[row].tolist(), hits, strict=True)
        )


def make_codes(bits: int, count: int, seed: int, n_centres: int = 6, noise: float = 0.05) -> Array:
    """Return codes around a few centres, with ties and duplicates; the centres depend on `bits` alone."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(bits).random((n_centres, bits)) < 0.5
    bits_ = centres[rng.integers(0, n_centres, count)] ^ (rng.random((count, bits)) < noise * rng.random((count, 1)))
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


class IndexMachine(RuleBasedStateMachine):
    """After any sequence of writes, an index answers as brute force does."""

    spec: str
    folder: Path

    @initialize(bits=st.sampled_from([8, 16, 64, 72, 136]), seed=st.integers(0, 10**6), count=st.integers(0, 2000))
    def start(self, bits: int, seed: int, count: int) -> None:
        self.bits = bits
        self.index = from_spec(bits, self.spec)
        self.items: Items = {}
        self.add(seed, count)

    def random_ids(self, seed: int, count: int) -> Array:
        return np.unique(np.random.default_rng(seed).integers(0, 3000, count))

    @rule(seed=st.integers(0, 10**6), count=st.sampled_from([0, 1, 3, 60, 1500]))
    def add(self, seed: int, count: int) -> None:
        ids = np.random.default_rng(seed).permutation([i for i in self.random_ids(seed, count) if i not in self.items])
        ids = ids.astype(np.int64)
        codes = make_codes(self.bits, len(ids), seed)
        self.index.add(codes, ids)
        self.items |= as_items(codes, ids)

    @rule(seed=st.integers(0, 10**6), count=st.sampled_from([1, 5]))
    def add_existing(self, seed: int, count: int) -> None:
        ids = np.setdiff1d(self.random_ids(seed, count), list(self.items)).astype(np.int64)
        clash = np.array(list(self.items)[seed % max(1, len(self.items)) :][:1] or [*ids[:1].tolist()], np.int64)
        ids = np.concatenate([ids, clash])
        if len(clash):
            with pytest.raises(ValueError, match=str(clash[0])):
                self.index.add(make_codes(self.bits, len(ids), seed), ids)

    @rule(seed=st.integers(0, 10**6), count=st.sampled_from([0, 1, 40, 900]))
    def remove(self, seed: int, count: int) -> None:
        ids = np.random.default_rng(seed).integers(-10, 3000, count)
        existing = set(ids.tolist()) & set(self.items)
        assert self.index.remove(ids) == len(existing)
        for i in existing:
            del self.items[i]

    @rule()
    def remove_all(self) -> None:
        assert self.index.remove(np.array([*self.items, *self.items], np.int64)) == len(self.items)
        self.items = {}

    @rule(verify=st.booleans())
    def save_and_load(self, verify: bool) -> None:
        self.index.save(self.folder / "index")
        self.index = index_class(self.spec).load(self.folder / "index", verify=verify)
        assert [path.name for path in self.folder.iterdir()] == ["index"]

    @rule(seed=st.integers(0, 10**6), k=st.sampled_from([1, 7, 100]), radius=st.sampled_from([0, 2, 9, 70]))
    def query(self, seed: int, k: int, radius: int) -> None:
        queries = make_codes(self.bits, 3, seed)
        allowed = None if seed % 3 == 0 else self.random_ids(seed, 300 * (seed % 3) ** 3)
        check_search(self.index, self.items, queries, k, allowed)
        check_within(self.index, self.items, queries, radius, allowed)

    @invariant()
    def equals_brute_force(self) -> None:
        if hasattr(self, "items"):
            assert len(self.index) == len(self.items)
            check_search(self.index, self.items, make_codes(self.bits, 2, len(self.items)), 5)
            check_get(self.index, self.items)


def assert_same(a: tuple[Array, ...], b: tuple[Array, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y)


def make_clusters(bits: int, count: int, noise: float, outliers: int, seed: int = 0) -> tuple[Array, Array]:
    """Return codes in clusters of some two hundred, with `outliers` random ones among them, and 30 such queries."""
    rng = np.random.default_rng(seed)
    centres = rng.random((count // 200, bits)) < 0.5
    around = centres[rng.integers(0, len(centres), count + 30)] ^ (rng.random((count + 30, bits)) < noise)
    around[:outliers], around[-5:] = rng.random((outliers, bits)) < 0.5, rng.random((5, bits)) < 0.5
    return np.packbits(around[:-30], axis=1), np.packbits(around[-30:], axis=1)
