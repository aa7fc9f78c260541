"""The variational autoencoder with binary units: relaxed as by Maddison, Mnih and Teh, "The Concrete Distribution",
https://arxiv.org/abs/1611.00712, and Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax",
https://arxiv.org/abs/1611.01144, both ICLR 2017, or straight through a sample as by Bengio, Léonard and Courville 2013,
https://arxiv.org/abs/1308.3432. Ours uses the KL divergence of the discrete bits in both cases."""

from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hashret.errors import choose
from hashret.models.vae import Variational


def kl_to_fair_coin(logits: Tensor) -> Tensor:
    """Return KL(Bernoulli(sigmoid(logits)) ‖ Bernoulli(½)) in nats, summed over the last axis."""
    return (logits.sigmoid() * logits - F.softplus(logits) + log(2)).sum(-1)


def _straight_through(logits: Tensor, temperature: float) -> Tensor:
    p = torch.sigmoid(logits)
    return torch.bernoulli(p.detach()) + (p - p.detach())  # in this order exactly 0 or 1


def _relaxed(logits: Tensor, temperature: float) -> Tensor:
    noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit()
    return torch.sigmoid((logits + noise) / temperature)


SAMPLES = {"relaxed": _relaxed, "straight-through": _straight_through}


class BernoulliVariationalAutoencoder(Variational):
    """A variational autoencoder whose latent variables are bits with fair coins as prior."""

    head = "sign"

    def __init__(
        self,
        *args: Any,
        sample: str = "relaxed",
        temperature: float = 0.5,
        beta: float = 1.0,
        **parts: Any,
    ) -> None:
        """`sample` is `relaxed`, a number in (0, 1) that approaches a bit as `temperature` falls, or
        `straight-through`, a bit with the gradient of its probability. `beta` weighs the KL term."""
        super().__init__(*args, **parts)
        if not (temperature > 0 and beta >= 0):
            raise ValueError(f"temperature must be above 0 and beta 0 or more, not {temperature} and {beta}")
        self.sample, self.temperature, self.beta = choose(SAMPLES, sample, "sample"), temperature, beta

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = features.float()
        kl = {"kl": self.beta * kl_to_fair_coin(logits).mean()}
        if not self.training:
            return (logits > 0).to(logits.dtype), kl
        return self.sample(logits, self.temperature), kl

    def draw_posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.bernoulli(features.sigmoid())  # bits, even if training used relaxed ones
        return z, (F.softplus(features) - z * features - log(2)).sum(1)

    def sample_prior(self, n: int) -> Tensor:
        return torch.randint(2, (n, self.latent)).float()
