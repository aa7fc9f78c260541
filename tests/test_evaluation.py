from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from hashret.codes import hamming
from hashret.evaluation import average_precision, mean_average_precision, precision, psnr, squared_error


def some_codes(n: int, *, byte: bool, seed: int = 0) -> NDArray[np.uint8]:
    """Codes of two bytes, of which the second is 0 for many ties."""
    codes = np.random.default_rng(seed).integers(0, 256, (n, 2), dtype=np.uint8)
    codes[:, 1] *= not byte
    return codes


def by_places(order: NDArray[np.bool_]) -> float:
    """Average precision as it is defined, of relevance in the order of the ranking."""
    places = np.flatnonzero(order) + 1
    return float(np.mean([(n + 1) / place for n, place in enumerate(places)]))


def test_precision_is_the_share_of_relevant_neighbours() -> None:
    assert precision([[True, False], [True, True]]) == 0.75


def test_without_ties_it_is_the_average_precision_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    relevant = rng.random((50, 40)) < 0.3
    relevant[:, 0] |= ~relevant.any(1)
    expected = [average_precision_score(row, -np.arange(40)) for row in relevant]
    assert average_precision(np.ones((50, 40)), relevant) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7))
def test_ties_are_the_mean_over_all_their_orders(ranked: list[tuple[int, bool]]) -> None:
    distances = np.array([distance for distance, _ in ranked])
    relevant = np.array([right for _, right in ranked])
    items, hits = np.bincount(distances, minlength=4), np.bincount(distances[relevant], minlength=4)
    if not relevant.any():
        with pytest.raises(ValueError, match="1 queries have no relevant item"):
            average_precision([items], [hits])
        return
    orders = [list(order) for order in permutations(range(len(ranked)))]
    expected = np.mean([by_places(relevant[o]) for o in orders if (np.diff(distances[o]) >= 0).all()])
    assert average_precision([items], [hits]) == pytest.approx(expected)


@pytest.mark.parametrize("byte", [True, False])
def test_codes_are_ranked_by_distance_with_ties_in_random_order(byte: bool) -> None:
    rng = np.random.default_rng(1)
    codes, queries = some_codes(60, byte=byte), some_codes(8, byte=byte, seed=1)
    labels, wanted = rng.integers(0, 3, 60), rng.integers(0, 3, 8)
    drawn = []
    for distances, label in zip(hamming(queries, codes), wanted, strict=True):
        orders = (np.lexsort((rng.random(60), distances)) for _ in range(2000))
        drawn.append(np.mean([by_places((labels == label)[order]) for order in orders]))
    assert mean_average_precision(queries, wanted, codes, labels) == pytest.approx(np.mean(drawn), abs=0.003)
    names = np.array(["a", "b", "c"])
    assert mean_average_precision(queries, names[wanted], codes, names[labels]) == mean_average_precision(
        queries, wanted, codes, labels
    )
    same = mean_average_precision(np.zeros((3, 2), np.uint8), [0, 1, 2], np.zeros((60, 2), np.uint8), labels)
    assert 0.3 < same < 0.42  # codes that say nothing are no better than chance


def test_what_cannot_be_ranked_is_refused() -> None:
    codes = some_codes(5, byte=False)
    with pytest.raises(ValueError, match="no relevant item"):
        mean_average_precision(codes[:1], [7], codes, [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="16 bits"):
        mean_average_precision(codes[:1, :1].copy(), [0], codes, [0] * 5)
    with pytest.raises(ValueError):
        mean_average_precision(codes, [0], codes, [0] * 5)


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
