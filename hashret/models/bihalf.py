"""The bi-half autoencoder: Li and van Gemert, "Deep Unsupervised Image Hashing by Maximizing Bit Entropy", AAAI 2021,
https://arxiv.org/abs/2012.12334. Ours writes the γ (h − b) that they add to the gradient as the penalty that has this
gradient, and normalises each unit over the batch, so that the plain signs of a test image are nearly halves too."""

from typing import Any

import torch
from torch import Tensor

from hashret.models.binary import BinaryAutoencoder


def halves(h: Tensor) -> Tensor:
    """+1 for the upper half of each column of `h` (n, d), −1 for the lower: the nearest balanced signs, by optimal
    transport. Of an odd number the one in the middle is −1; equal values go by their rows."""
    n = len(h)
    rank = h.argsort(stable=True, dim=0).argsort(dim=0)
    return torch.where(rank >= n - n // 2, 1.0, -1.0).to(h.dtype)


class BihalfAutoencoder(BinaryAutoencoder):
    """Remember an image through bits that half of each batch has."""

    def __init__(self, *args: Any, gamma: float = 1.0, **parts: Any) -> None:
        """`gamma` pulls each number towards its bit."""
        super().__init__(*args, **parts)
        if not gamma >= 0:
            raise ValueError(f"gamma must be 0 or more, not {gamma}")
        self.gamma = gamma

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = features.float()
        b = halves(h.detach()) if self.training else torch.where(h > 0, 1.0, -1.0)
        pull = {"quantisation": 0.5 * self.gamma * (h - b).square().sum(1).mean()}
        return b + (h - h.detach()), pull  # bits with the gradient of h
