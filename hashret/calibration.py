"""What each radius means on one's own images: how many of the images shown are right, and how many copies are missed.

A query is an image of which there is a copy. Of what lies within radius r of it, the copy is right and all else is
wrong. *Recall* at r is the share of copies within r: what is missing to 1 are true copies missed. *Precision* at r is
the share of what is right in all that is shown within r, over all queries together. From altered copies: each is looked
for among all items, where one is right, so what is wrong grows with the number of items, and copies that lie among them
already pass for wrong. From pairs that a person has judged: what is within r are the pairs of at most that distance, so
it is the precision among pairs such as those.
"""

import io
import json
import math
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from hashret.codes import Codes, hamming
from hashret.errors import HashretError

KINDS = ("cropped", "resized", "jpeg", "brighter", "turned")
SIDE = 512  # pixels of an altered copy, at most
TARGET = 0.95  # the precision that a radius is chosen for, if no other is asked for
Counts = NDArray[np.float64]  # (bits + 1,), one for each distance or radius


class Calibration(NamedTuple):
    """How many copies of images, and how many other images, were found at each distance from 0 to bits."""

    source: str  # what the copies were: "altered copies", "verdicts", or a file of pairs
    copies: dict[str, list[int]]  # by kind
    others: list[float]
    items: int | None  # among which the others were; None for judged pairs, where it does not matter

    @property
    def recall(self) -> Counts:
        """The share of copies within each radius, (bits + 1,)."""
        return _share(np.sum(list(self.copies.values()), axis=0))

    @property
    def recalls(self) -> dict[str, Counts]:
        """The same for each kind of copies."""
        return {kind: _share(np.array(found)) for kind, found in self.copies.items()}

    def precision(self, items: int | None = None) -> Counts:
        """The share of copies in what lies within each radius, (bits + 1,), among so many items, if not as many as
        there were; 1 where nothing lies within it."""
        right = np.sum(list(self.copies.values()), axis=0).cumsum()
        wrong = np.cumsum(self.others)
        if items is not None and self.items is not None:
            wrong = wrong * max(0, items - 1) / max(1, self.items - 1)
        shown = right + wrong
        return np.asarray(np.divide(right, shown, out=np.ones(len(shown)), where=shown > 0))

    def radius(self, target: float = TARGET, items: int | None = None) -> int:
        """The radius that finds most copies at this precision or better, among so many items; of several the least.

        Raises HashretError if there is none, and ValueError for a target that is no share.
        """
        if not 0 < target <= 1:
            raise ValueError(f"a target is a precision above 0 and at most 1, not {target!r}")
        precision = self.precision(items)
        good = np.flatnonzero((precision >= target) & (self.recall > 0))
        if not len(good):
            best = precision[self.recall > 0].max()
            raise HashretError(f"no radius has precision {target:g}: the best there is has {best:.3f}, so aim lower")
        return int(np.searchsorted(self.recall, self.recall[good[-1]]))

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def from_pairs(source: str, a: Codes, b: Codes, same: NDArray[np.bool_]) -> Calibration:
    """What judged pairs say: codes of the one and of the other image of each, (p, bits // 8), and the verdicts (p,).

    Raises HashretError unless some are the same and some different.
    """
    if not (same.any() and (~same).any()):
        raise HashretError(
            f"{source}: {same.sum()} pairs are the same and {(~same).sum()} different: judge some of both kinds"
        )
    distances = np.bitwise_count(a ^ b).sum(axis=1, dtype=np.int64)
    counts = [np.bincount(distances[of], minlength=a.shape[1] * 8 + 1).tolist() for of in (same, ~same)]
    return Calibration(source, {"judged the same": counts[0]}, [float(count) for count in counts[1]], None)


def from_copies(
    originals: Codes, altered: dict[str, Codes], rows: NDArray[np.int64], pool: Codes, items: int
) -> Calibration:
    """What altered copies say: the codes of originals (n, bits // 8), and of a copy of each by kind.

    The others are counted in `pool`, codes drawn from those of all `items`, in which `rows` (n,) are the originals' own
    and are left out; -1 for one that is not drawn.
    """
    bins = originals.shape[1] * 8 + 1
    others = np.zeros(bins)
    copies = {}
    for kind, codes in altered.items():
        own = np.bitwise_count(originals ^ codes).sum(axis=1, dtype=np.int64)
        copies[kind] = np.bincount(own, minlength=bins).tolist()
        for code, distance, row in zip(codes, own, rows, strict=True):
            found = np.bincount(hamming(code[None], pool)[0], minlength=bins)
            found[distance] -= row >= 0
            others += found * (max(0, items - 1) / max(1, len(pool) - (row >= 0)))
    return Calibration("altered copies", copies, others.tolist(), items)


def alter(pixels: NDArray[np.uint8], rng: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Copies of an image, uint8 (h, w, 1 | 3), as people come to have them, one of each of `KINDS`.

    All have at most `SIDE` pixels a side. A crop keeps 90 % of each side, a resizing 75 %; JPEG has quality 40; light
    changes by a fifth, up or down; and a turn is by 3 degrees either way, cut to where no corners are missing.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((SIDE, SIDE))
    width, height = image.size
    share = 0.9
    left, top = rng.uniform(0, 1 - share, 2) * (width, height)
    cropped = image.crop((round(left), round(top), round(left + share * width), round(top + share * height)))
    resized = image.resize((max(1, width * 3 // 4), max(1, height * 3 // 4)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    brighter = ImageEnhance.Brightness(image).enhance(rng.choice([0.8, 1.2]))
    turned = image.rotate(3 * rng.choice([-1, 1]), Image.Resampling.BICUBIC)
    slope = math.sin(math.radians(3))
    x, y = (min(math.ceil(slope * other / 2), (side - 1) // 2) for side, other in ((width, height), (height, width)))
    turned = turned.crop((x, y, width - x, height - y))
    return [np.asarray(one) for one in (cropped, resized, Image.open(file), brighter, turned)]


def _share(found: NDArray[np.int64]) -> Counts:
    """The share that is found within each radius."""
    return np.asarray(found.cumsum() / max(1, found.sum()), np.float64)
