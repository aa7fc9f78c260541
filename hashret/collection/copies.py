"""Which items of a database are copies of one image, and what its codes say of copies that are made of its images.

What a person has judged comes first: "different" items are no copies of each other however near their codes are, and
the "same" ones are, however far. The grouping itself is in `duplicates`, the maths of radii in `calibration`.
"""

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hashret.codes import Codes, hamming
from hashret.collection import grouping as duplicates
from hashret.collection.calibration import KINDS, SIDE, alter, from_copies
from hashret.data.contents import Content, Inputs
from hashret.data.images import decode, to_content
from hashret.errors import HashretError
from hashret.parallel import in_order
from hashret.results import Calibration, Group, Item
from hashret.stores.sqlite import Store

if TYPE_CHECKING:
    from hashret.hasher import Hasher

VERDICTS = ("same", "different")
TITLES = ("path_a", "path_b", "verdict")
POOL = 50_000  # codes, drawn from all, that altered copies are compared with


def find_groups(store: Store, max_distance: int, by: str, keep: str) -> list[Group]:
    """The groups of a database, within `read`; see `Collection.dupes`."""
    settings = store.settings()
    ids, codes = store.codes(settings["fingerprint"], int(settings["bits"]))
    rank = np.empty(len(ids), np.int64)
    rank[np.searchsorted(ids, store.best_first(keep))] = np.arange(len(ids))
    judged = {verdict: np.searchsorted(ids, store.verdicts(verdict)) for verdict in ("same", "different")}
    if by == "star":
        numbers = duplicates.stars(codes, max_distance, rank, **judged)
    else:
        numbers = duplicates.connected(codes, max_distance, **judged)
    found = [_by_distance(rows, codes) for rows in duplicates.groups(numbers, rank)]
    grouped = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in found)])
    alone = np.setdiff1d(np.searchsorted(ids, store.shared()), grouped)
    found += [(alone[i : i + 1], [0]) for i in range(len(alone))]
    items = store.items(ids[np.concatenate([grouped, alone])].tolist())
    groups = []
    for rows, distances in sorted(found, key=lambda group: int(group[0][0])):
        kept, *others = (items[i] for i in ids[rows].tolist())
        if len(kept.paths) > 1:
            kept = kept._replace(paths=_best_first(kept, keep, store))
        if others or len(kept.paths) > 1:  # one file may have been indexed under two folders
            groups.append(Group([kept, *others], distances))
    return groups


def warm_up(codes: Codes) -> None:
    """Compile and load what `find_groups` would at its first call, for codes as wide as these, uint8 (n, bits // 8)."""
    duplicates.connected(codes, 0)


def _by_distance(rows: NDArray[np.int64], codes: Codes) -> tuple[NDArray[np.int64], list[int]]:
    """The rows of a group, but for the first by (distance from the first, id), and these distances."""
    distances = hamming(codes[rows[:1]], codes[rows])[0]
    order = np.append(0, 1 + np.lexsort((rows[1:], distances[1:])))
    return rows[order], distances[order].tolist()


def _best_first(item: Item, keep: str, store: Store) -> list[str]:
    if keep == "oldest":
        oldest = store.oldest_path(item.id)
        return sorted(item.paths, key=lambda path: path != oldest)
    if keep == "largest":
        return item.paths
    return sorted(item.paths, key=lambda path: not path.startswith(keep.rstrip("/") + "/"))


def calibrate_by_altering(
    hasher: "Hasher",
    contents: Iterable[tuple[int, Content]],
    ids: NDArray[np.int64],
    codes: Codes,
    seed: int,
    altered: Callable[[int], None],
) -> Calibration:
    """What the radii mean to altered copies of some contents, given with their ids, among all items: ids (n,) and codes
    (n, bits // 8). `altered` is told how many are done. Raises HashretError if none of them can be decoded, or
    for vectors."""
    hasher.preprocessing.check_pictures("alter", "give judged pairs, hashret calibrate PAIRS.csv")

    def prepare(item: tuple[int, Content]) -> tuple[int, list[Inputs]]:
        item_id, content = item
        try:
            pixels = decode(content, (SIDE // 2, SIDE // 2)).pixels  # a JPEG comes at twice that, if it is so large
        except HashretError:
            return item_id, []
        copies = alter(pixels, np.random.default_rng((seed, item_id)))
        return item_id, [hasher.preprocessing(to_content(copy)).pixels for copy in copies]

    done = []
    for item in in_order(prepare, contents, ahead=8):
        done += [item] if item[1] else []
        altered(len(done))
    if not done:
        raise HashretError("none of the indexed images can be read where it was: put the files back to alter them")
    done.sort(key=lambda item: item[0])
    coded = hasher.encode_pixels(np.stack([pixels for _, copies in done for pixels in copies]))
    pool = np.sort(np.random.default_rng(seed).permutation(len(ids))[:POOL])
    rows = np.searchsorted(ids, [item_id for item_id, _ in done])
    own = np.where(np.isin(rows, pool), np.searchsorted(pool, rows), -1)
    by_kind = {kind: coded[i :: len(KINDS)] for i, kind in enumerate(KINDS)}
    return from_copies(codes[rows], by_kind, own, codes[pool], len(ids))


def read_pairs(path: Path) -> list[tuple[str, str, bool]]:
    """The pairs of a CSV file of path_a,path_b,same|different, with or without a line of titles."""
    pairs = []
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                verdict = row[2].strip() if len(row) == 3 else None
                if verdict in VERDICTS:
                    pairs.append((row[0], row[1], verdict == "same"))
                elif row and (number, verdict) != (1, TITLES[2]):
                    raise HashretError(
                        f"{path}, line {number}: a line is path_a,path_b,same or path_a,path_b,different"
                    )
    except OSError as error:
        raise HashretError(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise HashretError(f"{path} is no CSV file: {error}") from error
    return pairs


def write_pairs(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """A CSV file that `read_pairs` reads."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([TITLES, *rows])
