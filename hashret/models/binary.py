"""The binary autoencoder: a sign in the bottleneck with a straight-through gradient, after Bengio, Léonard and
Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, https://arxiv.org/abs/1308.3432. Ours
passes the gradient of tanh and batch-normalises each unit, so that no bit becomes constant."""

from torch import Tensor

from hashret.models.base import Member, straight_through_sign


class BinaryAutoencoder(Member):
    """An autoencoder whose bottleneck is the binary code itself."""

    head = "sign"
    normalised = True

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return straight_through_sign(features), {}
