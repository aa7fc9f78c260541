"""Near-duplicates in a collection: groups of them, and what people said of pairs.

Verdicts come first: "different" items are in no group together however near their codes are, and the "same" ones are,
however far. The grouping itself is in `grouping`, what a radius means in `calibration`.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.collection import grouping
from hashret.collection.pairs import VERDICTS
from hashret.collection.parts import Parts, no_item
from hashret.data.contents import Content, sha256
from hashret.data.images import to_content
from hashret.errors import HashretError, check_count
from hashret.results import Group, Item
from hashret.stores.protocol import PathRef, Snapshot


def find_groups(parts: Parts, max_distance: int, by: str, keep: str | os.PathLike[str]) -> list[Group]:
    """The groups of near-duplicates of a collection; see `Collection.dupes`."""
    check_count(max_distance, 0, "max_distance")
    if by not in ("connected", "star"):
        raise ValueError(f"by is 'connected' or 'star', not {by!r}")
    best = os.fspath(keep)
    if best not in ("largest", "oldest"):
        best = str(Path(best).absolute())
    with parts.store.snapshot() as rows:
        groups = _groups(rows, max_distance, by, best)
    return [Group([parts.originals.absolute(item) for item in group.items], group.distances) for group in groups]


def _groups(rows: Snapshot, max_distance: int, by: str, keep: str) -> list[Group]:
    ids, codes = rows.codes()
    ranking = rows.ranking(keep)
    rank = np.empty(len(ids), np.int64)
    rank[np.searchsorted(ids, ranking.ids)] = np.arange(len(ids))
    judged = {verdict: np.searchsorted(ids, rows.verdicts(verdict)) for verdict in VERDICTS}
    if by == "star":
        numbers = grouping.star_clustering(codes, max_distance, rank, **judged)
    else:
        numbers = grouping.single_linkage(codes, max_distance, **judged)
    found = [_by_distance(members, codes) for members in grouping.cluster_members(numbers, rank)]
    grouped = np.concatenate([np.empty(0, np.int64), *(members for members, _ in found)])
    with_several_paths = np.searchsorted(ids, ranking.ids[ranking.paths > 1])
    alone = np.setdiff1d(with_several_paths, grouped)
    found += [(alone[i : i + 1], [0]) for i in range(len(alone))]
    items = rows.items(ids[np.concatenate([grouped, alone])].tolist())
    groups = []
    for members, distances in sorted(found, key=lambda group: int(group[0][0])):
        kept, *others = (items[i] for i in ids[members].tolist())
        if len(kept.paths) > 1:
            kept = kept._replace(paths=_best_first(kept, keep, rows))
        if others or len(kept.paths) > 1:  # one file may have been indexed under two folders
            groups.append(Group([kept, *others], distances))
    return groups


def warm_up(codes: Codes) -> None:
    """Compile and load what `find_groups` would at its first call, for codes as wide as these, uint8 (n, bits // 8)."""
    grouping.single_linkage(codes, 0)


def _by_distance(members: NDArray[np.int64], codes: Codes) -> tuple[NDArray[np.int64], list[int]]:
    """The rows of a group, but for the first by (distance from the first, id), and these distances."""
    distances = hamming(codes[members[:1]], codes[members])[0]
    order = np.append(0, 1 + np.lexsort((members[1:], distances[1:])))
    return members[order], distances[order].tolist()


def _best_first(item: Item, keep: str, rows: Snapshot) -> list[str]:
    if keep == "largest":
        return item.paths
    if keep == "oldest":
        oldest: PathRef = min(rows.paths([item.id]), key=lambda path: (path.mtime_ns, path.root, path.name))
        return sorted(item.paths, key=lambda path: path != oldest.root + oldest.name)
    return sorted(item.paths, key=lambda path: not path.startswith(keep.rstrip("/") + "/"))


def put_verdict(parts: Parts, a: Any, b: Any, verdict: str) -> None:
    """Record what two items, given by ids or images, are to each other; see `Collection.verdict`."""
    if verdict not in VERDICTS:
        raise ValueError(f"a verdict is 'same' or 'different', not {verdict!r}")
    with parts.store.exclusive():
        first, second = (_item_id(parts, image) for image in (a, b))
        if first == second:
            raise HashretError(f"both are item {first}, one content: a verdict is of two")
        with parts.store.transaction() as transaction:
            transaction.put_verdict(first, second, verdict)


def all_verdicts(parts: Parts) -> list[tuple[int, int, str]]:
    """All verdicts: the ids of the two items, and "same" or "different"."""
    with parts.store.snapshot() as rows:
        pairs = {verdict: rows.verdicts(verdict).tolist() for verdict in VERDICTS}
    return sorted((a, b, verdict) for verdict, found in pairs.items() for a, b in found)


def judged_contents(parts: Parts) -> list[tuple[Content, Content, bool]]:
    """The pairs of contents with a verdict that can still be read, and whether they are the same."""
    verdicts = all_verdicts(parts)
    ids = sorted({i for a, b, _ in verdicts for i in (a, b)})
    contents = dict(parts.contents(ids))
    readable = [row for row in verdicts if row[0] in contents and row[1] in contents]
    return [(contents[a], contents[b], verdict == "same") for a, b, verdict in readable]


def find_item(parts: Parts, image: Any) -> int | None:
    """The id of the item that an image is, if it is one; see `Collection.find`."""
    if isinstance(image, str | os.PathLike) and not os.path.isfile(image):  # noqa: PTH113  # takes any text
        path = os.fspath(image)
        with parts.store.snapshot() as rows:
            roots = rows.roots()
            for whole in (path, str(Path(path).absolute())):
                for root in roots:
                    name = whole.removeprefix(root)
                    known = rows.known_paths(root, [name]).get(name) if whole.startswith(root) else None
                    if known is not None and known.item_id is not None:
                        return known.item_id
        return None
    digest = sha256(to_content(image))
    with parts.store.snapshot() as rows:
        return rows.find([digest]).get(digest)


def _item_id(parts: Parts, image: Any) -> int:
    if isinstance(image, int | np.integer):
        with parts.store.snapshot() as rows:
            if not rows.items([int(image)]):
                raise no_item(int(image))
        return int(image)
    found = find_item(parts, image)
    if found is None:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else "the image"
        raise HashretError(f"{name} is not in the collection: hashret index its folder first")
    return found
