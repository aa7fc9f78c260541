"""The bi-half autoencoder: Li and van Gemert, "Deep Unsupervised Image Hashing by Maximizing Bit Entropy", AAAI 2021,
https://arxiv.org/abs/2012.12334. Ours minimises the penalty whose gradient is the γ (h − b) that they add to the
gradient, and batch-normalises each unit, so that the signs of test images are nearly balanced too."""

from typing import Any

import torch
from torch import Tensor

from hashret.models.binary import BinaryAutoencoder


def halves(h: Tensor) -> Tensor:
    """Return +1 for the upper half of each column of `h` (n, d) and −1 for the lower: the nearest balanced signs by
    optimal transport. The median of an odd number is −1; equal values are ordered by row."""
    n = len(h)
    rank = h.argsort(stable=True, dim=0).argsort(dim=0)
    return torch.where(rank >= n - n // 2, 1.0, -1.0).to(h.dtype)


class BihalfAutoencoder(BinaryAutoencoder):
    """An autoencoder with binary codes, each bit of which is 1 for half of every batch."""

    def __init__(self, *args: Any, gamma: float = 1.0, **parts: Any) -> None:
        """`gamma` is the weight of the quantisation penalty ½ ‖h − b‖²."""
        super().__init__(*args, **parts)
        if not gamma >= 0:
            raise ValueError(f"gamma must be 0 or more, not {gamma}")
        self.gamma = gamma

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = features.float()
        b = halves(h.detach()) if self.training else torch.where(h > 0, 1.0, -1.0)
        penalty = {"quantisation": 0.5 * self.gamma * (h - b).square().sum(1).mean()}
        return b + (h - h.detach()), penalty  # bits with the gradient of h
