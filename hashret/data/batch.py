"""A batch of images, in whichever form it is given, prepared one by one and in order."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, TypeVar

import numpy as np

from hashret.data.arrays import vector_dim
from hashret.data.images import as_batch
from hashret.parallel import in_order

R = TypeVar("R")

SMALL_FILE, SMALL_ARRAY = 2**12, 2**14  # bytes of images that are decoded one after the other


def iter_images(images: Any) -> Iterable[Any]:
    """The images of a batch: an array (n, h, w) or (n, h, w, c), a path, or a sequence of images; or vectors, an array
    of floats (n, d). Raises ValueError for anything else."""
    images = as_batch(images)
    if isinstance(images, np.ndarray) and vector_dim(images.shape, images.dtype) is None and images.ndim not in (3, 4):
        raise ValueError(
            f"an array of images has shape (n, h, w) or (n, h, w, c), not {images.shape}, and one of vectors has "
            f"floats (n, d)"
        )
    if not isinstance(images, Iterable):
        raise ValueError(f"images are an array, a path, or a sequence of images, not {type(images).__name__}")
    return images


def map_images(prepare: Callable[[Any], R], images: Any) -> Iterator[R]:
    """`prepare` of each of a batch of images, in their order, in parallel where that is faster."""
    for small, group in groupby(iter_images(images), _is_small):
        if small:  # threads would take longer to take turns than to decode
            yield from map(prepare, group)
        else:
            yield from in_order(prepare, group)


def _is_small(image: Any) -> bool:
    """Whether an image is in memory and decoded in a fraction of a millisecond, beyond doubt or nearly so."""
    return (isinstance(image, bytes) and len(image) <= SMALL_FILE) or (
        isinstance(image, np.ndarray) and image.nbytes <= SMALL_ARRAY
    )
