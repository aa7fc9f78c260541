"""Baselines without a network: the head is applied to the pixels. Learned members are compared with them."""

from math import prod

from torch import Tensor, nn

from hashret.models.base import Member
from hashret.models.networks import Shape


class Pixels(Member):
    """A member without a network, whose outputs are the flattened pixels."""

    trainable = False

    def __init__(self, shape: Shape, bits: int) -> None:
        nn.Module.__init__(self)
        self.shape, self.bits, self.latent = shape, bits, prod(shape)

    def outputs(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Lsh(Pixels):
    """Signs of random projections: Charikar, "Similarity Estimation Techniques from Rounding Algorithms", STOC 2002."""

    head = "lsh"


class Pca(Pixels):
    """Signs of the principal components: Wang, Kumar and Chang, "Semi-Supervised Hashing", CVPR 2010."""

    head = "pca"


class Itq(Pixels):
    """Signs of rotated principal components: Gong and Lazebnik, "Iterative Quantization", CVPR 2011."""

    head = "itq"


class AnchorGraph(Pixels):
    """Signs of coordinates in a graph of the images: Liu, Wang, Kumar and Chang, "Hashing with Graphs", ICML 2011."""

    head = "anchor-graph"
