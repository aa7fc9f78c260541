"""Cluster near-duplicates by their codes, without comparing all pairs of codes.

Items with equal codes share a node: each distinct code is looked up once, in an index of the distinct codes, so
thousands of equal codes cost no more than one. Items in labelled pairs have nodes of their own, because a label belongs
to two items and not to their codes. At most some millions of pairs are in memory at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, check_codes
from hashret.errors import check_count
from hashret.indexes import BitFlipIndex

Rows = NDArray[np.int64]
NO_PAIRS = np.empty((0, 2), np.int64)

MIN_BATCH, MAX_BATCH = 64, 1 << 14  # codes per lookup, at first and at most
MAX_PAIRS = 1 << 23  # pairs in memory at a time, as far as their number can be predicted


def single_linkage(codes: Codes, max_distance: int, *, same: Rows = NO_PAIRS, different: Rows = NO_PAIRS) -> Rows:
    """Return the cluster label of each item, (n,): the connected components of the neighbour graph (single linkage).

    Items are neighbours if their codes, uint8 (n, bits // 8), differ in at most `max_distance` bits. `same` and
    `different` are pairs of rows (p, 2): must-link pairs are neighbours at any distance, cannot-link pairs never are,
    but may still be connected through other items.
    """
    nodes = _nodes(codes, same, different)
    cannot_link = np.sort(_keys(nodes.of_items[different], len(nodes.codes)))
    labels = np.arange(len(nodes.codes))
    pending, count = [nodes.of_items[same]], 0
    for batch, limits, neighbours in _neighbours(nodes, labels, max_distance):
        edges = np.stack([np.repeat(batch, np.diff(limits)), neighbours], axis=1)
        edges = edges[edges[:, 0] < edges[:, 1]]
        if len(cannot_link):
            edges = edges[~np.isin(_keys(edges, len(nodes.codes)), cannot_link)]
        pending.append(edges)
        count += len(edges)
        if count > MAX_PAIRS:
            labels, pending, count = _merged(labels, pending), [NO_PAIRS], 0
    return _merged(labels, pending)[nodes.of_items]


def star_clustering(
    codes: Codes, max_distance: int, rank: Rows, *, same: Rows = NO_PAIRS, different: Rows = NO_PAIRS
) -> Rows:
    """Return the cluster label of each item, (n,), by star (leader) clustering.

    The unassigned item of the lowest `rank` (n,) becomes a leader, and its cluster all unassigned items within
    `max_distance` bits of it, until none is left. `same` and `different` are pairs of rows (p, 2): an item joins the
    leader that it must link with at any distance, and never one that it cannot link with.
    """
    nodes = _nodes(codes, same, different)
    node_ranks = np.empty(len(nodes.codes), np.int64)
    worst_first = np.argsort(rank)[::-1]
    node_ranks[nodes.of_items[worst_first]] = rank[worst_first]  # the best item of a node is written last
    must_link, cannot_link = (_partners(nodes.of_items[pairs]) for pairs in (same, different))
    leaders = np.full(len(nodes.codes), -1)
    for batch, limits, neighbours in _neighbours(nodes, np.argsort(node_ranks), max_distance, leaders):
        for node, low, high in zip(batch.tolist(), limits[:-1].tolist(), limits[1:].tolist(), strict=True):
            if leaders[node] < 0:
                members = neighbours[low:high]
                if node in must_link:
                    members = np.union1d(members, must_link[node])
                if node in cannot_link:
                    members = np.setdiff1d(members, cannot_link[node])
                leaders[members[leaders[members] < 0]] = node
    return leaders[nodes.of_items]


def cluster_members(labels: Rows, rank: Rows) -> list[Rows]:
    """Return the rows of each cluster of two or more, by ascending `rank` (n,), given the cluster labels (n,)."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[inverse] > 1)
    rows = rows[np.lexsort((rank[rows], inverse[rows]))]
    return np.split(rows, np.flatnonzero(np.diff(inverse[rows])) + 1) if len(rows) else []


class _Nodes(NamedTuple):
    """The nodes of the neighbour graph: the distinct codes, and the items in labelled pairs."""

    of_items: Rows  # (n,): the node of each item
    codes: Codes  # (m, bits // 8)


def _nodes(codes: Codes, same: Rows, different: Rows) -> _Nodes:
    width = check_codes(codes).shape[1]
    is_labelled = np.zeros(len(codes), np.bool_)
    is_labelled[same] = is_labelled[different] = True
    distinct, inverse = np.unique(codes[~is_labelled].view(f"S{width}")[:, 0], return_inverse=True)
    of_items = np.empty(len(codes), np.int64)
    of_items[~is_labelled] = inverse
    of_items[is_labelled] = len(distinct) + np.arange(is_labelled.sum())
    return _Nodes(of_items, np.concatenate([distinct.view(np.uint8).reshape(-1, width), codes[is_labelled]]))


def _neighbours(
    nodes: _Nodes, queue: Rows, max_distance: int, leaders: Rows | None = None
) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Iterate over batches of `queue`, with the limits and the neighbours of each, without nodes that have a leader."""
    check_count(max_distance, 0, "max_distance")
    index = BitFlipIndex(nodes.codes.shape[1] * 8)
    index.add(nodes.codes, np.arange(len(nodes.codes)))
    size = MIN_BATCH
    while len(queue):
        batch, queue = queue[:size], queue[size:]
        if leaders is not None:
            batch = batch[leaders[batch] < 0]
        hits = index.within(nodes.codes[batch], max_distance)
        yield batch, hits.limits, hits.ids
        neighbours_per_node = max(1, len(hits.ids) // max(1, len(batch)))
        size = min(4 * size, MAX_BATCH, MAX_PAIRS // neighbours_per_node + 1)


def _merged(labels: Rows, edges: list[Rows]) -> Rows:
    """Return the labels after merging the clusters that edges between nodes (p, 2) connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(labels):
        return labels
    a, b = labels[np.concatenate(edges)].T
    shape = (int(labels.max()) + 1,) * 2
    merged: Rows = connected_components(coo_array((np.ones(len(a), np.bool_), (a, b)), shape), directed=False)[1]
    return merged[labels].astype(np.int64)


def _keys(pairs: Rows, count: int) -> Rows:
    """Return one integer for each unordered pair of nodes."""
    return np.asarray(pairs.min(axis=1) * count + pairs.max(axis=1))


def _partners(pairs: Rows) -> dict[int, list[int]]:
    """Return for each node in a pair the nodes that it is paired with."""
    partners: dict[int, list[int]] = {}
    for a, b in pairs.tolist():
        partners.setdefault(a, []).append(b)
        partners.setdefault(b, []).append(a)
    return partners
