"""A binary autoencoder with a contrastive loss on the codes of two augmented views: Qiu, Su, Ou, Yu and Chen,
"Unsupervised Hashing with Contrastive Information Bottleneck", IJCAI 2021, https://arxiv.org/abs/2105.06138. Ours adds
a reconstruction loss, which keeps in the code what the contrastive loss alone would discard."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.models.augment import AUTO, ViewedAutoencoder, is_colour
from hashret.models.base import TrainingDefaults, straight_through_sign
from hashret.models.networks import Shape

MIN_LATENT = 64
COLOUR_DEFAULTS = TrainingDefaults(batch=128, learning_rate=8e-3, weight_decay=0.05)
MANY_IMAGES = 10_000  # colour images, too many to memorise
# For many colour images: a wider network, trained by Muon, on more varied views, whose real-valued outputs are compared
# because these differ more finely than bits.
MANY_IMAGES_SETTINGS: dict[str, Any] = {"width": 64, "muon": True, "temperature": 0.2, "signs": 0.0, "whole": 0.0}
MANY_IMAGES_SETTINGS |= {"crop": 0.4, "light": 0.4, "grey": 0.2, "reconstruction": 1.0, "remembered": 1 / 8}


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy (Chen et al. 2020), a scalar, of `a` and `b` (n, d), whose
    rows i are the two views of image i."""
    n = len(a)
    views = F.normalize(torch.cat([a, b]).float(), dim=1)
    similarities = views @ views.T / temperature
    similarities.fill_diagonal_(float("-inf"))
    partners = torch.arange(2 * n, device=a.device).roll(n)
    return F.cross_entropy(similarities, partners)


class ContrastiveAutoencoder(ViewedAutoencoder):
    """A binary autoencoder whose codes agree for augmented views of one image, and differ for different images."""

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
        """`latent` 0 means one unit per bit, but at least 64; `width` 0 means 24 for colour images, otherwise 16.

        `signs`, from 0 to 1, is the weight of the contrastive loss on the binary codes of the views, and 1 − `signs`
        that of the loss on their real-valued outputs. `reconstruction` is the weight of the reconstruction loss in nats
        per pixel, computed for the share `remembered` of a batch. `whole` is the probability that the first of the two
        views is the image itself, which improves the search for near-duplicates. If `reconstruction` or `whole` is −1,
        it is set from the images: 5 and ¾ for colour images, 50 and 0 for others. `muon` selects the optimiser
        `hashret.training.muon`.
        """
        width = width or (24 if is_colour(shape) else 16)
        super().__init__(shape, bits, width=width, latent=latent or max(bits, MIN_LATENT), **parts)
        if self.colour:
            self.training_defaults = COLOUR_DEFAULTS
        self.training_defaults = self.training_defaults._replace(muon=muon)
        if reconstruction == AUTO:
            reconstruction = 5.0 if self.colour else 50.0
        if whole == AUTO:
            whole = 0.75 if self.colour else 0.0
        are_shares = all(0 <= share <= 1 for share in (signs, remembered, whole))
        if not (temperature > 0 and reconstruction >= 0 and are_shares):
            raise ValueError(
                "temperature must be above 0, reconstruction 0 or more, and signs, remembered and whole "
                f"from 0 to 1, not {temperature}, {reconstruction}, {signs}, {remembered} and {whole}"
            )
        self.temperature, self.reconstruction = temperature, reconstruction
        self.signs, self.whole, self.remembered = signs, whole, remembered

    @classmethod
    def recommended_settings(cls, shape: Shape, images: int) -> dict[str, Any]:
        return dict(MANY_IMAGES_SETTINGS) if is_colour(shape) and images >= MANY_IMAGES else {}

    def two_views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two random views of each image, in the shape of `x`."""
        first = self.view(x)
        if self.whole:
            unchanged = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.whole
            first = torch.where(unchanged, x, first)
        return first, self.view(x)

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        h = self.features(torch.cat(self.two_views(x)))
        codes = straight_through_sign(h)
        weighted = ((self.signs, codes), (1 - self.signs, h))
        terms = [weight * nt_xent(z[: len(x)], z[len(x) :], self.temperature) for weight, z in weighted if weight]
        count = max(2, round(self.remembered * len(x)))
        return {"contrast": torch.stack(terms).sum()} | self.reconstruction_loss(codes[:count], x[:count])
