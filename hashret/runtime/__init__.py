"""The evaluation of networks, from NumPy to NumPy, whatever library computes them."""

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Inputs

__all__ = ["BATCH_SIZE", "Runtime", "batch_slices"]

BATCH_SIZE, MAX_BATCH_VALUES = 1000, 2**21  # the most images, and the most values in them, per forward pass


class Runtime(Protocol):
    """A network that can be evaluated on batches of the size of one forward pass."""

    def outputs(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float32]:
        """Return the outputs (n, latent) that a head turns into bits. With `single_thread` only the calling thread
        works."""
        ...

    def exact(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float64]:
        """Return the outputs (n, latent), computed in float64."""
        ...


def batch_slices(images: Inputs, length: int | None = None) -> Iterator[slice]:
    """Yield the slices of the images, or of `length` images of their shape, that form the batches of forward passes."""
    length = len(images) if length is None else length
    size = max(1, min(BATCH_SIZE, MAX_BATCH_VALUES // math.prod(images.shape[1:])))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
