"""Groups of near-duplicates in a collection, and verdicts on pairs of items.

Verdicts override distances: "different" items are never linked, however near their codes, and "same" items always are.
The clustering itself is in `grouping`, the choice of a radius in `calibration`.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.collection import grouping
from hashret.collection.pairs import VERDICTS
from hashret.collection.parts import Parts, no_item
from hashret.collection.snapshot import View
from hashret.data.contents import Content, sha256
from hashret.data.images import to_content
from hashret.errors import HashretError, check_count
from hashret.results import Group, Item
from hashret.stores.protocol import PathRef, Snapshot


class Cluster(NamedTuple):
    """The ids of near-duplicates, the one to keep first, and their distances from it in bits."""

    ids: list[int]
    distances: list[int]


def find_groups(parts: Parts, max_distance: int, by: str, keep: str | os.PathLike[str]) -> list[Group]:
    """Find the groups of near-duplicates; see `Collection.dupes`."""
    criterion = os.fspath(keep)
    if criterion not in ("largest", "oldest"):
        criterion = str(Path(criterion).absolute())

    def find(view: View) -> list[Group]:
        clusters = find_clusters(view.snapshot, max_distance, by, criterion)
        items = view.iterate_items(i for cluster in clusters for i in cluster.ids)
        groups = read_groups(view, clusters, criterion, items)
        return [Group(list(members), cluster.distances) for cluster, members in groups]

    return parts.reader.read(find)


def find_clusters(snapshot: Snapshot, max_distance: int, by: str, keep: str) -> list[Cluster]:
    """Return the clusters of items, and the items with several paths as clusters of one, by the id of the first item.

    `keep` is "largest", "oldest" or the absolute path of a folder.
    """
    check_count(max_distance, 0, "max_distance")
    if by not in ("connected", "star"):
        raise ValueError(f"by is 'connected' or 'star', not {by!r}")
    ids, codes = snapshot.codes()
    ranking = snapshot.ranking(keep)
    rank = np.empty(len(ids), np.int64)
    rank[np.searchsorted(ids, ranking.ids)] = np.arange(len(ids))
    pairs = {verdict: np.searchsorted(ids, snapshot.verdicts(verdict)) for verdict in VERDICTS}
    if by == "star":
        labels = grouping.star_clustering(codes, max_distance, rank, **pairs)
    else:
        labels = grouping.single_linkage(codes, max_distance, **pairs)
    clusters = [_by_distance(members, codes) for members in grouping.cluster_members(labels, rank)]
    clustered = np.concatenate([np.empty(0, np.int64), *(members for members, _ in clusters)])
    singletons = np.setdiff1d(np.searchsorted(ids, ranking.ids[ranking.paths > 1]), clustered)
    clusters += [(singletons[i : i + 1], [0]) for i in range(len(singletons))]
    clusters.sort(key=lambda cluster: int(cluster[0][0]))
    return [Cluster(ids[members].tolist(), distances) for members, distances in clusters]


def read_groups(
    view: View, clusters: Iterable[Cluster], keep: str, items: Iterator[Item], max_items: int | None = None
) -> Iterator[tuple[Cluster, Iterator[Item]]]:
    """Iterate over the clusters that are groups, each with an iterator over its items, to be exhausted before the next.

    `items` are those of all clusters in order, of each at most `max_items`. The path to keep leads those of a group's
    first item. One file that was indexed under two folders is no group.
    """
    for cluster in clusters:
        others = islice(items, len(cluster.ids[:max_items]) - 1)
        kept = next(items)
        if len(kept.paths) > 1:
            kept = kept._replace(paths=_best_first(view, kept, keep))
        if len(cluster.ids) > 1 or len(kept.paths) > 1:
            yield cluster, chain([kept], others)


def warm_up(codes: Codes) -> None:
    """Compile and load everything `find_groups` needs, for codes of the width of `codes`, uint8 (n, bits // 8)."""
    grouping.single_linkage(codes, 0)


def _by_distance(members: NDArray[np.int64], codes: Codes) -> tuple[NDArray[np.int64], list[int]]:
    """Sort the rows of a cluster after the first by (distance from the first, id); return them and the distances."""
    distances = hamming(codes[members[:1]], codes[members])[0]
    order = np.append(0, 1 + np.lexsort((members[1:], distances[1:])))
    return members[order], distances[order].tolist()


def _best_first(view: View, item: Item, keep: str) -> list[str]:
    if keep == "largest":
        return item.paths
    if keep == "oldest":
        oldest: PathRef = min(view.snapshot.paths([item.id]), key=lambda path: (path.mtime_ns, path.root, path.name))
        first = view.absolute_path(oldest.root + oldest.name)
        return sorted(item.paths, key=lambda path: path != first)
    return sorted(item.paths, key=lambda path: not path.startswith(keep.rstrip("/") + "/"))


def put_verdict(parts: Parts, a: Any, b: Any, verdict: str) -> None:
    """Record a verdict on two items, given by id or image; see `Collection.verdict`."""
    if verdict not in VERDICTS:
        raise ValueError(f"a verdict is 'same' or 'different', not {verdict!r}")
    with parts.store.exclusive():
        first, second = (_item_id(parts, image) for image in (a, b))
        if first == second:
            raise HashretError(f"both are item {first}, one content: give two different items")
        with parts.store.transaction() as transaction:
            transaction.put_verdict(first, second, verdict)


def all_verdicts(parts: Parts) -> list[tuple[int, int, str]]:
    """Return all verdicts as (id, id, "same" or "different")."""
    with parts.store.snapshot() as snapshot:
        pairs = {verdict: snapshot.verdicts(verdict).tolist() for verdict in VERDICTS}
    return sorted((a, b, verdict) for verdict, ids in pairs.items() for a, b in ids)


def labelled_pairs(parts: Parts) -> list[tuple[Content, Content, bool]]:
    """Return the readable contents of all pairs with a verdict, each with whether they are the same."""
    verdicts = all_verdicts(parts)
    ids = sorted({i for a, b, _ in verdicts for i in (a, b)})
    contents = dict(parts.contents(ids))
    readable = [row for row in verdicts if row[0] in contents and row[1] in contents]
    return [(contents[a], contents[b], verdict == "same") for a, b, verdict in readable]


def find_item(parts: Parts, image: Any) -> int | None:
    """Return the id of the item with the content of an image, or None; see `Collection.find`."""
    if isinstance(image, str | os.PathLike) and not os.path.isfile(image):  # noqa: PTH113  # accepts any text
        return _find_path(parts, os.fspath(image))
    digest = sha256(to_content(image))
    with parts.store.snapshot() as snapshot:
        return snapshot.find([digest]).get(digest)


def _find_path(parts: Parts, path: str) -> int | None:
    """Return the id of the item at a recorded path, absolute or relative, or None."""
    with parts.store.snapshot() as snapshot:
        roots = snapshot.roots()
        for candidate in (path, str(Path(path).absolute())):
            for root in roots:
                name = candidate.removeprefix(root)
                known_path = snapshot.known_paths(root, [name]).get(name) if candidate.startswith(root) else None
                if known_path is not None and known_path.item_id is not None:
                    return known_path.item_id
    return None


def _item_id(parts: Parts, image: Any) -> int:
    if isinstance(image, int | np.integer):
        with parts.store.snapshot() as snapshot:
            if not snapshot.items([int(image)]):
                raise no_item(int(image))
        return int(image)
    item_id = find_item(parts, image)
    if item_id is None:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else "the image"
        raise HashretError(f"{name} is not in the collection: hashret index its folder first")
    return item_id
