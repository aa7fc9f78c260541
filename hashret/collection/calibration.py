"""What each radius means on one's own images: how many of the images shown are right, and how many copies are missed.

A query is an image of which there is a copy. Of what lies within radius r of it, the copy is right and all else is
wrong. *Recall* at r is the share of copies within r: what is missing to 1 are true copies missed. *Precision* at r is
the share of what is right in all that is shown within r, over all queries together. From altered copies: each is looked
for among all items, where one is right, so what is wrong grows with the number of items, and copies that lie among them
already pass for wrong. From pairs that a person has judged: what is within r are the pairs of at most that distance, so
it is the precision among pairs such as those.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from hashret.codes import Codes, hamming
from hashret.errors import HashretError
from hashret.results import Calibration

KINDS = ("cropped", "resized", "jpeg", "brighter", "turned")
SIDE = 512  # pixels of an altered copy, at most


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
