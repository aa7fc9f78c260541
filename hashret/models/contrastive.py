"""The binarised autoencoder whose two augmented views must agree: the contrastive term of Qiu, Su, Ou, Yu and Chen,
"Unsupervised Hashing with Contrastive Information Bottleneck", IJCAI 2021, https://arxiv.org/abs/2105.06138. Ours keeps
a decoder beside it, which holds on to what the views agree on by chance."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.models.augment import augment, mirror_images_are_rarer, views
from hashret.models.base import straight_through_sign
from hashret.models.binary import BinaryAutoencoder
from hashret.models.networks import Shape

LATENT = 64  # units at least
BY_THE_IMAGES = -1.0


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020): row i of `a` and of `b` (n, d) are a pair."""
    n = len(a)
    views = F.normalize(torch.cat([a, b]).float(), dim=1)
    similarities = views @ views.T / temperature
    similarities.fill_diagonal_(float("-inf"))
    partners = torch.arange(2 * n, device=a.device).roll(n)
    return F.cross_entropy(similarities, partners)


class ContrastiveAutoencoder(BinaryAutoencoder):
    """Bits from which the image can be remembered, and which its augmented views share."""

    head = "anchor-itq"

    def __init__(
        self,
        shape: Shape,
        bits: int,
        *,
        width: int = 16,
        latent: int = 0,
        temperature: float = 0.1,
        reconstruction: float = 50.0,
        crop: float = -1.0,
        rotation: float = 10.0,
        flip: float = -1.0,
        light: float = -1.0,
        erase: float = 0.0,
        noise: float = 0.1,
        masking: float = 0.05,
        **parts: Any,
    ) -> None:
        """`latent` is 0 for one unit a bit, or 64 if there are fewer bits. `reconstruction` weighs the decoder's nats
        per pixel; the others are the views' (see `augment`), of which `noise` and `masking` are for vectors. −1 lets
        the images choose: a `flip` is ½ unless their mirror images are other images, as of writing; in colour, as
        photos are, whose objects lie anywhere in any light, `crop` is 0.7 and `light` 0.4, otherwise 0.8 and 0.2."""
        super().__init__(shape, bits, width=width, latent=latent or max(bits, LATENT), **parts)
        if not (temperature > 0 and reconstruction >= 0):
            raise ValueError(
                f"temperature must be above 0 and reconstruction 0 or more, not {temperature} and {reconstruction}"
            )
        self.temperature, self.reconstruction = temperature, reconstruction
        colour = shape[0] == 3
        crop = (0.7 if colour else 0.8) if crop == BY_THE_IMAGES else crop
        light = (0.4 if colour else 0.2) if light == BY_THE_IMAGES else light
        self.free = flip == BY_THE_IMAGES
        flip = 0.5 if self.free else flip
        vectors = {"noise": noise, "masking": masking}
        self.views = views(crop=crop, rotation=rotation, flip=flip, light=light, erase=erase, **vectors)

    def prepare(self, x: Tensor, labels: Tensor | None) -> None:
        if self.free and x.ndim == 4:
            self.views["flip"] = 0.0 if mirror_images_are_rarer(x) else 0.5

    def chosen(self) -> dict[str, float]:
        return {f"view_{name}": self.views[name] for name in ("crop", "flip", "light")} if len(self.shape) == 3 else {}

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        pair = torch.cat([augment(x, **self.views), augment(x, **self.views)])
        h = self.features(pair)
        a, b = straight_through_sign(h).chunk(2)
        nll = self.likelihood.nll(self.decode(a), x).mean() / x[0].numel()
        return {"contrast": nt_xent(a, b, self.temperature), "reconstruction": self.reconstruction * nll}
