"""Draw training images from a source in one pass, and choose their preprocessing."""

import contextlib
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Content, Inputs, to_vector
from hashret.data.images import decode, has_colour, resize
from hashret.data.preprocessing import ImagePreprocessing, Preprocessing
from hashret.data.records import Record, Source, read
from hashret.data.vectors import NOT_FINITE, VectorPreprocessing
from hashret.errors import HashretError, format_count
from hashret.parallel import ordered_map

MAX_SIDE, MIN_SIDE = 32, 8  # 32: a minute on two cores trains a useful model; a side of 64 takes four times as long
MAX_ORIGINALS = 2**28  # bytes of original images in memory

T = TypeVar("T")
Failures = list[tuple[str, str]]  # (name, reason)


class Sample(NamedTuple):
    """A random sample of a source.

    `images` are preprocessed images, uint8 (n, height, width, channels), or vectors without preprocessing, float32
    (n, d). `labels` has one entry per image; `seen` counts the records of the source; `failures` are (name, reason) of
    drawn images that could not be read.
    """

    images: Inputs
    labels: list[str | None]
    preprocessing: Preprocessing
    seen: int
    failures: Failures


def sample(
    source: Source,
    *,
    size: tuple[int, int] | None = None,
    limit: int = 100_000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Sample:
    """Draw at most `limit` images of a source uniformly at random, and choose their preprocessing.

    The source is read in one pass, and only drawn images are decoded. Memory holds the result and a quarter of a
    gigabyte. The same `seed` gives the same sample. `progress` is called with the number of records seen.

    `size` is (height, width). Without it, images of one common size with sides up to 32 keep that size. Others become
    squares, whose side is the median short side, between 8 and 32; it is 32 without computing the median if the
    originals of larger images exceed the quarter of a gigabyte. The preprocessing has three channels if any image has
    colour (`images.has_colour`), and one otherwise.

    Raise HashretError if the source has no image, or none that can be read, or if vectors are given a size. Raise
    ValueError for an invalid size or limit.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit!r}")
    if size is not None:
        ImagePreprocessing(*size, channels=1)  # raises ValueError
    reservoir = _Reservoir(source, limit, seed, progress)
    if source.dim is None:
        return _sample_images(reservoir, size)
    if size is not None:
        raise HashretError(f"{source.root.location} has vectors, which have no size in pixels: leave --size out")
    return _sample_vectors(reservoir, source.dim)


class _Draw(NamedTuple):
    row: int  # of the sample; replaces an earlier draw of the same row
    record: Record
    content: Content | HashretError | None  # None if it is still to be read


class _Reservoir:
    """Reservoir sampling of `limit` records by Vitter's algorithm R (1985); iterating yields its draws."""

    def __init__(self, source: Source, limit: int, seed: int, progress: Callable[[int], None] | None) -> None:
        self.source, self.limit = source, limit
        self.seen = 0
        self._random = random.Random(seed)
        self._progress = progress

    def __iter__(self) -> Iterator[_Draw]:
        for record in self.source:
            row = self.seen if self.seen < self.limit else int(self._random.random() * (self.seen + 1))
            self.seen += 1
            if self._progress is not None:
                self._progress(self.seen)
            if row < self.limit:
                yield _Draw(row, record, read(record) if self.source.streaming else None)

    def check(self, count: int, failures: Failures) -> None:
        """Raise HashretError if no image was read."""
        location = self.source.root.location
        if not count and failures:
            name, reason = failures[0]
            raise HashretError(f"{location}: no image could be read; the first, {name}: {reason}")
        if not count:
            raise HashretError(f"{location} has no images ({format_count(self.source.ignored, 'other file')} ignored)")


def _sample_vectors(reservoir: _Reservoir, dim: int) -> Sample:
    limit = reservoir.limit
    vectors = np.empty((min(limit, reservoir.source.length or limit), dim), np.float32)
    labels: list[str | None] = []
    failures: Failures = []
    for row, record, _ in reservoir:
        vector = to_vector(record.read())
        if not np.isfinite(vector).all():
            failures.append((record.name, NOT_FINITE))
        elif row < len(labels):
            vectors[row], labels[row] = vector, record.label
        else:
            vectors[len(labels)] = vector
            labels.append(record.label)
    reservoir.check(len(labels), failures)
    vectors = vectors[: len(labels)]
    return Sample(vectors, labels, VectorPreprocessing.fitted(vectors), reservoir.seen, failures)


def _sample_images(reservoir: _Reservoir, size: tuple[int, int] | None) -> Sample:
    decode_draw = partial(_decode_draw, size=size)
    decoded = (
        (decode_draw(draw) for draw in reservoir)
        if reservoir.source.arrays
        else ordered_map(decode_draw, reservoir, weight_of=_weight)
    )
    images = _DecodedImages()
    failures: Failures = []
    with contextlib.closing(decoded):
        for draw, image in decoded:
            if isinstance(image, HashretError):
                failures.append((draw.record.name, str(image)))
            else:
                images.put(draw.row, image)
    reservoir.check(len(images.rows), failures)
    preprocessing = images.choose_preprocessing(size)
    labels = [image.label for image in images.rows]
    return Sample(images.pop_all(preprocessing), labels, preprocessing, reservoir.seen, failures)


class _DecodedImage(NamedTuple):
    pixels: NDArray[np.uint8]  # at most MAX_SIDE × MAX_SIDE, with the channels of the image
    height: int
    width: int
    original: Content | None  # while a size smaller than `pixels` may still be chosen
    label: str | None

    @property
    def original_bytes(self) -> int:
        if isinstance(self.original, np.ndarray):
            return self.original.nbytes
        return 0 if self.original is None else len(self.original)


class _DecodedImages:
    """The drawn images until the preprocessing is chosen, with their originals up to `MAX_ORIGINALS` bytes in all."""

    def __init__(self) -> None:
        self.rows: list[_DecodedImage] = []
        self._original_bytes = 0
        self._has_originals = True  # whether no original was dropped

    def put(self, row: int, image: _DecodedImage) -> None:
        """Replace the image of a row, or append it if there are fewer rows."""
        if not self._has_originals:
            image = image._replace(original=None)
        if row < len(self.rows):
            self._original_bytes -= self.rows[row].original_bytes
            self.rows[row] = image
        else:  # also for a later draw, if broken images left rows empty
            self.rows.append(image)
        self._original_bytes += image.original_bytes
        if self._original_bytes > MAX_ORIGINALS:
            self.rows = [image._replace(original=None) for image in self.rows]
            self._original_bytes, self._has_originals = 0, False

    def choose_preprocessing(self, size: tuple[int, int] | None) -> ImagePreprocessing:
        """Return the preprocessing to `size`, or to the size that `sample` chooses if it is None."""
        colour = any(has_colour(image.pixels) for image in self.rows)
        return ImagePreprocessing(*(size or self._choose_size()), channels=3 if colour else 1)

    def _choose_size(self) -> tuple[int, int]:
        if not self._has_originals:
            return MAX_SIDE, MAX_SIDE
        sizes = [(image.height, image.width) for image in self.rows]
        if max(sizes[0]) <= MAX_SIDE and len(set(sizes)) == 1:
            return sizes[0]
        side = max(MIN_SIDE, min(MAX_SIDE, statistics.median_low(map(min, sizes))))
        return side, side

    def pop_all(self, preprocessing: ImagePreprocessing) -> NDArray[np.uint8]:
        """Remove all images, and return them as inputs, uint8 (n, height, width, channels)."""
        inputs = np.empty((len(self.rows), *preprocessing.shape), np.uint8)
        for row, image in zip(inputs, _drain(self.rows), strict=True):
            has_size = image.original is None or image.pixels.shape[:2] == preprocessing.size
            row[...] = preprocessing(image.pixels if has_size or image.original is None else image.original).pixels
        return inputs


def _drain(items: list[T]) -> Iterator[T]:
    """Remove the items of a list and yield them in order, so that the memory of used ones is freed."""
    items.reverse()
    while items:
        yield items.pop()


def _decode_draw(draw: _Draw, size: tuple[int, int] | None) -> tuple[_Draw, _DecodedImage | HashretError]:
    content = read(draw.record) if draw.content is None else draw.content
    draw = draw._replace(content=None)
    if isinstance(content, HashretError):
        return draw, content
    try:
        if size is not None:
            pixels, width, height = resize(content, *size)
            original = None
        else:
            pixels, width, height = decode(content, at_least=(MAX_SIDE, MAX_SIDE))
            original = content if max(height, width) > MAX_SIDE else None
            if original is not None:
                pixels = resize(pixels, MAX_SIDE, MAX_SIDE).pixels
    except HashretError as error:
        return draw, error
    if isinstance(content, np.ndarray):  # a view into a block of rows: the copy allows the block to be freed
        pixels, original = pixels.copy(), None if original is None else content.copy()
    return draw, _DecodedImage(pixels, height, width, original, draw.record.label)


def _weight(draw: _Draw) -> float:
    return max(1, draw.record.size / 2**22)  # ordered_map reads 64 of them ahead: a quarter of a gigabyte
