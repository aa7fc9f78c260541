"""The sparse autoencoder: the penalty of Olshausen and Field, "Emergence of simple-cell receptive field properties by
learning a sparse code for natural images", Nature 1996, https://doi.org/10.1038/381607a0, on an encoder's output. Ours
batch-normalises each unit, so that scaling the code down and the decoder up does not reduce the penalty, and applies
the penalty's proximal operator (soft thresholding), so that many units are exactly 0."""

from math import log
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hashret.models.base import Member


class SparseAutoencoder(Member):
    """An autoencoder with few active units: the penalty is the negative log-density of a Laplace prior on each unit."""

    head = "itq"  # a unit that is mostly 0 makes a poor bit on its own
    normalised = True

    def __init__(self, *args: Any, rate: float = 1.0, threshold: float = 0.5, **parts: Any) -> None:
        """`rate` is the λ of the prior ½ λ exp(−λ |z|). A unit is active if it deviates by more than `threshold`
        standard deviations."""
        super().__init__(*args, **parts)
        if not (rate > 0 and threshold >= 0):
            raise ValueError(f"rate must be above 0 and threshold 0 or more, not {rate} and {threshold}")
        self.rate, self.threshold = rate, threshold

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = F.softshrink(features, self.threshold)
        return z, {"sparsity": (self.rate * z.float().abs() - log(self.rate / 2)).sum(1).mean()}

    def metrics(self, x: Tensor) -> dict[str, Tensor]:
        """Return the share of active units."""
        z, _ = self.bottleneck(self.features(x))
        return {"active": (z != 0).float().mean()}
