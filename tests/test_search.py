import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hashret.codes import hamming, pack
from hashret.collection.search import candidate_count, rerank
from hashret.collection.snapshot import Neighbours


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 24, 64]), st.sampled_from([None, 1, 3, 50]), st.booleans())
def test_rerank_orders_by_weighted_distance(seed: int, bits: int, k: int | None, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(1000, 40, replace=False)).astype(np.int64)
    stored = rng.random((40, bits)) < rng.choice([0.1, 0.5])  # few ones: many codes are equal
    margins = rng.normal(size=(5, bits)).astype(np.float32)
    if tied:
        margins = np.round(margins)  # equal costs at different distances
    queries = pack(margins > 0)
    distances = hamming(queries, pack(stored))
    near = []
    for i in range(5):
        rows = rng.permutation(40)[: rng.integers(0, 41)]
        near.append(Neighbours(distances[i, rows].astype(np.int32), ids[rows]))
    found, scores = rerank(near, queries, margins, ids, pack(stored), k)
    for i, (row_distances, row_ids) in enumerate(near):
        weights = [abs(float(margin)) for margin in margins[i]]
        brute = []
        for d, item in zip(row_distances.tolist(), row_ids.tolist(), strict=True):
            code = stored[ids.tolist().index(item)]
            cost = sum(w for w, bit, m in zip(weights, code, margins[i], strict=True) if bit != (m > 0))
            brute.append((round(cost, 9), d, item))
        brute = sorted(brute)[:k]
        assert [round(score, 9) for score in scores[i]] == [cost for cost, _, _ in brute]
        assert found[i][0].tolist() == [d for _, d, _ in brute] and found[i][1].tolist() == [
            item for _, _, item in brute
        ]


def test_scores_do_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(0)
    ids, codes = np.arange(1000), rng.integers(0, 256, (1000, 8), np.uint8)
    margins = rng.normal(size=(50, 64)).astype(np.float32)
    queries = pack(margins > 0)
    near = [Neighbours(row.astype(np.int32), ids) for row in hamming(queries, codes)]
    _, together = rerank(near, queries, margins, ids, codes, 100)
    for i in range(50):
        subset = np.sort(rng.permutation(1000)[:7])
        (distances, _), few = near[i], ids[subset]
        _, (alone,) = rerank(
            [Neighbours(distances[subset], few)], queries[i : i + 1], margins[i : i + 1], few, codes[subset], 7
        )
        full = rerank([near[i]], queries[i : i + 1], margins[i : i + 1], ids, codes, None)[1][0]
        assert full[:100] == together[i] and set(alone) <= set(full)


def test_rerank_takes_more_candidates_than_k() -> None:
    assert [candidate_count(k) for k in (1, 10, 11, 1000, None)] == [100, 100, 110, 10_000, None]
