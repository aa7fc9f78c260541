"""The plain autoencoder: Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", Science
2006, https://doi.org/10.1126/science.1127647. Ours is trained end to end with batch normalisation instead of layer by
layer with restricted Boltzmann machines."""

import warnings
from math import prod
from typing import Any

from hashret.models.base import Member


class Autoencoder(Member):
    """Remember an image through a narrow bottleneck of real numbers."""

    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)
        values = prod(self.shape)
        if self.latent >= values and not next(self.parameters()).is_meta:  # where it would only be looked at
            warnings.warn(
                f"a bottleneck of {self.latent} numbers can copy an image of {values} and learn nothing: choose a "
                "smaller latent, or a member with a penalty, such as denoising, sparse or contractive",
                RuntimeWarning,
                stacklevel=2,
            )
