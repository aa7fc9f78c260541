"""Augmented views of images (random crops, rotations, mirroring, brightness, erasure) and of vectors (noise, masking),
computed for a whole batch at once.

The views are those of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709), as one affine resampling per batch
with random parameters for each image.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.models.binary import BinaryAutoencoder
from hashret.models.networks import Shape

AUTO = -1.0  # the value of a setting that is chosen from the images
MIRROR_RATIO = 1.2  # flips are off if mirror images are farther from other images than this times the images' distance


def is_colour(shape: Shape) -> bool:
    """Return whether images of this shape (c, h, w) have three channels; False for vectors (d,)."""
    return len(shape) == 3 and shape[0] == 3


class ViewedAutoencoder(BinaryAutoencoder):
    """Base class of the members that learn from augmented views of the images."""

    reconstruction: float  # weight of the reconstruction loss

    def __init__(
        self,
        *args: Any,
        crop: float = AUTO,
        rotation: float = 10.0,
        flip: float = AUTO,
        light: float = AUTO,
        erase: float = 0.0,
        grey: float = 0.0,
        noise: float = 0.1,
        masking: float = 0.05,
        **parts: Any,
    ) -> None:
        """The settings are those of `augment`; `noise` and `masking` are for vectors.

        A setting of −1 is derived from the images. `flip` becomes 0 if mirrored images are unlike the others, as in
        writing, otherwise ½. `crop` and `light` become 0.6 and 0.3 for colour images, which are mostly photos with
        objects at any place and in any light, otherwise 0.8 and 0.2.
        """
        super().__init__(*args, **parts)
        self.colour = is_colour(self.shape)
        crop = (0.6 if self.colour else 0.8) if crop == AUTO else crop
        light = (0.3 if self.colour else 0.2) if light == AUTO else light
        self.auto_flip = flip == AUTO
        flip = 0.5 if self.auto_flip else flip
        others = {"erase": erase, "grey": grey, "noise": noise, "masking": masking}
        self.view_settings = check_views(crop=crop, rotation=rotation, flip=flip, light=light, **others)

    def on_train_start(self, x: Tensor, labels: Tensor | None) -> None:
        if self.auto_flip and x.ndim == 4:
            self.view_settings["flip"] = 0.0 if mirror_images_are_rarer(x) else 0.5

    def auto_settings(self) -> dict[str, float]:
        names = ("crop", "flip", "light", "grey") if len(self.shape) == 3 else ()
        return {f"view_{name}": self.view_settings[name] for name in names}

    def view(self, x: Tensor) -> Tensor:
        """Return a random view of each image of a batch, in the shape of `x`."""
        return augment(x, **self.view_settings)

    def reconstruction_loss(self, code: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Return the weighted negative log-likelihood in nats per pixel, or nothing if its weight is 0."""
        if not self.reconstruction:
            return {}
        nll = self.likelihood.nll(self.decode(code), x).mean() / x[0].numel()
        return {"reconstruction": self.reconstruction * nll}


def check_views(
    *,
    crop: float,
    rotation: float,
    flip: float,
    light: float,
    erase: float = 0.0,
    grey: float = 0.0,
    noise: float = 0.0,
    masking: float = 0.0,
) -> dict[str, float]:
    """Return the arguments of `augment` by name. Raise ValueError for values out of range."""
    settings = {"crop": crop, "rotation": rotation, "flip": flip, "light": light, "erase": erase}
    settings |= {"grey": grey, "noise": noise, "masking": masking}
    are_shares = all(0 <= share <= 1 for share in (flip, light, erase, grey, masking))
    if not (0 < crop <= 1 and min(rotation, noise) >= 0 and are_shares):
        raise ValueError(
            "crop must be above 0 and at most 1, rotation 0 or more, noise too, and flip, light, erase, grey and "
            "masking from 0 to 1, not " + ", ".join(f"{name} {value}" for name, value in settings.items())
        )
    return settings


