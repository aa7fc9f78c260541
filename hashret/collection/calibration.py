"""Calibration of the radius: its precision and recall on the user's own images.

A query is an image of which a copy exists. The copy is relevant, and every other item is not. *Recall* at radius r is
the fraction of copies within r of their queries. *Precision* at r is the fraction of relevant items among all items
within r, summed over all queries. Augmented copies are searched for among all items, of which one is relevant: the
number of false positives grows with the number of items, and copies that are in the collection already count as false
positives. With labelled pairs, both are fractions of the pairs within distance r, so precision refers to similar pairs.
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
from hashret.collection.near_duplicates import find_item
from hashret.collection.parts import Parts
from hashret.collection.pending import prepare_image
from hashret.data.contents import Content, Inputs
from hashret.data.images import decode, to_content
from hashret.errors import HashretError, check_count, format_count
from hashret.parallel import Progress, ordered_map
from hashret.results import Calibration
from hashret.stores.protocol import ModelKey

if TYPE_CHECKING:
    from hashret.hasher import Hasher

TRANSFORMS = ("cropped", "resized", "jpeg", "brighter", "turned")
MAX_SIDE = 512  # pixels, of an augmented copy
POOL_SIZE = 50_000  # codes in the random sample that augmented copies are compared with


def by_pairs(parts: Parts, pairs: Iterable[tuple[Any, Any, bool]], source: str) -> Calibration:
    """Calibrate on labelled pairs, each two ids or images and whether they are the same, and store the result."""
    hasher = parts.models.current()
    labelled = list(pairs)
    a, b = (_codes(parts, [pair[side] for pair in labelled], hasher) for side in (0, 1))
    return _store(parts, hasher, from_pairs(source, a, b, np.array([same for _, _, same in labelled], np.bool_)))


def by_augmentation(
    parts: Parts, images: int, seed: int, progress: Callable[[Progress], None] | None = None
) -> Calibration:
    """Calibrate on augmented copies of a random sample of `images` items, drawn with `seed`, and store the result.

    Raise HashretError if none of them can be decoded, and for vectors.
    """
    hasher = parts.models.current()
    hasher.preprocessing.require_images("augment", "give labelled pairs, hashret calibrate PAIRS.csv")
    with parts.store.snapshot() as snapshot:
        ids, codes = snapshot.codes(model=ModelKey(hasher.fingerprint, hasher.bits))
    sample = np.random.default_rng(seed).permutation(ids)[: check_count(images, 1, "images")].tolist()
    augmented = []
    for item in ordered_map(partial(_augment_item, hasher, seed), parts.contents(sample), max_pending=8):
        augmented += [item] if item[1] else []
        if progress is not None:
            progress(Progress("augmenting", len(augmented), len(sample), {}))
    if not augmented:
        raise HashretError("none of the indexed images can be read where it was: put the files back")
    augmented.sort(key=lambda item: item[0])
    copy_codes = hasher.encode_pixels(np.stack([pixels for _, copies in augmented for pixels in copies]))
    pool = np.sort(np.random.default_rng(seed).permutation(len(ids))[:POOL_SIZE])
    rows = np.searchsorted(ids, [item_id for item_id, _ in augmented])
    pool_rows = np.where(np.isin(rows, pool), np.searchsorted(pool, rows), -1)
    by_transform = {transform: copy_codes[i :: len(TRANSFORMS)] for i, transform in enumerate(TRANSFORMS)}
    return _store(parts, hasher, from_augmented(codes[rows], by_transform, pool_rows, codes[pool], len(ids)))


def _augment_item(hasher: "Hasher", seed: int, item: tuple[int, Content]) -> tuple[int, list[Inputs]]:
    """Return the id of an item and its augmented copies, preprocessed; no copies if it cannot be decoded."""
    item_id, content = item
    try:
        half = MAX_SIDE // 2  # a large JPEG is decoded at up to twice the size that is needed
        pixels = decode(content, (half, half)).pixels
    except HashretError:
        return item_id, []
    copies = augmented_copies(pixels, np.random.default_rng((seed, item_id)))
    return item_id, [hasher.preprocessing(to_content(copy)).pixels for copy in copies]


def _store(parts: Parts, hasher: "Hasher", calibration: Calibration) -> Calibration:
    with parts.store.exclusive(), parts.store.transaction(advance=False) as transaction:
        if transaction.settings["fingerprint"] != hasher.fingerprint:
            raise HashretError(f"{parts.originals.folder} was switched to another model meanwhile: calibrate again")
        transaction.put_setting("calibration", calibration.to_json())
    return calibration


def _codes(parts: Parts, images: list[Any], hasher: "Hasher") -> Codes:
    """Return the codes of ids and images: the stored ones of items, and new ones of other images."""
    item_ids = [int(image) if isinstance(image, int | np.integer) else find_item(parts, image) for image in images]
    known_ids, model = [i for i in item_ids if i is not None], ModelKey(hasher.fingerprint, hasher.bits)
    with parts.store.snapshot() as snapshot:
        ids, codes = snapshot.codes(known_ids, model=model)
    stored = dict(zip(ids.tolist(), codes, strict=True))
    others = [image for image, i in zip(images, item_ids, strict=True) if i not in stored]
    prepared = list(ordered_map(partial(prepare_image, hasher.preprocessing), others))
    new = iter(hasher.encode_pixels(np.stack([image.pixels for _, image in prepared])) if prepared else ())
    return np.array([stored[i] if i in stored else next(new) for i in item_ids], np.uint8).reshape(-1, model.bits // 8)


def from_pairs(source: str, a: Codes, b: Codes, same: NDArray[np.bool_]) -> Calibration:
    """Calibrate on labelled pairs: the codes of their first and second images, (p, bits // 8), and the labels (p,).

    Raise HashretError unless there are pairs of both labels.
    """
    if not (same.any() and (~same).any()):
        labelled = f"{format_count(int(same.sum()), 'pair')} labelled the same and {(~same).sum()} different"
        raise HashretError(f"{source}: {labelled}: label some of both kinds")
    distances = np.bitwise_count(a ^ b).sum(axis=1, dtype=np.int64)
    counts = [np.bincount(distances[rows], minlength=a.shape[1] * 8 + 1).tolist() for rows in (same, ~same)]
    return Calibration(source, {"judged the same": counts[0]}, [float(count) for count in counts[1]], None)


def from_augmented(
    originals: Codes, augmented: dict[str, Codes], pool_rows: NDArray[np.int64], pool: Codes, items: int
) -> Calibration:
    """Calibrate on augmented copies: the codes of n originals, (n, bits // 8), and of their copies by transform.

    `pool` (m, bits // 8) is a random sample of the codes of all `items`, and `pool_rows` (n,) the row of each original
    in it, -1 for none. The distances to all other items are estimated from the pool, without the original.
    """
    bins = originals.shape[1] * 8 + 1
    others = np.zeros(bins)
    copies = {}
    for transform, codes in augmented.items():
        distances = np.bitwise_count(originals ^ codes).sum(axis=1, dtype=np.int64)
        copies[transform] = np.bincount(distances, minlength=bins).tolist()
        for code, distance, row in zip(codes, distances, pool_rows, strict=True):
            counts = np.bincount(hamming(code[None], pool)[0], minlength=bins)
            counts[distance] -= row >= 0
            others += counts * (max(0, items - 1) / max(1, len(pool) - (row >= 0)))
    return Calibration("altered copies", copies, others.tolist(), items)


def augmented_copies(pixels: NDArray[np.uint8], rng: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Return copies of an image, uint8 (h, w, 1 | 3), one by each of `TRANSFORMS`, at most `MAX_SIDE` pixels a side.

    They are a random crop to 90 % of each side, a resizing to 75 %, JPEG compression with quality 40, a change of
    brightness by ±20 %, and a rotation by ±3 degrees, cropped to leave out the empty corners.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    width, height = image.size
    kept = 0.9
    left, top = rng.uniform(0, 1 - kept, 2) * (width, height)
    cropped = image.crop((round(left), round(top), round(left + kept * width), round(top + kept * height)))
    resized = image.resize((max(1, width * 3 // 4), max(1, height * 3 // 4)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    brighter = ImageEnhance.Brightness(image).enhance(rng.choice([0.8, 1.2]))
    turned = image.rotate(3 * rng.choice([-1, 1]), Image.Resampling.BICUBIC)
    slope = math.sin(math.radians(3))
    x, y = (min(math.ceil(slope * other / 2), (side - 1) // 2) for side, other in ((width, height), (height, width)))
    turned = turned.crop((x, y, width - x, height - y))
    return [np.asarray(copy) for copy in (cropped, resized, Image.open(file), brighter, turned)]
