"""The binarised autoencoder whose two augmented views must agree: the contrastive term of Qiu, Su, Ou, Yu and Chen,
"Unsupervised Hashing with Contrastive Information Bottleneck", IJCAI 2021, https://arxiv.org/abs/2105.06138. Ours keeps
a decoder beside it, which holds on to what the views agree on by chance."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.models.augment import augment, views
from hashret.models.base import straight_through_sign
from hashret.models.binary import BinaryAutoencoder


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

    def __init__(
        self,
        *args: Any,
        temperature: float = 0.2,
        reconstruction: float = 50.0,
        crop: float = 0.8,
        rotation: float = 5.0,
        flip: float = -1.0,
        light: float = 0.2,
        erase: float = 0.0,
        noise: float = 0.1,
        masking: float = 0.05,
        **parts: Any,
    ) -> None:
        """`reconstruction` weighs the decoder's nats per pixel; the others are the views' (see `augment`). A `flip` of
        −1 means ½ for colour and 0 for grey images, which are often writing; `noise` and `masking` are for vectors."""
        super().__init__(*args, **parts)
        if not (temperature > 0 and reconstruction >= 0):
            raise ValueError(
                f"temperature must be above 0 and reconstruction 0 or more, not {temperature} and {reconstruction}"
            )
        self.temperature, self.reconstruction = temperature, reconstruction
        flip = flip if flip >= 0 else 0.5 * (self.shape[0] == 3)
        vectors = {"noise": noise, "masking": masking}
        self.views = views(crop=crop, rotation=rotation, flip=flip, light=light, erase=erase, **vectors)

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        pair = torch.cat([augment(x, **self.views), augment(x, **self.views)])
        h = self.features(pair)
        a, b = straight_through_sign(h).chunk(2)
        nll = self.likelihood.nll(self.decode(a), x).mean() / x[0].numel()
        return {"contrast": nt_xent(a, b, self.temperature), "reconstruction": self.reconstruction * nll}
