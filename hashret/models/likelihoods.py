"""Likelihoods of pixels by name, parametrised by a decoder's outputs.

Each gives the negative log-likelihood of images `x` in [0, 1], in nats summed over the pixels of an image, including
constants, and the mean image. Those of unbounded values support vectors (n, d) too.
"""

from collections.abc import Callable
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 256


class Likelihood(NamedTuple):
    """A distribution of an image given its parameters."""

    nll: Callable[[Tensor, Tensor], Tensor]  # parameters (n, n_params · c, h, w), x (n, c, h, w) -> (n,)
    mean: Callable[[Tensor], Tensor]  # parameters -> images in the scale of x
    n_params: int = 1  # parameters per pixel and channel
    for_vectors: bool = False  # whether it is defined for values outside [0, 1]


def gaussian_nll(mean: Tensor, x: Tensor) -> Tensor:
    """Return the negative log-likelihood for unit variance: half the squared error plus ½ log 2π per pixel."""
    return (0.5 * (x - mean).square() + 0.5 * log(2 * pi)).flatten(1).sum(1)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """Return the cross-entropy, with a pixel's intensity as the probability of a one."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def laplace_nll(median: Tensor, x: Tensor) -> Tensor:
    """Return the negative log-likelihood for unit scale: the absolute error plus log 2 per pixel."""
    return ((x - median).abs() + log(2)).flatten(1).sum(1)


def categorical_nll(logits: Tensor, x: Tensor) -> Tensor:
    """Return the cross-entropy of the nearest of 256 levels, as in PixelRNN (van den Oord et al. 2016,
    https://arxiv.org/abs/1601.06759). The logit of level l of channel j is in channel l · c + j."""
    levels = (x * (LEVELS - 1)).round().long()
    return F.cross_entropy(torch.unflatten(logits, 1, (LEVELS, -1)), levels, reduction="none").flatten(1).sum(1)


def categorical_mean(logits: Tensor) -> Tensor:
    """Return the expected level as a share of the highest, (n, c, h, w)."""
    levels = torch.linspace(0, 1, LEVELS, device=logits.device, dtype=logits.dtype)
    return torch.einsum("nlchw,l->nchw", torch.unflatten(logits, 1, (LEVELS, -1)).softmax(1), levels)


LIKELIHOODS = {
    "gaussian": Likelihood(gaussian_nll, lambda mean: mean, for_vectors=True),
    "bernoulli": Likelihood(bernoulli_nll, torch.sigmoid),
    "laplace": Likelihood(laplace_nll, lambda median: median, for_vectors=True),
    "categorical": Likelihood(categorical_nll, categorical_mean, LEVELS),
}
