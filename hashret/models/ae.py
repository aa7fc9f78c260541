"""The plain autoencoder: Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", Science
2006, https://doi.org/10.1126/science.1127647. Ours is trained end to end with batch normalisation instead of layer by
layer with restricted Boltzmann machines."""

from hashret.models.base import Member


class Autoencoder(Member):
    """Remember an image through a narrow bottleneck of real numbers."""
