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
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from hashret.codes import Codes, hamming
from hashret.collection.ingest import prepare_image
from hashret.collection.near_duplicates import find_item
from hashret.collection.parts import Parts
from hashret.data.contents import Content, Inputs
from hashret.data.images import decode, to_content
from hashret.errors import HashretError, check_count, format_count
from hashret.parallel import Progress, ordered_map
from hashret.results import Calibration
from hashret.stores.protocol import ModelKey

if TYPE_CHECKING:
    from hashret.hasher import Hasher

TRANSFORMS = ("cropped", "resized", "jpeg", "brighter", "turned")
SIDE = 512  # pixels of an altered copy, at most
POOL = 50_000  # codes, drawn from all, that altered copies are compared with


def by_pairs(parts: Parts, pairs: Iterable[tuple[Any, Any, bool]], source: str) -> Calibration:
    """Measure the radii on judged pairs, each of ids or images and whether they are the same, and keep that."""
    hasher = parts.models.current()
    judged = list(pairs)
    a, b = (_codes_of(parts, [pair[side] for pair in judged], hasher) for side in (0, 1))
    return _keep(parts, hasher, from_pairs(source, a, b, np.array([same for _, _, same in judged], np.bool_)))


def by_augmentation(
    parts: Parts, images: int, seed: int, progress: Callable[[Progress], None] | None = None
) -> Calibration:
    """Measure the radii on altered copies of so many items, drawn with `seed`, and keep that.

    Raises HashretError if none of them can be decoded, or for vectors.
    """
    hasher = parts.models.current()
    hasher.preprocessing.require_images("alter", "give judged pairs, hashret calibrate PAIRS.csv")
    with parts.store.snapshot() as rows:
        ids, codes = rows.codes(model=ModelKey(hasher.fingerprint, hasher.bits))
    drawn = np.random.default_rng(seed).permutation(ids)[: check_count(images, 1, "images")].tolist()
    altered = []
    for item in ordered_map(partial(_augmented, hasher, seed), parts.contents(drawn), max_pending=8):
        altered += [item] if item[1] else []
        if progress is not None:
            progress(Progress("altering", len(altered), len(drawn), {}))
    if not altered:
        raise HashretError("none of the indexed images can be read where it was: put the files back to alter them")
    altered.sort(key=lambda item: item[0])
    coded = hasher.encode_pixels(np.stack([pixels for _, copies in altered for pixels in copies]))
    pool = np.sort(np.random.default_rng(seed).permutation(len(ids))[:POOL])
    rows_of = np.searchsorted(ids, [item_id for item_id, _ in altered])
    own = np.where(np.isin(rows_of, pool), np.searchsorted(pool, rows_of), -1)
    by_kind = {kind: coded[i :: len(TRANSFORMS)] for i, kind in enumerate(TRANSFORMS)}
    return _keep(parts, hasher, from_augmented(codes[rows_of], by_kind, own, codes[pool], len(ids)))


def _augmented(hasher: "Hasher", seed: int, item: tuple[int, Content]) -> tuple[int, list[Inputs]]:
    """The id of an item, and its altered copies as the model sees them; none if it cannot be decoded."""
    item_id, content = item
    try:
        pixels = decode(content, (SIDE // 2, SIDE // 2)).pixels  # a JPEG comes at twice that, if it is so large
    except HashretError:
        return item_id, []
    copies = augment(pixels, np.random.default_rng((seed, item_id)))
    return item_id, [hasher.preprocessing(to_content(copy)).pixels for copy in copies]


def _keep(parts: Parts, hasher: "Hasher", calibration: Calibration) -> Calibration:
    with parts.store.exclusive(), parts.store.transaction(advance=False) as transaction:
        if transaction.settings["fingerprint"] != hasher.fingerprint:
            raise HashretError(f"{parts.originals.folder} has changed to another model meanwhile: calibrate again")
        transaction.put_setting("calibration", calibration.to_json())
    return calibration


def _codes_of(parts: Parts, images: list[Any], hasher: "Hasher") -> Codes:
    """The codes of items, by ids or images, and of other images."""
    known = [int(image) if isinstance(image, int | np.integer) else find_item(parts, image) for image in images]
    with parts.store.snapshot() as rows:
        ids, codes = rows.codes([i for i in known if i is not None], model=ModelKey(hasher.fingerprint, hasher.bits))
    row = dict(zip(ids.tolist(), codes, strict=True))
    rest = [image for image, i in zip(images, known, strict=True) if i not in row]
    prepared = list(ordered_map(partial(prepare_image, hasher.preprocessing), rest))
    fresh = iter(hasher.encode_pixels(np.stack([image.pixels for _, image in prepared])) if prepared else ())
    return np.array([row[i] if i in row else next(fresh) for i in known], np.uint8).reshape(-1, hasher.bits // 8)


def from_pairs(source: str, a: Codes, b: Codes, same: NDArray[np.bool_]) -> Calibration:
    """What judged pairs say: codes of the one and of the other image of each, (p, bits // 8), and the verdicts (p,).

    Raises HashretError unless some are the same and some different.
    """
    if not (same.any() and (~same).any()):
        labelled = f"{format_count(int(same.sum()), 'pair')} labelled the same and {(~same).sum()} different"
        raise HashretError(f"{source}: {labelled}: label some of both kinds")
    distances = np.bitwise_count(a ^ b).sum(axis=1, dtype=np.int64)
    counts = [np.bincount(distances[of], minlength=a.shape[1] * 8 + 1).tolist() for of in (same, ~same)]
    return Calibration(source, {"judged the same": counts[0]}, [float(count) for count in counts[1]], None)


def from_augmented(
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


def augment(pixels: NDArray[np.uint8], rng: np.random.Generator) -> list[NDArray[np.uint8]]:
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
