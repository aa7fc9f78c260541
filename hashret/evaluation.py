"""Measures of retrieval and of images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes


def precision(relevant: Any) -> float:
    """Precision of k neighbours: the mean share of relevant ones, from a Boolean array-like (queries, k)."""
    return float(np.asarray(relevant, np.bool_).mean())


def average_precision(items: Any, relevant: Any) -> NDArray[np.float64]:
    """Average precision of rankings with ties, (queries,), from how many items there are at each distance, and how many
    of them are relevant, both (queries, distances) from the nearest on.

    It is the mean over all orders of tied items, in closed form: McSherry and Najork, "Computing Information Retrieval
    Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008. Raises ValueError for a query without
    relevant items.
    """
    items, relevant = np.asarray(items, np.float64), np.asarray(relevant, np.float64)
    total = relevant.sum(1)
    if not total.all():
        raise ValueError(f"{int((total == 0).sum())} queries have no relevant item: their precision is of nothing")
    reached = items.cumsum(1)
    before, found = reached - items, relevant.cumsum(1) - relevant
    # Place i of n tied items has a relevant one with probability r/n, and then (i − 1)(r − 1)/(n − 1) of the i − 1 in
    # front of it are relevant too, so that its precision is (found + 1 + (i − 1)(r − 1)/(n − 1)) / (before + i). The
    # sums over i of 1/(before + i) and (i − 1)/(before + i) are `inverse` and n − (before + 1) · `inverse`.
    harmonic = np.append(0, 1 / np.arange(1, reached.max() + 1)).cumsum()
    inverse = harmonic[reached.astype(np.int64)] - harmonic[before.astype(np.int64)]
    others = (relevant - 1) / np.maximum(items - 1, 1)
    precisions = (found + 1) * inverse + others * (items - (before + 1) * inverse)
    return np.asarray((relevant / np.maximum(items, 1) * precisions).sum(1) / total)


def mean_average_precision(queries: Codes, wanted: Any, codes: Codes, labels: Any) -> float:
    """Mean average precision of all of `codes` (n) ranked by their Hamming distance from each of `queries` (m).

    A code is relevant whose label, of `labels` (n,), is the query's of `wanted` (m,); ties are averaged (see
    `average_precision`). Raises ValueError for codes of another width or a query whose label no code has.
    """
    bits = check_codes(codes).shape[1] * 8
    check_codes(queries, bits)
    labels = np.asarray(labels)
    items, relevant = np.zeros((2, len(queries), bits + 1), np.int64)
    for i, (query, label) in enumerate(zip(queries, np.asarray(wanted), strict=True)):
        distances = np.bitwise_count(query ^ codes).sum(1, dtype=np.int64)
        items[i] = np.bincount(distances, minlength=bits + 1)
        relevant[i] = np.bincount(distances[labels == label], minlength=bits + 1)
    return float(average_precision(items, relevant).mean())


def squared_error(images: Any, restored: Any) -> float:
    """The squared error summed over an image's values in [0, 1], the mean over images (n, …)."""
    return float(_squares(images, restored).sum(1).mean())


def psnr(images: Any, restored: Any) -> float:
    """Peak signal-to-noise ratio in decibels, the mean over images (n, …) in [0, 1]; infinite where one is exact."""
    with np.errstate(divide="ignore"):
        return float(np.mean(-10 * np.log10(_squares(images, restored).mean(1))))


def _squares(images: Any, restored: Any) -> NDArray[np.float64]:
    images, restored = np.asarray(images, np.float64), np.asarray(restored, np.float64)
    if images.shape != restored.shape:
        raise ValueError(f"images of shape {images.shape} were restored to {restored.shape}")
    return np.asarray(np.square(images - restored).reshape(len(images), -1))
