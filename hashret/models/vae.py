"""The variational autoencoder: Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014,
https://arxiv.org/abs/1312.6114, with the weight β on the KL term of Higgins et al., ICLR 2017,
https://openreview.net/forum?id=Sy2fzU9gl. The posterior means become the bits."""

from math import log
from typing import Any

import torch
from torch import Tensor

from hashret.models.base import Member

METRIC_SAMPLES = 5  # posterior samples for `metrics`; log-likelihoods in papers use 50 or more


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) ‖ N(0, 1)) in nats, summed over the last axis."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


class Variational(Member):
    """Base class of the members with a posterior and a prior, for which the log-likelihood of images can be estimated.

    `condition` are further arguments of `features` and `decode`: the labels, for a conditional member.
    """

    def draw_posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sample z (n, latent) of each image's posterior, and log p(z) − log q(z | x), (n,)."""
        raise NotImplementedError

    def log_weights(self, x: Tensor, samples: int, *condition: Tensor) -> Tensor:
        """Return log p(x, z) − log q(z | x) in nats for `samples` samples z of each posterior, (samples, n)."""
        features = self.features(x, *condition)
        weights = []
        for _ in range(samples):
            z, log_ratio = self.draw_posterior(features)
            weights.append(log_ratio - self.likelihood.nll(self.decode(z, *condition), x))
        return torch.stack(weights)

    def elbo(self, x: Tensor, samples: int, *condition: Tensor) -> Tensor:
        """Return an unbiased estimate of the evidence lower bound of each image in nats, (n,)."""
        return self.log_weights(x, samples, *condition).mean(0)

    def log_likelihood(self, x: Tensor, samples: int, *condition: Tensor) -> Tensor:
        """Return the importance-weighted lower bound on each image's log-likelihood in nats, (n,). It tightens with
        `samples` (Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016,
        https://arxiv.org/abs/1509.00519)."""
        return self.log_weights(x, samples, *condition).logsumexp(0) - log(samples)

    def metrics(self, x: Tensor) -> dict[str, Tensor]:
        """Return the means of the ELBO and of the tighter importance-weighted bound, from a few samples."""
        weights = self.log_weights(x, METRIC_SAMPLES)
        return {"elbo": weights.mean(), "log_likelihood": (weights.logsumexp(0) - log(METRIC_SAMPLES)).mean()}


class VariationalAutoencoder(Variational):
    """A variational autoencoder with a normal posterior and a standard normal prior."""

    outputs_per_latent = 2

    def __init__(self, *args: Any, beta: float = 1.0, **parts: Any) -> None:
        """`beta` is the weight of the KL term; 1 gives the evidence lower bound."""
        super().__init__(*args, **parts)
        if not beta >= 0:
            raise ValueError(f"beta must be 0 or more, not {beta}")
        self.beta = beta

    def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_variance = features.chunk(2, dim=1)
        kl = {"kl": self.beta * kl_to_standard_normal(mean, log_variance).mean()}
        return self.draw_posterior(features)[0] if self.training else mean, kl

    def draw_posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = features.chunk(2, dim=1)
        noise = torch.randn_like(mean)
        z = mean + (0.5 * log_variance).exp() * noise
        return z, 0.5 * (noise.square() + log_variance - z.square()).sum(1)

    def sample_prior(self, n: int) -> Tensor:
        return torch.randn(n, self.latent)
