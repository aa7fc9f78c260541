"""Views of one image: random crops, turns, mirrorings, light and erasures, for a whole batch at once. Those of a
vector: noise, and numbers that are left out.

The views of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709) as one affine resampling a batch, with every
image drawing its own parameters.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.models.binary import BinaryAutoencoder
from hashret.models.networks import Shape

AUTO = -1.0
FARTHER = 1.2  # than an image: its mirror image, if it is another one


def in_colour(shape: Shape) -> bool:
    """Whether images of this shape (c, h, w) have three channels; vectors (d,) have none."""
    return len(shape) == 3 and shape[0] == 3


class ViewedAutoencoder(BinaryAutoencoder):
    """A member that learns from views of the images rather than from the images themselves."""

    reconstruction: float

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
        """What views are like (see `augment`); `noise` and `masking` are for vectors. −1 lets the images choose: a
        `flip` is ½ unless their mirror images are other images, as of writing; in colour, as photos are, whose objects
        lie anywhere in any light, `crop` is 0.6 and `light` 0.3, otherwise 0.8 and 0.2."""
        super().__init__(*args, **parts)
        self.colour = in_colour(self.shape)
        crop = (0.6 if self.colour else 0.8) if crop == AUTO else crop
        light = (0.3 if self.colour else 0.2) if light == AUTO else light
        self.free = flip == AUTO
        flip = 0.5 if self.free else flip
        others = {"erase": erase, "grey": grey, "noise": noise, "masking": masking}
        self.views = views(crop=crop, rotation=rotation, flip=flip, light=light, **others)

    def on_train_start(self, x: Tensor, labels: Tensor | None) -> None:
        if self.free and x.ndim == 4:
            self.views["flip"] = 0.0 if mirror_images_are_rarer(x) else 0.5

    def auto_settings(self) -> dict[str, float]:
        told = ("crop", "flip", "light", "grey") if len(self.shape) == 3 else ()
        return {f"view_{name}": self.views[name] for name in told}

    def view(self, x: Tensor) -> Tensor:
        """Another view of each image of a batch."""
        return augment(x, **self.views)

    def reconstruction_loss(self, code: Tensor, x: Tensor) -> dict[str, Tensor]:
        """What the decoder costs, in `reconstruction` nats per pixel; where that is 0, it is not asked."""
        if not self.reconstruction:
            return {}
        nll = self.likelihood.nll(self.decode(code), x).mean() / x[0].numel()
        return {"reconstruction": self.reconstruction * nll}


def views(
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
    """What `augment` takes, checked; raises ValueError for what it cannot do."""
    chosen = {"crop": crop, "rotation": rotation, "flip": flip, "light": light, "erase": erase}
    chosen |= {"grey": grey, "noise": noise, "masking": masking}
    shares = all(0 <= share <= 1 for share in (flip, light, erase, grey, masking))
    if not (0 < crop <= 1 and min(rotation, noise) >= 0 and shares):
        raise ValueError(
            "crop must be above 0 and at most 1, rotation 0 or more, noise too, and flip, light, erase, grey and "
            "masking from 0 to 1, not " + ", ".join(f"{name} {value}" for name, value in chosen.items())
        )
    return chosen


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
    """Another view of each image: float32 (n, c, h, w) in and out, in [0, 1]; or of each vector (n, d).

    `crop` is the smallest share of a side that is kept (before a change of the aspect ratio by at most exp(1 − crop)),
    `rotation` the largest turn in degrees, `flip` the probability of a mirror image, `light` the largest relative
    change of contrast and of brightness, and half of it that of a single channel beside, `erase` the largest side of an
    erased rectangle as a share of the image's, and `grey` the probability that every channel becomes their mean. Of
    vectors, whose mean is 0 and variance 1, `masking` is the share of numbers that become 0, and `noise` the standard
    deviation of what is added to the others.
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


def moved(x: Tensor, most: int) -> Tensor:
    """Each image, (n, c, h, w), moved by whole pixels, at most so many each way, its edge repeated behind it."""
    n, _, height, width = x.shape
    padded = F.pad(x, (most,) * 4, mode="replicate")
    top, left = torch.randint(2 * most + 1, (2, n, 1), device=x.device)
    rows, columns = ((first + torch.arange(side, device=x.device)) for first, side in ((top, height), (left, width)))
    each = torch.arange(n, device=x.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def mirror_images_are_rarer(x: Tensor) -> bool:
    """Whether the mirror images of x, float32 (n, c, h, w), are farther from the other images than the images
    themselves: by over a fifth, at the median of 1,000, from the nearest of 5,000, of which only 16 × 16 pixels are
    compared. Then left and right are no matter of chance, as in writing, and a mirror image is another image."""
    small = F.adaptive_avg_pool2d(x[:5000], 16)
    asked = small[:1000]
    images = small.flatten(1)
    own = torch.arange(len(asked), device=x.device)

    def nearest(queries: Tensor) -> Tensor:
        distances = torch.cdist(queries.flatten(1), images)
        distances[own, own] = math.inf
        return distances.amin(1)

    return bool((nearest(asked.flip(3)) / nearest(asked).clamp(min=1e-6)).median() > FARTHER)
