"""The plain autoencoder: Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", Science
2006, https://doi.org/10.1126/science.1127647. Ours is trained end to end with batch normalisation instead of layer by
layer with restricted Boltzmann machines."""

import warnings
from math import prod
from typing import Any

from torch import Tensor

from hashret.models.augment import moved
from hashret.models.base import Member

FARTHEST = 7  # pixels, of the 32 or so that an image has


class Autoencoder(Member):
    """Remember an image through a narrow bottleneck of real numbers."""

    def __init__(self, *args: Any, shift: int = 0, **parts: Any) -> None:
        """`shift` is by how many pixels images are moved at most, at random, each time they are learned from: then long
        trainings remember others better."""
        super().__init__(*args, **parts)
        if not 0 <= shift <= FARTHEST or (shift and len(self.shape) != 3):
            raise ValueError(f"shift must be from 0 to {FARTHEST}, and 0 for vectors, not {shift}")
        self.shift = shift
        values = prod(self.shape)
        if self.latent >= values and not next(self.parameters()).is_meta:  # where it would only be looked at
            warnings.warn(
                f"a bottleneck of {self.latent} numbers can copy an image of {values} and learn nothing: choose a "
                "smaller latent, or a member with a penalty, such as denoising, sparse or contractive",
                RuntimeWarning,
                stacklevel=2,
            )

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        return super().loss(moved(x, self.shift) if self.shift and self.training else x)
