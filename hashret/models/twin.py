"""Twin-bottleneck hashing: Shen, Qin, Chen, Yu, Liu, Zhu, Shen and Shao, "Auto-Encoding Twin-Bottleneck Hashing", CVPR
2020, https://arxiv.org/abs/2002.11930. Ours has no adversaries that hold the bottlenecks to a prior: instead, batch
normalisation gives both of them the prior's mean and variance."""

from typing import Any

import torch
from torch import Tensor, nn

from hashret.models.base import Member, straight_through_sign


def laplacian(b: Tensor) -> Tensor:
    """D^−½ A D^−½ (n, n) of the graph on codes `b` (n, d) of ±1, where A is the share of bits that two codes share."""
    adjacency = (1 + b @ b.T / b.shape[1]) / 2
    scale = adjacency.sum(1).rsqrt()
    return scale[:, None] * adjacency * scale


class TwinBottleneck(Member):
    """Remember an image through real numbers that are mixed with those of images of similar codes.

    The bits decide who is mixed with whom, and learn to bring together images that help to remember each other. A
    reconstruction therefore depends on the other images of its batch; a code does not.
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
