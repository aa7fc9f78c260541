"""The images that a model learns from, drawn from a source in one pass, and the preprocessing that fits them."""

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
from hashret.errors import HashretError
from hashret.parallel import in_order

MAX_SIDE, MIN_SIDE = 32, 8  # at 32 a minute on two cores teaches a model something; at 64, four times as slow, not
MAX_ORIGINALS = 2**28  # bytes

T = TypeVar("T")
Failures = list[tuple[str, str]]  # (name, reason)


class Sample(NamedTuple):
    """Images chosen from a source, as the chosen preprocessing makes them: uint8 (n, height, width, channels). Vectors
    are float32 (n, d), and as they are in the source.

    `labels` are those of the images; `seen` counts the records of the source; `failures` are (name, reason) of chosen
    images that could not be read.
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
    """At most `limit` images of a source, each with the same chance, and the preprocessing that fits them.

    One pass, in memory for the result and a quarter of a gigabyte; only chosen images are decoded. `size` is (height,
    width). Without it, images that all have one size with sides up to 32 keep that; others become squares of 32, or of
    the median short side where that is smaller, but at least 8 (the median is not waited for, and the side is 32, once
    the originals of images larger than 32 fill the quarter gigabyte). The model sees colour when any image has some
    (`images.has_colour`). `progress` is called with the number of records seen. The same seed gives the same sample.
    Raises HashretError when there is no image or none that can be read, or a size for vectors, ValueError for an
    impossible size or limit.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit!r}")
    if size is not None:
        ImagePreprocessing(*size, channels=1)  # raises ValueError
    draws = _Draws(source, limit, seed, progress)
    if source.numbers is None:
        return _sample_images(draws, size)
    if size is not None:
        raise HashretError(f"{source.root.location} has vectors, which have no size in pixels: leave --size out")
    return _sample_vectors(draws, source.numbers)


class _Draw(NamedTuple):
    row: int  # of the sample, which an earlier draw may have had
    record: Record
    content: Content | HashretError | None  # where it had to be read already


class _Draws:
    """The records of a source that come into the sample, for now at least: `limit` of all those seen, each with the
    same chance, by Vitter's algorithm R (1985)."""

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

    def check(self, found: int, failures: Failures) -> None:
        """Raise HashretError if nothing was found in them."""
        location = self.source.root.location
        if not found and failures:
            name, reason = failures[0]
            raise HashretError(f"{location}: none of {self.seen} images could be read; the first, {name}: {reason}")
        if not found:
            raise HashretError(f"{location} has no images ({self.source.ignored} other files were passed over)")


def _sample_vectors(draws: _Draws, numbers: int) -> Sample:
    vectors = np.empty((min(draws.limit, draws.source.length or draws.limit), numbers), np.float32)
    labels: list[str | None] = []
    failures: Failures = []
    for row, record, _ in draws:
        vector = to_vector(record.read())
        if not np.isfinite(vector).all():
            failures.append((record.name, NOT_FINITE))
        elif row < len(labels):
            vectors[row], labels[row] = vector, record.label
        else:
            vectors[len(labels)] = vector
            labels.append(record.label)
    draws.check(len(labels), failures)
    vectors = vectors[: len(labels)]
    return Sample(vectors, labels, VectorPreprocessing.fitted(vectors), draws.seen, failures)


def _sample_images(draws: _Draws, size: tuple[int, int] | None) -> Sample:
    decoder = partial(_decode, size=size)
    decoded = (decoder(draw) for draw in draws) if draws.source.arrays else in_order(decoder, draws, weigh=_weight)
    candidates = _Candidates()
    failures: Failures = []
    with contextlib.closing(decoded):
        for draw, candidate in decoded:
            if isinstance(candidate, HashretError):
                failures.append((draw.record.name, str(candidate)))
            else:
                candidates.put(draw.row, candidate)
    draws.check(len(candidates.images), failures)
    preprocessing = candidates.suited(size)
    labels = [candidate.label for candidate in candidates.images]
    return Sample(candidates.prepared(preprocessing), labels, preprocessing, draws.seen, failures)


class _Candidate(NamedTuple):
    pixels: NDArray[np.uint8]  # as large as the model can see, in the image's own channels
    height: int
    width: int
    original: Content | None  # kept while a size smaller than `pixels` may still be chosen
    label: str | None

    @property
    def original_bytes(self) -> int:
        if isinstance(self.original, np.ndarray):
            return self.original.nbytes
        return 0 if self.original is None else len(self.original)


class _Candidates:
    """The images of a sample until its size is chosen, with their originals while these are few bytes."""

    def __init__(self) -> None:
        self.images: list[_Candidate] = []
        self._bytes = 0  # of originals
        self._complete = True  # whether every original that may be needed is kept

    def put(self, row: int, image: _Candidate) -> None:
        """Put an image into a row of the sample in place of the one in it, or else at the end."""
        if not self._complete:
            image = image._replace(original=None)
        if row < len(self.images):
            self._bytes -= self.images[row].original_bytes
            self.images[row] = image
        else:  # the first ones, and later where broken images left rows empty
            self.images.append(image)
        self._bytes += image.original_bytes
        if self._bytes > MAX_ORIGINALS:
            self.images = [image._replace(original=None) for image in self.images]
            self._bytes, self._complete = 0, False

    def suited(self, size: tuple[int, int] | None) -> ImagePreprocessing:
        """The preprocessing that fits them, of this size if one is given."""
        colour = any(has_colour(image.pixels) for image in self.images)
        return ImagePreprocessing(*(size or self._size()), channels=3 if colour else 1)

    def _size(self) -> tuple[int, int]:
        if not self._complete:
            return MAX_SIDE, MAX_SIDE
        sizes = [(image.height, image.width) for image in self.images]
        if max(sizes[0]) <= MAX_SIDE and len(set(sizes)) == 1:
            return sizes[0]
        side = max(MIN_SIDE, min(MAX_SIDE, statistics.median_low(map(min, sizes))))
        return side, side

    def prepared(self, preprocessing: ImagePreprocessing) -> NDArray[np.uint8]:
        """The images as a model sees them, (n, height, width, channels); they are let go."""
        out = np.empty((len(self.images), *preprocessing.shape), np.uint8)
        for row, image in zip(out, _drain(self.images), strict=True):
            fits = image.original is None or image.pixels.shape[:2] == preprocessing.size
            row[...] = preprocessing(image.pixels if fits or image.original is None else image.original).pixels
        return out


def _drain(items: list[T]) -> Iterator[T]:
    """The items of a list in order, each taken out of it first, so that memory is freed while they are used."""
    items.reverse()
    while items:
        yield items.pop()


def _decode(draw: _Draw, size: tuple[int, int] | None) -> tuple[_Draw, _Candidate | HashretError]:
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
    if isinstance(content, np.ndarray):  # rows are views into blocks: a copy lets go of the block
        pixels, original = pixels.copy(), None if original is None else content.copy()
    return draw, _Candidate(pixels, height, width, original, draw.record.label)


def _weight(draw: _Draw) -> float:
    return max(1, draw.record.size / 2**22)  # of which 64, a quarter gigabyte, are read before the first is looked at
