"""The plain autoencoder: Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", Science
2006, https://doi.org/10.1126/science.1127647. Ours is trained end to end with batch normalisation, without layer-wise
pretraining by restricted Boltzmann machines."""

import warnings
from math import prod
from typing import Any

from torch import Tensor

from hashret.models.augment import random_shift
from hashret.models.base import Member

MAX_SHIFT = 7  # pixels; images are about 32 pixels wide


class Autoencoder(Member):
    """An autoencoder with a narrow bottleneck of real numbers."""

    def __init__(self, *args: Any, shift: int = 0, **parts: Any) -> None:
        """`shift` is the largest random translation, in pixels, of a training image: it lowers the reconstruction error
        of other images in long trainings."""
        super().__init__(*args, **parts)
        if not 0 <= shift <= MAX_SHIFT or (shift and len(self.shape) != 3):
            raise ValueError(f"shift must be from 0 to {MAX_SHIFT}, and 0 for vectors, not {shift}")
        self.shift = shift
        values = prod(self.shape)
        if self.latent >= values and not next(self.parameters()).is_meta:  # not where only sizes are computed
            warnings.warn(
                f"a bottleneck of {self.latent} numbers can copy an image of {values} and learn nothing: choose a "
                "smaller latent, or a member with a penalty, such as denoising, sparse or contractive",
                RuntimeWarning,
                stacklevel=2,
            )

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        return super().loss(random_shift(x, self.shift) if self.shift and self.training else x)
