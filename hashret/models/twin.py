"""Twin-bottleneck hashing: Shen, Qin, Chen, Yu, Liu, Zhu, Shen and Shao, "Auto-Encoding Twin-Bottleneck Hashing", CVPR
2020, https://arxiv.org/abs/2002.11930. Ours replaces the adversarial regularisation of both bottlenecks by batch
normalisation, which gives them the mean and variance of the prior."""

from typing import Any

import torch
from torch import Tensor, nn

from hashret.models.base import Member, straight_through_sign


def laplacian(b: Tensor) -> Tensor:
    """Return the normalised adjacency D^−½ A D^−½ (n, n) of codes `b` (n, d) of ±1; A is the share of equal bits."""
    adjacency = (1 + b @ b.T / b.shape[1]) / 2
    scale = adjacency.sum(1).rsqrt()
    return scale[:, None] * adjacency * scale


class TwinBottleneck(Member):
    """An autoencoder with a binary and a real-valued bottleneck: a graph convolution over the batch averages the
    real-valued one among images of similar codes.

    The bits learn to group images that help to reconstruct each other. A reconstruction therefore depends on the other
    images of its batch; a code does not.
    """

    head = "sign"
    normalised = True
    outputs_per_latent = 2

    def __init__(self, *args: Any, **parts: Any) -> None:
        super().__init__(*args, **parts)
        self.convolution = nn.Linear(self.latent, self.latent)

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h, z = features.chunk(2, dim=1)
        return torch.sigmoid(laplacian(straight_through_sign(h)) @ self.convolution(z)), {}
