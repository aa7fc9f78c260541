"""Tables and clusters over the codes of a segment, and the planner's estimates of what a search with them costs."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from hashret.indexes.kernels import Plan, Segment
from hashret.indexes.kernels_build import build_buckets, build_clusters, count_buckets, fill_buckets, list_members
from hashret.indexes.kernels_codes import Words
from hashret.indexes.segments import NO_PLAN, freeze, get_workspace, take_probes
from hashret.indexes.threads import get_threads

MAX_WIDTH = 24  # a table of 2**24 buckets takes 64 MiB
MAX_PREFILTER_BITS = 128  # signatures of longer codes reject too few of them
WIDTH_REDUCTION = 5  # with signatures, substrings are so many bits shorter than log2(count)

# The planner's estimates in nanoseconds: probing a bucket and checking one of its codes, without and with signatures;
# scanning one word. A scan shared by many queries costs each a quarter.
PROBE_NS, CHECK_NS, PREFILTER_PROBE_NS, PREFILTER_NS, SCAN_NS = 4.0, 16.0, 150.0, 1.5, 0.2
# The cost of flipping up to each level of a `Plan` in its order, as a share of a scan, without and with signatures. The
# distances of the first codes in large buckets predict little, so `promising_distance` is larger with signatures.
LEVEL_SHARES, PREFILTER_LEVEL_SHARES = (1 / 400, 1 / 25, 1 / 4, 1, 1 / 4), (1 / 400, 1 / 8, 1 / 4, 1, 4)
MIN_PREFILTER_CODES = 1 << 22  # fewer codes are found faster in small buckets, without signatures
MIN_CODES = 8192  # fewer codes are scanned before flipping starts
MAX_UNCLUSTERED_BITS = 64  # longer codes are clustered
MAX_CLUSTERED_CODES = 1 << 26  # more codes need too many pivots


def add_tables(segment: Segment, bits: int) -> Segment:
    """Return the segment with tables, and with clusters, where they make searches faster."""
    layout, plan = make_layout(len(segment.codes), bits)
    if not len(layout):
        return segment
    shape = len(layout) - 1, len(segment.codes)
    postings = np.empty(shape, np.uint32)
    signatures = np.empty(shape if layout[-1, 4] else (0, 0), np.uint32)
    rows = chain([None], zip(postings, signatures if len(signatures) else repeat(np.empty(0, np.uint32)), strict=False))
    with ThreadPoolExecutor(get_threads()) as pool:
        tables = list(pool.map(lambda entry, row: build_table(lambda: [segment.codes], entry, row), layout, rows))
    ranks, offsets = (np.concatenate(parts) for parts in zip(*renumber(tables), strict=True))
    segment = segment._replace(layout=layout, bucket_ranks=ranks, bucket_offsets=offsets, plan=plan)
    return add_clusters(freeze(segment._replace(postings=postings, signatures=signatures)), bits)


def add_clusters(segment: Segment, bits: int) -> Segment:
    """Return the segment with clusters, if it has tables and clusters make searches faster."""
    if bits <= MAX_UNCLUSTERED_BITS or len(segment.codes) > MAX_CLUSTERED_CODES or not len(segment.layout):
        return segment
    pivots, radii, assignment = build_clusters(segment, bits // 4, get_workspace(segment, 0))
    take_probes()  # these were not for a query
    if not len(radii):
        return segment
    offsets, members = list_members(assignment, len(radii))
    pivots = np.ascontiguousarray(pivots)
    return freeze(segment._replace(pivots=pivots, radii=radii, member_offsets=offsets, members=members))


def make_layout(count: int, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the `layout` and `plan` of a segment of `count` codes; an empty layout if they are too few for tables.

    Without signatures m ≈ bits / log2(count) is best. With them one more table, of buckets with about a hundred codes,
    is best.
    """
    if count < MIN_CODES:
        return np.empty((0, 5), np.int64), NO_PLAN
    prefiltered = bits <= MAX_PREFILTER_BITS and count >= MIN_PREFILTER_CODES
    width = max(1.0, math.log2(count) - WIDTH_REDUCTION) if prefiltered else math.log2(count)
    m = max(round(bits / width), -(-bits // MAX_WIDTH))
    widths = [bits // m + (t < bits % m) for t in range(m)]
    layout = np.zeros((m, 5), np.int64)
    layout[:, 0] = np.cumsum([0, *widths[:-1]])
    layout[:, 1] = widths
    layout[:, 2] = np.cumsum([0, *(((1 << width) + 63) >> 6 for width in widths[:-1])])
    if prefiltered and m > 1:  # a signature: the bits after or before the substring, whichever are more
        before, after = layout[:, 0], bits - layout[:, 0] - layout[:, 1]
        layout[:, 3] = np.where(after >= before, layout[:, 0] + layout[:, 1], 0)
        layout[:, 4] = np.minimum(32, np.maximum(before, after))
    return layout, np.array(_make_plan(count, bits, widths, bool(layout[-1, 4])), np.int64)


def build_table(
    blocks: Callable[[], Iterable[Words]],
    layout: NDArray[np.int64],
    row: tuple[NDArray[np.uint32], NDArray[np.uint32]] | None,
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Return the rank bitmap and the bucket offsets of the table of a substring, given its row of the layout.

    Fill a row of postings and signatures, which every table but the first has. `blocks` yields all codes in read-only
    blocks each time it is called.
    """
    ends = np.zeros(1 << layout[1], np.uint32)
    for codes in blocks():
        count_buckets(codes, layout[0], layout[1], ends)
    ranks, offsets = build_buckets(ends)
    if row is not None:
        number = 0
        for codes in blocks():
            fill_buckets(codes, number, layout, ends, *row)
            number += len(codes)
    return ranks, offsets


def renumber(
    tables: Iterable[tuple[NDArray[np.uint64], NDArray[np.uint32]]],
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint32]]]:
    """Yield the tables with rank bitmaps that number the buckets of all tables, whose offsets become one array."""
    filled = 0
    for ranks, offsets in tables:
        ranks[:, 1] += np.uint64(filled)
        filled += len(offsets)
        yield ranks, offsets


def _make_plan(count: int, bits: int, widths: list[int], prefiltered: bool) -> Plan:
    """Return the plan from the estimated costs of flips in evenly filled buckets."""
    scan = SCAN_NS * count * -(-bits // 64)
    probe, check, shares = PROBE_NS, CHECK_NS, LEVEL_SHARES
    if prefiltered:
        probe, check, shares = PREFILTER_PROBE_NS, PREFILTER_NS, PREFILTER_LEVEL_SHARES
    m, cost, levels = len(widths), 0.0, [0] * len(shares)
    for level in range(bits):
        s, width = level // m, widths[level % m]
        cost += math.comb(width, s) * (probe + check * count / 2**width)
        levels = [level if cost <= share * scan else last for share, last in zip(shares, levels, strict=True)]
    free, cheap, shared, last, promising = levels
    return Plan(max(free, min(m - 1, last)), cheap, shared, last, promising, candidate_budget=int(scan / CHECK_NS))
