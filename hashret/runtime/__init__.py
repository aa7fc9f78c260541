"""Evaluating networks: NumPy in and out, whatever computes them, and codes that do not depend on it."""

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import Inputs

__all__ = ["Runtime", "batch_slices"]

PASS, PASS_NUMBERS = 1000, 2**21  # images in one forward pass, at most, and the numbers that they have together


class Runtime(Protocol):
    """A network that can be evaluated. It takes as many images as fit one pass."""

    def outputs(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float32]:
        """The real numbers (n, latent) that a head turns into bits. With `alone` the calling thread does all the
        work."""
        ...

    def exact(self, pixels: Inputs, single_thread: bool = False) -> NDArray[np.float64]:
        """The same (n, latent), computed in float64."""
        ...


def batch_slices(images: Inputs, length: int | None = None) -> Iterator[slice]:
    """The rows of images, or of so many like them, that go through a network together."""
    length = len(images) if length is None else length
    size = max(1, min(PASS, PASS_NUMBERS // math.prod(images.shape[1:])))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
