"""Brute force as the judge of indexes, and the codes, with many ties and duplicates, that it judges them by."""

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


def judge(items: Items, queries: Array, allowed: Array | None = None) -> tuple[Array, Array]:
    """Every qualifying item for each query: distances and ids, (q, n), ordered by (distance, id)."""
    ids = np.array(sorted(set(items) & set(items if allowed is None else allowed.tolist())), np.int64)
    codes = np.frombuffer(b"".join(items[i] for i in ids.tolist()), np.uint8).reshape(len(ids), queries.shape[1])
    distances = hamming(queries, codes)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, axis=1), ids[order]


def check_search(index: CodeIndex, items: Items, queries: Array, k: int, allowed: Array | None = None) -> None:
    hits = index.search(queries, k, allowed=allowed)
    queries = np.ascontiguousarray(queries)
    distances, ids = judge(items, queries, allowed)
    assert hits.distances.dtype == np.int32 and hits.ids.dtype == np.int64
    assert hits.ids.shape == hits.distances.shape == (len(queries), min(k, ids.shape[1]))
    assert_honest(hits.distances, hits.ids, items, queries, allowed)
    if index.exact:
        assert (hits.distances == distances[:, :k]).all()
    if isinstance(index, BitFlipIndex):
        assert (hits.ids == ids[:, :k]).all()


def check_within(index: CodeIndex, items: Items, queries: Array, radius: int, allowed: Array | None = None) -> None:
    hits = index.within(queries, radius, allowed=allowed)
    queries = np.ascontiguousarray(queries)
    distances, ids = judge(items, queries, allowed)
    assert hits.limits.dtype == np.int64 and hits.limits[0] == 0 and len(hits.limits) == len(queries) + 1
    assert hits.distances.dtype == np.int32 and hits.ids.dtype == np.int64
    assert len(hits.distances) == len(hits.ids) == hits.limits[-1]
    for q, (low, high) in enumerate(zip(hits.limits[:-1], hits.limits[1:], strict=True)):
        assert_honest(hits.distances[None, low:high], hits.ids[None, low:high], items, queries[q : q + 1], allowed)
        assert (hits.distances[low:high] <= radius).all()
        if index.exact:  # all of them: a radius leaves no choice among ties
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


class Life(RuleBasedStateMachine):
    """Any sequence of writes leaves an index that answers as brute force does."""

    spec: str
    folder: Path

    @initialize(bits=st.sampled_from([8, 16, 64, 72, 136]), seed=st.integers(0, 10**6), count=st.integers(0, 2000))
    def start(self, bits: int, seed: int, count: int) -> None:
        self.bits = bits
        self.index = from_spec(bits, self.spec)
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
        self.index = index_class(self.spec).load(self.folder / "index", verify=verify)
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
            check_get(self.index, self.items)


def assert_same(a: tuple[Array, ...], b: tuple[Array, ...]) -> None:
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x, y)


def gathered(bits: int, count: int, noise: float, lost: int, seed: int = 0) -> tuple[Array, Array]:
    """Codes around centres, some hundred around each, but `lost` of them anywhere; and queries of both kinds."""
    rng = np.random.default_rng(seed)
    centres = rng.random((count // 200, bits)) < 0.5
    around = centres[rng.integers(0, len(centres), count + 30)] ^ (rng.random((count + 30, bits)) < noise)
    around[:lost], around[-5:] = rng.random((lost, bits)) < 0.5, rng.random((5, bits)) < 0.5
    return np.packbits(around[:-30], axis=1), np.packbits(around[-30:], axis=1)
