"""The binarised autoencoder whose two augmented views must agree: the contrastive term of Qiu, Su, Ou, Yu and Chen,
"Unsupervised Hashing with Contrastive Information Bottleneck", IJCAI 2021, https://arxiv.org/abs/2105.06138. Ours keeps
a decoder beside it, which holds on to what the views agree on by chance."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.models.augment import AUTO, ViewedAutoencoder, in_colour
from hashret.models.base import TrainingDefaults, straight_through_sign
from hashret.models.networks import Shape

MIN_LATENT = 64  # units at least
IN_COLOUR = TrainingDefaults(batch=128, learning_rate=8e-3, weight_decay=0.05)
MANY = 10_000  # images in colour that are too many to be known by heart
# For these, a wider network compares numbers, which differ more finely than bits, of views that differ more, and all
# directions of its matrices learn alike:
FOR_MANY: dict[str, Any] = {"width": 64, "muon": True, "temperature": 0.2, "signs": 0.0, "whole": 0.0}
FOR_MANY |= {"crop": 0.4, "light": 0.4, "grey": 0.2, "reconstruction": 1.0, "remembered": 1 / 8}


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020): row i of `a` and of `b` (n, d) are a pair."""
    n = len(a)
    views = F.normalize(torch.cat([a, b]).float(), dim=1)
    similarities = views @ views.T / temperature
    similarities.fill_diagonal_(float("-inf"))
    partners = torch.arange(2 * n, device=a.device).roll(n)
    return F.cross_entropy(similarities, partners)


class ContrastiveAutoencoder(ViewedAutoencoder):
    """Bits from which the image can be remembered, and which its augmented views share."""

    head = "anchor-itq"

    def __init__(
        self,
        shape: Shape,
        bits: int,
        *,
        width: int = 0,
        latent: int = 0,
        temperature: float = 0.1,
        signs: float = 1.0,
        reconstruction: float = AUTO,
        remembered: float = 1.0,
        whole: float = AUTO,
        muon: bool = False,
        **parts: Any,
    ) -> None:
        """`latent` is 0 for one unit a bit, or 64 if there are fewer bits; `width` 0 for 24 in colour, otherwise 16.
        `signs` is how much it is the bits of two views that are compared, from 0 to 1, rather than the numbers behind
        them. `reconstruction` weighs the decoder's nats per pixel, of the share `remembered` of a batch, and `whole` is
        how often one of two views is the image itself, which altered copies then find more surely. −1 lets the images
        choose: 5, for what the views agree on says more, and ¾ in colour, otherwise 50 and 0. `muon` is whether
        matrices are learned by `hashret.training.muon`."""
        width = width or (24 if in_colour(shape) else 16)
        super().__init__(shape, bits, width=width, latent=latent or max(bits, MIN_LATENT), **parts)
        if self.colour:
            self.training_defaults = IN_COLOUR
        self.training_defaults = self.training_defaults._replace(muon=muon)
        if reconstruction == AUTO:
            reconstruction = 5.0 if self.colour else 50.0
        if whole == AUTO:
            whole = 0.75 if self.colour else 0.0
        shares = all(0 <= share <= 1 for share in (signs, remembered, whole))
        if not (temperature > 0 and reconstruction >= 0 and shares):
            raise ValueError(
                "temperature must be above 0, reconstruction 0 or more, and signs, remembered and whole "
                f"from 0 to 1, not {temperature}, {reconstruction}, {signs}, {remembered} and {whole}"
            )
        self.temperature, self.reconstruction = temperature, reconstruction
        self.signs, self.whole, self.remembered = signs, whole, remembered

    @classmethod
    def recommended_settings(cls, shape: Shape, images: int) -> dict[str, Any]:
        return dict(FOR_MANY) if in_colour(shape) and images >= MANY else {}

    def pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of each image."""
        first = self.view(x)
        if self.whole:
            itself = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.whole
            first = torch.where(itself, x, first)
        return first, self.view(x)

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(torch.cat(self.pair(x)))
        codes = straight_through_sign(h)
        compared = ((self.signs, codes), (1 - self.signs, h))
        terms = [share * nt_xent(z[: len(x)], z[len(x) :], self.temperature) for share, z in compared if share]
        few = max(2, round(self.remembered * len(x)))
        return {"contrast": torch.stack(terms).sum()} | self.reconstruction_loss(codes[:few], x[:few])
