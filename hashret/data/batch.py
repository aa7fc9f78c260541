"""A batch of images in any accepted form, and a map over it in order."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from hashret.data.arrays import vector_dim
from hashret.data.images import as_batch
from hashret.parallel import ordered_map

R = TypeVar("R")

SMALL_FILE, SMALL_ARRAY = 2**12, 2**14  # bytes of an image up to which threads cost more than they save


def iter_images(images: Any) -> Iterable[Any]:
    """Return the images of a batch as an iterable.

    A batch is an array (n, h, w) or (n, h, w, c), a single path, a sequence of images, or vectors, an array of floats
    (n, d). Raise ValueError for anything else.
    """
    images = as_batch(images)
    if isinstance(images, np.ndarray) and vector_dim(images.shape, images.dtype) is None and images.ndim not in (3, 4):
        raise ValueError(
            f"an array of images has shape (n, h, w) or (n, h, w, c), not {images.shape}, and one of vectors has "
            f"floats (n, d)"
        )
    if not isinstance(images, Iterable):
        raise ValueError(f"images are an array, a path, or a sequence of images, not {type(images).__name__}")
    return images


def map_images(function: Callable[[Any], R], images: Any) -> Iterator[R]:
    """Yield `function(image)` for each image of a batch, in order; in parallel where that is faster."""
    for small, group in groupby(iter_images(images), _is_small):
        if small:  # handing an image to a thread takes longer than decoding it
            yield from map(function, group)
        else:
            yield from ordered_map(function, group)


def _is_small(image: Any) -> bool:
    """Return whether an image is in memory and so small that it decodes in a fraction of a millisecond."""
    return (isinstance(image, bytes) and len(image) <= SMALL_FILE) or (
        isinstance(image, np.ndarray) and image.nbytes <= SMALL_ARRAY
    )
