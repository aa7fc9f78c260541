"""The variational autoencoder: Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014,
https://arxiv.org/abs/1312.6114, with the weight β on the KL term of Higgins et al., ICLR 2017,
https://openreview.net/forum?id=Sy2fzU9gl. Ours takes the posterior means as the numbers that become bits."""

from typing import Any

import torch
from torch import Tensor

from hashret.models.base import Member


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, 1)) in nats, summed over the last axis."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


class VariationalAutoencoder(Member):
    """Remember an image through a sample from its posterior, which costs its divergence from the prior."""

    outputs_per_latent = 2

    def __init__(self, *args: Any, beta: float = 1.0, **parts: Any) -> None:
        """`beta` weighs the KL term: 1 gives the evidence lower bound; its inverse is the λ on the reconstruction."""
        super().__init__(*args, **parts)
        if not beta >= 0:
            raise ValueError(f"beta must be 0 or more, not {beta}")
        self.beta = beta

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_variance = features.chunk(2, dim=1)
        kl = {"kl": self.beta * kl_to_standard_normal(mean, log_variance).mean()}
        if not self.training:
            return mean, kl
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean), kl

    def draw(self, n: int) -> Tensor:
        return torch.randn(n, self.latent)