def augment(
    x: Tensor,
    *,
    crop: float,
    rotation: float,
    flip: float,
    light: float,
    erase: float,
    grey: float = 0.0,
    noise: float = 0.0,
    masking: float = 0.0,
) -> Tensor:
    """Return a random view of each image, float32 (n, c, h, w) in [0, 1], or of each vector (n, d).

    `crop` is the smallest share of a side that is kept, before a random change of the aspect ratio by a factor of at
    most exp(1 − crop). `rotation` is the largest angle in degrees and `flip` the probability of
    mirroring. `light` is the largest relative change of contrast and of brightness; each channel varies by half of it
    besides. `erase` is the largest side of an erased rectangle as a share of the image's side, and `grey` the
    probability that all channels become their mean. For vectors of mean 0 and variance 1, `masking` is the share of
    coordinates set to 0 and `noise` the standard deviation of the noise added to the others.
    """
    if x.ndim == 2:
        return (x + noise * torch.randn_like(x)) * (torch.rand_like(x) >= masking)
    n, channels, height, width = x.shape

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *size, device=x.device, dtype=x.dtype)

    scale = uniform(crop, 1)
    stretch = uniform(-0.5, 0.5).mul(1 - crop).exp()
    angle = uniform(-rotation, rotation) * (math.pi / 180)
    mirror = torch.where(uniform(0, 1) < flip, -1.0, 1.0).to(x.dtype)
    theta = x.new_empty(n, 2, 3)
    theta[:, 0, 0] = scale * stretch * angle.cos() * mirror
    theta[:, 0, 1] = -scale * angle.sin() * (height / width)  # both axes run from −1 to 1, whatever the sides are
    theta[:, 1, 0] = scale * angle.sin() * (width / height) * mirror
    theta[:, 1, 1] = scale / stretch * angle.cos()
    theta[:, :, 2] = uniform(-1, 1, 2) * (1 - scale)[:, None]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    if light:
        middle = x.mean((1, 2, 3), keepdim=True)
        x = (x - middle) * uniform(1 - light, 1 + light, 1, 1, 1) + middle
        brightness = uniform(1 - light, 1 + light, 1, 1, 1)
        if channels > 1:
            brightness = brightness * uniform(1 - light / 2, 1 + light / 2, channels, 1, 1)
        x = (x * brightness).clamp(0, 1)
    if grey and channels > 1:
        x = torch.where(uniform(0, 1, 1, 1, 1) < grey, x.mean(1, keepdim=True), x)
    if erase:
        top, left = uniform(0, 1, 1, 1, 1), uniform(0, 1, 1, 1, 1)
        half = uniform(0, erase / 2, 1, 1, 1)
        rows = torch.linspace(0, 1, height, device=x.device, dtype=x.dtype).view(1, 1, -1, 1)
        columns = torch.linspace(0, 1, width, device=x.device, dtype=x.dtype).view(1, 1, 1, -1)
        x = x.masked_fill(((rows - top).abs() < half) & ((columns - left).abs() < half), 0.0)
    return x


def random_shift(x: Tensor, max_shift: int) -> Tensor:
    """Translate each image (n, c, h, w) by a random whole number of pixels, at most `max_shift` along each axis, and
    fill the gap by repeating the edge."""
    n, _, height, width = x.shape
    padded = F.pad(x, (max_shift,) * 4, mode="replicate")
    top, left = torch.randint(2 * max_shift + 1, (2, n, 1), device=x.device)
    rows, columns = ((first + torch.arange(side, device=x.device)) for first, side in ((top, height), (left, width)))
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def mirror_images_are_rarer(x: Tensor) -> bool:
    """Return whether the mirror images of x, float32 (n, c, h, w), are unlike the other images.

    They are if their distance from the nearest other image exceeds that of the image itself by over a fifth, as the
    median over 1,000 images, among 5,000, at 16 × 16 pixels. Orientation then carries meaning, as in writing, and a
    flip would show another image.
    """
    small = F.adaptive_avg_pool2d(x[:5000], 16)
    queries = small[:1000]
    images = small.flatten(1)
    own = torch.arange(len(queries), device=x.device)

    def nearest_distances(queries: Tensor) -> Tensor:
        distances = torch.cdist(queries.flatten(1), images)
        distances[own, own] = math.inf
        return distances.amin(1)

    ratios = nearest_distances(queries.flip(3)) / nearest_distances(queries).clamp(min=1e-6)
    return bool(ratios.median() > MIRROR_RATIO)
