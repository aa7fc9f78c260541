"""Groups of near-duplicates among many codes, without comparing every code with every other.

Items of equal codes stand for each other: each distinct code is looked up once, in an index of the distinct codes, so
thousands of equal codes cost nothing. Items that a person has judged are looked up by themselves, because a verdict is
of these two items, and not of others with their codes. At most some millions of pairs are held at a time.
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

FIRST, MOST = 64, 1 << 14  # codes looked up at once, at first and at most
HELD = 1 << 23  # pairs in memory at once, as far as that can be foreseen


def single_linkage(codes: Codes, max_distance: int, *, same: Rows = NO_PAIRS, different: Rows = NO_PAIRS) -> Rows:
    """The number of each item's group, (n,), for codes uint8 (n, bits // 8): items are in one group if a chain of items
    leads from one to the other, each at most `max_distance` bits from the next.

    `same` and `different` are pairs of rows (p, 2): the former are links of a chain at any distance, the latter never.
    """
    nodes = _nodes(codes, same, different)
    banned = np.sort(_keys(nodes.of[different], len(nodes.codes)))
    number = np.arange(len(nodes.codes))
    pending, held = [nodes.of[same]], 0
    for part, limits, near in _neighbours(nodes, number, max_distance):
        links = np.stack([np.repeat(part, np.diff(limits)), near], axis=1)
        links = links[links[:, 0] < links[:, 1]]
        if len(banned):
            links = links[~np.isin(_keys(links, len(nodes.codes)), banned)]
        pending.append(links)
        held += len(links)
        if held > HELD:
            number, pending, held = _merged(number, pending), [NO_PAIRS], 0
    return _merged(number, pending)[nodes.of]


def star_clustering(
    codes: Codes, max_distance: int, rank: Rows, *, same: Rows = NO_PAIRS, different: Rows = NO_PAIRS
) -> Rows:
    """The number of each item's group, (n,), where every item is within `max_distance` bits of the best of its group.

    `rank` (n,) says which is better: the lower. The best item that is left takes all that are left within the distance,
    but for those judged `different` from it, and with those judged the `same`; pairs are of rows (p, 2).
    """
    nodes = _nodes(codes, same, different)
    best = np.empty(len(nodes.codes), np.int64)
    worst_first = np.argsort(rank)[::-1]
    best[nodes.of[worst_first]] = rank[worst_first]  # of several items of a node the best is written last
    joined, apart = (_partners(nodes.of[pairs]) for pairs in (same, different))
    centre = np.full(len(nodes.codes), -1)
    for part, limits, near in _neighbours(nodes, np.argsort(best), max_distance, centre):
        for node, low, high in zip(part.tolist(), limits[:-1].tolist(), limits[1:].tolist(), strict=True):
            if centre[node] < 0:
                taken = near[low:high]
                if node in joined:
                    taken = np.union1d(taken, joined[node])
                if node in apart:
                    taken = np.setdiff1d(taken, apart[node])
                centre[taken[centre[taken] < 0]] = node
    return centre[nodes.of]


def cluster_members(numbers: Rows, rank: Rows) -> list[Rows]:
    """The rows of each group of several, the one of the lowest rank first, from the numbers of their groups (n,)."""
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[inverse] > 1)
    rows = rows[np.lexsort((rank[rows], inverse[rows]))]
    return np.split(rows, np.flatnonzero(np.diff(inverse[rows])) + 1) if len(rows) else []


class _Nodes(NamedTuple):
    """What is looked up: each distinct code, and each judged item."""

    of: Rows  # (n,): the node of each item
    codes: Codes  # (m, bits // 8)


def _nodes(codes: Codes, same: Rows, different: Rows) -> _Nodes:
    width = check_codes(codes).shape[1]
    judged = np.zeros(len(codes), np.bool_)
    judged[same] = judged[different] = True
    distinct, numbers = np.unique(codes[~judged].view(f"S{width}")[:, 0], return_inverse=True)
    of = np.empty(len(codes), np.int64)
    of[~judged] = numbers
    of[judged] = len(distinct) + np.arange(judged.sum())
    return _Nodes(of, np.concatenate([distinct.view(np.uint8).reshape(-1, width), codes[judged]]))


def _neighbours(
    nodes: _Nodes, queue: Rows, max_distance: int, taken: Rows | None = None
) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Parts of `queue`, with limits and the nodes within the distance of each; none that `taken` says is taken."""
    check_count(max_distance, 0, "max_distance")
    index = BitFlipIndex(nodes.codes.shape[1] * 8)
    index.add(nodes.codes, np.arange(len(nodes.codes)))
    size = FIRST
    while len(queue):
        part, queue = queue[:size], queue[size:]
        if taken is not None:
            part = part[taken[part] < 0]
        found = index.within(nodes.codes[part], max_distance)
        yield part, found.limits, found.ids
        each = max(1, len(found.ids) // max(1, len(part)))
        size = min(4 * size, MOST, HELD // each + 1)


def _merged(number: Rows, links: list[Rows]) -> Rows:
    """The numbers of groups after joining those that links between nodes (p, 2) lead from and to."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(number):
        return number
    a, b = number[np.concatenate(links)].T
    shape = (int(number.max()) + 1,) * 2
    joined: Rows = connected_components(coo_array((np.ones(len(a), np.bool_), (a, b)), shape), directed=False)[1]
    return joined[number].astype(np.int64)


def _keys(pairs: Rows, count: int) -> Rows:
    """One number for each pair of nodes, whichever comes first."""
    return np.asarray(pairs.min(axis=1) * count + pairs.max(axis=1))


def _partners(pairs: Rows) -> dict[int, list[int]]:
    """For each node in a pair the nodes that it is paired with."""
    partners: dict[int, list[int]] = {}
    for a, b in pairs.tolist():
        partners.setdefault(a, []).append(b)
        partners.setdefault(b, []).append(a)
    return partners
