"""Copies in a collection: groups of them, what people judged, and what a radius means."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hashret.codes import Codes
from hashret.collection.calibration import from_pairs
from hashret.collection.copies import VERDICTS, calibrate_by_altering, find_groups
from hashret.collection.ingest import prepare
from hashret.collection.search import Searching
from hashret.data.contents import Content as ImageContent
from hashret.data.contents import sha256
from hashret.data.images import to_content
from hashret.data.records import read
from hashret.errors import HashretError, NotFound
from hashret.indexes.protocol import check_count
from hashret.parallel import Progress, in_order
from hashret.results import TARGET, Calibration, Group

if TYPE_CHECKING:
    from hashret.hasher import Hasher


class Judging(Searching):
    """A collection whose copies can be found and judged."""

    def dupes(
        self, max_distance: int = 3, *, by: str = "connected", keep: str | os.PathLike[str] = "largest"
    ) -> list[Group]:
        """Groups of items that are copies of one image, the one to keep first; those of one item have several paths.

        `by` "connected": a chain leads from each to each, every link at most `max_distance` bits long; by "star": each
        is within that of the first. `keep` says which is the first: "largest" (in pixels, then bytes), "oldest" (by
        the date of its file), or a folder that it should lie in, and then the largest. Verdicts count: "different"
        removes a link, "same" adds one. Raises HashretError if nothing lies in the folder.
        """
        check_count(max_distance, 0, "max_distance")
        if by not in ("connected", "star"):
            raise ValueError(f"by is 'connected' or 'star', not {by!r}")
        best = os.fspath(keep)
        with self._store.read():
            found = find_groups(
                self._store, max_distance, by, best if best in ("largest", "oldest") else str(Path(best).absolute())
            )
        return [Group([self._absolute(item) for item in group.items], group.distances) for group in found]

    def verdict(self, a: Any, b: Any, verdict: str) -> None:
        """Remember that two items are the "same", or "different", until one of them is removed or this is said anew.

        Each is an id, or an image as in `find`. A verdict is of contents, so it stays when files move. Raises
        HashretError for what is no item, and for two that have the same content.
        """
        if verdict not in VERDICTS:
            raise ValueError(f"a verdict is 'same' or 'different', not {verdict!r}")
        with self._writing():
            first, second = (self._item_id(image) for image in (a, b))
            if first == second:
                raise HashretError(f"both are item {first}, one content: a verdict is of two")
            with self._store.write():
                self._store.put_verdict(first, second, verdict)

    def verdicts(self) -> list[tuple[int, int, str]]:
        """All verdicts: the ids of the two items, and "same" or "different"."""
        with self._store.read():
            found = {verdict: self._store.verdicts(verdict).tolist() for verdict in VERDICTS}
        return sorted((a, b, verdict) for verdict, pairs in found.items() for a, b in pairs)

    def judged(self) -> list[tuple[ImageContent, ImageContent, bool]]:
        """The pairs of contents that were judged, and whether they are the same: what `Hasher.fit` takes as `pairs`.

        Those that cannot be read any more where they were indexed from are left out.
        """
        verdicts = self.verdicts()
        contents = dict(self.contents({i for a, b, _ in verdicts for i in (a, b)}))
        readable = [told for told in verdicts if told[0] in contents and told[1] in contents]
        return [(contents[a], contents[b], verdict == "same") for a, b, verdict in readable]

    def find(self, image: Any) -> int | None:
        """The id of the item that an image is (a path, a PIL image, bytes or a uint8 array), if it is one.

        It is known by its content; a path where there is no file is looked for among those that were indexed.
        """
        if isinstance(image, str | os.PathLike) and not os.path.isfile(image):  # noqa: PTH113  # takes any text
            path = os.fspath(image)
            with self._store.read():
                return self._store.at(path) or self._store.at(str(Path(path).absolute()))
        digest = sha256(to_content(image))
        with self._store.read():
            return self._store.find([digest]).get(digest)

    def contents(self, ids: Iterable[int]) -> Iterator[tuple[int, ImageContent]]:
        """Id and content of those of the items that can still be read where they were indexed from, in any order."""
        with self._store.read():
            places = dict[str, dict[str, int]]()
            for place in self._store.places(ids):
                places.setdefault(place.root, {})[place.name] = place.item_id or 0
            items = self._store.items({i for names in places.values() for i in names.values()})
        done = set[int]()
        for root, names in places.items():
            found: Iterable[tuple[str, ImageContent | HashretError | None]]
            if (self.path / root).is_dir():
                new = ((name, items[i].sha256) for name, i in names.items() if i not in done)
                found = ((name, self._contents.read(root, name, digest, None)) for name, digest in new)
            else:  # in the order of an archive, which may have no other
                found = ((record.name, read(record)) for record in self._records(root) if record.name in names)
            for name, content in found:
                item_id = names[name]
                if content is None or isinstance(content, HashretError) or item_id in done:
                    continue
                if sha256(content) == items[item_id].sha256:
                    done.add(item_id)
                    yield item_id, content

    def calibrate(
        self,
        pairs: Iterable[tuple[Any, Any, bool]] | None = None,
        *,
        source: str = "pairs",
        images: int = 500,
        seed: int = 0,
        progress: Callable[[Progress], None] | None = None,
    ) -> Calibration:
        """Measure what each radius means on these images, and keep that for `radius` until the model changes.

        `pairs` are judged ones, each an id or an image as in `find` and whether they are the same, from `source`. With
        None, altered copies are made of so many items, drawn with `seed`, and looked for among all. Raises
        HashretError if that leaves nothing to measure.
        """
        hasher = self.hasher
        if pairs is None:
            with self._store.read():
                ids, codes = self._store.codes(hasher.fingerprint, hasher.bits)
            drawn = np.random.default_rng(seed).permutation(ids)[: check_count(images, 1, "images")]
            contents = self.contents(drawn.tolist())

            def altered(done: int) -> None:
                if progress is not None:
                    progress(Progress("altering", done, len(drawn), {}))

            found = calibrate_by_altering(hasher, contents, ids, codes, seed, altered)
        else:
            judged = list(pairs)
            a, b = (self._codes_of([pair[side] for pair in judged], hasher) for side in (0, 1))
            found = from_pairs(source, a, b, np.array([same for _, _, same in judged], np.bool_))
        with self._writing(), self._store.write(step=0):
            if self._store.settings()["fingerprint"] != hasher.fingerprint:
                raise HashretError(f"{self.path} has changed to another model meanwhile: calibrate again")
            self._store.put_setting("calibration", found.to_json())
        return found

    def calibration(self) -> Calibration:
        """What `calibrate` found for the present model; raises NotFound if it was not asked to."""
        text = self._settings().get("calibration")
        if text is None:
            raise NotFound("what a radius means here is not known: run hashret calibrate, or give a number of bits")
        return Calibration.from_json(text)

    def radius(self, target: float = TARGET) -> int:
        """The radius that finds most copies while this share of what it shows is right, as `calibration` has it."""
        return self.calibration().radius(target, len(self))

    def _item_id(self, image: Any) -> int:
        if isinstance(image, int | np.integer):
            return self.get(int(image)).id
        found = self.find(image)
        if found is None:
            what = os.fspath(image) if isinstance(image, str | os.PathLike) else "the image"
            raise HashretError(f"{what} is not in the collection: hashret index its folder first")
        return found

    def _codes_of(self, images: list[Any], hasher: "Hasher") -> Codes:
        """The codes of items, by ids or images, and of other images."""
        known = [int(image) if isinstance(image, int | np.integer) else self.find(image) for image in images]
        with self._store.read():
            ids, codes = self._store.codes(hasher.fingerprint, hasher.bits, [i for i in known if i is not None])
        row = dict(zip(ids.tolist(), codes, strict=True))
        rest = [image for image, i in zip(images, known, strict=True) if i not in row]
        prepared = list(in_order(partial(prepare, hasher.preprocessing), rest))
        fresh = iter(hasher.encode_pixels(np.stack([one.pixels for _, one in prepared])) if prepared else ())
        return np.array([row[i] if i in row else next(fresh) for i in known], np.uint8).reshape(-1, hasher.bits // 8)
