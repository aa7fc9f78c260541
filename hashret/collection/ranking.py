"""The order of what a search has found, where it is another one than that of distances."""

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes

RANKS = ("distance", "asymmetric")
Near = tuple[NDArray[np.int32], NDArray[np.int64]]  # distances and ids, of one query


def check_rank(rank: str) -> None:
    """Raises ValueError if there is no such order."""
    if rank not in RANKS:
        raise ValueError(f"there is no rank {rank!r}; choose {' or '.join(RANKS)}")


def candidates(k: int | None) -> int | None:
    """How many of the nearest are looked at for the first `k` of another order."""
    return None if k is None else max(10 * k, 100)


def by_certainty(
    near: list[Near], queries: Codes, margins: NDArray[np.float32], ids: NDArray[np.int64], codes: Codes, k: int | None
) -> tuple[list[Near], list[list[float]]]:
    """The first `k` of what is near to each query, and their scores, lowest first: weighted Hamming distances, in which
    a bit that differs costs how sure the query is of it, the size of its margin, (queries, bits).

    Gordo, Perronnin, Gong and Lazebnik, "Asymmetric Distances for Binary Embeddings", PAMI 2014,
    https://doi.org/10.1109/TPAMI.2013.101. `ids`, ascending, and `codes` are of all that is near to any query. Equal
    scores are in the order of (distance, id).
    """
    found: list[Near] = []
    scores: list[list[float]] = []
    for (distances, row), query, margin in zip(near, queries, np.abs(margins).astype(np.float64), strict=True):
        differing = np.unpackbits(codes[np.searchsorted(ids, row)] ^ query, axis=1)
        costs = (differing * margin).sum(axis=1)
        order = np.lexsort((row, distances, costs))[:k]
        found.append((distances[order], row[order]))
        scores.append(costs[order].tolist())
    return found, scores
