"""The hits of a radius search: from codes to items, and from parts of a batch or of an index to the whole."""

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.kernels import Segment
from hashret.indexes.kernels_codes import Words
from hashret.indexes.kernels_heap import Ids
from hashret.indexes.kernels_within import expand_within
from hashret.indexes.protocol import RangeHits
from hashret.indexes.segments import as_filter


def expand(segment: Segment, words: Words, matches: tuple[Ids, NDArray[np.uint32]], allowed: Ids | None) -> RangeHits:
    """Return the items of the codes that `segments.match_within` found for each query, in no order."""
    return RangeHits(*expand_within(segment, words, *matches, *as_filter(allowed)))


def concatenate(parts: list[RangeHits]) -> RangeHits:
    """Return the hits of a batch from those of its consecutive parts."""
    if len(parts) == 1:
        return parts[0]
    limits = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.limits) for part in parts]))])
    distances, ids = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[1:])
    return RangeHits(limits, distances, ids)


def merge(a: RangeHits, b: RangeHits) -> RangeHits:
    """Return the hits of the same queries in two segments, in no order."""
    rows = np.concatenate([np.repeat(np.arange(len(hits.limits) - 1), np.diff(hits.limits)) for hits in (a, b)])
    order = np.argsort(rows, kind="stable")
    return RangeHits(
        a.limits + b.limits,
        np.concatenate([a.distances, b.distances])[order],
        np.concatenate([a.ids, b.ids])[order],
    )
