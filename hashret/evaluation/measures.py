"""Measures of retrieval, of codes and of images.

Retrieval is measured on `DistanceCounts`: the numbers of items and of relevant items at each Hamming distance from each
query. Items at equal distance have no order, so every measure is its mean over all orders of ties, in closed form. It
does not depend on the order of the database.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes, unpack

QUERY_BLOCK = 1024  # queries whose counts are in memory at once
CODE_BLOCK = 8192  # codes or vectors that are unpacked at once
DEAD_SHARE = 0.01  # a bit is dead if the share of its rarer value is less

RowIndices = NDArray[np.int64]
Measures = dict[str, float]


class DistanceCounts(NamedTuple):
    """The numbers of items and of relevant items at each distance from each query, (queries, bits + 1)."""

    items: NDArray[np.int64]
    relevant: NDArray[np.int64]


class Health(NamedTuple):
    """Statistics of a set of codes, which reveal degenerate codes."""

    codes: int
    distinct_codes: int
    largest_bucket: int  # the most codes that are equal
    entropy: float  # of the empirical distribution of codes, in bits; at most log2 of their number
    constant_bits: int  # equal in all codes
    dead_bits: int  # equal in more than 99 % of the codes
    balance: float  # the mean over bits of the share of the rarer value; ½ at best
    correlation: float  # the mean absolute correlation of pairs of bits that are not constant; 0 at best
    largest_correlation: float  # the largest of these; 1 if one bit determines another


def count_labels(
    queries: Codes, query_labels: Any, codes: Codes, labels: Any, excluded: RowIndices | None = None
) -> Iterator[DistanceCounts]:
    """Yield the counts of `codes` (n) by distance from `queries` (m), for `QUERY_BLOCK` queries at a time.

    A code is relevant to a query if its label, of `labels` (n,), equals the query's, of `query_labels` (m,). `excluded`
    (m,) is the row of a code that is not counted for each query, usually its own. Raise ValueError for codes of another
    width, or for other numbers of labels than of codes.
    """
    labels, query_labels = np.asarray(labels), np.asarray(query_labels)
    if (len(labels), len(query_labels)) != (len(codes), len(queries)):
        raise ValueError(
            f"{len(codes)} codes, {len(queries)} queries, but {len(labels)} and {len(query_labels)} labels"
        )
    order = labels.argsort(kind="stable")  # so that relevant codes are consecutive
    first, last = (labels[order].searchsorted(query_labels, side) for side in ("left", "right"))
    if excluded is not None:
        excluded = order.argsort()[excluded]
    return _count(queries, codes[order], lambda q: slice(first[q], last[q]), excluded)


def count_neighbours(
    queries: Codes, neighbours: RowIndices, codes: Codes, excluded: RowIndices | None = None
) -> Iterator[DistanceCounts]:
    """Yield counts as `count_labels` does; relevant to each query are the codes of the rows `neighbours` (m, k)."""
    return _count(queries, codes, lambda q: neighbours[q], excluded)


def _count(
    queries: Codes, codes: Codes, relevant: Callable[[int], Any], excluded: RowIndices | None
) -> Iterator[DistanceCounts]:
    bits = check_codes(codes).shape[1] * 8
    check_codes(queries, bits)
    words, query_words = np.ascontiguousarray(_words(codes).T), _words(queries)
    for start in range(0, len(queries), QUERY_BLOCK):
        block = range(start, min(start + QUERY_BLOCK, len(queries)))
        items, hits = np.zeros((2, len(block), bits + 2), np.int64)
        for row, q in enumerate(block):
            distances = np.bitwise_count(words ^ query_words[q][:, None]).sum(0, dtype=np.uint16)
            if excluded is not None:
                distances[excluded[q]] = bits + 1  # beyond all distances
            items[row] = np.bincount(distances, minlength=bits + 2)
            hits[row] = np.bincount(distances[relevant(q)], minlength=bits + 2)
        yield DistanceCounts(items[:, :-1], hits[:, :-1])


def _words(codes: Codes) -> NDArray[np.uint64]:
    """Return codes as 64-bit words, (n, words), padded with zeros."""
    padded = np.zeros((len(codes), -(-codes.shape[1] // 8) * 8), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view(np.uint64)


def retrieval(counts: Iterator[DistanceCounts]) -> Measures:
    """Return by name the means over queries of mAP@all, mAP@1000, precision@10, precision@1000, and precision and
    recall within 2 bits."""
    parts = [
        {
            "mAP@all": average_precision(*block),
            "mAP@1000": average_precision(*block, 1000),
            "precision@10": precision_at(*block, 10),
            "precision@1000": precision_at(*block, 1000),
            "precision within 2": precision_within(*block, 2),
            "recall within 2": recall_within(*block, 2),
        }
        for block in counts
    ]
    return {name: float(np.concatenate([part[name] for part in parts]).mean()) for name in parts[0]}


def average_precision(items: Any, relevant: Any, cutoff: int | None = None) -> NDArray[np.float64]:
    """Return the average precision of rankings with ties, (queries,).

    `items` and `relevant`, both (queries, distances), are the numbers of items and of relevant items at each distance,
    nearest first. Average precision is the mean of the precisions at the ranks of the relevant items. With `cutoff`, it
    is the mean over the relevant items *among the first* `cutoff` items, and 0 if there are none. Ties are averaged
    over all orders in closed form: McSherry and Najork, "Computing Information Retrieval Performance Measures
    Efficiently in the Presence of Tied Scores", ECIR 2008. Ours extends it to a `cutoff` that falls among tied items.
    Raise ValueError for a query without relevant items.
    """
    items, relevant = np.asarray(items, np.float64), np.asarray(relevant, np.float64)
    lacking = int((relevant.sum(1) == 0).sum())
    if lacking:
        raise ValueError(f"{lacking} queries have no relevant item, so that their average precision is undefined")
    reached = items.cumsum(1)
    before, found = reached - items, relevant.cumsum(1) - relevant
    max_rank = int(reached.max())
    harmonic = np.append(0, 1 / np.arange(1, max_rank + 1)).cumsum()
    whole = reached <= (max_rank if cutoff is None else cutoff)
    sums = np.where(whole, _precisions(harmonic, before, items, found, relevant), 0).sum(1)
    precisions = sums / np.maximum(np.where(whole, relevant, 0).sum(1), 1)
    log_factorial = np.append(0, np.log(np.arange(1, max_rank + 1))).cumsum()

    def log_choices(n: Any, k: Any) -> Any:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    for q in np.flatnonzero(~whole.all(1)):
        # The list ends among the n items of one distance, of which it takes m. The number h of relevant ones among
        # these, of r, has a hypergeometric distribution, and they are in any order.
        end = whole[q].argmin()
        n, r, ahead = (int(part[q, end]) for part in (items, relevant, before))
        m = (cutoff or 0) - ahead
        h = np.arange(max(0, m - (n - r)), min(m, r) + 1)
        probability = np.exp(log_choices(r, h) + log_choices(n - r, m - h) - log_choices(n, m))
        total = sums[q] + _precisions(harmonic, np.float64(ahead), np.float64(m), found[q, end], h)
        precisions[q] = np.average(total / np.maximum(found[q, end] + h, 1), weights=probability)
    return np.asarray(precisions)


def _precisions(harmonic: NDArray[np.float64], before: Any, items: Any, found: Any, relevant: Any) -> Any:
    """Return the expected sum of the precisions at the relevant ones of tied items, after `before` items of which
    `found` are relevant.

    Rank i of n ties holds one of the r relevant items with probability r/n. Then (i − 1)(r − 1)/(n − 1) of the i − 1
    ties before it are expected to be relevant, so that its precision is (found + 1 + (i − 1)(r − 1)/(n − 1)) /
    (before + i). The sums over i of 1/(before + i) and (i − 1)/(before + i) are `inverse` and
    n − (before + 1) · `inverse`.
    """
    inverse = harmonic[(before + items).astype(np.int64)] - harmonic[before.astype(np.int64)]
    others = (relevant - 1) / np.maximum(items - 1, 1)
    precisions = (found + 1) * inverse + others * (items - (before + 1) * inverse)
    return relevant / np.maximum(items, 1) * precisions


def mean_average_precision(
    queries: Codes, query_labels: Any, codes: Codes, labels: Any, cutoff: int | None = None
) -> float:
    """Return the mean over `queries` (m) of the average precision of `codes` (n) ranked by Hamming distance; with
    `cutoff`, of the first `cutoff` codes only (see `average_precision`). Codes with the query's label are relevant (see
    `count_labels`).

    Raise ValueError for codes of another width, or a query whose label no code has.
    """
    counts = count_labels(queries, query_labels, codes, labels)
    return float(np.concatenate([average_precision(*block, cutoff) for block in counts]).mean())


def precision(relevant: Any) -> float:
    """Return the precision of k neighbours: the share of relevant ones in a Boolean array-like (queries, k)."""
    return float(np.asarray(relevant, np.bool_).mean())


def precision_at(items: Any, relevant: Any, k: int) -> NDArray[np.float64]:
    """Return the share of relevant items among the first k, (queries,), or among all if there are fewer."""
    return np.asarray(_hits(items, relevant, k) / np.minimum(np.asarray(items).sum(1), k))


def recall_at(items: Any, relevant: Any, k: int) -> NDArray[np.float64]:
    """Return the share of the relevant items that are among the first k, (queries,)."""
    return np.asarray(_hits(items, relevant, k) / np.asarray(relevant).sum(1))


def _hits(items: Any, relevant: Any, k: int) -> NDArray[np.float64]:
    """Return the number of relevant items among the first k, the mean over all orders of ties."""
    items = np.asarray(items)
    reached = items.cumsum(1)
    taken = np.minimum(reached, k) - np.minimum(reached - items, k)
    return np.asarray((relevant * taken / np.maximum(items, 1)).sum(1))


def precision_within(items: Any, relevant: Any, radius: int) -> NDArray[np.float64]:
    """Return the share of relevant items among those within `radius` bits, (queries,), or 0 if there are none."""
    near = np.asarray(items)[:, : radius + 1].sum(1)
    return np.asarray(np.asarray(relevant)[:, : radius + 1].sum(1) / np.maximum(near, 1))


def recall_within(items: Any, relevant: Any, radius: int) -> NDArray[np.float64]:
    """Return the share of the relevant items that are within `radius` bits, (queries,)."""
    relevant = np.asarray(relevant)
    return np.asarray(relevant[:, : radius + 1].sum(1) / relevant.sum(1))


def nearest(queries: Any, vectors: Any, k: int, excluded: RowIndices | None = None) -> RowIndices:
    """Return the rows (m, k) of the k of `vectors` (n, …) nearest to each of `queries` (m, …) in Euclidean distance.

    `excluded` (m,) is a row that is not a neighbour of each query. Vectors are converted to float32 in blocks.
    """
    from sklearn.neighbors import NearestNeighbors

    def flat(block: Any) -> NDArray[np.float32]:
        return np.asarray(block, np.float32).reshape(len(block), -1)

    distances: NDArray[np.float64] = np.empty((len(queries), 0))
    rows: RowIndices = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), CODE_BLOCK):
        block = flat(vectors[start : start + CODE_BLOCK])
        search = NearestNeighbors(n_neighbors=min(k + 1, len(block)), algorithm="brute").fit(block)
        farther, others = search.kneighbors(flat(queries))
        distances, rows = np.hstack([distances, farther]), np.hstack([rows, others + start])
        if excluded is not None:
            distances[rows == excluded[:, None]] = np.inf
        best = distances.argsort(1, kind="stable")[:, : k + 1]
        distances, rows = np.take_along_axis(distances, best, 1), np.take_along_axis(rows, best, 1)
    return rows[:, : min(k, len(vectors) - (excluded is not None))]


def health(codes: Codes) -> Health:
    """Return the health of codes, uint8 (n, bits // 8); all fields are 0 for n = 0."""
    bits, n = check_codes(codes).shape[1] * 8, len(codes)
    if not n:
        return Health(0, 0, 0, 0.0, 0, 0, 0.0, 0.0, 0.0)
    words = _words(codes)
    words = words[np.lexsort(words.T)]
    starts = np.flatnonzero(np.concatenate([[True], (words[1:] != words[:-1]).any(axis=1), [True]]))
    buckets = np.diff(starts)
    counts_of_both = np.zeros((bits, bits))
    for start in range(0, n, CODE_BLOCK):
        block = unpack(codes[start : start + CODE_BLOCK]).astype(np.float32)
        counts_of_both += block.T @ block  # integers that float32 represents exactly
    ones = counts_of_both.diagonal() / n
    rarer = np.minimum(ones, 1 - ones)
    varying = rarer > 0
    deviation = np.sqrt(ones * (1 - ones))[varying]
    covariance = (counts_of_both / n - np.outer(ones, ones))[np.ix_(varying, varying)]
    pairs = np.abs(covariance / np.outer(deviation, deviation))[np.triu_indices(len(deviation), 1)]
    return Health(
        codes=n,
        distinct_codes=len(buckets),
        largest_bucket=int(buckets.max()),
        entropy=float(-(buckets / n * np.log2(buckets / n)).sum()),
        constant_bits=int((~varying).sum()),
        dead_bits=int((rarer < DEAD_SHARE).sum()),
        balance=float(rarer.mean()),
        correlation=float(pairs.mean()) if len(pairs) else 0.0,
        largest_correlation=float(pairs.max()) if len(pairs) else 0.0,
    )


def squared_error(images: Any, restored: Any) -> float:
    """Return the squared error, summed over an image's values in [0, 1], the mean over images (n, …)."""
    return float(_squares(images, restored).sum(1).mean())


def psnr(images: Any, restored: Any) -> float:
    """Return the peak signal-to-noise ratio in decibels, the mean over images (n, …) in [0, 1]; infinite if one is
    exact."""
    with np.errstate(divide="ignore"):
        return float(np.mean(-10 * np.log10(_squares(images, restored).mean(1))))


def _squares(images: Any, restored: Any) -> NDArray[np.float64]:
    images, restored = np.asarray(images, np.float64), np.asarray(restored, np.float64)
    if images.shape != restored.shape:
        raise ValueError(f"images of shape {images.shape} were restored to {restored.shape}")
    return np.asarray(np.square(images - restored).reshape(len(images), -1))
