"""The linear autoencoder, which spans the principal subspace: Baldi and Hornik, "Neural Networks and Principal
Component Analysis: Learning from Examples Without Local Minima", Neural Networks 1989,
https://doi.org/10.1016/0893-6080(89)90014-2. Ours has biases, which replace centring the images."""

from math import prod

from torch import nn

from hashret.models.base import Member
from hashret.models.likelihoods import LIKELIHOODS
from hashret.models.networks import Shape


class LinearAutoencoder(Member):
    """An autoencoder with a linear encoder and decoder and the squared error as loss."""

    def __init__(self, shape: Shape, bits: int, *, latent: int = 0) -> None:
        """`latent` is the width of the bottleneck, 0 for one unit per bit."""
        nn.Module.__init__(self)
        if latent < 0:
            raise ValueError(f"latent must be 0 or more, not {latent}")
        self.shape, self.bits, self.latent = shape, bits, latent or bits
        self.likelihood = LIKELIHOODS["gaussian"]
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), self.latent))
        self.decoder = nn.Sequential(nn.Linear(self.latent, prod(shape)), nn.Unflatten(1, shape))
