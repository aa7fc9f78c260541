"""Measures of retrieval, of codes and of images.

Retrieval is measured on `Counts`: how many items, and how many relevant ones, there are at each Hamming distance from
each query. Items at one distance have no order, so every measure is the mean over all the orders that they could have,
in closed form: it does not depend on how the database is sorted.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes, unpack

TOGETHER = 1024  # queries whose counts are in memory at once
BLOCK = 8192  # codes or vectors that are unpacked at once
RARE = 0.01  # a bit is dead when a smaller share of the codes has one of its two values

RowIndices = NDArray[np.int64]
Measures = dict[str, float]


class DistanceCounts(NamedTuple):
    """How many items are at each distance from each query, and how many of them are relevant: (queries, bits + 1)."""

    items: NDArray[np.int64]
    relevant: NDArray[np.int64]


class Health(NamedTuple):
    """What can be wrong with codes, whatever they mean."""

    codes: int
    distinct_codes: int
    largest_bucket: int  # codes that are one and the same
    entropy: float  # of a code drawn from these, in bits; at most log2 of how many there are
    constant_bits: int  # the same in every code
    dead_bits: int  # the same in more than 99 % of the codes, or in every one
    balance: float  # the share of a bit's rarer value, the mean over bits; ½ at best
    correlation: float  # between two bits that are not constant, its size, the mean over pairs; 0 at best
    largest_correlation: float  # the greatest of them; 1 if one bit says what another does


def count_labels(
    queries: Codes, wanted: Any, codes: Codes, labels: Any, left_out: RowIndices | None = None
) -> Iterator[DistanceCounts]:
    """Counts of `codes` (n) around each of `queries` (m), for `TOGETHER` queries at a time.

    A code is relevant whose label, of `labels` (n,), is the query's of `wanted` (m,). With `left_out` (m,) the code of
    that row is no item to the query: usually its own. Raises ValueError for codes of another width, or too few labels.
    """
    labels, wanted = np.asarray(labels), np.asarray(wanted)
    if (len(labels), len(wanted)) != (len(codes), len(queries)):
        raise ValueError(f"{len(codes)} codes, {len(queries)} queries, but {len(labels)} and {len(wanted)} labels")
    order = labels.argsort(kind="stable")  # then the relevant ones are a range
    first, last = (labels[order].searchsorted(wanted, side) for side in ("left", "right"))
    if left_out is not None:
        left_out = order.argsort()[left_out]
    return _count(queries, codes[order], lambda q: slice(first[q], last[q]), left_out)


def count_neighbours(
    queries: Codes, neighbours: RowIndices, codes: Codes, left_out: RowIndices | None = None
) -> Iterator[DistanceCounts]:
    """Counts as of `count_labels`, where the codes of the rows `neighbours` (m, k) are relevant to each query."""
    return _count(queries, codes, lambda q: neighbours[q], left_out)


def _count(
    queries: Codes, codes: Codes, relevant: Callable[[int], Any], left_out: RowIndices | None
) -> Iterator[DistanceCounts]:
    bits = check_codes(codes).shape[1] * 8
    check_codes(queries, bits)
    words, asked = np.ascontiguousarray(_words(codes).T), _words(queries)
    for start in range(0, len(queries), TOGETHER):
        numbers = range(start, min(start + TOGETHER, len(queries)))
        items, found = np.zeros((2, len(numbers), bits + 2), np.int64)
        for row, q in enumerate(numbers):
            distances = np.bitwise_count(words ^ asked[q][:, None]).sum(0, dtype=np.uint16)
            if left_out is not None:
                distances[left_out[q]] = bits + 1  # farther than any
            items[row] = np.bincount(distances, minlength=bits + 2)
            found[row] = np.bincount(distances[relevant(q)], minlength=bits + 2)
        yield DistanceCounts(items[:, :-1], found[:, :-1])


def _words(codes: Codes) -> NDArray[np.uint64]:
    """Codes as numbers of 64 bits, (n, words), filled up with zeros."""
    padded = np.zeros((len(codes), -(-codes.shape[1] // 8) * 8), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view(np.uint64)


def retrieval(counts: Iterator[DistanceCounts]) -> Measures:
    """Means over queries, from counts by labels: mAP@all, mAP@1000, precision@10 and @1000, and within 2 bits."""
    parts = [
        {
            "mAP@all": average_precision(*counted),
            "mAP@1000": average_precision(*counted, 1000),
            "precision@10": precision_at(*counted, 10),
            "precision@1000": precision_at(*counted, 1000),
            "precision within 2": precision_within(*counted, 2),
            "recall within 2": recall_within(*counted, 2),
        }
        for counted in counts
    ]
    return {name: float(np.concatenate([part[name] for part in parts]).mean()) for name in parts[0]}


def average_precision(items: Any, relevant: Any, first: int | None = None) -> NDArray[np.float64]:
    """Average precision of rankings with ties, (queries,), from how many items there are at each distance, and how many
    of them are relevant, both (queries, distances) from the nearest on.

    It is the mean of the precisions at the places of the relevant items; with `first`, of those among so many first
    items alone (mAP@R divides by the relevant items *in the list*, and is 0 if there are none). Of tied items it is the
    mean over all their orders, in closed form: McSherry and Najork, "Computing Information Retrieval Performance
    Measures Efficiently in the Presence of Tied Scores", ECIR 2008, which ours extends to lists that end among ties.
    Raises ValueError for a query without relevant items.
    """
    items, relevant = np.asarray(items, np.float64), np.asarray(relevant, np.float64)
    lacking = int((relevant.sum(1) == 0).sum())
    if lacking:
        raise ValueError(f"{lacking} queries have no relevant item: their precision is of nothing")
    reached = items.cumsum(1)
    before, found = reached - items, relevant.cumsum(1) - relevant
    most = int(reached.max())
    harmonic = np.append(0, 1 / np.arange(1, most + 1)).cumsum()
    whole = reached <= (most if first is None else first)
    sums = np.where(whole, _precisions(harmonic, before, items, found, relevant), 0).sum(1)
    precisions = sums / np.maximum(np.where(whole, relevant, 0).sum(1), 1)
    log_factorial = np.append(0, np.log(np.arange(1, most + 1))).cumsum()

    def log_choices(n: Any, k: Any) -> Any:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    for q in np.flatnonzero(~whole.all(1)):
        # The list ends among the n items of a distance, of which it takes m: how many of the r relevant ones is a
        # hypergeometric chance, and wherever h of them are, they are in any order.
        end = whole[q].argmin()
        n, r, ahead = (int(part[q, end]) for part in (items, relevant, before))
        m = (first or 0) - ahead
        h = np.arange(max(0, m - (n - r)), min(m, r) + 1)
        chance = np.exp(log_choices(r, h) + log_choices(n - r, m - h) - log_choices(n, m))
        total = sums[q] + _precisions(harmonic, np.float64(ahead), np.float64(m), found[q, end], h)
        precisions[q] = np.average(total / np.maximum(found[q, end] + h, 1), weights=chance)
    return np.asarray(precisions)


def _precisions(harmonic: NDArray[np.float64], before: Any, items: Any, found: Any, relevant: Any) -> Any:
    """The mean sum of the precisions at the relevant ones of tied items, after `before` items with `found` relevant.

    Place i of n tied items has a relevant one with probability r/n, and then (i − 1)(r − 1)/(n − 1) of the i − 1 in
    front of it are relevant too, so that its precision is (found + 1 + (i − 1)(r − 1)/(n − 1)) / (before + i). The sums
    over i of 1/(before + i) and (i − 1)/(before + i) are `inverse` and n − (before + 1) · `inverse`.
    """
    inverse = harmonic[(before + items).astype(np.int64)] - harmonic[before.astype(np.int64)]
    others = (relevant - 1) / np.maximum(items - 1, 1)
    precisions = (found + 1) * inverse + others * (items - (before + 1) * inverse)
    return relevant / np.maximum(items, 1) * precisions


def mean_average_precision(queries: Codes, wanted: Any, codes: Codes, labels: Any, first: int | None = None) -> float:
    """Mean average precision of `codes` (n) ranked by their Hamming distance from each of `queries` (m), of all of
    them or of the `first` ones (see `average_precision`); relevant are those with its label (see `count_labels`).

    Raises ValueError for codes of another width or a query whose label no code has.
    """
    counts = count_labels(queries, wanted, codes, labels)
    return float(np.concatenate([average_precision(*counted, first) for counted in counts]).mean())


def precision(relevant: Any) -> float:
    """Precision of k neighbours: the mean share of relevant ones, from a Boolean array-like (queries, k)."""
    return float(np.asarray(relevant, np.bool_).mean())


def precision_at(items: Any, relevant: Any, k: int) -> NDArray[np.float64]:
    """The share of relevant items among the k first, (queries,), or among all where there are fewer."""
    return np.asarray(_hits(items, relevant, k) / np.minimum(np.asarray(items).sum(1), k))


def recall_at(items: Any, relevant: Any, k: int) -> NDArray[np.float64]:
    """The share of the relevant items that is among the k first, (queries,)."""
    return np.asarray(_hits(items, relevant, k) / np.asarray(relevant).sum(1))


def _hits(items: Any, relevant: Any, k: int) -> NDArray[np.float64]:
    """How many relevant items are among the k first, the mean over all orders of tied ones."""
    items = np.asarray(items)
    reached = items.cumsum(1)
    taken = np.minimum(reached, k) - np.minimum(reached - items, k)
    return np.asarray((relevant * taken / np.maximum(items, 1)).sum(1))


def precision_within(items: Any, relevant: Any, radius: int) -> NDArray[np.float64]:
    """The share of relevant items among those within so many bits, (queries,); 0 where nothing is."""
    near = np.asarray(items)[:, : radius + 1].sum(1)
    return np.asarray(np.asarray(relevant)[:, : radius + 1].sum(1) / np.maximum(near, 1))


def recall_within(items: Any, relevant: Any, radius: int) -> NDArray[np.float64]:
    """The share of the relevant items that is within so many bits, (queries,)."""
    relevant = np.asarray(relevant)
    return np.asarray(relevant[:, : radius + 1].sum(1) / relevant.sum(1))


def nearest(queries: Any, vectors: Any, k: int, left_out: RowIndices | None = None) -> RowIndices:
    """The rows of the k of `vectors` (n, …) nearest to each of `queries` (m, …) in Euclidean distance, (m, k).

    With `left_out` (m,) that row is no neighbour of the query. A block of vectors at a time is made float32.
    """
    from sklearn.neighbors import NearestNeighbors

    def flat(block: Any) -> NDArray[np.float32]:
        return np.asarray(block, np.float32).reshape(len(block), -1)

    distances: NDArray[np.float64] = np.empty((len(queries), 0))
    rows: RowIndices = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), BLOCK):
        block = flat(vectors[start : start + BLOCK])
        search = NearestNeighbors(n_neighbors=min(k + 1, len(block)), algorithm="brute").fit(block)
        farther, others = search.kneighbors(flat(queries))
        distances, rows = np.hstack([distances, farther]), np.hstack([rows, others + start])
        if left_out is not None:
            distances[rows == left_out[:, None]] = np.inf
        best = distances.argsort(1, kind="stable")[:, : k + 1]
        distances, rows = np.take_along_axis(distances, best, 1), np.take_along_axis(rows, best, 1)
    return rows[:, : min(k, len(vectors) - (left_out is not None))]


def health(codes: Codes) -> Health:
    """Whether codes, (n), are as many and their bits as different as they could be; all is 0 of none."""
    bits, n = check_codes(codes).shape[1] * 8, len(codes)
    if not n:
        return Health(0, 0, 0, 0.0, 0, 0, 0.0, 0.0, 0.0)
    words = _words(codes)
    words = words[np.lexsort(words.T)]
    begins = np.flatnonzero(np.concatenate([[True], (words[1:] != words[:-1]).any(axis=1), [True]]))
    buckets = np.diff(begins)
    both = np.zeros((bits, bits))
    for start in range(0, n, BLOCK):
        block = unpack(codes[start : start + BLOCK]).astype(np.float32)
        both += block.T @ block  # whole numbers that float32 holds
    ones = both.diagonal() / n
    rarer = np.minimum(ones, 1 - ones)
    living = rarer > 0
    deviation = np.sqrt(ones * (1 - ones))[living]
    covariance = (both / n - np.outer(ones, ones))[np.ix_(living, living)]
    pairs = np.abs(covariance / np.outer(deviation, deviation))[np.triu_indices(len(deviation), 1)]
    return Health(
        codes=n,
        distinct_codes=len(buckets),
        largest_bucket=int(buckets.max()),
        entropy=float(-(buckets / n * np.log2(buckets / n)).sum()),
        constant_bits=int((~living).sum()),
        dead_bits=int((rarer < RARE).sum()),
        balance=float(rarer.mean()),
        correlation=float(pairs.mean()) if len(pairs) else 0.0,
        largest_correlation=float(pairs.max()) if len(pairs) else 0.0,
    )


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
