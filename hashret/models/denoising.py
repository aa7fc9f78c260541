"""The denoising autoencoder: Vincent, Larochelle, Lajoie, Bengio and Manzagol, "Stacked Denoising Autoencoders", JMLR
2010, https://jmlr.org/papers/v11/vincent10a.html. Ours is trained end to end, not layer by layer."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.errors import choose
from hashret.models.base import Member, check_for_vectors


def _gaussian(x: Tensor, strength: float) -> Tensor:
    return x + strength * torch.randn_like(x)


def _masking(x: Tensor, strength: float) -> Tensor:
    return x * (torch.rand_like(x) >= strength)


def _salt_and_pepper(x: Tensor, strength: float) -> Tensor:
    return torch.where(torch.rand_like(x) < strength, torch.rand_like(x).round(), x)


def _downscaling(x: Tensor, strength: float) -> Tensor:
    """Return images at half their width and height, enlarged again: the input of super-resolution."""
    half = [max(1, side // 2) for side in x.shape[2:]]
    smaller = F.interpolate(x, half, mode="bilinear", antialias=True)
    return F.interpolate(smaller, x.shape[2:], mode="bicubic").clamp(0, 1)


CORRUPTIONS = {
    "gaussian": _gaussian,
    "masking": _masking,
    "salt-and-pepper": _salt_and_pepper,
    "downscaling": _downscaling,
}


class DenoisingAutoencoder(Member):
    """An autoencoder that reconstructs the clean image from a corrupted one."""

    allows_skips = True

    def __init__(self, *args: Any, corruption: str = "masking", strength: float = 0.3, **parts: Any) -> None:
        """`corruption` is `gaussian`, `masking`, `salt-and-pepper` or `downscaling`. `strength` is the standard
        deviation of `gaussian` noise, or the share of pixels that `masking` and `salt-and-pepper` replace;
        `downscaling` is always by two."""
        super().__init__(*args, **parts)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be from 0 to 1, not {strength}")
        self.corruption, self.strength = choose(CORRUPTIONS, corruption, "corruption"), strength
        if len(self.shape) == 1:
            check_for_vectors("corruption", corruption, ["gaussian", "masking"])

    def corrupt(self, x: Tensor) -> Tensor:
        return self.corruption(x, self.strength)
