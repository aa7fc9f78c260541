"""Denoise and upscale images of any size with a `denoising` model.

The model's inputs have one size. A larger image is cut into overlapping tiles of that size. Overlaps are blended with
weights that decrease towards the edges of a tile, so that no seams are visible.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.models.denoising import DenoisingAutoencoder
from hashret.runtime.inputs import default_device, to_input

Pixels = NDArray[np.uint8]

TILES_PER_BATCH = 256


def denoise(hasher: Hasher, image: Pixels) -> Pixels:
    """Return a denoised image, uint8 like `image` (height, width, channels) of any size.

    Raise HashretError for a model that was not trained to denoise.
    """
    return _restore(hasher, _to_batch(hasher, image, upscaling=False))


def upscale(hasher: Hasher, image: Pixels) -> Pixels:
    """Return an image, uint8 (height, width, channels), at twice its width and height.

    Raise HashretError for a model that was not trained with `corruption="downscaling"`.
    """
    x = _to_batch(hasher, image, upscaling=True)
    return _restore(hasher, F.interpolate(x, scale_factor=2, mode="bicubic").clamp(0, 1))


def _to_batch(hasher: Hasher, image: Pixels, upscaling: bool) -> Tensor:
    """Return the image as a batch of one with the model's channels. Raise HashretError for an unsuitable model."""
    hasher.preprocessing.require_images("restore")
    corruption = hasher.settings.get("corruption")
    if not isinstance(hasher.member, DenoisingAutoencoder) or (corruption == "downscaling") != upscaling:
        setting = "corruption=downscaling" if upscaling else "corruption=gaussian"
        raise HashretError(
            f"this takes a model that was trained for it: hashret train SOURCE --model denoising --set {setting} "
            f"--set network=unet --set likelihood=gaussian -o MODEL_DIR"
        )
    channels = hasher.preprocessing.channels
    if image.shape[2] != channels:
        image = image.repeat(3, axis=2) if channels == 3 else image.mean(axis=2, keepdims=True).round().astype(np.uint8)
    return to_input(image[None], default_device())


def _restore(hasher: Hasher, x: Tensor) -> Pixels:
    height, width = hasher.preprocessing.height, hasher.preprocessing.width
    rows, columns = _starts(x.shape[2], height), _starts(x.shape[3], width)
    padded = F.pad(x, (0, max(0, width - x.shape[3]), 0, max(0, height - x.shape[2])), mode="replicate")
    window = torch.outer(_window(height), _window(width)).to(x)
    total, weight = torch.zeros_like(padded), torch.zeros_like(padded[:, :1])
    corners = [(top, left) for top in rows for left in columns]
    for start in range(0, len(corners), TILES_PER_BATCH):
        batch = corners[start : start + TILES_PER_BATCH]
        tiles = torch.cat([padded[..., top : top + height, left : left + width] for top, left in batch])
        with torch.inference_mode():
            restored = hasher.member.reconstruct(tiles)
        for tile, (top, left) in zip(restored, batch, strict=True):
            total[0, :, top : top + height, left : left + width] += window * tile
            weight[0, :, top : top + height, left : left + width] += window
    image = (total / weight)[0, :, : x.shape[2], : x.shape[3]]
    return np.asarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _starts(length: int, tile: int) -> list[int]:
    """Return the starts of tiles that overlap by half and cover a length."""
    last = max(0, length - tile)
    return sorted({*range(0, last, max(1, tile // 2)), last})


def _window(length: int) -> Tensor:
    """Return triangular weights above 0."""
    ramp = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(ramp, ramp.flip(0))
