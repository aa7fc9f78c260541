from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import entropy
from sklearn.metrics import average_precision_score

from hashret.codes import Codes, hamming, pack, unpack
from hashret.evaluation import measures as evaluation
from hashret.evaluation.measures import (
    DistanceCounts,
    average_precision,
    count_labels,
    count_neighbours,
    health,
    mean_average_precision,
    nearest,
    precision,
    precision_at,
    precision_within,
    psnr,
    recall_at,
    recall_within,
    retrieval,
    squared_error,
)


def random_codes(n: int, *, byte: bool, seed: int = 0) -> NDArray[np.uint8]:
    """Return n codes of 16 bits; with `byte`, the last 8 are 0, which makes many ties."""
    codes = np.random.default_rng(seed).integers(0, 256, (n, 2), dtype=np.uint8)
    codes[:, 1] *= not byte
    return codes


def average_precision_of(order: NDArray[np.bool_]) -> float:
    """Return the average precision, by its definition, of relevances in ranked order."""
    ranks = np.flatnonzero(order) + 1
    return float(np.mean([(n + 1) / rank for n, rank in enumerate(ranks)])) if len(ranks) else 0.0


def orders_of(distances: NDArray[np.int64], relevant: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Relevance in every order of the ranking that the distances allow."""
    orders = (list(order) for order in permutations(range(len(distances))))
    return [relevant[order] for order in orders if (np.diff(distances[order]) >= 0).all()]


def test_precision_is_the_share_of_relevant_neighbours() -> None:
    assert precision([[True, False], [True, True]]) == 0.75


def test_average_precision_without_ties_equals_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    relevant = rng.random((50, 40)) < 0.3
    relevant[:, 0] |= ~relevant.any(1)
    expected = [average_precision_score(row, -np.arange(40)) for row in relevant]
    assert average_precision(np.ones((50, 40)), relevant) == pytest.approx(expected)


@pytest.mark.parametrize("first", [1, 7, 39, 40, 1000])
def test_average_precision_of_a_cutoff_without_ties_equals_a_plain_loop(first: int) -> None:
    relevant = np.random.default_rng(1).random((50, 40)) < 0.2
    relevant[:, -1] = True
    items = np.ones((50, 40))
    expected = [average_precision_score(row, -np.arange(len(row))) if row.any() else 0 for row in relevant[:, :first]]
    assert average_precision(items, relevant, first) == pytest.approx(expected)
    assert precision_at(items, relevant, first) == pytest.approx(relevant[:, :first].mean(1))
    assert recall_at(items, relevant, first) == pytest.approx(relevant[:, :first].sum(1) / relevant.sum(1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6), st.integers(1, 7))
def test_measures_of_ties_are_means_over_all_orders(ranked: list[tuple[int, bool]], k: int) -> None:
    distances = np.array([distance for distance, _ in ranked])
    relevant = np.array([right for _, right in ranked])
    counts = [np.bincount(distances, minlength=4)], [np.bincount(distances[relevant], minlength=4)]
    if not relevant.any():
        for first in (None, k):
            with pytest.raises(ValueError, match="1 queries have no relevant item"):
                average_precision(*counts, first)
        return
    orders = orders_of(distances, relevant)
    assert average_precision(*counts) == pytest.approx(np.mean([average_precision_of(order) for order in orders]))
    assert average_precision(*counts, k) == pytest.approx(
        np.mean([average_precision_of(order[:k]) for order in orders])
    )
    assert precision_at(*counts, k) == pytest.approx(np.mean([order[:k].mean() for order in orders]))
    assert recall_at(*counts, k) == pytest.approx(np.mean([order[:k].sum() for order in orders]) / relevant.sum())
    near = relevant[distances <= 1]
    assert precision_within(*counts, 1) == (near.mean() if len(near) else 0)
    assert recall_within(*counts, 1) == near.sum() / relevant.sum()


def test_a_cutoff_among_thousands_of_ties_gives_their_mean() -> None:
    rng = np.random.default_rng(2)
    relevant = np.repeat([True, False], [1500, 4500])
    drawn = [average_precision_of(rng.permutation(relevant)[:1000]) for _ in range(2000)]
    assert average_precision([[6000]], [[1500]], 1000) == pytest.approx(np.mean(drawn), abs=5e-4)


@pytest.mark.parametrize("bits", [8, 24, 64, 72, 256])
@pytest.mark.parametrize("own", [False, True])
def test_counts_equal_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, bits: int, own: bool) -> None:
    monkeypatch.setattr(evaluation, "QUERY_BLOCK", 7)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 256, (60, bits // 8), dtype=np.uint8)
    codes[:, 1:] &= 3
    labels = rng.choice(["a", "b", "c"], 60)
    rows = np.arange(3, 20)
    queries, query_labels, left_out = codes[rows], labels[rows], rows if own else None
    neighbours = rng.permuted(np.tile(np.arange(20, 60), (17, 1)), axis=1)[:, :5]
    by_label = list(count_labels(queries, query_labels, codes, labels, left_out))
    by_rows = list(count_neighbours(queries, neighbours, codes, left_out))
    assert [len(counts.items) for counts in by_label] == [7, 7, 3]
    distances = hamming(queries, codes).astype(np.int64)
    for i, row in enumerate(rows):
        items = np.delete(distances[i], row) if own else distances[i]
        same = np.delete(labels == labels[row], row) if own else labels == labels[row]
        by_query = [DistanceCounts(*(part[i % 7] for part in counts[i // 7])) for counts in (by_label, by_rows)]
        assert all((counts.items == np.bincount(items, minlength=bits + 1)).all() for counts in by_query)
        assert (by_query[0].relevant == np.bincount(items[same], minlength=bits + 1)).all()
        assert (by_query[1].relevant == np.bincount(distances[i, neighbours[i]], minlength=bits + 1)).all()


def test_measures_do_not_depend_on_the_order_of_the_database() -> None:
    codes, queries = random_codes(3000, byte=True), random_codes(20, byte=True, seed=1)
    labels, query_labels = np.sort(np.arange(3000) % 5), np.arange(20) % 5
    order = np.random.default_rng(0).permutation(3000)
    measured = [
        retrieval(count_labels(queries, query_labels, codes[rows], labels[rows]))
        for rows in (slice(None), order, order[::-1])
    ]
    assert measured[1] == pytest.approx(measured[0], rel=1e-12) and measured[2] == pytest.approx(measured[0], rel=1e-12)
    assert measured[0]["mAP@all"] == mean_average_precision(queries, query_labels, codes, labels)
    assert measured[0]["mAP@1000"] == mean_average_precision(queries, query_labels, codes, labels, 1000)
    near = hamming(queries, codes) <= 2
    right = (near & (labels == query_labels[:, None])).sum(1)
    assert measured[0]["precision within 2"] == pytest.approx((right / near.sum(1)).mean())
    assert measured[0]["recall within 2"] == pytest.approx((right / 600).mean())


@pytest.mark.parametrize("byte", [True, False])
def test_codes_are_ranked_by_distance_with_ties_in_random_order(byte: bool) -> None:
    rng = np.random.default_rng(1)
    codes, queries = random_codes(60, byte=byte), random_codes(8, byte=byte, seed=1)
    labels, query_labels = rng.integers(0, 3, 60), rng.integers(0, 3, 8)
    drawn = []
    for distances, label in zip(hamming(queries, codes), query_labels, strict=True):
        orders = (np.lexsort((rng.random(60), distances)) for _ in range(2000))
        drawn.append(np.mean([average_precision_of((labels == label)[order]) for order in orders]))
    assert mean_average_precision(queries, query_labels, codes, labels) == pytest.approx(np.mean(drawn), abs=0.003)
    names = np.array(["a", "b", "c"])
    assert mean_average_precision(queries, names[query_labels], codes, names[labels]) == mean_average_precision(
        queries, query_labels, codes, labels
    )
    same = mean_average_precision(np.zeros((3, 2), np.uint8), [0, 1, 2], np.zeros((60, 2), np.uint8), labels)
    assert 0.3 < same < 0.42  # equal codes are ranked by chance


def test_invalid_codes_and_labels_are_refused() -> None:
    codes = random_codes(5, byte=False)
    with pytest.raises(ValueError, match="no relevant item"):
        mean_average_precision(codes[:1], [7], codes, [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="16 bits"):
        mean_average_precision(codes[:1, :1].copy(), [0], codes, [0] * 5)
    with pytest.raises(ValueError, match="5 queries, but 5 and 1 labels"):
        mean_average_precision(codes, [0], codes, [0] * 5)


@pytest.mark.parametrize("own", [False, True])
def test_nearest_vectors_across_blocks_equal_brute_force(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    monkeypatch.setattr(evaluation, "CODE_BLOCK", 8)
    vectors = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
    vectors[20:] = vectors[:10]  # so that each has a double
    rows = np.arange(12)
    distances = np.square(vectors[rows, None] - vectors[None].astype(float)).sum((2, 3, 4))
    if own:
        distances[rows, rows] = np.inf
    for k in (1, 5, 29, 30):
        found = nearest(vectors[rows], vectors, k, rows if own else None)
        assert found.shape == (12, min(k, 30 - own))
        assert not own or not (found == rows[:, None]).any()
        assert all(len(set(row)) == len(row) for row in found)
        expected = np.sort(distances, 1)[:, : found.shape[1]]
        assert np.take_along_axis(distances, found, 1) == pytest.approx(expected)


def correlated(n: int) -> Codes:
    """Return n codes of 16 bits: one constant, one nearly constant, one the inverse of the next, and random ones."""
    bits = np.random.default_rng(0).random((n, 16)) < 0.3
    bits[:, 0] = True
    bits[:, 1] = np.arange(n) < n // 200
    bits[:, 2] = ~bits[:, 3]
    return pack(bits)


def test_health_equals_a_plain_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CODE_BLOCK", 300)
    codes = correlated(2000)
    report = health(codes)
    buckets = np.array(list(Counter(code.tobytes() for code in codes).values()))
    assert (report.codes, report.distinct_codes, report.largest_bucket) == (2000, len(buckets), buckets.max())
    assert report.entropy == pytest.approx(entropy(buckets, base=2))
    assert (report.constant_bits, report.dead_bits) == (1, 2)
    share = unpack(codes).mean(0)
    assert report.balance == pytest.approx(np.minimum(share, 1 - share).mean())
    correlations = np.asarray(np.corrcoef(unpack(codes)[:, 1:].T))[np.triu_indices(15, 1)]
    assert report.correlation == pytest.approx(np.abs(correlations).mean())
    assert report.largest_correlation == pytest.approx(1)


def test_the_health_of_constant_or_no_codes_is_zero() -> None:
    assert set(health(np.zeros((0, 2), np.uint8))) == {0}
    report = health(np.zeros((5, 2), np.uint8))
    assert report == (5, 1, 5, 0, 16, 16, 0, 0, 0)


def test_errors_of_images_are_means_over_images() -> None:
    images = np.random.default_rng(0).random((2, 3, 4, 4))
    noisy = images.copy()
    noisy[0] += 0.1
    noisy[1] -= 0.01
    assert squared_error(images, noisy) == pytest.approx((0.48 + 0.0048) / 2)
    assert psnr(images, noisy) == pytest.approx((20 + 40) / 2)
    assert squared_error(images, images) == 0 and psnr(images, images) == np.inf
    with pytest.raises(ValueError, match="shape"):
        psnr(images, noisy[:1])  # which NumPy would stretch
